"""Even pairs: is the number of adjacent unequal pairs (01 or 10) even? Equivalently, is the last bit the first bit?

Ids: 0 pad, 1 = bit 0, 2 = bit 1. A row of n ~ U{3..max} tokens is n-1 fair bits and the answer, 1 if the first bit
equals the last and 2 otherwise. One bit must be carried unchanged over the whole row.

Source: the formal-language tasks that Grazzi et al. 2025 (arXiv:2411.12537) and Mamba-3 (arXiv:2603.15569, appendix D)
draw parity and arithmetic from, after Delétang et al. 2023 (arXiv:2207.02098).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from mamba3_jax.tasks.task import Task, append_answer, uniform_integers

PAD, ZERO, EVEN = 0, 1, 1


def _row(key: PRNGKeyArray, n: Int[Array, ""], size: int) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
    bits = uniform_integers(jax.random.bits(key, (size,), jnp.uint32), 2)
    return append_answer(ZERO + bits, EVEN + (bits ^ bits[0]), n, PAD)


EVEN_PAIRS = Task(
    name="even_pairs",
    symbols=("_", "0", "1"),
    pad_id=PAD,
    chance=1 / 2,
    min_length=3,
    lengths="all",
    every=True,
    row=_row,
)
