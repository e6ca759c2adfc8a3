"""Reads the text of a compiled (partitioned, scheduled) HLO module: its computations, and how often each one runs.

XLA's own cost analysis counts the body of a loop once. Here every computation has the number of its runs in one
execution of the program: loops by their trip counts, which XLA states for some backends (known_trip_count) and which are
otherwise read from the loop's condition, as `lax.scan` writes it: a counter from a constant up to a constant.
"""

import dataclasses
import functools
import re

BYTES = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16, "s4": 0.5, "u4": 0.5}

_END = re.compile(r"\}$|\}, execution_thread=")  # of a computation


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str  # as printed, layout and memory space included; a tuple's in parentheses
    opcode: str
    operands: tuple[str, ...]  # names
    arguments: str  # the text between the parentheses: a parameter's number, a constant's value
    attributes: str  # the text after them
    root: bool

    def attribute(self, name: str) -> str | None:
        """The value of `name=`: up to the next comma outside of brackets."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        return None if found is None else _balanced(self.attributes[found.end() :], ",")

    @functools.cached_property
    def arrays(self) -> tuple["Array", ...]:
        return tuple(arrays(self.shape))

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)


@dataclasses.dataclass(frozen=True)
class Array:
    kind: str  # as bf16
    shape: tuple[int, ...]
    space: int  # of memory: 0 the device's main memory; TPU: 1 VMEM, 2 semaphores, 5 the host; 6 SMEM

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def bytes(self) -> int:
        if self.kind in BYTES:
            return int(self.size * BYTES[self.kind])
        return self.size * int(re.search(r"\d+", self.kind).group()) // 8


class Computation(dict):
    """Name of an instruction -> Instruction, in the order of the schedule."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    @property
    def root(self) -> Instruction:
        return next(one for one in self.values() if one.root)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self[name] for name in instruction.operands if name in self]

    def parameter(self, number: int) -> Instruction:
        return next(i for i in self.values() if i.opcode == "parameter" and i.arguments == str(number))


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str
    unknown_loops: tuple[str, ...]  # while instructions whose trips could not be read; counted as 1
    runs: dict[str, int]  # computation -> times that it runs; those reached by no instruction are left out
    inside: frozenset[str]  # computations that are parts of one instruction: fusions, reducers, wrapped collectives

    def instructions(self, inside: bool = True):
        """(instruction, its computation, runs) of all that is executed. inside=False: whole instructions alone, as the
        device launches them."""
        for name, runs in self.runs.items():
            if inside or name not in self.inside:
                for instruction in self.computations[name].values():
                    yield instruction, self.computations[name], runs


def arrays(shape: str) -> list[Array]:
    """The arrays in a printed shape: 'bf16[8,16]{1,0:T(8,128)(2,1)S(1)}', or a tuple of such."""
    out = []
    for kind, dimensions, layout in re.findall(r"(\w+)\[([\d,<= ]*)\](\{[^}]*\})?", shape):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(n.strip("<= ")) for n in dimensions.split(",") if n.strip())
        out.append(Array(kind, sizes, int(space.group(1)) if space else 0))
    return out


