"""A needle in a haystack, on tokens: one key and its value lie somewhere in filler; what was the key's value?

Ids: 0 pad, 1 the needle's marker, 2 the question's, then filler, keys and values, each a range of its own. A row of n
tokens is n-5 uniform filler tokens with the needle, (marker, key, value), among them, and the question, (marker, key),
at the end, where the value is asked for. At depth d the needle has round(d * (n-5)) filler tokens before it: depth 0
is the row's beginning and depth 1 just before the question.

Source: the needle-in-a-haystack test (github.com/gkamradt/LLMTest_NeedleInAHaystack), with tokens for sentences.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from mamba3_jax.tasks.task import Task, uniform_integers

PAD, NEEDLE, QUESTION, FILLER_0 = 0, 1, 2, 3
FILLERS, KEYS, VALUES = 32, 16, 16


def _row(
    key: PRNGKeyArray, n: Int[Array, ""], size: int, depth: float | None, fillers: int, keys: int, values: int
) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
    filler_key, needle_key = jax.random.split(key)
    words = jax.random.bits(needle_key, (3,), jnp.uint32)
    hay = n - 5
    if depth is None:
        start = uniform_integers(words[0], hay + 1)
    else:
        start = jnp.floor(jnp.float32(depth) * hay.astype(jnp.float32) + 0.5).astype(jnp.int32)
    needle_key_id = FILLER_0 + fillers + uniform_integers(words[1], keys)
    value_id = FILLER_0 + fillers + keys + uniform_integers(words[2], values)

    position = jnp.arange(size)
    tokens = FILLER_0 + uniform_integers(jax.random.bits(filler_key, (size,), jnp.uint32), fillers)
    for place, token in (
        (start, NEEDLE),
        (start + 1, needle_key_id),
        (start + 2, value_id),
        (n - 2, QUESTION),
        (n - 1, needle_key_id),
    ):
        tokens = jnp.where(position == place, token, tokens)
    return jnp.where(position < n, tokens, PAD), jnp.where(position == n - 1, value_id, PAD)


@cache
def needle(depth: float | None = None, fillers: int = FILLERS, keys: int = KEYS, values: int = VALUES) -> Task:
    """The task with the needle at one relative depth, or at a uniform one if None.

    The depth is no part of the alphabet: a model trained at uniform depth is tested at each by itself.

    Raises:
        ValueError: for a depth outside [0, 1], or fewer than one filler or key, or two values.
    """
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth: got {depth}; allowed: 0 to 1, or None")
    for name, value, least in (("fillers", fillers, 1), ("keys", keys, 1), ("values", values, 2)):
        if value < least:
            raise ValueError(f"{name}: got {value}; allowed: at least {least}")
    sizes = "" if (fillers, keys, values) == (FILLERS, KEYS, VALUES) else f"_{fillers}_{keys}_{values}"
    kinds = (("f", fillers), ("k", keys), ("v", values))
    return Task(
        name="needle" + sizes + ("" if depth is None else f"_at_{depth:g}"),
        symbols=("_", "needle", "?", *(f"{kind}{i}" for kind, count in kinds for i in range(count))),
        pad_id=PAD,
        chance=1 / values,
        min_length=5,
        lengths="all",
        every=False,
        row=partial(_row, depth=depth, fillers=fillers, keys=keys, values=values),
    )
