"""What a compiled program says of itself: collectives and large buffers, read from XLA's own texts.

The texts are the optimised HLO (`compiled.as_text()`) and the buffer assignment that XLA dumps. Nothing here needs an
accelerator or JAX.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "bf16": 2} | {f"{kind}{8 * n}": n for n in (1, 2, 4, 8) for kind in "fsu"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(([^)]*)\)")
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|(?:true|false)_computation)=%([\w.\-]+)|branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_TRIPS = re.compile(r"known_trip_count\D+(\d+)")
_LIMIT = re.compile(r" compare\(%([\w.\-]+), %([\w.\-]+)\), direction=LT")
_VALUE = re.compile(r"value: <\d+ ([\w.\-]+)[^@>]*@0> \(size=(\d+),offset=(\d+)\): ([a-z]+\d*\[[\d,]*\])")
_SOURCE = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """All of one kind in a run of the program.

    Attributes:
        count: how often a device takes part in one; those in loops as often as the loop runs.
        bytes: on one device, of what it gives (all-gather) or takes (reduce-scatter, all-reduce).
    """

    count: int
    bytes: int


class Buffer(NamedTuple):
    """Bytes of a buffer on a device, its array, how many places like it there are, and the operation that fills one."""

    bytes: int
    array: str
    count: int
    source: str


def collectives(hlo: str) -> dict[str, Collective]:
    """By kind, those that occur.

    The TPU compiler starts a collective in one fusion and ends it in others, which all name it: only the first counts.
    A fused all-reduce of which a device keeps its part is a reduce-scatter. Loops count by ones from 0, as JAX's do.
    """
    computations, entry = _computations(hlo)
    found: dict[str, Collective] = {}

    def visit(name: str, times: int) -> None:
        lines = computations.get(name, [])
        starts = any('"AsyncCollectiveStart"' in line for line in lines)
        types = {}
        for line in lines:
            instruction = _INSTRUCTION.match(line)
            if instruction is None:
                continue
            types[instruction[1]] = instruction[2]
            if (match := _COLLECTIVE.search(line)) and (starts or "chain_id=" not in line):
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else match[1]
                before = found.get(kind, Collective(0, 0))
                moved = times * _moved(instruction[2], match, types)
                found[kind] = Collective(before.count + times, before.bytes + moved)
            elif match := _WHILE.search(line):
                visit(match[2], times * _trips(line, computations.get(match[1], [])))
            elif " async-update(" not in line and " async-done(" not in line:
                for called in _called(line):
                    visit(called, times)

    visit(entry, 1)
    return {kind: found[kind] for kind in KINDS if kind in found}


def largest_buffers(assignment: str, hlo: str, n: int) -> list[Buffer]:
    """The n largest of a device's memory, those of one size and array as one; not all of them exist at once.

    Args:
        assignment: XLA's buffer assignment.
        hlo: the program that it is of.
    """
    sources = {}
    for line in hlo.splitlines():
        if (instruction := _INSTRUCTION.match(line)) and (source := _SOURCE.search(line)):
            sources[instruction[1]] = source[1].replace("\\'", "'").removeprefix("jit(train_step)/")
    places: dict[tuple[int, str], dict[tuple[int, int], str]] = {}
    allocation = 0
    for line in assignment.splitlines():
        if line.startswith("allocation "):
            allocation += 1
        elif match := _VALUE.search(line):
            name, size, offset, array = match.groups()
            at = places.setdefault((int(size), array), {})
            at[allocation, int(offset)] = at.get((allocation, int(offset))) or sources.get(name, "")
    largest = sorted(places.items(), key=lambda item: -item[0][0])[:n]
    return [Buffer(size, array, len(at), next(filter(None, at.values()), "")) for (size, array), at in largest]


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the one that runs first."""
    computations, entry, lines = {}, "", []
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _called(line: str) -> Iterator[str]:
    for match in _CALLED.finditer(line):
        yield from [match[1]] if match[1] else re.findall(r"%([\w.\-]+)", match[2])


def _trips(loop: str, condition: list[str]) -> int:
    """How often a loop runs; 1 where its text does not say."""
    if match := _TRIPS.search(loop):
        return int(match[1])
    for line in condition:
        if match := _LIMIT.search(line):
            limit = next((text for text in condition if f"%{match[2]} = " in text), "")
            value = re.search(r" constant\((\d+)\)", limit)
            return int(value[1]) if value else 1
    return 1


def _moved(type_and_operation: str, match: re.Match, types: dict[str, str]) -> int:
    """Bytes of a collective's operands or of its results, whichever is more."""
    operands = sum(_size(types.get(name, "").split("(%")[0]) for name in re.findall(r"%([\w.\-]+)", match[3]))
    results = _size(type_and_operation[: type_and_operation.index(match[0])])
    # What starts one holds both.
    return max(operands, results - operands if match[2] else results)


def _size(text: str) -> int:
    """Bytes of all arrays whose types are in the text."""
    return sum(
        ITEM_BYTES.get(kind, 1) * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in _ARRAY.findall(text)
    )
