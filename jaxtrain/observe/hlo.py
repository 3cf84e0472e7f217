"""The collectives of a compiled program: what kind, over which mesh axes, how many bytes, how often. It runs nothing.

HLO text is no stable format: what this does not understand is a ValueError with the line, never a collective less.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:body|calls|\w*computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_SHAPE = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction. `bytes`: per device, of the buffer as it is whole (gathered, or before a reduction
    is scattered). `times`: executions in one run of the program. `branch`: it stands under a condition, and may not run.
    `axes`: mesh axes along which the members of a group differ."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    group: int  # members
    op: str  # where it comes from, as jax named it
    times: int = 1
    branch: bool = False

    @property
    def wire_bytes(self) -> float:
        """What one device sends in one execution, in a ring: a reduction to all is a scatter and a gather.

        Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH", sections 4-5.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.group - 1) / self.group


class Traffic(NamedTuple):
    """All executions of one kind over the same axes."""

    times: int
    bytes: int


def collectives(program: str, mesh: Mesh) -> list[Collective]:
    """Those of a compiled program's text (`compiled.as_text()`), of which one run is a run of ENTRY, on this mesh."""
    bodies, entry = _computations(program)
    return list(_walk(bodies, entry, mesh))


def traffic(found: Iterable[Collective]) -> dict[tuple[str, str], Traffic]:
    """{("all-gather", "fsdp"): Traffic}, axes joined by " x "."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for one in found:
        row = sums[one.kind, " x ".join(one.axes) or "none"]
        row[0] += one.times
        row[1] += one.times * one.bytes
    return {key: Traffic(*row) for key, row in sorted(sums.items())}


def _computations(program: str) -> tuple[dict[str, list[re.Match]], str]:
    bodies: dict[str, list[re.Match]] = {}
    entry = current = ""
    for line in program.splitlines():
        if found := _COMPUTATION.match(line):
            current = found[2]
            bodies[current], entry = [], current if found[1] else entry
        elif current and (instruction := _INSTRUCTION.match(line)):
            bodies[current].append(instruction)
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return bodies, entry


def _walk(bodies: dict[str, list[re.Match]], name: str, mesh: Mesh) -> Iterator[Collective]:
    """Of one run of this computation."""
    for instruction in bodies[name]:
        _, result, opcode, rest = instruction.groups()
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            yield _collective(kind, opcode != kind, result, rest, mesh)
            continue
        callees = {callee for names in _CALLED.findall(rest) for callee in re.findall(r"[\w.\-]+", names)}
        for one in (one for callee in sorted(callees & bodies.keys()) for one in _walk(bodies, callee, mesh)):
            times = one.times * (_trips(rest, instruction) if opcode == "while" else 1)
            yield replace(one, times=times, branch=one.branch or opcode == "conditional")


def _trips(rest: str, instruction: re.Match) -> int:
    if found := _TRIPS.search(rest):
        return int(found[1])
    raise ValueError(f"collectives in a loop without a known trip count: {instruction[0][:200]}")


def _collective(kind: str, started: bool, result: str, rest: str, mesh: Mesh) -> Collective:
    groups = _pairs(rest) if kind == "collective-permute" else _groups(rest, mesh.devices.size)
    size = _num_bytes(_second(result) if started and kind != "all-reduce" and result.startswith("(") else result)
    size *= len(groups[0]) if kind == "reduce-scatter" else 1
    op = re.search(r'op_name="([^"]*)"', rest)
    return Collective(kind=kind, axes=_axes(groups, mesh), bytes=size, group=len(groups[0]), op=op[1] if op else "")


def _num_bytes(shapes: str) -> int:
    return sum(math.prod(map(int, filter(None, dims.split(",")))) * _bits(kind) for kind, dims in _SHAPE.findall(shapes)) // 8


def _bits(kind: str) -> int:
    if kind in BITS:
        return BITS[kind]
    if found := re.match(r"[sufc](\d+)", kind):
        return int(found[1])
    raise ValueError(f"{kind!r} is not known as an element type")


def _second(tuple_text: str) -> str:
    """Of the result of a started collective, "(operands, results, ...)", the results."""
    depth, parts, start = 0, [], 1
    for i, char in enumerate(tuple_text):
        depth += (char in "([{") - (char in ")]}")
        if (depth == 1 and char == ",") or depth == 0:
            parts.append(tuple_text[start:i])
            start = i + 1
    return parts[1]


def _axes(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """A device's number in the program is its place in the mesh."""
    places = np.stack(np.unravel_index(np.array(groups), mesh.devices.shape))
    varies = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, along in zip(mesh.axis_names, varies, strict=True) if along)


def _pairs(rest: str) -> list[list[int]]:
    found = re.search(r"source_target_pairs=\{(\{[^=]*?\})\}", rest)
    if not found:
        raise ValueError(f"a permutation without pairs: {rest[:200]}")
    return _braces(found[1])


def _groups(rest: str, num_devices: int) -> list[list[int]]:
    """replica_groups in the forms of XLA: {{0,1},{2,3}}; [4,2]<=[2,4]T(1,0); mesh['a'=2,'b'=4] {'b'}; {} is everybody."""
    text = rest.split("replica_groups=", 1)[-1]
    if text.startswith("{}"):
        return [list(range(num_devices))]
    if text.startswith("{{"):
        return _braces(text[: text.index("}}") + 1])
    if found := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(found[2]).reshape(_ints(found[1])).tolist()
    if found := re.match(r"@?mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", text):
        return _of_mesh(*found.groups(), num_devices)
    raise ValueError(f"replica groups of an unknown form: {text[:200]}")


def _of_mesh(axes: str, ids: str | None, grouped: str, num_devices: int) -> list[list[int]]:
    """Groups along some axes of XLA's own mesh; an axis may be given in part: 'a':(before)size."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    whole = _iota(ids) if ids else np.arange(num_devices)
    parts: list[tuple[str, int]] = []  # the mesh with the axes that are given in part split up
    wanted = []
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", grouped):
        wanted.append((name, int(before or 1), int(size or sizes[name])))
    for name, size in sizes.items():
        cuts = sorted({1, size, *(b for n, b, s in wanted if n == name), *(b * s for n, b, s in wanted if n == name)})
        parts += [(name, (low, high)) for low, high in zip(cuts, cuts[1:])] or [(name, (1, 1))]
    dims = [high // low for _, (low, high) in parts]
    inside = [i for i, (n, (low, high)) in enumerate(parts) if any(n == w and b <= low and high <= b * s for w, b, s in wanted)]
    outside = [i for i in range(len(parts)) if i not in inside]
    members = math.prod(dims[i] for i in inside)
    return whole.reshape(dims).transpose(*outside, *inside).reshape(-1, members).tolist()


def _iota(text: str) -> np.ndarray:
    """[2,4]T(1,0) -> 0, 1, ... of that shape, transposed."""
    dims, _, order = text.partition("T")
    numbers = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return numbers.transpose(_ints(order)) if order else numbers


def _ints(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _braces(text: str) -> list[list[int]]:
    return [_ints(group) for group in re.findall(r"\{([\d,]*)\}", text)]
