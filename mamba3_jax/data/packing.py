"""Documents in rows of `context` tokens: best-fit decreasing, planned on the histogram of their lengths.

A document that is longer than a row fills whole rows of its own first; what is left of it, and every other document,
stays in one piece. The pieces go into rows from the longest to the shortest, each into the row with the least room that
still takes it. Pieces of one length are alike, so the plan is made for lengths with counts, and its time depends on the
number of different lengths only; documents of a length are dealt out in their order. The result is a table in which
any row can be looked up; with the index of the shards it takes about 32 bytes of memory for each document.

Source: best-fit decreasing for language models, arXiv 2404.10830; on a histogram, arXiv 2107.02027.
"""

import bisect
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int


class Piece(NamedTuple):
    """Tokens start to stop of a split; `goes_on` if their document does, behind them."""

    start: int
    stop: int
    goes_on: bool


class Packing:
    """The rows of a split.

    Args:
        offsets: where each document begins and the last one ends, in tokens.
        kept: documents to pack.
        context: tokens of a row.

    Attributes:
        full: rows that a part of one long document fills; they come first.
        rows: all of them.
    """

    def __init__(
        self, offsets: Int[np.ndarray, " documents_and_end"], kept: Bool[np.ndarray, " documents"], context: int
    ):
        self._offsets, self._context = offsets, context
        lengths = np.diff(offsets)
        # What is left has at least one token, so that a piece with room behind it always ends its document.
        parts = np.where(kept, (lengths - 1) // context, 0)
        self._long = np.flatnonzero(parts)
        self._ends = np.cumsum(parts[self._long])
        self.full = int(self._ends[-1]) if self._ends.size else 0
        documents = np.flatnonzero(kept)
        self._last = (lengths - parts * context)[documents]
        self._order, self._bounds = _best_fit(self._last, context)
        # Of each piece in the order of the rows: its length, and its document. Half the size, for large data.
        self._last, self._order = self._last[self._order].astype(np.int32), documents[self._order].astype(np.int32)
        self.rows = self.full + len(self._bounds) - 1

    def pieces(self, row: int) -> list[Piece]:
        """What is in a row, from left to right."""
        if row < self.full:
            i = int(np.searchsorted(self._ends, row, "right"))
            part = row - (int(self._ends[i - 1]) if i else 0)
            start = int(self._offsets[self._long[i]]) + part * self._context
            return [Piece(start, start + self._context, True)]
        first, last = self._bounds[row - self.full : row - self.full + 2]
        stops = self._offsets[self._order[first:last] + 1]
        starts = stops - self._last[first:last]
        return [Piece(start, stop, False) for start, stop in zip(starts.tolist(), stops.tolist())]


def _best_fit(
    lengths: Int[np.ndarray, " n"], context: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " rows_and_end"]]:
    """The pieces in the order of the rows, and where in it each row begins and the last one ends."""
    values, counts = np.unique(lengths, return_counts=True)
    by_length = np.argsort(lengths, kind="stable")
    # The next piece of each length, as a place in by_length.
    ahead = dict(zip(values.tolist(), (np.cumsum(counts) - counts).tolist()))
    order, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for count, content in _plan(values.tolist(), counts.tolist(), context):
        table = []
        for length, repeats in content:
            start = ahead[length]
            ahead[length] = stop = start + count * repeats
            table.append(by_length[start:stop].reshape(count, repeats))
        rows = np.concatenate(table, axis=1)
        order.append(rows.ravel())
        sizes.append(np.full(count, rows.shape[1]))
    return np.concatenate(order), np.append(0, np.cumsum(np.concatenate(sizes)))


# Lengths and how often each occurs in a row.
Content = tuple[tuple[int, int], ...]


def _plan(lengths: list[int], counts: list[int], context: int) -> Iterator[tuple[int, Content]]:
    """Kinds of rows, each with how many there are of it."""
    room: list[int] = []  # the rooms that some rows have, ascending
    kinds: dict[int, list[tuple[int, Content]]] = {}  # by room

    def put(count: int, left: int, content: Content) -> None:
        if left not in kinds:
            bisect.insort(room, left)
            kinds[left] = []
        kinds[left].append((count, content))

    def take(left: int) -> tuple[int, Content]:
        kind = kinds[left].pop()
        if not kinds[left]:
            del kinds[left], room[bisect.bisect_left(room, left)]
        return kind

    for length, count in zip(reversed(lengths), reversed(counts)):
        while count:
            at = bisect.bisect_left(room, length)
            left = room[at] if at < len(room) else context
            rows, content = take(left) if at < len(room) else (count, ())
            # As many into each row as fit; if that is more than there are, all into one row.
            each = min(left // length, count)
            used = min(rows, count // each)
            if used < rows and content:
                put(rows - used, left, content)
            put(used, left - each * length, (*content, (length, each)))
            count -= used * each
    for left in room:
        yield from kinds[left]
