"""What every synthetic state-tracking task shares: lengths, rows, supervision, chance.

A row is n tokens, right-padded: symbols, then the answer to the whole of them. A model reads the row and is asked, at
the token just before the answer, for the answer's id; the loss and the accuracy are over the whole vocabulary. Rows are
drawn in plain JAX from a key, so that data is made inside the jitted training step, on the device, from (seed, step).

Protocol: Grazzi et al. 2025 (arXiv:2411.12537), followed by Mamba-3 (arXiv:2603.15569, appendix D).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

Length = int | np.integer | Int[Array, ""]


class Batch(NamedTuple):
    """Rows and what is asked of a model; only a causal one may read the tokens whole, since they end in the answer.

    tokens: (b, size) int32, right-padded.
    labels: (b, size) int32, the answer's id where `mask` is True and the pad id elsewhere.
    mask: (b, size) bool, the supervised positions.
    """

    tokens: Int[Array, "b size"]
    labels: Int[Array, "b size"]
    mask: Bool[Array, "b size"]


@dataclass(frozen=True)
class Task:
    """A task: its alphabet, how long its rows are, and how one row is drawn.

    name: the key in `mamba3_jax.tasks.TASKS`.
    symbols: what each token id stands for, pad and answers included.
    pad_id: the id that fills a row after its last token; never an answer.
    chance: accuracy of a guess among the answers.
    min_length: the shortest row, in tokens.
    lengths: "all" draws n ~ U{min..max}; "odd" draws k ~ U{(min+1)//2 .. (max+1)//2} and n = 2k-1.
    every: whether supervision="every" is defined.
    row: (key, n, size) -> (tokens, labels) for one row, both (size,) int32, n traced and size static. A label is the
        answer to the prefix that ends at its position, or the pad id where that is undefined; the last one defined
        is at the token before the answer.
    """

    name: str
    symbols: tuple[str, ...]
    pad_id: int
    chance: float
    min_length: int
    lengths: Literal["all", "odd"]
    every: bool
    row: Callable[[PRNGKeyArray, Int[Array, ""], int], tuple[Int[Array, " size"], Int[Array, " size"]]]

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
            supervision: "final" asks for the answer once per row, just before it; "every" asks at every position
                where the answer to the prefix is defined.

        Raises:
            ValueError: for an argument out of its range; of the lengths, for Python integers only: others are trusted.
        """
        shortest = self.min_length if min_length is None else min_length
        self._check(batch_size, max_length, size, shortest, supervision)
        length_key, row_key = jax.random.split(key)
        n = self._draw_lengths(length_key, batch_size, shortest, max_length)
        row_keys = jax.random.split(row_key, batch_size)
        tokens, labels = jax.vmap(lambda row_key, n: self.row(row_key, n, size))(row_keys, n)
        mask = labels != self.pad_id
        if supervision == "final":
            position = jnp.broadcast_to(jnp.arange(size), mask.shape)
            mask = position == jnp.max(position * mask, axis=1, keepdims=True)
        return Batch(tokens, jnp.where(mask, labels, self.pad_id), mask)

    def _draw_lengths(self, key: PRNGKeyArray, batch_size: int, low: Length, high: Length) -> Int[Array, " b"]:
        if self.lengths == "odd":
            return 2 * jax.random.randint(key, (batch_size,), (low + 1) // 2, (high + 1) // 2 + 1, jnp.int32) - 1
        return jax.random.randint(key, (batch_size,), low, high + 1, jnp.int32)

    def _check(self, batch_size: int, high: Length, size: int, low: Length, supervision: str) -> None:
        if supervision not in ("final", "every"):
            raise ValueError(f"supervision must be 'final' or 'every', got {supervision!r}")
        if supervision == "every" and not self.every:
            raise ValueError(f"supervision must be 'final' for task {self.name!r}, got 'every'")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(low, int | np.integer) and low < self.min_length:
            raise ValueError(f"min_length must be at least {self.min_length} for task {self.name!r}, got {low}")
        if isinstance(high, int | np.integer):
            if isinstance(low, int | np.integer) and high < low:
                raise ValueError(f"max_length must be at least min_length = {low} for task {self.name!r}, got {high}")
            if size < high:
                raise ValueError(f"size must be at least max_length = {high}, got {size}")


def scaled_accuracy[Accuracy: (float, Float[Array, "..."])](accuracy: Accuracy, chance: float) -> Accuracy:
    """Accuracy on the scale where a guess scores 0 and perfection 1; not clipped, so below chance is negative."""
    return (accuracy - chance) / (1 - chance)


def uniform_integers(bits: UInt32[Array, "*shape"], count: int | Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Maps uniform 32-bit words to integers uniform on {0..count-1}: floor(bits * count / 2^32).

    Exact in uint32 for count <= 2^16 (the product is taken in two halves), so that it never rounds up to `count`, as a
    float would; each integer's probability is within 2^-32 of 1/count.
    """
    count = jnp.asarray(count, jnp.uint32)
    high, low = bits >> 16, bits & 0xFFFF
    return ((high * count + ((low * count) >> 16)) >> 16).astype(jnp.int32)


def append_answer(
    symbols: Int[Array, " size"], answers: Int[Array, " size"], n: Int[Array, ""], pad_id: int
) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
    """A row's (tokens, labels): symbols at 0..n-2, the last of their running `answers` at n-1, padding after it."""
    position = jnp.arange(symbols.size)
    tokens = jnp.where(position < n - 1, symbols, jnp.where(position == n - 1, answers[n - 2], pad_id))
    return tokens, jnp.where(position < n - 1, answers, pad_id)
