"""The gated delta rule in chunk-parallel form: sections 3.1 and 3.3 of arXiv:2412.06464 (Gated DeltaNet).

    S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        o_t = S_t q_t

Token t writes u_t k_t^T with u_t = beta_t (v_t - alpha_t S_{t-1} k_t). With cs the inclusive cumulative sum of log
alpha in a chunk of c tokens, the writes of the chunk solve one unit lower triangular system:

    (I + L) u = r    L_ij = beta_i exp(cs_i - cs_j) (k_i . k_j) for i > j    r_i = beta_i (v_i - exp(cs_i) S_in k_i)
    o_i   = exp(cs_i) S_in q_i + sum_{j <= i} exp(cs_i - cs_j) (q_i . k_j) u_j
    S_out = exp(cs_c) S_in + sum_j exp(cs_c - cs_j) u_j k_j^T

A scan over chunks carries S and does what needs it: r, u and S_out. All else is computed for many chunks at once. The
paper solves for two right-hand sides before the scan, beta_i v_i and beta_i exp(cs_i) k_i (its WY form), of which u is
a combination; r is one, known inside the scan.

The system is solved by substitution, which is the recurrence itself and as well behaved. I - L + L^2 - ... is the same
inverse but no way to compute it: with beta near 2 and a repeated key the powers of L grow like binomials and cancel.
So does the inverse itself, times r: 100 times the error over 1,000 tokens of that key, in float32.
Every exponent is <= 0 and masked before exp. c x c numbers of every chunk and the state on its entry are kept for the
backward pass; of longer rows than CHUNKS_AT_ONCE chunks only of so many, which are recomputed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mamba3_jax.checks import check_array, check_rank, check_segment_ids
from mamba3_jax.ops.chunked import cumulative, matmul, split_log_decay, split_time
from mamba3_jax.ops.discretization import MIN_LOG_DECAY, document_starts

CHUNK_SIZE = 64
# So many chunks are unrolled: a loop copies each slice it reads or writes, and starts a kernel for each.
UNROLLED_CHUNKS = 4
# What is made for so many chunks at once bounds the memory of a long row.
CHUNKS_AT_ONCE = 8


class _Inputs(NamedTuple):
    """What the caller gives, of N chunks of every row; with a leading axis when scanned."""

    q: Float[Array, "*M N b c h n"]
    k: Float[Array, "*M N b c h n"]
    v: Float[Array, "*M N b c h p"]
    log_alpha: Float[Array, "*M N b c h"]
    beta: Float[Array, "*M N b c h"]
    starts: Bool[Array, "*M N b c"]


class _Chunk(NamedTuple):
    """What takes the state through one chunk of every row; with a leading axis of chunks when scanned."""

    L: Float[Array, "*N b h c c"]
    k: Float[Array, "*N b h c n"]
    weighted_v: Float[Array, "*N b h c p"]
    read: Float[Array, "*N b h c 1"]
    write: Float[Array, "*N b h c 1"]
    decay: Float[Array, "*N b h 1 1"]


def gated_delta_rule(
    q: Float[Array, "b t h n"],
    k: Float[Array, "b t h n"],
    v: Float[Array, "b t h p"],
    log_alpha: Float[Array, "b t h"],
    beta: Float[Array, "b t h"],
    *,
    initial_state: Float[Array, "b h p n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """The gated delta rule over whole sequences, or over one token to decode. Letters as in ops/api.py.

    Differentiable in every floating-point argument, the initial state included.

    Args:
        q, k: queries and keys, in the dtype of the matrix products. With |k| = 1 the transition of one token has
            the eigenvalues alpha, and alpha (1 - beta) along k.
        v: values, in the same dtype.
        log_alpha: logarithm of the decay, <= 0.
        beta: weight of the write, 0 to 2; above 1 the eigenvalue along k is negative.
        initial_state: what a previous call returned; None is zero. It continues the document open at each row's start.
        segment_ids: document of each token, non-decreasing along t; every document after a row's first starts from
            zero. Checked where it is concrete, which inside jit it is not.
        chunk_size: largest chunk.

    Returns:
        o in v's dtype, and the state after the last token, in at least float32.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or value, named with what is allowed.
    """
    _check(q, k, v, log_alpha, beta, initial_state, segment_ids, chunk_size)
    b, t, h, n = q.shape
    p = v.shape[-1]
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    chunks = -(-t // chunk_size)
    groups = -(-chunks // CHUNKS_AT_ONCE)
    at_once = -(-chunks // groups)
    c = -(-t // (groups * at_once))
    row = _Inputs(
        q=q,
        k=k,
        v=v,
        log_alpha=jnp.maximum(log_alpha.astype(dtype), MIN_LOG_DECAY),
        beta=beta.astype(dtype),
        starts=jnp.zeros((b, t), bool) if segment_ids is None else document_starts(segment_ids),
    )
    row = jax.tree.map(lambda a: split_time(a, groups * at_once, c), row)
    state = jnp.zeros((b, h, p, n), dtype) if initial_state is None else initial_state.astype(dtype)
    if groups == 1:
        state, o = _chunks(state, row)
    else:
        row = jax.tree.map(lambda a: a.reshape(groups, at_once, *a.shape[1:]), row)
        state, o = jax.lax.scan(jax.checkpoint(_chunks, prevent_cse=False), state, row)
        o = o.reshape(groups * at_once, *o.shape[2:])
    return jnp.moveaxis(o, 0, 1).reshape(b, -1, h, p)[:, :t], state


def _chunks(
    state: Float[Array, "b h p n"], inputs: _Inputs
) -> tuple[Float[Array, "b h p n"], Float[Array, "N b c h p"]]:
    """The state after some chunks, and their outputs."""
    compute, dtype = inputs.v.dtype, state.dtype
    q, k, v, log_alpha, beta = (jnp.moveaxis(a, 2, 3) for a in inputs[:-1])
    within, on_entry, on_exit = jax.vmap(_decays)(log_alpha, inputs.starts)
    chunks = _Chunk(
        # Only what is below the diagonal is read.
        L=beta[..., None] * within * matmul("Nbhin,Nbhjn->Nbhij", k, k, dtype),
        k=k,
        weighted_v=beta[..., None] * v,
        read=(beta * on_entry)[..., None],
        write=on_exit[..., None],
        decay=on_entry[..., -1, None, None],
    )
    state, (u, entered) = jax.lax.scan(_chunk_step, state, chunks, unroll=len(k) <= UNROLLED_CHUNKS)
    scores = within * matmul("Nbhin,Nbhjn->Nbhij", q, k, dtype)
    o = matmul("Nbhij,Nbhjp->Nbhip", scores.astype(compute), u, dtype)
    o = o + on_entry[..., None] * matmul("Nbhin,Nbhpn->Nbhip", q, entered, dtype)
    return state, jnp.moveaxis(o.astype(compute), 3, 2)


def _chunk_step(
    state: Float[Array, "b h p n"], chunk: _Chunk
) -> tuple[Float[Array, "b h p n"], tuple[Float[Array, "b h c p"], Float[Array, "b h p n"]]]:
    """The state on exit; the writes, and the state on entry."""
    compute, dtype = chunk.k.dtype, state.dtype
    entered = state.astype(compute)
    target = chunk.weighted_v - chunk.read * matmul("bhin,bhpn->bhip", chunk.k, entered, dtype)
    u = jax.lax.linalg.triangular_solve(chunk.L, target, left_side=True, lower=True, unit_diagonal=True)
    written = matmul("bhjp,bhjn->bhpn", (chunk.write * u).astype(compute), chunk.k, dtype)
    return chunk.decay * state + written, (u.astype(compute), entered)


def _decays(
    log_alpha: Float[Array, "b h c"], starts: Bool[Array, "b c"]
) -> tuple[Float[Array, "b h c c"], Float[Array, "b h c"], Float[Array, "b h c"]]:
    """exp(cs_i - cs_j) for j <= i, exp(cs_i) and exp(cs_c - cs_j); 0 from one document to another."""
    c = log_alpha.shape[2]
    document = jnp.cumsum(starts, axis=1)[:, None]
    same = document[..., :, None] == document[..., None, :]
    coarse, fine = (cumulative(a) for a in split_log_decay(log_alpha))
    within = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    to_exit = (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)
    return (
        _masked_exp(np.tril(np.ones((1, 1, c, c), bool)) & same, within),
        _masked_exp(document == 0, coarse + fine),
        _masked_exp(document == document[..., -1:], to_exit),
    )


def _masked_exp(mask: Bool[Array, "#*shape"], exponent: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.exp(jnp.where(mask, exponent, -jnp.inf))


def _check(q, k, v, log_alpha, beta, initial_state, segment_ids, chunk_size) -> None:
    b, t, h, n = check_rank("q", q, "b t h n")
    sizes = dict(b=b, t=t, h=h, n=n, p=check_rank("v", v, "b t h p")[-1])
    for name, value in dict(q=q, k=k).items():
        check_array(name, value, "b t h n", sizes)
    check_array("v", v, "b t h p", sizes)
    for name, value in dict(log_alpha=log_alpha, beta=beta).items():
        check_array(name, value, "b t h", sizes)
    if initial_state is not None:
        check_array("initial_state", initial_state, "b h p n", sizes)
    for name, value in dict(q=q, k=k).items():
        if value.dtype != v.dtype:
            raise TypeError(f"{name}: got dtype {value.dtype}; allowed: {v.dtype}, v's")
    if t == 0:
        raise ValueError("q: got t=0 tokens; allowed: at least 1")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size!r}; allowed: a positive integer")
    check_segment_ids(segment_ids, sizes)
