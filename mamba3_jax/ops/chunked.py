"""The chunk-parallel form in plain XLA: sections 3.1.3 and 3.3 of arXiv:2603.15569, SISO and MIMO.

A scan over chunks of c tokens carries (theta, h); inside a chunk everything is a matrix product. With cs the inclusive
cumulative sum of log alpha and scale_t = gamma_t + carry_{t+1} (0 after a document's last token):

    W_ij  = exp(cs_i - cs_j) scale_j for i > j,   W_ii = gamma_i,   0 above the diagonal
    y_i   = exp(cs_i) h_in q_i + sum_j W_ij (q_i . k_j) v_j
    h_out = exp(cs_c) h_in + sum_j exp(cs_c - cs_j) scale_j v_j k_j^T

and the previous call's last token enters as h_in += carry_0 v_prev k_prev^T. Every exponent is <= 0 and masked before
exp, so nothing overflows. Of several chunks each is recomputed in the backward pass, so that memory does not grow with
c x t; a row of one chunk keeps what it computed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mamba3_jax.ops.discretization import next_carry
from mamba3_jax.ops.inputs import Inputs, expand_ranks, per_head
from mamba3_jax.ops.rotation import rotate, rotate_by, turns, wrap
from mamba3_jax.ops.state import SSMState

# log alpha is split at this grain into a part whose float32 sums are exact (up to 2^21 in magnitude) and a remainder of
# at most 1/16 per token, because cs_i - cs_j would otherwise lose the weak decays that follow a strong one.
LOG_DECAY_GRAIN = 1 / 8


class _Chunk(NamedTuple):
    """One chunk of every row; with a leading axis of chunks when scanned."""

    x: Float[Array, "*N b c h p"]
    B: Float[Array, "*N b c r g n"]
    C: Float[Array, "*N b c r g n"]
    log_decay: Float[Array, "*N b c h"]
    gamma: Float[Array, "*N b c h"]
    scale: Float[Array, "*N b c h"]
    omega: Float[Array, "*N b c hh s"]
    clock: Float[Array, "*N b c h"]
    segment_ids: Int[Array, "*N b c"] | None


class _Carry(NamedTuple):
    """Between chunks: the running angle, the state, and for packed rows the open document and the angle it began at."""

    angle: Float[Array, "b h s"]
    ssm: Float[Array, "b h p n"]
    document: Int[Array, " b"] | None
    angle_at_start: Float[Array, "b h s"] | None


def chunked(inputs: Inputs, state: SSMState, chunk_size: int) -> tuple[Float[Array, "b t r h p"], SSMState]:
    """The operator over chunks of at most `chunk_size` tokens, of equal length so that little is padded."""
    b, t, h, p = inputs.x.shape
    chunks = -(-t // chunk_size)
    c = -(-t // chunks)

    def body(carry, chunk):
        return _chunk_step(inputs, carry, chunk)

    carry = _enter(inputs, state)
    if chunks == 1:
        if inputs.x.dtype == jnp.bfloat16:
            # A new row's state is a broadcast of zeros. Fused with it, jaxlib 0.12.0 on CPUs sums the gradients of
            # bfloat16 B and C over the heads of a group wrongly, by any amount. Inside a scan it is an array anyway.
            carry = carry._replace(ssm=lax.optimization_barrier(carry.ssm))
        carry, o = body(carry, _whole_row(inputs))
        return o, leave(inputs, carry.angle, carry.ssm, carry.angle_at_start)
    xs = jax.tree.map(lambda u: split_time(u, chunks, c), _whole_row(inputs))
    carry, o = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), carry, xs)
    o = jnp.moveaxis(o, 0, 1).reshape(b, chunks * c, *o.shape[3:])[:, :t]
    return o, leave(inputs, carry.angle, carry.ssm, carry.angle_at_start)


def default_chunk_size(backend: str, r: int) -> int:
    """Measured with `mamba3 experiment chunked_latency`: CPUs want a chunk in cache, accelerators few, large steps."""
    tokens = 64 if backend == "cpu" else 256
    return max(16, tokens // r)


def _whole_row(inputs: Inputs) -> _Chunk:
    log_decay, gamma, carry = inputs.coefficients
    return _Chunk(
        x=inputs.x,
        B=inputs.B,
        C=inputs.C,
        log_decay=log_decay,
        gamma=gamma,
        scale=gamma + next_carry(carry, inputs.segment_ids),
        omega=inputs.omega,
        clock=inputs.clock,
        segment_ids=inputs.segment_ids,
    )


def split_time(u: Array, chunks: int, c: int) -> Array:
    """(b, t, ...) -> (chunks, b, c, ...). Padding tokens neither decay, turn, write nor open a document."""
    fill = {"mode": "edge"} if jnp.issubdtype(u.dtype, jnp.integer) else {}
    u = jnp.pad(u, ((0, 0), (0, chunks * c - u.shape[1])) + ((0, 0),) * (u.ndim - 2), **fill)
    return jnp.moveaxis(u.reshape(u.shape[0], chunks, c, *u.shape[2:]), 1, 0)


def _enter(inputs: Inputs, state: SSMState) -> _Carry:
    ssm = enter(inputs, state)
    if inputs.segment_ids is None:
        return _Carry(state.angle, ssm, None, None)
    return _Carry(state.angle, ssm, inputs.segment_ids[:, 0], jnp.zeros_like(state.angle))


def enter(inputs: Inputs, state: SSMState) -> Float[Array, "b h p n"]:
    """h_in += carry_0 v_prev k_prev^T: the trapezoid's left end of the first token."""
    owed = jnp.einsum("bhrp,bhrn->bhpn", expand_ranks(state.v, inputs.mimo_x), state.k, precision="highest")
    # XLA would else take what this carry receives, a sum over p and n, into the program that adds up every token's, and
    # sum anew for each: 1.5 ms of 2.5 at b=1 t=2048 h=64 on an H100.
    carry = lax.optimization_barrier(inputs.coefficients.carry[:, 0])
    return state.ssm + carry[:, :, None, None] * owed


