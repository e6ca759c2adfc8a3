"""Bytes between a device and its memory in one run of a compiled program: read from its HLO.

Every launched instruction reads its operands from memory and writes its results to it once, except what the compiler
keeps on chip (memory spaces other than 0). Slices are counted by what they take, updates in place by what they put. It
is what this schedule moves at least: tiles that a matrix product reads again are not known here.
"""

from linscale.launch import hlo

_NOTHING = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "optimization-barrier",
        "add-dependency",
        "iota",
        "async-update",
    ]
)
_SLICES = ("dynamic-slice", "slice", "gather")
_PASSES = ("bitcast", "convert", "copy", "reshape")


def memory_bytes(module: hlo.Module) -> int:
    """Read and written, per device."""
    total = 0
    for one, computation, runs in module.instructions(inside=False):
        if one.opcode in _NOTHING or 'custom_call_target="AllocateBuffer"' in one.attributes:
            continue
        total += runs * (_read(module, one, computation) + _written(module, one, computation))
    return total


def _here(instruction: hlo.Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays if array.space == 0)


def _read(module: hlo.Module, one: hlo.Instruction, computation: hlo.Computation) -> int:
    operands = computation.operands(one)
    if one.opcode.endswith("-done"):  # read by its start
        return 0
    if one.opcode in _SLICES:
        return min(_here(one), _here(operands[0])) + sum(map(_here, operands[1:]))
    if one.opcode in ("dynamic-update-slice", "scatter"):
        return sum(map(_here, operands[1:]))
    if one.opcode == "fusion":
        inner = module.computations[one.attribute("calls").strip("%")]
        return sum(_used(inner, i, operand) for i, operand in enumerate(operands))
    return sum(map(_here, operands))


def _used(inner: hlo.Computation, number: int, operand: hlo.Instruction) -> int:
    """What a fusion reads of an operand: slices of it, nothing if it is only updated in place, else the whole."""
    whole, parts = _here(operand), 0
    waiting = [inner.parameter(number)]
    while waiting:
        source = waiting.pop()
        for user in inner.values():
            if source.name not in user.operands:
                continue
            if user.opcode in _SLICES and user.operands[0] == source.name:
                parts += user.bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
                continue
            elif user.opcode == "bitcast":
                waiting.append(user)
            else:
                return whole
    return min(whole, parts)


def _written(module: hlo.Module, one: hlo.Instruction, computation: hlo.Computation) -> int:
    if one.opcode.endswith("-start"):  # its done has the result
        return 0
    if one.opcode == "dynamic-update-slice":
        return _here(computation.operands(one)[1])
    if one.opcode != "fusion":
        return _here(one)
    inner = module.computations[one.attribute("calls").strip("%")]
    results = inner.operands(inner.root) if inner.root.opcode == "tuple" else [inner.root]
    if len(results) != len(one.arrays):
        return _here(one)
    written = 0
    for array, result in zip(one.arrays, results):
        while result.opcode in _PASSES:
            result = inner.operands(result)[0]
        size = inner.operands(result)[1].bytes if result.opcode == "dynamic-update-slice" else array.bytes
        written += size if array.space == 0 else 0
    return written
