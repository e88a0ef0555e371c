"""The backward pass, from the inputs alone: nothing but them is kept between the passes.

    adjoints   dS <- through dS + sum_i entry_i q_i g_i^T, from chunk to chunk in reverse        (as forward's states)
    gradients  every chunk by itself, from its state on entry h and the adjoint dS of its state on exit

The gradients are four kinds of kernel: of the values, of the scores' weights, and of dq and dk per slab of the state.
Apart, because what does not fit the registers costs more than what is made twice. With g = dy silu(z), X = g v^T,
Y = q k^T, E_ij = exp(cs_i - cs_j) for i later than j, W as in tiles.py, and M = W X:

    dq = M k + entry g h^T        dk = M^T q + exit v dS^T        dv = (W Y + D)^T g + exit k dS
    dentry_i = g_i.(q_i h)        dexit_j = v_j.(k_j dS)          dthrough = <dS, h>
    dscale_j = sum_i (E X Y)_ij   dgamma_i = (X Y)_ii             dcs_j = sum_i (E X Y scale)_ji - scale_j dscale_j
    dtheta = q x dq + k x dk per turning pair, whose reverse cumulative sum is what each token's turn receives

dB, dC and domega are summed over a program's heads in a fixed order, and over programs outside. What the coefficients
receive is handed on by the derivative of plain jnp (operands.py), and so is what a turn receives from later chunks:
theta0 takes the sum of each chunk's dtheta, read off the states (`_start_angles`).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas.triton import tiles
from pallas.triton.block_sizes import BlockSizes
from pallas.triton.forward import call_serial, entry_states, gate, scan_segments, values
from pallas.triton.operands import OfHead, Operands, at_head, at_heads, heads_per_program, over_heads, specs
from pallas.triton.tiles import Tiling


def _adjoint_kernel(
    segment_ref, ops: Operands, dy_ref, dS_ref, exits_ref, start_ref, through_ref, *, tiling: Tiling, chunks: int
):
    """As forward's _state_kernel, in reverse: dS (n, p) enters at the segment's end and leaves at its start."""
    last = (segment_ref[...] + 1) * chunks - 1
    slabs = tiles.slabs(tiling)

    def body(i, carry):
        dS, through = carry
        chunk = last - i
        t0 = chunk * tiling.c
        C = tiles.load_slabs(tiling, ops.C, t0)
        g = _output_gradient(tiling, ops, dy_ref, t0)
        if exits_ref is not None:
            for slab, u in zip(slabs, dS):
                exits_ref[chunk, slab.channels] = u.astype(exits_ref.dtype)
        q = tiles.project(tiling, C, ops.C_bias, tiles.turns(tiling, ops, chunk), ops.x.dtype)
        seen = (g * tiling.of_token(ops.entry, t0)[:, None]).astype(ops.x.dtype)
        kept = ops.through[chunk]
        return [u * kept + tiling.dot(q_, seen, (0, 0)) for u, q_ in zip(dS, q)], through * kept

    dS, through = lax.fori_loop(0, chunks, body, ([dS_ref[slab.channels] for slab in slabs], jnp.float32(1)))
    for slab, u in zip(slabs, dS):
        start_ref[slab.channels] = u
    through_ref[...] = through


def _of_ranks(tiling: Tiling, ops: Operands, dy_ref, t0):
    """dy before the contraction of ranks, (rows, p) in float32."""
    if ops.mimo_o is None:
        return dy_ref[pl.ds(t0 * tiling.r, tiling.rows)].astype(jnp.float32)
    return tiling.of_token(dy_ref, t0, slice(None)).astype(jnp.float32) * tiling.of_rank(ops.mimo_o, slice(None))


class ValueGradients(NamedTuple):
    """What the kernel of the values' side writes; None where the operand is absent. m chunks.

    Sums over the tokens of a chunk (mimo_*) are finished outside.
    """

    x: jax.Array  # (b, t, h, p)
    z: jax.Array | None  # (b, t, h, p)
    mimo_x: jax.Array | None  # (b, m, h, r, p)
    mimo_z: jax.Array | None
    mimo_o: jax.Array | None
    entry: jax.Array  # (b, h, t)
    exit: jax.Array
    through: jax.Array  # (b, h, m)


def _value_kernel(
    chunk_ref, ops: Operands, dy_ref, entry_ref, exit_ref, out: ValueGradients, *, tiling: Tiling, heads: int
):
    """One chunk of one row, `heads` heads of one group: refs keep the axis of those heads."""

    def body(head, chunk, _):
        states = OfHead(entry_ref, 0, head), OfHead(exit_ref, 0, head)
        _values_side(at_head(ops, head), OfHead(dy_ref, 1, head), *states, _at_head(out, head), chunk, tiling)

    over_heads(heads, chunk_ref, body)


# Where outputs keep the block's heads, beside the batch; None: they are shared by the heads.
_HEAD_AXES = dict(x=1, z=1, mimo_x=1, mimo_z=1, mimo_o=1, entry=0, exit=0, through=0, D=1, cs=0, scale=0, gamma=0,
                  projection=None, bias=1, clock=0, omega=None)  # fmt: skip


def _at_head(out, head):
    """Outputs of one head, from refs to a block of heads."""
    return type(out)(**{
        name: ref if ref is None or _HEAD_AXES[name] is None else OfHead(ref, _HEAD_AXES[name], head)
        for name, ref in out._asdict().items()
    })  # fmt: skip


def _values_side(ops: Operands, dy_ref, entry_ref, exit_ref, out: ValueGradients, chunk, tiling: Tiling) -> None:
    """One head: what needs no dq or dk. entry, exit (n, p)."""
    t0 = chunk * tiling.c
    dtype = ops.x.dtype
    slabs = tiles.slabs(tiling)
    tokens = pl.ds(t0, tiling.c)
    B, C = tiles.load_slabs(tiling, ops.B, t0), tiles.load_slabs(tiling, ops.C, t0)
    v = values(tiling, ops, t0)
    turns = tiles.turns(tiling, ops, chunk)
    q = tiles.project(tiling, C, ops.C_bias, turns, dtype)
    k = tiles.project(tiling, B, ops.B_bias, turns, dtype)
    Y = sum(tiling.dot(q_, k_, (1, 1)) for q_, k_ in zip(q, k))
    WY = tiles.weighted(tiling, ops, tiles.weights(tiling, ops, t0), Y).astype(dtype)
    o = tiling.dot(WY, v)
    g, slope = _gate(tiling, ops, dy_ref, t0, o)
    o_entry = sum(tiling.dot(q_, entry_ref[slab.channels]) for slab, q_ in zip(slabs, q))
    dentry = jnp.sum(g * o_entry, axis=1)
    o = tiling.fma(tiling.of_token(ops.entry, t0)[:, None], o_entry, o)
    dz = None if slope is None else (o * slope)

    g_low = g.astype(dtype)
    k_exit = sum(tiling.dot(k_, exit_ref[slab.channels]) for slab, k_ in zip(slabs, k))
    dexit = jnp.sum(v.astype(jnp.float32) * k_exit, axis=1)
    dv = tiling.fma(tiling.of_token(ops.exit, t0)[:, None], k_exit, tiling.dot(WY, g_low, (0, 0)))
    out.entry[tokens] = tiling.per_token(dentry)
    out.exit[tokens] = tiling.per_token(dexit)
    _store_dx(tiling, ops, out, chunk, dv)
    _store_dz(tiling, ops, dy_ref, out, chunk, dz, o)
    out.through[chunk] = sum(
        jnp.sum(jnp.sum(entry_ref[slab.channels].astype(jnp.float32) * exit_ref[slab.channels].astype(jnp.float32), 1))
        for slab in slabs
    )


def _gate(tiling: Tiling, ops: Operands, dy_ref, t0, o):
    """g and what dz is of the gated o, both (rows, p) in float32; the latter None without a gate."""
    dy = _of_ranks(tiling, ops, dy_ref, t0)
    if ops.z is None:
        return dy, None
    u = gate(tiling, ops, tiling.of_token(ops.z, t0, slice(None)))
    # 0 o ties the gate to o's registers: the compiler would else redo it for every operand it lays out differently.
    sigmoid = tiling.fma(0.0 * o, 1.0, tiling.sigmoid(u))
    swish = u * sigmoid
    return dy * swish, dy * tiling.fma(swish, 1 - sigmoid, sigmoid)


def _store_dx(tiling: Tiling, ops: Operands, out: ValueGradients, chunk, dv) -> None:
    """dx and dmimo_x from dv."""
    t0 = chunk * tiling.c
    if ops.mimo_x is not None:
        x = tiling.of_token(ops.x, t0, slice(None)).astype(jnp.float32)
        out.mimo_x[chunk] = tiling.per_rank(dv * x)
        dv *= tiling.of_rank(ops.mimo_x, slice(None))
    out.x[pl.ds(t0, tiling.c)] = tiling.per_token(dv).astype(out.x.dtype)


def _store_dz(tiling: Tiling, ops: Operands, dy_ref, out: ValueGradients, chunk, dz, o) -> None:
    """dz from that of the ranks' gates; dmimo_z, and dmimo_o from o, the read before the gate."""
    t0 = chunk * tiling.c
    z = None if ops.z is None else tiling.of_token(ops.z, t0, slice(None))
    if ops.mimo_o is not None:
        if z is not None:
            u = gate(tiling, ops, z)
            o *= u * tiling.sigmoid(u)
        out.mimo_o[chunk] = tiling.per_rank(tiling.of_token(dy_ref, t0, slice(None)).astype(jnp.float32) * o)
    if z is None:
        return
    if ops.mimo_z is not None:
        out.mimo_z[chunk] = tiling.per_rank(dz * z.astype(jnp.float32))
        dz *= tiling.of_rank(ops.mimo_z, slice(None))
    out.z[pl.ds(t0, tiling.c)] = tiling.per_token(dz).astype(out.z.dtype)


