"""How the next token is drawn from the logits.

In this order, each step on what the one before left:

    penalty       l_i -> l_i / theta where l_i > 0, else l_i * theta, for tokens seen before      (arXiv:1909.05858)
    temperature   p = softmax(l / T); T = 0 takes the largest logit and ends here
    top-k         the k most likely tokens
    top-p         the fewest most likely tokens whose probabilities sum to top_p or more          (arXiv:1904.09751)
    min-p         the tokens with p_i >= min_p * max_j p_j                                        (arXiv:2407.01082)

The probabilities of top-p and min-p are those of what is left, normalised again. Seen are the tokens of the prompt and
those drawn since. The penalty's source divides every logit, which would favour a seen token whose logit is negative;
multiplying those makes it a penalty whatever the sign.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

Number = float | int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Filters:
    """A `Sampling` for compiled code: None is a step left out, and another number compiles nothing anew.

    Attributes:
        temperature, top_p, min_p, repetition_penalty: numbers; a temperature of None is greedy.
        top_k: a size, and so part of the program.
    """

    temperature: Number | Float[Array, ""] | None
    top_p: Number | Float[Array, ""] | None
    min_p: Number | Float[Array, ""] | None
    repetition_penalty: Number | Float[Array, ""] | None
    top_k: int | None = dataclasses.field(metadata=dict(static=True))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What the user asks for; the module's docstring defines it.

    Attributes:
        temperature: T; 0 is greedy.
        top_k: tokens kept; None is all.
        top_p: probability kept, above 0 and up to 1; None is all.
        min_p: smallest probability relative to the largest, from 0 to 1; None is none.
        repetition_penalty: theta; 1 is no penalty, above 1 makes repetition less likely.
    """

    temperature: Number = 1.0
    top_k: int | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    repetition_penalty: Number = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: got {self.temperature}; allowed: 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: got {self.top_k}; allowed: a positive integer, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}; allowed: above 0 and up to 1, or None")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: got {self.min_p}; allowed: from 0 to 1, or None")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty: got {self.repetition_penalty}; allowed: a positive number")

    def filters(self) -> Filters:
        """The steps that change anything."""
        penalty = None if self.repetition_penalty == 1 else self.repetition_penalty
        if self.temperature == 0:
            return Filters(None, None, None, penalty, top_k=None)
        top_p = None if self.top_p == 1 else self.top_p
        return Filters(float(self.temperature), top_p, self.min_p or None, penalty, self.top_k)


def sample(
    logits: Float[Array, "b v"], keys: Key[Array, " b"], seen: Bool[Array, "b v"], filters: Filters
) -> Int[Array, " b"]:
    """One token of every row. Pass the logits of the true vocabulary only: padding is not known here.

    Args:
        logits: before the softmax.
        keys: a row's token depends on its own key only.
        seen: which tokens the penalty falls on.
        filters: the steps.
    """
    if filters.repetition_penalty is not None:
        theta = filters.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / theta, logits * theta), logits)
    if filters.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest becomes 0 first, so that a tiny temperature sends the others to -inf and nothing to NaN.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / filters.temperature
    ids = None
    if filters.top_k is not None:
        logits, ids = jax.lax.top_k(logits, min(filters.top_k, logits.shape[1]))
    elif filters.top_p is not None:
        ids = jnp.argsort(logits, axis=-1, descending=True)
        logits = jnp.take_along_axis(logits, ids, axis=-1)
    if filters.top_p is not None:
        p = jax.nn.softmax(logits, axis=-1)
        more_likely = jnp.cumsum(p, axis=-1) - p
        logits = jnp.where(more_likely < filters.top_p, logits, -jnp.inf)
    if filters.min_p is not None:
        logits = jnp.where(logits >= jnp.log(filters.min_p), logits, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return drawn if ids is None else jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
