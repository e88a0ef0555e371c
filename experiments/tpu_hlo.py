"""What a program compiled for a TPU moves, read from its optimised HLO: bytes over HBM, copies, transpositions.

XLA's own count of bytes takes a loop's body once, and a kernel's from what the kernel says of itself. Here every
instruction of the entry computation counts the bytes of its operands and of its result as they lie in memory (tiled, so
that 64 channels on 128 lanes count twice), those of a loop's body as often as the loop runs. Of a fusion that reads a
slice of an operand, or writes one of its result, the slice counts. Buffers in on-chip memory (S(1)) and what moves
nothing (bitcast, tuple, ...) do not.
"""

import math
import re
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
         "s64": 8, "u64": 8}  # fmt: skip
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota",
        "copy-done", "slice-done", "async-done", "async-update", "opt-barrier"}  # fmt: skip
# Not copy-start, which brings an array to the chip ahead of its use.
MOVES = {"copy", "transpose"}

_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\)) -> .*\{\s*$")


class Array(NamedTuple):
    """One array of a result: its numbers, bytes of one, and of all in HBM: 0 where it lies on the chip."""

    size: int
    width: int
    bytes: int


class Instruction(NamedTuple):
    """`arrays` of the result, `calls` the computations that it runs, a loop's while `condition` holds."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    condition: str | None
    text: str

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)


class Program(NamedTuple):
    """The computations by name, and which one is the entry."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Program":
        """From `compiled.as_text()`."""
        computations, entry, current = {}, None, None
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                instruction = _instruction(found[1], found[2])
                current[instruction.name] = instruction
        return cls(computations, entry)

    def bytes(self) -> int:
        """Moved over HBM by one run."""
        return self._bytes(self.entry)

    def _bytes(self, computation: str) -> int:
        body = self.computations[computation]
        total = 0
        for one in body.values():
            if one.opcode in FREE:
                continue
            if one.opcode in ("while", "call", "conditional"):
                total += self._trips(one) * sum(self._bytes(name) for name in one.calls)
                continue
            if one.opcode.endswith("-start"):
                total += _transferred(one)
                continue
            total += self._written(one)
            total += sum(self._read(one, i, body[name]) for i, name in enumerate(one.operands) if name in body)
        return total

    def _trips(self, one: Instruction) -> int:
        """Of a loop that counts from 0 to the one number of its condition, as scans do."""
        if one.condition is None:
            return 1
        numbers = [u for u in self.computations[one.condition].values() if u.opcode == "constant"]
        return int(re.match(r"constant\((\d+)\)", numbers[0].text)[1]) if len(numbers) == 1 else 1

    def _inside(self, one: Instruction) -> dict[str, Instruction]:
        return self.computations[one.calls[0]] if one.opcode == "fusion" else {}

    def _read(self, one: Instruction, index: int, operand: Instruction) -> int:
        if one.opcode == "dynamic-slice" and index == 0:
            return one.bytes
        if one.opcode == "dynamic-update-slice" and index == 0:
            return 0
        inside = self._inside(one)
        parameter = next((u.name for u in inside.values() if u.text.startswith(f"parameter({index})")), None)
        users = [u for u in inside.values() if parameter in u.operands] if parameter else []
        if users and all(_slices(u, parameter) for u in users):
            itemsize = operand.bytes / max(1, sum(a.size for a in operand.arrays))
            return int(sum(a.size for u in users if "update" not in u.opcode for a in u.arrays) * itemsize)
        return operand.bytes

    def _written(self, one: Instruction) -> int:
        inside = self._inside(one) or {one.name: one}
        updates = [u for u in inside.values() if u.opcode == "dynamic-update-slice"]
        whole = sum(array.bytes for u in updates for array in u.arrays)
        of = inside if one.opcode == "fusion" else None
        if not updates:
            return one.bytes
        if of is None:
            return 0
        slices = sum(of[u.operands[1]].bytes for u in updates if u.operands[1] in of)
        return max(one.bytes - whole, 0) + slices

    def moves(self, size: int) -> list[str]:
        """Copies and transpositions of arrays of at least `size` numbers in HBM, anywhere in the program."""
        return [
            f"{one.opcode} {one.name}"
            for body in self.computations.values()
            for one in body.values()
            if one.opcode in MOVES and any(array.size >= size and array.bytes for array in one.arrays)
        ]


def _transferred(one: Instruction) -> int:
    """By an asynchronous copy or slice, whose result has the source, the destination and what is waited for."""
    ends = [array for array in one.arrays if array.size > 1]
    moved = min((array.size * array.width for array in ends), default=0)
    return moved * sum(array.bytes > 0 for array in ends)


def _slices(one: Instruction, parameter: str) -> bool:
    """Whether an instruction of a fusion reads or overwrites only a slice of the parameter."""
    return one.opcode in ("dynamic-slice", "dynamic-update-slice") and one.operands[0] == parameter


def _instruction(name: str, text: str) -> Instruction:
    shapes, rest = _split_type(text)
    opcode, _, rest = rest.partition("(")
    arguments, attributes = _split_arguments(rest)
    calls = re.findall(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)", attributes)
    condition = re.search(r"condition=%?([\w.\-]+)", attributes)
    return Instruction(
        name=name,
        opcode=opcode.strip(),
        arrays=tuple(_array(*found) for found in _SHAPE.findall(shapes)),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        calls=tuple(calls),
        condition=condition[1] if condition else None,
        text=f"{opcode.strip()}({arguments}){attributes}",
    )


def _split_type(text: str) -> tuple[str, str]:
    """(type, the rest) of an instruction; a tuple's type has brackets of its own."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    end = _closing(text)
    return text[: end + 1], text[end + 1 :].lstrip()


def _split_arguments(text: str) -> tuple[str, str]:
    end = _closing("(" + text) - 1
    return text[:end], text[end + 1 :]


def _closing(text: str) -> int:
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    return len(text)


def _array(dtype: str, sizes: str, order: str, layout: str) -> Array:
    shape = [int(size) for size in sizes.split(",") if size]
    size = math.prod(shape)
    width = BYTES.get(dtype, 4)
    if "S(" in layout:
        return Array(size, width, 0)
    physical = [shape[int(axis)] for axis in order.split(",") if axis][::-1] or shape
    tile = re.match(r"T\(([\d,]+)\)", layout)
    if tile and physical:
        for i, step in enumerate(reversed([int(u) for u in tile[1].split(",")]), 1):
            if i <= len(physical):
                physical[-i] = -(-physical[-i] // step) * step
    return Array(size, width, math.prod(physical) * width)
