"""What the kernels of sequences read instead of making it: plain JAX that autodiff sees through.

The angles are for all of them, the decays for a TPU's; those of a GPU are made by pallas/triton/coefficients.py.

For every chunk of c tokens, with cs the inclusive cumulative sum of log alpha from the chunk's start, -inf (as good as)
across the start of a document,

    entry_i = exp(cs_i)    exit_j = exp(cs_c - cs_j) scale_j    through = exp(cs_c)    theta0 = theta before the chunk
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mamba3_jax.ops.chunked import cumulative, split_log_decay
from mamba3_jax.ops.discretization import MIN_LOG_DECAY, document_starts, next_carry
from mamba3_jax.ops.inputs import Inputs
from mamba3_jax.ops.rotation import turns, wrap
from mamba3_jax.ops.state import SSMState

# So many chunks' turns, each in [-pi, pi], are summed before the sum is wrapped: float32 keeps the angle to 1e-5.
SUMMED = 32


def pad(tree, t: int):
    """Every array with a time axis, padded to t tokens that neither decay, turn, write nor open a document."""

    def padded(u):
        fill = {"mode": "edge"} if jnp.issubdtype(u.dtype, jnp.integer) else {}
        return jnp.pad(u, ((0, 0), (0, t - u.shape[1])) + ((0, 0),) * (u.ndim - 2), **fill)

    if isinstance(tree, Inputs):
        shared = dict(B_bias=tree.B_bias, C_bias=tree.C_bias, mimo_x=tree.mimo_x)
        return jax.tree.map(padded, tree._replace(**dict.fromkeys(shared)))._replace(**shared)
    return jax.tree.map(padded, tree)


def float32(u: Array | None) -> Array | None:
    return None if u is None else u.astype(jnp.float32)


def head_major(u: Float[Array, "b t h"]) -> Float[Array, "b h t"]:
    return jnp.moveaxis(u, 1, 2)


def weights(inputs: Inputs) -> tuple[Float[Array, "b t h"], Float[Array, "b t h"], Float[Array, "b t h"]]:
    """log alpha, as good as -inf at the start of a document, and of each token gamma and scale."""
    log_decay, gamma, carry = inputs.coefficients
    if inputs.segment_ids is not None:
        # What came before a document decays to 0 at its first token.
        log_decay = jnp.where(document_starts(inputs.segment_ids)[..., None], MIN_LOG_DECAY, log_decay)
    return log_decay, gamma, gamma + next_carry(carry, inputs.segment_ids)


def decays(inputs: Inputs, c: int) -> dict[str, Array]:
    """The operands that say what of each token is seen when: all float32, (b, h, t), but through, (b, h, chunks)."""
    log_decay, gamma, scale = map(head_major, weights(inputs))
    b, h, t = gamma.shape
    m = t // c
    parts = split_log_decay(log_decay)
    coarse, fine = (cumulative(u.reshape(b, h * m, c)).reshape(b, h, m, c) for u in parts)
    entry = jnp.exp(coarse + fine)
    exit = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)).reshape(b, h, t) * scale
    tokens = dict(coarse=coarse, fine=fine, entry=entry)
    tokens = {name: u.reshape(b, h, t) for name, u in tokens.items()}
    return tokens | dict(exit=exit, through=entry[..., -1], scale=scale, gamma=gamma)


class Angles(NamedTuple):
    """Before every chunk, after the last token, and for packed rows before the last document."""

    before: Float[Array, "b m h s"]
    after: Float[Array, "b h s"]
    at_start: Float[Array, "b h s"] | None


def angles(inputs: Inputs, state: SSMState, c: int) -> Angles:
    b, t, h = inputs.clock.shape
    m = t // c

    def total(clock):
        """Of each chunk. The turns of single tokens are summed as they are made, and never lie in memory."""
        turn = turns(inputs.omega, clock)
        return wrap(jnp.sum(turn.reshape(b, m, c, h, -1), axis=2))

    turned = total(inputs.clock)
    before = wrap(_sums_before(turned) + state.angle[:, None])
    after = wrap(before[:, -1] + turned[:, -1])
    if inputs.segment_ids is None:
        return Angles(before, after, None)
    ids = inputs.segment_ids
    earlier = ids != ids[:, -1:]
    begins = (jnp.pad(earlier, ((0, 0), (1, 0)))[:, :-1] & ~earlier).reshape(b, m, c).any(2)
    until = before + total(jnp.where(earlier[..., None], inputs.clock, 0))
    return Angles(before, after, wrap(jnp.sum(jnp.where(begins[..., None, None], until, 0), axis=1)))


def _sums_before(u: Float[Array, "b m h s"]) -> Float[Array, "b m h s"]:
    """Of angles, along m and modulo 2 pi: exclusive cumulative sums of at most SUMMED at a time."""
    b, m, h, s = u.shape
    if m <= SUMMED:
        u = jnp.moveaxis(u, 1, 2)
        return jnp.moveaxis(cumulative(u) - u, 2, 1)
    groups = -(-m // SUMMED)
    u = jnp.pad(u, ((0, 0), (0, groups * SUMMED - m), (0, 0), (0, 0)))
    inside = _sums_before(u.reshape(b * groups, SUMMED, h, s))
    u = u.reshape(b, groups, SUMMED, h, s)
    inside = inside.reshape(u.shape)
    before = _sums_before(wrap(inside[:, :, -1] + u[:, :, -1]))
    return wrap(inside + before[:, :, None]).reshape(b, groups * SUMMED, h, s)[:, :m]