def parse(text: str) -> Module:
    """compiled.as_text() -> Module. ValueError for text that has no entry computation."""
    computations, entry, current = {}, None, None
    for line in _lines(text):
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) (\(.*)?.*\{$", line)
            if header and "=" not in line.split("(")[0] and not line.startswith("HloModule"):
                current = computations[header.group(2)] = Computation(header.group(2))
                entry = header.group(2) if header.group(1) else entry
        elif _END.match(line):
            current = None
        elif (instruction := _instruction(line)) is not None:
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    runs, inside, unknown = {}, set(), []
    _count(computations, entry, 1, runs, inside, unknown, False)
    return Module(computations, entry, tuple(dict.fromkeys(unknown)), runs, frozenset(inside))


def _lines(text: str):
    """The text's lines, those of one instruction joined: what a Pallas kernel says of itself is printed over several."""
    whole = ""
    for line in text.splitlines():
        if whole.startswith(" ") and line and not line.startswith(" ") and not _END.match(line):
            whole += line
        else:
            yield whole
            whole = line
    yield whole


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if found is None:
        return None
    rest = line[found.end() :]
    shape = _balanced(rest, " ")
    opcode, _, rest = rest[len(shape) + 1 :].partition("(")
    arguments = _balanced(rest, ")")
    names = tuple(re.findall(r"%([\w.\-]+)", arguments)) if opcode != "constant" else ()
    attributes = rest[len(arguments) + 1 :].lstrip(", ")
    return Instruction(found.group(2), shape, opcode, names, arguments.strip(), attributes, bool(found.group(1)))


def _balanced(text: str, end: str) -> str:
    """The start of text up to `end`, which is looked for outside of brackets and quotes."""
    depth, quoted, before = 0, False, ""
    for i, c in enumerate(text):
        if c == '"' and before != "\\":
            quoted = not quoted
        elif not quoted:
            if depth == 0 and c == end:
                return text[:i]
            depth += (c in "([{") - (c in ")]}")
        before = c
    return text


def _count(computations, name, times, runs, inside, unknown, part) -> None:
    runs[name] = runs.get(name, 0) + times
    if part:
        inside.add(name)
    computation = computations[name]
    for one in computation.values():
        if one.opcode == "while":
            trips = _trips(computations, computation, one)
            if trips is None:
                unknown.append(one.name)
            for key, n in (("condition", (trips or 1) + 1), ("body", trips or 1)):
                called = one.attribute(key).strip("%")
                _count(computations, called, times * n, runs, inside, unknown, part)
        elif one.opcode == "conditional":  # each branch is counted: no more than one of them runs
            names = one.attribute("branch_computations") or ",".join(
                filter(None, (one.attribute("true_computation"), one.attribute("false_computation")))
            )
            for called in re.findall(r"%([\w.\-]+)", names):
                _count(computations, called, times, runs, inside, unknown, part)
        elif one.opcode == "call":
            _count(computations, one.attribute("to_apply").strip("%"), times, runs, inside, unknown, part)
        elif one.opcode in ("fusion", "async-start"):  # async-update and -done name the same computation
            _count(computations, one.attribute("calls").strip("%"), times, runs, inside, unknown, True)


def _trips(computations, computation: Computation, loop: Instruction) -> int | None:
    """Trips of a while instruction; None if they cannot be read."""
    if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(stated.group(1))
    condition = computations[loop.attribute("condition").strip("%")]
    body = computations[loop.attribute("body").strip("%")]
    initial = _source(computation, computation.operands(loop)[0])
    test = _source(condition, condition.root)
    if test.opcode == "fusion":  # the comparison, wrapped
        called = computations[test.attribute("calls").strip("%")]
        outer, test = condition.operands(test), _source(called, called.root)
        sides = [_source(called, side) for side in called.operands(test)]
        sides = [_source(condition, outer[int(s.arguments)]) if s.opcode == "parameter" else s for s in sides]
    else:
        sides = [_source(condition, side) for side in condition.operands(test)]
    if test.opcode != "compare" or len(sides) != 2:
        return None
    direction = test.attribute("direction")
    if direction in ("GT", "GE"):
        sides, direction = sides[::-1], {"GT": "LT", "GE": "LE"}[direction]
    if direction not in ("LT", "LE") or sides[0].opcode != "get-tuple-element" or initial.opcode != "tuple":
        return None

    def before(side: Instruction) -> int | None:
        """Its value as the loop begins: a constant, or one that the loop is given."""
        if side.opcode == "get-tuple-element":
            side = _source(computation, computation[initial.operands[int(side.attribute("index"))]])
        return int(side.arguments) if re.fullmatch(r"-?\d+", side.arguments) and side.opcode == "constant" else None

    start, end = before(sides[0]), before(sides[1])
    step = _step(computations, body, int(sides[0].attribute("index")))
    if start is None or end is None or not step:
        return None
    return max(0, -(-(end - start + (direction == "LE")) // step))


def _step(computations, body: Computation, index: int) -> int | None:
    """What one trip adds to the counter."""
    root = _source(body, body.root)
    if root.opcode != "tuple":
        return None
    inner, update = body, _source(body, body[root.operands[index]])
    if update.opcode == "fusion":
        outer = body.operands(update)
        inner = computations[update.attribute("calls").strip("%")]
        update = _source(inner, inner.root)
        constants = [_source(body, one) for one in outer]
    else:
        constants = []
    if update.opcode != "add":
        return None
    for side in (_source(inner, one) for one in inner.operands(update)):
        if side.opcode == "parameter" and constants:
            side = constants[int(side.arguments)]
        if side.opcode == "constant" and re.fullmatch(r"-?\d+", side.arguments):
            return int(side.arguments)
    return None


def _source(computation: Computation, one: Instruction) -> Instruction:
    """Follows what only passes a value on."""
    while one.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start", "optimization-barrier", "reshape"):
        one = computation.operands(one)[0]
    return one
