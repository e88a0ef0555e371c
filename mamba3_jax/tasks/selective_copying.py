"""Selective copying: data tokens lie scattered in noise; say them again, in order, at the end.

Ids: 0 noise, which also pads, data 1..v-2, and v-1, the marker that asks for the next data token. A row of n tokens is
a context of n-k, noise but for k uniform data tokens in k distinct uniform places, and then k markers: the i-th data
token is asked for at the i-th marker. Neither the data nor the answers follow at regular steps, so that a model must
select by content. The published setting is a context of 4096 with k = 16 and v = 16: rows of 4112 tokens.

Source: Mamba (arXiv:2312.00752), section 4.1.1 and appendix E.1, whose code is unpublished; the markers and the part of
noise and marker in the vocabulary are those of the Copying task in state-spaces/s4 (its `variable` form).
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from mamba3_jax.tasks.task import Task, distinct_integers, uniform_integers

NOISE, DATA_0 = 0, 1
DATA_TOKENS, VOCAB_SIZE = 16, 16


def _row(
    key: PRNGKeyArray, n: Int[Array, ""], size: int, data_tokens: int, vocab_size: int
) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
    place_key, data_key = jax.random.split(key)
    position, context = jnp.arange(size), n - data_tokens
    places = jnp.sort(distinct_integers(jax.random.bits(place_key, (data_tokens,), jnp.uint32), context))
    data = DATA_0 + uniform_integers(jax.random.bits(data_key, (data_tokens,), jnp.uint32), vocab_size - 2)
    noise, marker = jnp.full((size,), NOISE, jnp.int32), vocab_size - 1
    tokens = jnp.where((context <= position) & (position < n), marker, noise.at[places].set(data))
    return tokens, noise.at[context + jnp.arange(data_tokens)].set(data)


@cache
def selective_copying(data_tokens: int = DATA_TOKENS, vocab_size: int = VOCAB_SIZE) -> Task:
    """The task with that many data tokens, of `vocab_size` - 2 kinds; rows have 2 * data_tokens tokens at least.

    Raises:
        ValueError: for fewer than one data token, or a vocabulary without room for two kinds.
    """
    if data_tokens < 1:
        raise ValueError(f"data_tokens: got {data_tokens}; allowed: a positive integer")
    if vocab_size < 4:
        raise ValueError(f"vocab_size: got {vocab_size}; allowed: at least 4")
    standard = (data_tokens, vocab_size) == (DATA_TOKENS, VOCAB_SIZE)
    return Task(
        name="selective_copying" if standard else f"selective_copying_{data_tokens}_vocab_{vocab_size}",
        symbols=("_", *(f"d{i}" for i in range(vocab_size - 2)), "?"),
        pad_id=NOISE,
        chance=1 / (vocab_size - 2),
        min_length=2 * data_tokens,
        lengths="all",
        every=True,
        row=partial(_row, data_tokens=data_tokens, vocab_size=vocab_size),
        scored="all",
        answers=data_tokens,
    )
