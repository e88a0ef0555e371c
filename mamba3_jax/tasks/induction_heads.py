"""Induction heads: what followed the special token the first time?

Ids: 0 the special token, which also pads, and ordinary tokens 1..v-1. A row of n tokens holds the special token twice:
in a uniform place of 0..n-3, and at n-1, where the token that followed it is asked for. All others are uniform.

The published setting is v = 16, trained at n = 256 and tested at n = 2^6, 2^7, ..., 2^20.

Source: Mamba (arXiv:2312.00752), section 4.1.2 and appendix E.1, after Fu et al. 2023 (arXiv:2212.14052).
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from mamba3_jax.tasks.task import Task, uniform_integers

SPECIAL, ORDINARY_0 = 0, 1
VOCAB_SIZE = 16
TEST_LENGTHS = tuple(2**i for i in range(6, 21))


def _row(
    key: PRNGKeyArray, n: Int[Array, ""], size: int, vocab_size: int
) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
    place_key, token_key = jax.random.split(key)
    position = jnp.arange(size)
    place = uniform_integers(jax.random.bits(place_key, (), jnp.uint32), n - 2)
    tokens = ORDINARY_0 + uniform_integers(jax.random.bits(token_key, (size,), jnp.uint32), vocab_size - 1)
    labels = jnp.where(position == n - 1, tokens[place + 1], SPECIAL)
    return jnp.where((position == place) | (position >= n - 1), SPECIAL, tokens), labels


@cache
def induction_heads(vocab_size: int = VOCAB_SIZE) -> Task:
    """The task with `vocab_size` - 1 ordinary tokens; raises ValueError if they are fewer than two."""
    if vocab_size < 3:
        raise ValueError(f"vocab_size: got {vocab_size}; allowed: at least 3")
    return Task(
        name="induction_heads" if vocab_size == VOCAB_SIZE else f"induction_heads_vocab_{vocab_size}",
        symbols=("*", *(f"t{i}" for i in range(vocab_size - 1))),
        pad_id=SPECIAL,
        chance=1 / (vocab_size - 1),
        min_length=3,
        lengths="all",
        every=False,
        row=partial(_row, vocab_size=vocab_size),
    )
