"""Parity: is the number of 1 bits even or odd? One bit of state that every 1 flips.

Ids: 0 pad, 1 = bit 0, 2 = bit 1. A row of n ~ U{3..max} tokens is n-1 fair bits and the answer,
1 + (sum of bits mod 2).

Source: Grazzi et al. 2025 (arXiv:2411.12537); Mamba-3 (arXiv:2603.15569), table 5b and appendix D.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from mamba3_jax.tasks.task import Task, append_answer, uniform_integers

PAD, ZERO = 0, 1


def _row(key: PRNGKeyArray, n: Int[Array, ""], size: int) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
    bits = uniform_integers(jax.random.bits(key, (size,), jnp.uint32), 2)
    return append_answer(ZERO + bits, ZERO + jnp.cumsum(bits) % 2, n, PAD)


PARITY = Task(
    name="parity", symbols=("_", "0", "1"), pad_id=PAD, chance=1 / 2, min_length=3, lengths="all", every=True, row=_row
)