def leave(
    inputs: Inputs,
    angle: Float[Array, "b h s"],
    ssm: Float[Array, "b h p n"],
    angle_at_start: Float[Array, "b h s"] | None,
    rotate: Callable[[Array, Array], Array] = rotate,
) -> SSMState:
    """The state after the last token, its angle counted from the start of the last document of packed rows."""
    if angle_at_start is not None:
        angle = wrap(angle - angle_at_start)
        ssm = rotate(ssm, -angle_at_start[:, :, None])
    k = rotate(per_head(inputs.B[:, -1], inputs.B_bias, ssm.dtype), angle[:, :, None])
    return SSMState(angle, ssm, k, inputs.x[:, -1].astype(ssm.dtype))


def _chunk_step(inputs: Inputs, carry: _Carry, chunk: _Chunk) -> tuple[_Carry, Float[Array, "b c r h p"]]:
    compute, dtype = chunk.x.dtype, carry.ssm.dtype
    b, c, h, p = chunk.x.shape
    r = inputs.B_bias.shape[1]
    log_decay, gamma, scale = (jnp.moveaxis(u, 1, 2) for u in (chunk.log_decay, chunk.gamma, chunk.scale))
    turn = jnp.moveaxis(turns(chunk.omega, chunk.clock), 1, 2)
    mask, open_on_entry, open_on_exit = _document_masks(carry, chunk, c)

    angle = cumulative(turn) + carry.angle[:, :, None]
    # Without the barrier XLA recomputes sine and cosine in each of their four uses.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angle)[:, :, :, None], jnp.sin(angle)[:, :, :, None]))
    k = rotate_by(_head_major(chunk.B, inputs.B_bias, dtype), cos, sin).astype(compute).reshape(b, h, c * r, -1)
    q = rotate_by(_head_major(chunk.C, inputs.C_bias, dtype), cos, sin).astype(compute).reshape(b, h, c * r, -1)
    v = jnp.moveaxis(expand_ranks(chunk.x, inputs.mimo_x), 1, 2).astype(compute)

    coarse, fine = (cumulative(u) for u in split_log_decay(log_decay))
    exponent = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    W = jnp.exp(jnp.where(mask, exponent, -jnp.inf)) * scale[..., None, :]
    W = jnp.where(np.eye(c, dtype=bool)[None, None], gamma[..., None, :], W)
    scores = matmul("bhin,bhjn->bhij", q, k, dtype).reshape(b, h, c, r, c, r) * W[:, :, :, None, :, None]
    o = matmul("bhij,bhjp->bhip", scores.astype(compute).reshape(b, h, c * r, c * r), v.reshape(b, h, c * r, p), dtype)

    from_entry = jnp.exp(jnp.where(open_on_entry, coarse + fine, -jnp.inf))
    o_entry = matmul("bhin,bhpn->bhip", q, carry.ssm.astype(compute), dtype).reshape(b, h, c, r, p)
    o = o.reshape(b, h, c, r, p) + from_entry[..., None, None] * o_entry

    to_exit = (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)
    weight = jnp.exp(jnp.where(open_on_exit, to_exit, -jnp.inf)) * scale
    written = (v * weight[..., None, None]).astype(compute).reshape(b, h, c * r, p)
    ssm = from_entry[..., -1, None, None] * carry.ssm + matmul("bhjp,bhjn->bhpn", written, k, dtype)
    return _advance(carry, chunk, angle, turn, ssm), jnp.moveaxis(o, (1, 3), (3, 2)).astype(compute)


