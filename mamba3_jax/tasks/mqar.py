"""Multi-query associative recall (MQAR): key-value pairs, then the keys again in random places; what was each value?

Ids: 0 pad, keys 1..v/2-1, values v/2..v-1. A row starts with its pairs, key value key value ..., of distinct keys and
distinct values. Each key then comes once more, as a query, and its value is asked for there. A query is 2g tokens after
the pairs, where the gaps g of the p queries are drawn without replacement from 0..(n-2p)//2 - 1 with weights
(g+1)^(0.01-1), so that most come early. All other tokens are noise, uniform on the whole vocabulary, 0 included; or,
without noise, all 0.

Source: Arora et al. 2024 (arXiv:2312.04927), HazyResearch/zoology, `multiquery_ar`. Noise is its default; zeros, its
`random_non_queries=False`, are what the configs of the paper's figure 2 have.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from mamba3_jax.tasks.task import Task, distinct_integers, uniform_integers

PAD = 0
POWER = 0.01
VOCAB_SIZE = 8192
STANDARD_SETTINGS = ((64, 4), (128, 8), (256, 16), (512, 64))  # (length, pairs) of figure 2


def _row(
    key: PRNGKeyArray, n: Int[Array, ""], size: int, pairs: int, vocab_size: int, noise: bool
) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
    key_key, value_key, gap_key, filler_key = jax.random.split(key, 4)
    half, context = vocab_size // 2, 2 * pairs
    keys = 1 + distinct_integers(jax.random.bits(key_key, (pairs,), jnp.uint32), half - 1)
    values = half + distinct_integers(jax.random.bits(value_key, (pairs,), jnp.uint32), vocab_size - half)

    # The largest of log(weight) + Gumbel noise are a draw without replacement, in the order of drawing.
    gap = jnp.arange((size - context) // 2, dtype=jnp.float32)
    log_weight = jnp.where(gap < (n - context) // 2, (POWER - 1) * jnp.log(gap + 1), -jnp.inf)
    _, gaps = jax.lax.top_k(log_weight + jax.random.gumbel(gap_key, gap.shape, jnp.float32), pairs)
    queries = context + 2 * gaps

    filler = jnp.zeros((size,), jnp.int32)
    if noise:
        filler = uniform_integers(jax.random.bits(filler_key, (size,), jnp.uint32), vocab_size)
    tokens = filler.at[:context].set(jnp.stack([keys, values], axis=1).ravel()).at[queries].set(keys)
    labels = jnp.full((size,), PAD, jnp.int32).at[queries].set(values)
    return jnp.where(jnp.arange(size) < n, tokens, PAD), labels


@cache
def mqar(pairs: int, vocab_size: int = VOCAB_SIZE, noise: bool = True) -> Task:
    """The task with that many pairs; rows have 4 * pairs tokens at least, and the standard ones a fixed length.

    `noise` says whether tokens that are neither pairs nor queries are random; else they are 0.

    Chance is that of a guess among all values; a guess among the values of the row scores 1/pairs.

    Raises:
        ValueError: for fewer than one pair, or more pairs than there are keys.
    """
    if not 1 <= pairs <= vocab_size // 2 - 1:
        raise ValueError(f"pairs: got {pairs} with vocab_size={vocab_size}; allowed: 1 to {vocab_size // 2 - 1}")
    name = f"mqar_{pairs}" + ("" if noise else "_zeros")
    name += "" if vocab_size == VOCAB_SIZE else f"_vocab_{vocab_size}"
    half = vocab_size // 2
    keys, values = (f"k{i}" for i in range(1, half)), (f"v{i}" for i in range(vocab_size - half))
    return Task(
        name=name,
        symbols=("_", *keys, *values),
        pad_id=PAD,
        chance=1 / (vocab_size - half),
        min_length=4 * pairs,
        lengths="all",
        every=True,
        row=partial(_row, pairs=pairs, vocab_size=vocab_size, noise=noise),
        scored="all",
        answers=pairs,
    )