class WeightGradients(NamedTuple):
    """What the kernel of the scores' weights writes; D None where the operand is."""

    D: jax.Array | None  # (b, m, h), to be summed over the chunks
    cs: jax.Array  # (b, h, t)
    scale: jax.Array
    gamma: jax.Array


def _weight_kernel(chunk_ref, ops: Operands, dy_ref, out: WeightGradients, *, tiling: Tiling, heads: int):
    """One chunk of one row, `heads` heads of one group: refs keep the axis of those heads."""

    def body(head, chunk, _):
        _weights_side(at_head(ops, head), OfHead(dy_ref, 1, head), _at_head(out, head), chunk, tiling)

    over_heads(heads, chunk_ref, body)


def _weights_side(ops: Operands, dy_ref, out: WeightGradients, chunk, tiling: Tiling) -> None:
    """One head: X and Y, their sums against the decays."""
    t0 = chunk * tiling.c
    dtype = ops.x.dtype
    B, C = tiles.load_slabs(tiling, ops.B, t0), tiles.load_slabs(tiling, ops.C, t0)
    v = values(tiling, ops, t0)
    g = _output_gradient(tiling, ops, dy_ref, t0).astype(dtype)
    turns = tiles.turns(tiling, ops, chunk)
    q = tiles.project(tiling, C, ops.C_bias, turns, dtype)
    k = tiles.project(tiling, B, ops.B_bias, turns, dtype)
    X = tiling.dot(g, v, (1, 1))
    XY = X * sum(tiling.dot(q_, k_, (1, 1)) for q_, k_ in zip(q, k))
    i, j = tiles.row_and_column(tiling)
    EXY = tiles.later(tiling, ops, t0) * XY
    dscale = tiling.per_token(jnp.sum(EXY, axis=0))
    received = tiling.per_token(jnp.sum(EXY * tiling.of_token(ops.scale, t0)[None, :], axis=1))
    tokens = pl.ds(t0, tiling.c)
    out.scale[tokens] = dscale
    out.cs[tokens] = received - ops.scale[tokens] * dscale
    out.gamma[tokens] = tiling.per_token(jnp.sum(jnp.where(i == j, XY, 0), axis=1))
    if ops.D is not None:
        i, j = (lax.broadcasted_iota(jnp.int32, X.shape, axis) for axis in (0, 1))
        out.D[chunk] = jnp.sum(jnp.sum(jnp.where(i == j, X, 0), axis=1))


