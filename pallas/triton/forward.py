"""The forward pass after angles and coefficients: states from chunk to chunk, then every chunk's output by itself.

    states   h <- through h + sum_j exit_j k_j v_j^T                             one program per row, head and segment
    outputs  o_i = entry_i q_i h + sum_j W_ij (q_i . k_j) v_j,  y = (o + D v) silu(z)    one per chunk and head

Sections 3.1.3 and 3.3 of arXiv:2603.15569; entry, exit and through in coefficients.py, W in tiles.py. One fused pass
would move fewer bytes and is bound by the latency of its serial chain; here only the cheap pass is serial. Where batch
x heads leave the GPU empty, time is cut into segments: a pass from zero finds what each segment adds, a short scan
gives each its initial state, and a second pass starts from it. The backward pass (backward.py) makes the same states
again.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas.triton import angles, coefficients, tiles
from pallas.triton.block_sizes import BlockSizes
from pallas.triton.operands import Arguments, Operands, at_heads, given_chunk, specs
from pallas.triton.tiles import Tiling


def _state_kernel(segment, ops: Operands, _, *refs, tiling: Tiling, chunks: int, ahead: bool):
    """ops of one row and head; refs as in `walk`, with h0, the last state and the entries."""

    def load(t0):
        return tiles.load_slabs(tiling, ops.B, t0), tiling.of_token(ops.x, t0, slice(None))

    def value(x):
        return of_ranks(tiling, ops, x)

    walk(tiling, ops, lambda i: segment * chunks + i, chunks, load, value, ops.B_bias, ops.exit, refs, ahead)


def walk(tiling: Tiling, ops: Operands, chunk_at, chunks: int, load, value, bias, weight, refs, ahead: bool) -> None:
    """From chunk to chunk of a segment: u <- through u + sum_i weight_i k_i value_i^T.

    Args:
        chunk_at: the i-th chunk on the way, i < chunks.
        load: of a chunk's first token, B or C and what `value` makes (rows, p) of.
        bias, weight: of B or C, whose rotation k is, and of a token; from ops.
        refs: the first u (n, p) in float32, None is 0; the last u; what every chunk finds, (m, n, p) or None.
        ahead: the next chunk is loaded while one is computed, because the compiler does not fetch ahead where each
            rank's row has an address of its own.
    """
    start_ref, end_ref, found_ref = refs
    slabs = tiles.slabs(tiling)

    def load_at(i):
        return load(chunk_at(i) * tiling.c)

    def step(i, u, raw, loaded):
        chunk = chunk_at(i)
        weights, kept = tiling.of_token(weight, chunk * tiling.c), ops.through[chunk]
        turns = tiles.turns(tiling, tiles.load_angles(tiling, ops, chunk))
        weighted = (value(loaded).astype(jnp.float32) * weights[:, None]).astype(ops.x.dtype)
        k = tiles.project(tiling, raw, bias, turns, ops.x.dtype)
        # Right before u changes: written first, its way to memory would hold up the loads above.
        if found_ref is not None:
            for slab, u_ in zip(slabs, u):
                found_ref[chunk, slab.channels] = u_.astype(found_ref.dtype)
        return [u_ * kept + tiling.dot(k_, weighted, (0, 0)) for u_, k_ in zip(u, k)]

    def body(i, carry):
        u, loaded = carry
        if ahead:
            return step(i, u, *loaded), load_at(jnp.minimum(i + 1, chunks - 1))
        return step(i, u, *load_at(i)), None

    if start_ref is None:
        start = [jnp.zeros((slab.width, tiling.p), jnp.float32) for slab in slabs]
    else:
        start = [start_ref[slab.channels] for slab in slabs]
    u, _ = lax.fori_loop(0, chunks, body, (start, load_at(0) if ahead else None))
    for slab, u_ in zip(slabs, u):
        end_ref[slab.channels] = u_


def values(tiling: Tiling, ops: Operands, t0) -> jax.Array:
    """v, (rows, p) in the dtype of x."""
    return of_ranks(tiling, ops, tiling.of_token(ops.x, t0, slice(None)))


def of_ranks(tiling: Tiling, ops: Operands, x: jax.Array) -> jax.Array:
    """v of a tile's x."""
    if ops.mimo_x is None:
        return x
    return (x.astype(jnp.float32) * tiling.of_rank(ops.mimo_x, slice(None))).astype(x.dtype)


