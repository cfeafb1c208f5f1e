"""What crosses the wire, read off a compiled program: its collectives, with how often each runs and what it moves.

A loop's body is counted as often as the loop turns: `known_trip_count` where it is written, else the limit that its
condition compares with, from zero on, as scans do. A collective that the compiler has spread over several fusions, to
overlap it with arithmetic, is one. Bytes are
those that one device receives with the least traffic an algorithm needs over n devices:

    all-gather       (n - 1) / n of the result           reduce-scatter   (n - 1) of the result
    all-reduce       2 (n - 1) / n of the operand         all-to-all       (n - 1) / n of the operand
    collective-permute   the operand
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}
_OP = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALL = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# What the parts of a collective that was spread over fusions have in common: channel and place in the source.
_SAME = re.compile(r"channel_id=\d+|metadata=\{[^}]*\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"[su](?:32|64)\[\]\S* constant\((\d+)\)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?: \{([^}]*)\})?")
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')


@dataclass(frozen=True)
class Collective:
    """One collective of the program.

    kind: one of KINDS. shapes: (dtype, dims) of what it gives. group: devices that take part together.
    times: how often it runs. bytes: received by one device each time.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    group: int
    times: int
    bytes: float

    @property
    def elements(self) -> int:
        """Values in its largest array."""
        return max((math.prod(dims) for _, dims in self.shapes), default=0)


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of an optimised HLO module.

    Args:
        text: `compiled.as_text()`.
        devices: of the whole program, for collectives that name no groups.
    """
    bodies, entry = _computations(text)
    found: list[Collective] = []
    spread: dict[tuple[str, ...], str] = {}
    for name, times in _reached(bodies, entry).items():
        for line in bodies[name]:
            match = _OP.search(line)
            if match is None:
                continue
            key = (match[2], match[1], *_SAME.findall(line))
            if "fus" in name and spread.setdefault(key, name) != name:
                continue
            found.append(_collective(line, match, devices, times))
    return found


def summary(found: list[Collective]) -> dict[str, dict[str, float]]:
    """Kind -> how many run in a step, and the bytes that one device receives."""
    out: dict[str, dict[str, float]] = {}
    for one in found:
        row = out.setdefault(one.kind, {"count": 0, "bytes": 0.0})
        row["count"] += one.times
        row["bytes"] += one.times * one.bytes
    return out


def _collective(line: str, match: re.Match[str], devices: int, times: int) -> Collective:
    kind, started = match[2], bool(match[3])
    shapes = [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _SHAPE.findall(match[1])]
    if started or kind == "collective-permute":
        # An asynchronous start gives (operands, results, and for permutes two words of context).
        shapes = [s for s in shapes if not (kind == "collective-permute" and s == ("u32", ()))]
        if match[1].startswith("(") and (kind != "all-reduce" or not started):
            shapes = shapes[len(shapes) // 2 :]
    size = sum(math.prod(dims) * _size(dtype) for dtype, dims in shapes)
    group = _group(line, devices)
    share = {"all-gather": (group - 1) / group, "all-reduce": 2 * (group - 1) / group, "reduce-scatter": group - 1}
    share["all-to-all"] = share["all-gather"]
    return Collective(kind, tuple(shapes), group, times, size * share.get(kind, 1.0))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Name -> lines of each computation, and the entry's name."""
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            words = line.split()
            name = (words[1] if words[0] == "ENTRY" else words[0]).lstrip("%").split("(")[0]
            current = name
            entry = name if words[0] == "ENTRY" else entry
            bodies[current] = []
        elif line.startswith("}"):
            current = ""
        elif current:
            bodies[current].append(line)
    return bodies, entry


def _reached(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs, from the entry on."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for callee, turns in _calls(bodies[name], bodies):
            if callee in bodies:
                visit(callee, count * turns)

    visit(entry, 1)
    return times


def _calls(lines: list[str], bodies: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    for line in lines:
        turns = _turns(line, bodies)
        for name in _CALL.findall(line):
            yield name, turns
        for group in _BRANCHES.findall(line):
            for name in group.split(","):
                yield name.strip().lstrip("%"), 1


def _turns(line: str, bodies: dict[str, list[str]]) -> int:
    """How often an instruction runs what it calls: 1 but for loops."""
    loop = _WHILE.search(line)
    if loop is None:
        return 1
    written = _TRIPS.search(line)
    if written:
        return int(written[1])
    condition = bodies.get(loop[1], [])
    limits = [int(found[1]) for found in map(_LIMIT.search, condition) if found]
    return max(limits) if limits and any("direction=LT" in text for text in condition) else 1


def _group(line: str, devices: int) -> int:
    """How many devices take part together.

    Written as `{{0,1},{2,3}}`, as `[groups,size]<=[...]`, or as `mesh['a'=2,'b'=4] {'b'}`.
    """
    mesh = _MESH.search(line)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        names = re.findall(r"'(\w+)'", mesh[2] or "") or list(sizes)
        return math.prod(int(sizes[name]) for name in names)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed[1].split(",")) if listed else devices


def _size(dtype: str) -> float:
    return _SIZES.get(dtype) or int(re.sub(r"\D", "", dtype) or 8) / 8