def _advance(carry: _Carry, chunk: _Chunk, angle, turn, ssm) -> _Carry:
    angle_end = wrap(angle[:, :, -1])
    if carry.document is None:
        return _Carry(angle_end, ssm, None, None)
    ids = chunk.segment_ids
    starts = ids != jnp.concatenate([carry.document[:, None], ids[:, :-1]], axis=1)
    last = starts & (ids == ids[:, -1:])
    before = jnp.sum(jnp.where(last[:, None, :, None], angle - turn, 0), axis=2)
    at_start = jnp.where(jnp.any(last, axis=1)[:, None, None], before, carry.angle_at_start)
    # Both angles lose the same multiple of 2 pi only modulo 2 pi, which is all that a rotation sees.
    return _Carry(angle_end, ssm, ids[:, -1], wrap(at_start))


def _document_masks(carry: _Carry, chunk: _Chunk, c: int) -> tuple[Bool[Array, "#b 1 c c"], Array, Array]:
    """Who sees whom inside the chunk, who sees the state on entry, and who is seen by the state on exit."""
    causal = np.tril(np.ones((1, 1, c, c), bool))
    ids = chunk.segment_ids
    if ids is None:
        return jnp.asarray(causal), jnp.asarray(True), jnp.asarray(True)
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return causal & same, (ids == carry.document[:, None])[:, None], (ids == ids[:, -1:])[:, None]


def split_log_decay(log_decay: Float[Array, "b h c"]) -> tuple[Float[Array, "b h c"], Float[Array, "b h c"]]:
    coarse = jnp.round(log_decay / LOG_DECAY_GRAIN) * LOG_DECAY_GRAIN
    return coarse, log_decay - coarse


def cumulative(u: Float[Array, "b h c *s"]) -> Float[Array, "b h c *s"]:
    """Inclusive cumulative sum over the chunk, as a triangular product: one matmul instead of log2(c) passes."""
    lower = np.tril(np.ones((u.shape[2], u.shape[2]), u.dtype))
    spec = "bhj,ij->bhi" if u.ndim == 3 else "ij,bhjs->bhis"
    return jnp.einsum(spec, *((u, lower) if u.ndim == 3 else (lower, u)), precision="highest")


def _head_major(u: Float[Array, "b c r g n"], bias, dtype) -> Float[Array, "b h c r n"]:
    return jnp.moveaxis(per_head(u, bias, dtype), 1, 2)


def matmul(spec: str, a: Array, b: Array, dtype: jnp.dtype) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=dtype)
