"""From continuous to discrete time: section 3.1 and table 1 of arXiv:2603.15569.

    h_t = alpha_t h_{t-1} + beta_t k_{t-1} v_{t-1}^T + gamma_t k_t v_t^T

    exponential-trapezoidal   alpha = exp(dt A)   beta = (1 - lambda) dt alpha   gamma = lambda dt
    fixed trapezoid           the same with lambda = 1/2                                               (table 8)
    exponential-Euler         the same with lambda = 1, so that beta = 0
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

EULER = 1.0
FIXED_TRAPEZOID = 0.5

# exp() of anything below is 0 in float32 and in float64, so that clamping here changes no value and keeps sums finite.
MIN_LOG_DECAY = -1000.0


class Coefficients(NamedTuple):
    """The recurrence's coefficients, one per token and head; beta = carry * exp(log_decay)."""

    log_decay: Float[Array, "b t h"]
    gamma: Float[Array, "b t h"]
    carry: Float[Array, "b t h"]


def exponential_trapezoidal(
    dt: Float[Array, "b t h"], A: Float[Array, "b t h"], lam: Float[Array, "b t h"] | float
) -> Coefficients:
    """Coefficients of one step of size `dt` at rate `A`; `lam` weighs the step's right end against its left end."""
    return Coefficients(log_decay=jnp.maximum(dt * A, MIN_LOG_DECAY), gamma=lam * dt, carry=(1 - lam) * dt)


def next_carry(
    carry: Float[Array, "b t h"], segment_ids: Array | None
) -> Float[Array, "b t h"]:
    """What token t still contributes when token t+1 arrives: carry_{t+1}, or 0 after the last token of a document.

    With scale_t = gamma_t + next_carry_t the trapezoid needs one pass over the inputs, not two (appendix A).
    """
    shifted = jnp.pad(carry[:, 1:], ((0, 0), (0, 1), (0, 0)))
    if segment_ids is None:
        return shifted
    last = jnp.pad(document_starts(segment_ids)[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    return jnp.where(last[..., None], 0, shifted)


def document_starts(segment_ids: Array) -> Bool[Array, "b t"]:
    """True at the first token of every packed document but the row's first, which may continue an earlier call."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
