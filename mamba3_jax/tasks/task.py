"""What every synthetic task shares: lengths, rows, supervision, scores, chance.

A row is n tokens, right-padded. A model reads it and is asked for ids at some positions; the loss and the accuracy are
over the whole vocabulary. In state tracking the row is symbols and the answer to the whole of them, which is asked for
at the token just before it; in retrieval the row ends where the last question is asked. Rows are drawn in plain JAX
from a key, so that data is made inside the jitted training step, on the device, from (seed, step).

Protocol of state tracking: Grazzi et al. 2025 (arXiv:2411.12537), followed by Mamba-3 (arXiv:2603.15569, appendix D).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from mamba3_jax.checks import check_choice

Length = int | np.integer | Int[Array, ""]


class Batch(NamedTuple):
    """Rows and what is asked of a model; only a causal one may read the tokens whole: they may hold the answers.

    tokens: (b, size) int32, right-padded.
    labels: (b, size) int32, the id asked for where `mask` is True and the pad id elsewhere.
    mask: (b, size) bool, the supervised positions, which the loss is over.
    scored: (b, size) bool, those of them that the accuracy is over.
    segment_ids: (b, size) int32, which of its rows a position belongs to where several share one; None where not.
    """

    tokens: Int[Array, "b size"]
    labels: Int[Array, "b size"]
    mask: Bool[Array, "b size"]
    scored: Bool[Array, "b size"]
    segment_ids: Int[Array, "b size"] | None = None


@dataclass(frozen=True)
class Task:
    """A task: its alphabet, how long its rows are, and how one row is drawn.

    name: the key in `mamba3_jax.tasks.TASKS` or `RETRIEVAL_TASKS`, if registered.
    symbols: what each token id stands for, pad and answers included.
    pad_id: the id that fills a row after its last token; never an answer, though some tasks use it as a symbol.
    chance: accuracy of a guess among the answers.
    min_length: the shortest row, in tokens.
    lengths: "all" draws n ~ U{min..max}; "odd" draws k ~ U{(min+1)//2 .. (max+1)//2} and n = 2k-1.
    every: whether supervision="every" is defined.
    row: (key, n, size) -> (tokens, labels) for one row, both (size,) int32, n traced and size static. A label is the
        answer to the prefix that ends at its position, or the pad id where that is undefined.
    scored: which labels of a row count in its accuracy: "last", the answer to the whole of it, or "all".
    answers: how many labels of a row count, where that is the same for all rows; None where it is not.
    held_out: (split, length) -> all of the "validation" or "test" split in rows of that length, of a task whose rows
        come from a text that has such splits, which `row` never reads; None where other keys draw other rows.
    """

    name: str
    symbols: tuple[str, ...]
    pad_id: int
    chance: float
    min_length: int
    lengths: Literal["all", "odd"]
    every: bool
    row: Callable[[PRNGKeyArray, Int[Array, ""], int], tuple[Int[Array, " size"], Int[Array, " size"]]]
    scored: Literal["last", "all"] = "last"
    answers: int | None = 1
    held_out: Callable[[str, int], Batch] | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self.symbols)

    def sample(
        self,
        key: PRNGKeyArray,
        batch_size: int,
        max_length: Length,
        size: int,
        min_length: Length | None = None,
        supervision: str = "final",
    ) -> Batch:
        """Draws a batch; a pure function of its arguments.

        With JAX's default generator (threefry) the rows do not depend on `size`, which only adds padding.

        Args:
            key: the only source of randomness, for example fold_in(key(seed), step).
            batch_size: number of rows, b.
            max_length: longest row in tokens; may be traced, so that a curriculum moves it without recompiling.
            size: width of the arrays, static, at least `max_length`.
            min_length: shortest row, the task's own minimum if None; may be traced. Equal to `max_length`, it makes
                rows of exactly that length (one less if it is even and only odd lengths exist).
            supervision: "final" asks for what is scored, in state tracking once per row; "every" asks at every
                position where the answer to the prefix is defined.

        Raises:
            ValueError: for an argument out of its range; of the lengths, for Python integers only: others are trusted.
        """
        shortest = self.min_length if min_length is None else min_length
        self._check(batch_size, max_length, size, shortest, supervision)
        length_key, row_key = jax.random.split(key)
        n = self._draw_lengths(length_key, batch_size, shortest, max_length)
        return self._rows(row_key, n, size, supervision)

    def sample_pairs(
        self, key: PRNGKeyArray, batch_size: int, max_length: Length, size: int, supervision: str = "final"
    ) -> Batch:
        """As `sample`, in half as many rows: the two of a pair share one, and little of it is padding.

        Their lengths are n and (shortest + longest - n), so that every pair takes the same room. Each of the two is
        distributed as in `sample`; together they are not independent.

        Args:
            key, supervision: as in `sample`.
            batch_size: number of rows before they are paired, even.
            max_length: longest row in tokens; may be traced.
            size: width of the arrays, static, at least `min_length + max_length`.

        Raises:
            ValueError: for an argument out of its range; of the lengths, for Python integers only: others are trusted.
        """
        self._check(batch_size, max_length, size, self.min_length, supervision)
        if batch_size % 2:
            raise ValueError(f"batch_size: got {batch_size}; allowed: an even number")
        if isinstance(max_length, int | np.integer) and size < self.min_length + max_length:
            both = self.min_length + max_length
            raise ValueError(f"size: got {size}; allowed: at least min_length + max_length = {both}")
        length_key, row_key = jax.random.split(key)
        n = self._draw_lengths(length_key, batch_size // 2, self.min_length, max_length)
        shortest, longest = self._length_range(self.min_length, max_length)
        rows = self._rows(row_key, jnp.concatenate([n, shortest + longest - n]), size, supervision)
        first, second = (jax.tree.map(lambda a: jnp.split(a, 2)[i], rows) for i in (0, 1))
        position = jnp.arange(size)[None]
        after = position - n[:, None]

        def join(a, b):
            return jnp.where(after < 0, a, jnp.take_along_axis(b, jnp.maximum(after, 0), axis=1))

        joined = jax.tree.map(join, first, second)
        return joined._replace(segment_ids=(after >= 0).astype(jnp.int32))

    def _rows(self, key: PRNGKeyArray, n: Int[Array, " b"], size: int, supervision: str) -> Batch:
        keys = jax.random.split(key, n.size)
        tokens, labels = jax.vmap(lambda key, n: self.row(key, n, size))(keys, n)
        mask = scored = labels != self.pad_id
        if self.scored == "last":
            position = jnp.broadcast_to(jnp.arange(size), mask.shape)
            scored = position == jnp.max(position * mask, axis=1, keepdims=True)
            mask = scored if supervision == "final" else mask
        return Batch(tokens, jnp.where(mask, labels, self.pad_id), mask, scored)

    def _length_range(self, low: Length, high: Length) -> tuple[Length, Length]:
        """The shortest and the longest row between two lengths."""
        return (2 * ((low + 1) // 2) - 1, 2 * ((high + 1) // 2) - 1) if self.lengths == "odd" else (low, high)

    def _draw_lengths(self, key: PRNGKeyArray, batch_size: int, low: Length, high: Length) -> Int[Array, " b"]:
        if self.lengths == "odd":
            return 2 * jax.random.randint(key, (batch_size,), (low + 1) // 2, (high + 1) // 2 + 1, jnp.int32) - 1
        return jax.random.randint(key, (batch_size,), low, high + 1, jnp.int32)

    def _check(self, batch_size: int, high: Length, size: int, low: Length, supervision: str) -> None:
        check_choice("supervision", supervision, ("final", "every"))
        if supervision == "every" and not self.every:
            raise ValueError(f"supervision: got 'every' with task {self.name!r}; allowed: 'final'")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}; allowed: a positive integer")
        if isinstance(low, int | np.integer) and low < self.min_length:
            raise ValueError(f"min_length: got {low} with task {self.name!r}; allowed: at least {self.min_length}")
        if isinstance(high, int | np.integer):
            if isinstance(low, int | np.integer) and high < low:
                raise ValueError(f"max_length: got {high} with task {self.name!r}; allowed: at least min_length={low}")
            if size < high:
                raise ValueError(f"size: got {size}; allowed: at least max_length={high}")


def accuracy(logits: Float[Array, "b t v"], batch: Batch) -> Float[Array, ""]:
    """The fraction of scored positions whose most likely token of the whole vocabulary is the label."""
    correct = (jnp.argmax(logits, axis=-1) == batch.labels) & batch.scored
    return jnp.sum(correct, dtype=jnp.float32) / jnp.sum(batch.scored, dtype=jnp.float32)


def scaled_accuracy[Accuracy: (float, Float[Array, "..."])](accuracy: Accuracy, chance: float) -> Accuracy:
    """Accuracy on the scale where a guess scores 0 and perfection 1; not clipped, so below chance is negative."""
    return (accuracy - chance) / (1 - chance)


def unscaled_accuracy(scaled: float, chance: float) -> float:
    """The accuracy that `scaled_accuracy` scales."""
    return chance + scaled * (1 - chance)


def uniform_integers(bits: UInt32[Array, "*shape"], count: int | Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Maps uniform 32-bit words to integers uniform on {0..count-1}: floor(bits * count / 2^32).

    Exact in uint32 (the product is taken in halves), so that it never rounds up to `count`, as a float would; each
    integer's probability is within 2^-32 of 1/count.
    """
    count = jnp.asarray(count, jnp.uint32)
    high, low, count_high, count_low = bits >> 16, bits & 0xFFFF, count >> 16, count & 0xFFFF
    middle = high * count_low + ((low * count_low) >> 16)
    carry = (middle & 0xFFFF) + low * count_high
    return (high * count_high + (middle >> 16) + (carry >> 16)).astype(jnp.int32)


def distinct_integers(bits: UInt32[Array, " k"], count: int | Int[Array, ""]) -> Int[Array, " k"]:
    """The first k <= count of {0..count-1} in uniformly random order, from k uniform 32-bit words.

    Fisher and Yates's shuffle, whose step i swaps place i with one of the places i..count-1, without its array of
    `count` places and without its k steps in turn: what a place holds follows from the earlier steps that chose it.
    O(k^2) comparisons, whatever the count.
    """
    step = jnp.arange(bits.size, dtype=jnp.int32)
    chosen = step + uniform_integers(bits, count - step)

    def last_to_choose(place):
        """For each step, the last step before it that chose the place; -1 if there was none."""
        before = (step[None, :] < step[:, None]) & (chosen[None, :] == place[:, None])
        return jnp.max(jnp.where(before, step[None, :], -1), axis=1)

    # Place i holds, before step i, what place j held before step j, if j was the last to choose i, and so on down.
    source = last_to_choose(step)
    held = jnp.where(source < 0, step, source)
    for _ in range((bits.size - 1).bit_length()):  # each pass follows twice as many of these links as the one before
        held = held[held]
    source = last_to_choose(chosen)
    return jnp.where(source < 0, chosen, held[source])


def append_answer(
    symbols: Int[Array, " size"], answers: Int[Array, " size"], n: Int[Array, ""], pad_id: int
) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
    """A row's (tokens, labels): symbols at 0..n-2, the last of their running `answers` at n-1, padding after it."""
    position = jnp.arange(symbols.size)
    tokens = jnp.where(position < n - 1, symbols, jnp.where(position == n - 1, answers[n - 2], pad_id))
    return tokens, jnp.where(position < n - 1, answers, pad_id)