def _output_gradient(tiling: Tiling, ops: Operands, dy_ref, t0):
    """g, (rows, p) in float32."""
    g = _of_ranks(tiling, ops, dy_ref, t0)
    if ops.z is None:
        return g
    u = gate(tiling, ops, tiling.of_token(ops.z, t0, slice(None)))
    return g * (u * tiling.sigmoid(u))


class ProjectionGradients(NamedTuple):
    """What a kernel of the projections' side writes, of B or of C, for one slab of w channels; N programs per group.

    Sums over the tokens of a chunk (bias) and over blocks of heads are finished outside.
    """

    projection: jax.Array  # (N, b, t r, g, w) float32
    bias: jax.Array  # (b, m, h, r, w) float32
    clock: jax.Array | None  # (b, h, t); None, like the next one, where the slab does not turn
    omega: jax.Array | None  # (N g, b, t, w / 2)


def _projection_kernel(
    chunk_ref, ops: Operands, dy_ref, states_ref, out: ProjectionGradients, *, tiling: Tiling, slab, of: str, heads: int
):
    """One slab of C (`of` "C", states on entry) or B ("B", adjoints on exit), for `heads` heads of one group."""

    def body(head, chunk, sums):
        one = at_head(ops, head)
        side = _query_side if of == "C" else _key_side
        du = side(one, OfHead(dy_ref, 1, head), OfHead(states_ref, 0, head), chunk, tiling, slab)
        return jax.tree.map(jnp.add, sums, _project_back(one, of, du, _at_head(out, head), chunk, tiling, slab))

    def zeros(width):
        return jnp.zeros((tiling.rows, width), jnp.float32)

    sums = zeros(slab.width), None if slab.pair is None else zeros(slab.width // 2)
    du, domega = over_heads(heads, chunk_ref, body, sums)
    chunk = chunk_ref[...]
    out.projection[pl.ds(chunk * tiling.rows, tiling.rows)] = du
    if domega is not None:
        out.omega[pl.ds(chunk * tiling.c, tiling.c)] = tiling.per_token(domega)


def _query_side(ops: Operands, dy_ref, entry_ref, chunk, tiling: Tiling, slab):
    """A slab of dq, (rows, w) in float32."""
    t0 = chunk * tiling.c
    dtype = ops.x.dtype
    v = values(tiling, ops, t0)
    g = _output_gradient(tiling, ops, dy_ref, t0)
    M = (tiles.weights(tiling, ops, t0) * tiling.dot(g.astype(dtype), v, (1, 1))).astype(dtype)
    k = tiles.load_projected(tiling, ops, "B", chunk, slab)
    seen = (g * tiling.of_token(ops.entry, t0)[:, None]).astype(dtype)
    return tiling.dot(M, k) + tiling.dot(seen, entry_ref[slab.channels], (1, 1))


def _key_side(ops: Operands, dy_ref, exit_ref, chunk, tiling: Tiling, slab):
    """A slab of dk, (rows, w) in float32."""
    t0 = chunk * tiling.c
    dtype = ops.x.dtype
    v = values(tiling, ops, t0)
    g = _output_gradient(tiling, ops, dy_ref, t0).astype(dtype)
    # M^T, made as such: an operand of a product comes from registers as it is, but is transposed through memory.
    M = (tiles.weights(tiling, ops, t0, transposed=True) * tiling.dot(v, g, (1, 1))).astype(dtype)
    q = tiles.load_projected(tiling, ops, "C", chunk, slab)
    written = (v.astype(jnp.float32) * tiling.of_token(ops.exit, t0)[:, None]).astype(dtype)
    return tiling.dot(M, q) + tiling.dot(written, exit_ref[slab.channels], (1, 1))


def _project_back(ops: Operands, of: str, du, out: ProjectionGradients, chunk, tiling: Tiling, slab):
    """From dq or dk: writes what is the head's own, returns its share of the projection's gradient and of domega."""
    t0 = chunk * tiling.c
    ref, bias_ref = (ops.C, ops.C_bias) if of == "C" else (ops.B, ops.B_bias)
    turn = tiles.turn(tiling, ops, chunk, slab)
    back = tiles.rotate_back(tiling, du, turn)
    out.bias[chunk] = tiling.per_rank(back)
    if turn is None:
        return back, None
    (a, b), (da, db) = tiles.pairs_of(tiles.load(tiling, ref, bias_ref, t0, slab)), tiles.pairs_of(back)
    dtheta = tiling.fma(a, db, -(b * da))
    # The reverse cumulative sum, of which Triton has the forward one only.
    received = tiling.once_per_token(jnp.sum(dtheta, axis=0)[None, :] - jnp.cumsum(dtheta, axis=0) + dtheta)
    omega = tiling.of_token(ops.omega, t0, slab.pairs)
    out.clock[pl.ds(t0, tiling.c)] = tiling.per_token(jnp.sum(received * omega, axis=1))
    return back, received * tiling.of_token(ops.clock, t0)[:, None]


def _exit_adjoints(ops: Operands, dy, dlast, tiling: Tiling, segments: int, blocks: BlockSizes):
    """Adjoints of every chunk's state on exit (b, h, chunks, n, p) in the dtype of x, and that of h0 in float32."""
    call = functools.partial(call_serial, _adjoint_kernel, "ssm_adjoints", ops, (dy,), tiling=tiling, blocks=blocks)
    ends = dlast[:, :, None]
    if segments > 1:
        from_zero = jnp.zeros((*dlast.shape[:2], segments, *dlast.shape[2:]), jnp.float32)
        _, starts, through = call(from_zero, keep=False)
        ends = jnp.flip(scan_segments(dlast, jnp.flip(starts, 2), jnp.flip(through, 2)), 2)
    exits, starts, _ = call(ends, keep=True)
    return exits, starts[:, :, 0]


class _Grid(NamedTuple):
    """Blocks of heads x chunks x batch, and the BlockSpecs of what lies on it."""

    ops: Operands
    tiling: Tiling
    blocks: BlockSizes

    @property
    def heads(self) -> int:
        return heads_per_program(self.ops.x.shape[2], self.ops.B.shape[2], self.blocks.heads)

    @property
    def per_group(self) -> int:
        """Blocks of heads in a group."""
        return self.ops.x.shape[2] // self.ops.B.shape[2] // self.heads

    @property
    def blocks_of_heads(self) -> int:
        return self.ops.x.shape[2] // self.heads

    @property
    def chunks(self) -> int:
        return self.ops.x.shape[1] // self.tiling.c

    def at(self, index):
        """index(block of heads, chunk, row of the batch), from the grid's axes."""
        return at_heads(self.blocks_of_heads, index)

    def call(self, kernel, name: str, out: tuple, inputs, **static):
        """Runs `kernel`; `out` holds (shape, BlockSpec) or None, `inputs` (array, BlockSpec), after chunk and ops."""
        b = self.ops.x.shape[0]
        outs = [None if u is None else u[i] for u in out for i in (0, 1)]
        return pl.pallas_call(
            functools.partial(kernel, tiling=self.tiling, heads=self.heads, **static),
            grid=(self.blocks_of_heads * self.chunks, b),
            in_specs=[
                pl.BlockSpec((None,), self.at(lambda i, c, b: (c,))),
                specs(self.ops, self.at(lambda i, c, b: (b, i, i // self.per_group)), self.heads),
                *(spec for _, spec in inputs),
            ],
            out_specs=[type(out)(*outs[1::2])],
            out_shape=[type(out)(*outs[0::2])],
            compiler_params=tiles.compiler_params(self.blocks.num_warps, self.blocks.stages),
            interpret=self.tiling.interpret,
            name=name,
        )(jnp.arange(self.chunks, dtype=jnp.int32), self.ops, *(array for array, _ in inputs))[0]

    def sequence(self, array):
        """(b, t or t r, h, p), as an output in the array's dtype."""
        if array is None:
            return None
        _, rows, _, p = array.shape
        return jax.ShapeDtypeStruct(array.shape, array.dtype), self.sequence_spec(array)

    def sequence_spec(self, array):
        _, rows, _, p = array.shape
        return pl.BlockSpec((None, rows, self.heads, p), self.at(lambda i, c, b: (b, 0, i, 0)))

    @property
    def state_spec(self):
        """One chunk of (b, h, m, n, p)."""
        n, p = self.tiling.n, self.tiling.p
        return pl.BlockSpec((None, self.heads, None, n, p), self.at(lambda i, c, b: (b, i, c, 0, 0)))

    def coefficient(self, length: int | None = None):
        """(b, h, t) or (b, h, length)."""
        b, t, h, _ = self.ops.x.shape
        length = length or t
        spec = pl.BlockSpec((None, self.heads, length), self.at(lambda i, c, b: (b, i, 0)))
        return jax.ShapeDtypeStruct((b, h, length), jnp.float32), spec

    def per_chunk(self, operand, *shape):
        """(b, m, h, *shape), or None without the operand."""
        if operand is None:
            return None
        b, _, h, _ = self.ops.x.shape
        index = self.at(lambda i, c, b: (b, 0, i, *(0 for _ in shape)))
        spec = pl.BlockSpec((None, self.chunks, self.heads, *shape), index)
        return jax.ShapeDtypeStruct((b, self.chunks, h, *shape), jnp.float32), spec


def _call_value_gradients(ops: Operands, dy, entries, exits, tiling: Tiling, blocks: BlockSizes) -> ValueGradients:
    # One head to a program, as in the forward pass: what is fetched ahead needs registers that this one has not.
    grid = _Grid(ops, tiling, dataclasses.replace(blocks, heads=1))
    r, p = tiling.r, tiling.p
    out = ValueGradients(
        x=grid.sequence(ops.x),
        z=grid.sequence(ops.z),
        mimo_x=grid.per_chunk(ops.mimo_x, r, p),
        mimo_z=grid.per_chunk(ops.mimo_z, r, p),
        mimo_o=grid.per_chunk(ops.mimo_o, r, p),
        entry=grid.coefficient(),
        exit=grid.coefficient(),
        through=grid.coefficient(grid.chunks),
    )
    inputs = (dy, grid.sequence_spec(dy)), (entries, grid.state_spec), (exits, grid.state_spec)
    return grid.call(_value_kernel, "ssm_value_gradients", out, inputs)


def _call_weight_gradients(ops: Operands, dy, tiling: Tiling, blocks: BlockSizes) -> WeightGradients:
    grid = _Grid(ops, tiling, blocks)
    out = WeightGradients(grid.per_chunk(ops.D), *(grid.coefficient(),) * 3)
    inputs = ((dy, grid.sequence_spec(dy)),)
    return grid.call(_weight_kernel, "ssm_weight_gradients", out, inputs)


def _call_projection_gradients(
    ops: Operands, dy, states, tiling: Tiling, slab, of: str, blocks: BlockSizes
) -> ProjectionGradients:
    grid = _Grid(ops, tiling, blocks)
    b, t, h, _ = ops.x.shape
    g, r, N = ops.B.shape[2], tiling.r, grid.per_group
    w, half = slab.width, slab.width // 2

    def shared(shape, block, index):
        return jax.ShapeDtypeStruct(shape, jnp.float32), pl.BlockSpec(block, grid.at(index))

    turning = None, None
    if slab.pair is not None:
        turning = (
            grid.coefficient(),
            shared((N * g, b, t, half), (None, None, t, half), lambda i, c, b: (i, b, 0, 0)),
        )
    out = ProjectionGradients(
        shared((N, b, t * r, g, w), (None, None, t * r, None, w), lambda i, c, b: (i % N, b, 0, i // N, 0)),
        grid.per_chunk(ops.B_bias, r, w),
        *turning,
    )
    inputs = (dy, grid.sequence_spec(dy)), (states, grid.state_spec)
    static = dict(slab=slab, of=of)
    return grid.call(_projection_kernel, f"ssm_{of}_gradients", out, inputs, **static)


def _start_angles(entries, exits, h0, last, dh0, dlast, tiling: Tiling) -> jax.Array:
    """dtheta0 (b, m, h, s): what the turns of a chunk's tokens receive in all.

    To turn all tokens from a chunk's start on is to turn the state there backwards, and the last state. So their
    dtheta sum to <dlast, J last> - <dS, J h> of that start, with J the quarter turn of every pair. The sums themselves,
    of terms that cancel but for rounding, would in bfloat16 be the worse the longer the sequence is.
    """

    def turned(h, dS):
        h, dS = (u[..., : 2 * tiling.s, :].astype(jnp.float32) for u in (h, dS))
        return jnp.sum(h[..., 0::2, :] * dS[..., 1::2, :] - h[..., 1::2, :] * dS[..., 0::2, :], axis=-1)

    start, end = turned(h0, dh0)[:, :, None], turned(last, dlast)[:, :, None]
    bounds = jnp.concatenate([start, turned(entries[:, :, 1:], exits[:, :, :-1]), end], axis=2)
    return jnp.moveaxis(jnp.diff(bounds, axis=2), 2, 1)


def backward(
    ops: Operands, h0, dy, dlast, tiling: Tiling, segments: int, blocks: BlockSizes
) -> tuple[Operands, jax.Array]:
    """Gradients of the operands and of h0, from those of y and of the last state."""
    entries, last = entry_states(ops, h0, tiling, segments, blocks)
    exits, dh0 = _exit_adjoints(ops, dy, dlast, tiling, segments, blocks)
    values = _call_value_gradients(ops, dy, entries, exits, tiling, blocks)
    weights = _call_weight_gradients(ops, dy, tiling, blocks)
    slabs = tiles.slabs(tiling)
    C, B = (
        [_call_projection_gradients(ops, dy, states, tiling, slab, of, blocks) for slab in slabs]
        for of, states in (("C", entries), ("B", exits))
    )

    def joined(u: list[ProjectionGradients], name: str, over) -> jax.Array:
        """Of the slabs that have it."""
        parts = [getattr(one, name) for one in u if getattr(one, name) is not None]
        return jnp.concatenate([jnp.sum(part, axis=over) for part in parts], axis=-1)

    grads = Operands(
        x=values.x,
        z=values.z,
        B=joined(B, "projection", 0),
        C=joined(C, "projection", 0),
        B_bias=joined(B, "bias", (0, 1)),
        C_bias=joined(C, "bias", (0, 1)),
        D=None if ops.D is None else jnp.sum(weights.D, axis=(0, 1)),
        **{
            name: None if getattr(values, name) is None else jnp.sum(getattr(values, name), axis=(0, 1))
            for name in ("mimo_x", "mimo_z", "mimo_o")
        },
        coarse=weights.cs,
        fine=None if ops.fine is None else weights.cs,
        entry=values.entry,
        exit=values.exit,
        through=values.through,
        scale=weights.scale,
        gamma=weights.gamma,
        clock=sum((u.clock for u in C + B if u.clock is not None), jnp.zeros_like(ops.clock)),
        omega=joined(C, "omega", 0) + joined(B, "omega", 0) if tiling.s else None,
        theta0=_start_angles(entries, exits, h0, last, dh0, dlast, tiling) if tiling.s else None,
        segment_ids=None,
    )
    return jax.tree.map(lambda grad, operand: grad.astype(operand.dtype), grads, ops._replace(segment_ids=None)), dh0