def _output_kernel(chunk_ref, ops: Operands, entry_ref, y_ref, *, tiling: Tiling):
    """ops of one row and head, entry (n, p) of one chunk, y (t, p), or (t r, p) where the ranks stay."""
    # The chunk is read from memory: with the same number off pl.program_id, and the same instructions else, an H100
    # takes 0.47 ms instead of 0.38. Why is not known.
    chunk = chunk_ref[...]
    t0 = chunk * tiling.c
    slabs = tiles.slabs(tiling)
    # First what comes from the device's memory: a load behind a barrier is waited for.
    h = [entry_ref[slab.channels] for slab in slabs]
    B, C = tiles.load_slabs(tiling, ops.B, t0), tiles.load_slabs(tiling, ops.C, t0)
    v = values(tiling, ops, t0)
    z = None if ops.z is None else tiling.of_token(ops.z, t0, slice(None))
    turns = tiles.turns(tiling, tiles.load_angles(tiling, ops, chunk))
    q = tiles.project(tiling, C, ops.C_bias, turns, v.dtype)
    k = tiles.project(tiling, B, ops.B_bias, turns, v.dtype)
    scores = sum(tiling.dot(q_, k_, (1, 1)) for q_, k_ in zip(q, k))
    decays = tiles.load_decays(tiling, ops, t0)
    W = tiles.weights(tiling, decays, tiles.later(tiling, ops, t0, decays))
    o = tiling.dot(tiles.weighted(tiling, ops, W, scores).astype(v.dtype), v)
    # The state's share and the gate last: three programs then fit the registers of a multiprocessor, instead of two.
    entry = sum(tiling.dot(q_, h_) for h_, q_ in zip(h, q))
    o = tiling.fma(tiling.of_token(ops.entry, t0)[:, None], entry, o)
    if z is not None:
        u = gate(tiling, ops, z)
        o *= u * tiling.sigmoid(u)
    if ops.mimo_o is not None:
        y_ref[pl.ds(t0, tiling.c)] = tiling.per_token(o * tiling.of_rank(ops.mimo_o, slice(None))).astype(y_ref.dtype)
    else:
        y_ref[pl.ds(t0 * tiling.r, tiling.rows)] = o.astype(y_ref.dtype)


def gate(tiling: Tiling, ops: Operands, z) -> jax.Array:
    """The gate before silu, (rows, p) in float32, from the tile's z."""
    z = z.astype(jnp.float32)
    return z if ops.mimo_z is None else z * tiling.of_rank(ops.mimo_z, slice(None))


