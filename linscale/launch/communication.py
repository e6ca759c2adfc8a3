"""What a compiled program sends between devices, by mesh axis: read from its HLO after partitioning.

A group of devices that meets in a collective is laid onto the mesh: the axes whose coordinates differ inside the group
are those the bytes travel along. Bytes are those that one device sends in one execution of the program, by the
algorithms that send least (ring or bidirectional ring), for n devices and an operand of b bytes:

  all-gather          b (n - 1)         b: the device's own shard
  reduce-scatter      b (n - 1) / n     b: the whole array
  all-reduce          2 b (n - 1) / n
  all-to-all          b (n - 1) / n
  collective-permute  b
"""

import collections
import dataclasses
import math
import re

import numpy as np

from linscale.launch import hlo

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")
_SENT = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_MESH = re.compile(
    r"replica_groups=@?mesh\[(?P<sizes>[^\]]*)\](?:, device_ids=\((?P<ids>(?:[^()]|\([^)]*\))*)\))?\s*\{(?P<axes>[^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a program."""

    kind: str
    axes: tuple[str, ...]  # mesh axes along which it sends; empty: it sends nothing
    group: int  # devices that meet
    operand: int  # bytes of a device's operands, one execution of the instruction
    runs: int  # executions in one run of the program
    where: str  # the source's own name of the operation, as jax gives it

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one run of the program."""
        return self.runs * self.operand * _SENT[self.kind](self.group) if self.group > 1 else 0.0


def collectives(module: hlo.Module, mesh: dict[str, int], scatters: bool = False) -> list[Collective]:
    """mesh: axis -> size, in the order of the mesh; the program's partitions are numbered in that order.

    scatters: an all-reduce of which each device keeps its own slice alone counts as the reduce-scatter that a later pass
    of the compiler makes of it; for programs that are only partitioned.
    """
    names, sizes = tuple(mesh), tuple(mesh.values())
    out = []
    for one, computation, runs in module.instructions():
        kind = one.opcode.removesuffix("-start")
        if kind not in KINDS or one.opcode.endswith("-done"):
            continue
        operands = computation.operands(one)
        if kind == "collective-permute":  # further operands are buffers and offsets of the same transfer
            operands = operands[:1]
            groups = pairs(one)
        else:
            groups = replica_groups(one, math.prod(sizes))
        # TPU programs have one fusion for the two
        if kind == "all-reduce" and (
            "all-reduce-scatter" in computation.name or (scatters and _sliced(one, computation))
        ):
            kind = "reduce-scatter"
        varying = [_varying(group, sizes) for group in groups if len(set(group)) > 1]
        axes = tuple(name for i, name in enumerate(names) if any(i in v for v in varying))
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', one.attributes)
        size = max((len(set(group)) for group in groups), default=1)
        operand = sum(o.bytes for o in operands)
        out.append(Collective(kind, axes, size, operand, runs, found.group(1) if found else ""))
    return out


def by_axis(found: list[Collective]) -> dict[str, float]:
    """'fsdp' or, where a group spans several, 'data+fsdp' -> bytes that a device sends in a run of the program."""
    out = collections.Counter()
    for one in found:
        if one.sent:
            out["+".join(one.axes)] += one.sent
    return dict(out)


def by_kind(found: list[Collective]) -> dict[str, float]:
    """'fsdp all-gather' -> bytes that a device sends in a run of the program."""
    out = collections.Counter()
    for one in found:
        if one.sent:
            out[f"{'+'.join(one.axes)} {one.kind}"] += one.sent
    return dict(out)


def _sliced(one: hlo.Instruction, computation: hlo.Computation) -> bool:
    users = [user for user in computation.values() if one.name in user.operands]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def replica_groups(one: hlo.Instruction, devices: int) -> list[tuple[int, ...]]:
    """The groups of devices that meet, in any of XLA's four ways to write them. ValueError for a fifth.

    {{0,1},{2,3}}                         each group
    {}                                    all devices
    [groups,size]<=[dims]T(permutation)   the numbers 0, 1, .. laid out in dims, transposed, cut into groups
    mesh['a'=4,'b'=8] {'a','b':(2)4}      all along the named axes; (2)4: of an axis cut into 2 x 4 x rest, the 4;
                                          with device_ids=([dims]T(permutation)) before the brace, as above, if the
                                          mesh is not numbered in order
    """
    text = one.attribute("replica_groups") or "{}"
    if re.fullmatch(r"\{\s*\}", text):
        return [tuple(range(devices))]
    if iota := re.fullmatch(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return [tuple(group) for group in _iota(iota[2]).reshape(_numbers(iota[1])).tolist()]
    if mesh := _MESH.search(one.attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'?([\w.]+)'?\s*=\s*(\d+)", mesh["sizes"])}
        return _along(sizes, re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?", mesh["axes"]), _iota(mesh["ids"]))
    if re.fullmatch(r"\{(\{[\d, ]*\},?\s*)+\}", text):
        return [tuple(_numbers(group)) for group in re.findall(r"\{([\d, ]+)\}", text)]
    raise ValueError(f"replica_groups={text[:200]} of {one.name} is written in a way that is not known here")


def _iota(text: str | None) -> np.ndarray | None:
    """'[2,3]T(1,0)' -> 0 .. 5 laid out in [2,3], transposed, as one row; '0,2,1' -> itself."""
    if not text:
        return None
    dims, _, permutation = (_numbers(part) for part in text.partition("T"))
    if not text.startswith("["):
        return np.asarray(dims)
    return np.arange(math.prod(dims)).reshape(dims).transpose(permutation or range(len(dims))).reshape(-1)


def _along(sizes: dict[str, int], chosen: list[tuple[str, str, str]], order) -> list[tuple[int, ...]]:
    """Groups along axes, or parts of axes, of a mesh; order: the numbers of its devices, None if they count up."""
    parts, members = [], []  # every axis as outer x part x inner; which of them are in a group
    cuts = {name: (int(outer or 1), int(part or sizes[name])) for name, outer, part in chosen}
    for name, size in sizes.items():
        outer, part = cuts.get(name, (1, 1))
        members += [len(parts) + 1] * (name in cuts)
        parts += [outer, part, size // (outer * part)]
    ids = np.arange(math.prod(parts)) if order is None else order
    ids = np.moveaxis(ids.reshape(parts), members, range(-len(members), 0))
    return [tuple(group) for group in ids.reshape(-1, math.prod(parts[i] for i in members)).tolist()]


def pairs(one: hlo.Instruction) -> list[tuple[int, ...]]:
    """Source and target of a permutation, without those who keep their own."""
    text = one.attribute("source_target_pairs") or ""
    found = [tuple(_numbers(pair)) for pair in re.findall(r"\{([\d, ]+)\}", text)]
    return [pair for pair in found if pair[0] != pair[1]]


def _varying(group: tuple[int, ...], sizes: tuple[int, ...]) -> set[int]:
    """Positions of the mesh axes along which the members of a group differ."""
    coordinates = np.stack(np.unravel_index(np.asarray(group), sizes))
    return set(np.flatnonzero((coordinates != coordinates[:, :1]).any(1)).tolist())


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