def call_serial(
    kernel,
    name: str,
    ops: Operands,
    sequence,
    start,
    *,
    keep: bool,
    first: int,
    rows: int,
    segments: int,
    tiling: Tiling,
    blocks: BlockSizes,
) -> tuple[jax.Array, jax.Array | None]:
    """A pass from chunk to chunk of every segment, forwards or backwards, as `kernel` walks.

    Args:
        sequence: what the kernel reads besides, (batch or rows, t or t r, h, p), or None.
        start: (rows, h, segments, n, p), None is 0.
        keep: whether the states of all chunks are asked for.
        first, rows: the first row of the batch, and how many.

    Returns:
        Where segments end, like start; and the states of all chunks (rows, h, m, n, p) in the dtype of x, or None.
    """
    _, t, h, p = ops.x.shape
    per_group, chunks = h // ops.B.shape[2], t // tiling.c
    at = functools.partial(at_heads, h)

    beside = None
    if sequence is not None:
        length = sequence.shape[1]
        beside = pl.BlockSpec((None, length, None, p), at(lambda h, s, b: (first % len(sequence) + b, 0, h, 0)))
    segment = pl.BlockSpec((None, None, None, tiling.n, p), at(lambda h, s, b: (b, h, s, 0, 0)))
    whole = pl.BlockSpec((None, None, chunks, tiling.n, p), at(lambda h, s, b: (b, h, 0, 0, 0)))
    return pl.pallas_call(
        given_chunk(kernel, h, tiling=tiling, chunks=chunks // segments, ahead=tiling.r > 1),
        grid=(h * segments, rows),
        in_specs=[
            specs(ops, at(lambda h, s, b: (first + b, h, h // per_group))),
            beside,
            None if start is None else segment,
        ],
        out_specs=[segment, whole if keep else None],
        out_shape=[
            jax.ShapeDtypeStruct((rows, h, segments, tiling.n, p), jnp.float32),
            jax.ShapeDtypeStruct((rows, h, chunks, tiling.n, p), ops.x.dtype) if keep else None,
        ],
        compiler_params=tiles.compiler_params(blocks.num_warps, blocks.serial_stages),
        interpret=tiling.interpret,
        name=name,
    )(ops, sequence, start)


def _call_outputs(ops: Operands, entries, tiling: Tiling, blocks: BlockSizes) -> jax.Array:
    b, t, h, p = ops.x.shape
    per_group, m = h // ops.B.shape[2], t // tiling.c
    rows = t if ops.mimo_o is not None else t * tiling.r
    at = functools.partial(at_heads, h)
    return pl.pallas_call(
        functools.partial(_output_kernel, tiling=tiling),
        grid=(h * m, b),
        in_specs=[
            pl.BlockSpec((None,), at(lambda h, c, b: (c,))),
            specs(ops, at(lambda h, c, b: (b, h, h // per_group))),
            pl.BlockSpec((None, None, None, tiling.n, p), at(lambda h, c, b: (b, h, c, 0, 0))),
        ],
        out_specs=pl.BlockSpec((None, rows, None, p), at(lambda h, c, b: (b, 0, h, 0))),
        out_shape=jax.ShapeDtypeStruct((b, rows, h, p), ops.x.dtype),
        # There is no loop over heads, whose pointers of what is fetched ahead would not fit beside the tiles.
        compiler_params=tiles.compiler_params(blocks.num_warps, num_stages=1),
        interpret=tiling.interpret,
        name="ssm_outputs",
    )(jnp.arange(m, dtype=jnp.int32), ops, entries)


def entry_states(
    ops: Operands, h0, tiling: Tiling, segments: int, blocks: BlockSizes, first: int, rows: int
) -> tuple[jax.Array, jax.Array]:
    """What every chunk starts from, (rows, h, chunks, n, p) in the dtype of x, and the last state (rows, h, n, p) in
    float32, of the rows from `first` on, which h0 has; None is 0."""
    how = dict(first=first, rows=rows, segments=segments, tiling=tiling, blocks=blocks)
    call = functools.partial(call_serial, _state_kernel, "ssm_states", ops, None, **how)
    starts = None if h0 is None else h0[:, :, None]
    if segments > 1:
        ends, _ = call(None, keep=False)
        starts = scan_segments(h0, ends, through_segments(ops, first, ends))
    ends, entries = call(starts, keep=True)
    return entries, ends[:, :, -1]


def through_segments(ops: Operands, first: int, ends) -> jax.Array:
    """What each segment's end keeps of its start, (b, h, segments), of the rows from `first` on that `ends` has."""
    b, h, segments = ends.shape[:3]
    return jnp.prod(ops.through[first : first + b].reshape(b, h, segments, -1), axis=-1)


def scan_segments(h0, ends, through) -> jax.Array:
    """The state each segment starts from: H_0 = h0, H_{k+1} = through_k H_k + ends_k. Shapes as in call_serial."""
    starts = [jnp.zeros_like(ends[:, :, 0]) if h0 is None else h0]
    for k in range(ends.shape[2] - 1):
        starts.append(through[:, :, k, None, None] * starts[-1] + ends[:, :, k])
    return jnp.stack(starts, axis=2)


def forward(
    args: Arguments, h0, tiling: Tiling, segments: int, blocks: BlockSizes
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """y (b, t, h, p), or (b, t r, h, p) without mimo_o; the last state (b, h, n, p), float32, in kernel order, like h0,
    of which None is 0; and theta0 (b, chunks, h, s), None where nothing turns."""
    theta0 = angles.before_chunks(args.turned, args.angle, tiling) if tiling.s else None
    ops = coefficients.operands(args, theta0, tiling)
    entries, last = entry_states(ops, h0, tiling, segments, blocks, 0, len(ops.x))
    return _call_outputs(ops, entries, tiling, blocks), last, theta0
