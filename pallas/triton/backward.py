"""The backward pass, from the inputs alone.

    states        h, that every chunk starts from, as in the forward pass
    adjoints      dS <- through dS + sum_i entry_i q_i g_i^T, from chunk to chunk in reverse     (as forward's states)
    outputs       every chunk by itself: g, P and M for the kernels below; dz, dD, dentry, dcs, dscale, dgamma
    values        every chunk by itself: dx, dexit, dthrough
    projections   every chunk and slab of the state by itself: dB, dC, their biases', and what the angles receive

Apart, because what does not fit the registers costs more than what is made twice; but the scores of a chunk are made
once, for a matrix read is cheaper than its exponentials. With g = dy silu(z), X = g v^T, Y = q k^T, dS the adjoint of
the state at a chunk's end, E_ij = exp(cs_i - cs_j) for i later than j, W as in tiles.py, M = W X, and P = W Y with D
added on its diagonal:

    o  = P v + entry q h          dz = dy o silu'(z)              dD = sum_i X_ii
    dq = M k + entry g h^T        dk = M^T q + exit v dS^T        dv = P^T g + exit k dS
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
from pallas.triton.forward import call_serial, entry_states, gate, over_chunks, scan_segments, values
from pallas.triton.operands import (
    OfHead,
    Operands,
    at_head,
    at_heads,
    given_chunk,
    heads_per_program,
    over_heads,
    specs,
)
from pallas.triton.tiles import Tiling


def _adjoint_kernel(
    segment,
    ops: Operands,
    dy_ref,
    dS_ref,
    exits_ref,
    start_ref,
    through_ref,
    *,
    tiling: Tiling,
    chunks: int,
    ahead: bool,
):
    """As forward's _state_kernel, in reverse: dS (n, p) enters at the segment's end and leaves at its start."""
    last = (segment + 1) * chunks - 1
    slabs = tiles.slabs(tiling)

    def load(i):
        t0 = (last - i) * tiling.c
        return tiles.load_slabs(tiling, ops.C, t0), _read(tiling, ops, dy_ref, t0)

    def step(i, carry, loaded):
        (dS, through), (C, dy) = carry, loaded
        chunk = last - i
        t0 = chunk * tiling.c
        g = _gated(tiling, ops, dy, t0)
        if exits_ref is not None:
            for slab, u in zip(slabs, dS):
                exits_ref[chunk, slab.channels] = u.astype(exits_ref.dtype)
        q = tiles.project(tiling, C, ops.C_bias, tiles.turns(tiling, ops, chunk), ops.x.dtype)
        seen = (g * tiling.of_token(ops.entry, t0)[:, None]).astype(ops.x.dtype)
        kept = ops.through[chunk]
        return [u * kept + tiling.dot(q_, seen, (0, 0)) for u, q_ in zip(dS, q)], through * kept

    end = [dS_ref[slab.channels] for slab in slabs], jnp.float32(1)
    dS, through = over_chunks(chunks, load, step, end, ahead)
    for slab, u in zip(slabs, dS):
        start_ref[slab.channels] = u
    through_ref[...] = through


def _read(tiling: Tiling, ops: Operands, dy_ref, t0):
    """dy as it lies in memory, of MIMO repeated for the ranks where they were contracted; (rows, p)."""
    if ops.mimo_o is None:
        return dy_ref[pl.ds(t0 * tiling.r, tiling.rows)]
    return tiling.of_token(dy_ref, t0, slice(None))


def _of_ranks(tiling: Tiling, ops: Operands, dy):
    """dy before the contraction of ranks, in float32."""
    dy = dy.astype(jnp.float32)
    return dy if ops.mimo_o is None else dy * tiling.of_rank(ops.mimo_o, slice(None))


def _gated(tiling: Tiling, ops: Operands, dy, t0):
    """g, (rows, p) in float32."""
    g = _of_ranks(tiling, ops, dy)
    if ops.z is None:
        return g
    u = gate(tiling, ops, tiling.of_token(ops.z, t0, slice(None)))
    return g * (u * tiling.sigmoid(u))


class Given(NamedTuple):
    """What a kernel of the gradients is given beside the operands, None what it does not need; m chunks.

    Of all these b is the grid's rows or more (see `_Grid`), as of what the kernels write.
    """

    dy: jax.Array | None = None
    g: jax.Array | None = None  # (b, t r, h, p) in the dtype of x, like the next four
    P: jax.Array | None = None  # (b, h, m, rows, rows)
    M: jax.Array | None = None
    entries: jax.Array | None = None  # (b, h, m, n, p)
    exits: jax.Array | None = None


# Where refs keep the block's heads, beside the batch; None: they are shared by the heads.
_HEAD_AXES = dict(
    dy=1, g=1, P=0, M=0, entries=0, exits=0,
    x=1, mimo_x=1, exit=0, through=0, z=1, mimo_z=1, mimo_o=1, entry=0, D=0, cs=0, scale=0, gamma=0,
    projections=None, biases=2, clock=0, omega=None,
)  # fmt: skip


def _at_head(refs, head):
    """What is given or written, of one head, from refs to a block of heads."""
    return type(refs)(**{
        name: ref if ref is None or _HEAD_AXES[name] is None else OfHead(ref, _HEAD_AXES[name], head)
        for name, ref in refs._asdict().items()
    })  # fmt: skip


def _kernel(chunk, ops: Operands, given: Given, earlier, out, *, of_head, tiling: Tiling, heads: int):
    """`of_head(ops, given, out, chunk, tiling)` of one chunk of one row, for `heads` heads of one group."""

    def body(head, chunk, _):
        of_head(at_head(ops, head), _at_head(given, head), _at_head(out, head), chunk, tiling)

    over_heads(heads, chunk, tiling.interpret, body)


class OutputGradients(NamedTuple):
    """What the kernel of the outputs writes; None where the operand is absent.

    Sums over the tokens of a chunk (mimo_*, D) are finished outside. P, M, and mimo_* are of a part of the batch, and
    so is g where ranks make it larger than x, whose gradient takes its place else.
    """

    P: jax.Array  # (rows, h, m, r c, r c) in the dtype of x
    M: jax.Array
    g: jax.Array | None  # (b, t r, h, p) in the dtype of x; None where it is dy
    z: jax.Array | None  # (b, t, h, p)
    mimo_z: jax.Array | None  # (rows, m, h, r, p)
    mimo_o: jax.Array | None
    D: jax.Array | None  # (b, h, m)
    entry: jax.Array  # (b, h, t)
    cs: jax.Array
    scale: jax.Array
    gamma: jax.Array


def _output_gradients(ops: Operands, given: Given, out: OutputGradients, chunk, tiling: Tiling) -> None:
    """One head: X and Y under their weights with their sums against the decays, then what the read receives."""
    t0 = chunk * tiling.c
    tokens, rows = pl.ds(t0, tiling.c), pl.ds(t0 * tiling.r, tiling.rows)
    dtype = ops.x.dtype
    slabs = tiles.slabs(tiling)
    h = [given.entries[slab.channels] for slab in slabs]
    B, C = tiles.load_slabs(tiling, ops.B, t0), tiles.load_slabs(tiling, ops.C, t0)
    turns = tiles.turns(tiling, ops, chunk)
    q = tiles.project(tiling, C, ops.C_bias, turns, dtype)
    k = tiles.project(tiling, B, ops.B_bias, turns, dtype)
    v = values(tiling, ops, t0)
    g = _gated(tiling, ops, _read(tiling, ops, given.dy, t0), t0).astype(dtype)
    X = tiling.dot(g, v, (1, 1))
    Y = sum(tiling.dot(q_, k_, (1, 1)) for q_, k_ in zip(q, k))
    E = tiles.later(tiling, ops, t0)
    W = tiles.weights(tiling, ops, t0, E)
    P = tiles.weighted(tiling, ops, W, Y).astype(dtype)
    out.P[...] = P
    out.M[...] = (W * X).astype(dtype)
    XY = X * Y
    EXY = E * XY
    dscale = tiling.per_token(jnp.sum(EXY, axis=0))
    received = tiling.per_token(jnp.sum(EXY * tiling.of_token(ops.scale, t0)[None, :], axis=1))
    out.scale[tokens] = dscale
    out.cs[tokens] = received - ops.scale[tokens] * dscale
    i, j = tiles.row_and_column(tiling)
    out.gamma[tokens] = tiling.per_token(jnp.sum(jnp.where(i == j, XY, 0), axis=1))
    if ops.D is not None:
        i, j = (lax.broadcasted_iota(jnp.int32, X.shape, axis) for axis in (0, 1))
        out.D[chunk] = jnp.sum(jnp.sum(jnp.where(i == j, X, 0), axis=1))

    # dy and z are read again: kept from above they would fill the registers.
    o = tiling.dot(P, v)
    o_entry = sum(tiling.dot(q_, h_) for h_, q_ in zip(h, q))
    dy = _of_ranks(tiling, ops, _read(tiling, ops, given.dy, t0))
    swish, slope = _swish(tiling, ops, t0, o)
    g = dy * swish
    if out.g is not None:
        out.g[rows] = g.astype(dtype)
    out.entry[tokens] = tiling.per_token(jnp.sum(g * o_entry, axis=1))
    o = tiling.fma(tiling.of_token(ops.entry, t0)[:, None], o_entry, o)
    if ops.mimo_o is not None:
        read = tiling.of_token(given.dy, t0, slice(None)).astype(jnp.float32) * (o * swish)
        out.mimo_o[chunk] = tiling.per_rank(read)
    if ops.z is None:
        return
    dz = dy * slope * o
    if ops.mimo_z is not None:
        out.mimo_z[chunk] = tiling.per_rank(dz * tiling.of_token(ops.z, t0, slice(None)).astype(jnp.float32))
        dz *= tiling.of_rank(ops.mimo_z, slice(None))
    out.z[tokens] = tiling.per_token(dz).astype(out.z.dtype)


def _swish(tiling: Tiling, ops: Operands, t0, o):
    """The gate's factor of the read o and its slope, (rows, p) in float32, or 1."""
    if ops.z is None:
        return 1.0, None
    u = gate(tiling, ops, tiling.of_token(ops.z, t0, slice(None)))
    # 0 o ties the gate to o's registers: the compiler would else redo it for every operand it lays out differently.
    sigmoid = tiling.fma(0.0 * o, 1.0, tiling.sigmoid(u))
    swish = u * sigmoid
    return swish, tiling.fma(swish, 1 - sigmoid, sigmoid)


class ValueGradients(NamedTuple):
    """What the kernel of the values writes; None where the operand is absent.

    Sums over the tokens of a chunk (mimo_x) are finished outside.
    """

    x: jax.Array  # (b, t, h, p)
    mimo_x: jax.Array | None  # (b, m, h, r, p)
    exit: jax.Array  # (b, h, t)
    through: jax.Array  # (b, h, m)


def _value_gradients(ops: Operands, given: Given, out: ValueGradients, chunk, tiling: Tiling) -> None:
    """One head."""
    t0 = chunk * tiling.c
    slabs = tiles.slabs(tiling)
    B = tiles.load_slabs(tiling, ops.B, t0)
    v = values(tiling, ops, t0)
    k = tiles.project(tiling, B, ops.B_bias, tiles.turns(tiling, ops, chunk), v.dtype)
    dv = tiling.dot(given.P[...], _of_rows(tiling, given.g, chunk), (0, 0))
    k_exit = sum(tiling.dot(k_, given.exits[slab.channels]) for slab, k_ in zip(slabs, k))
    out.exit[pl.ds(t0, tiling.c)] = tiling.per_token(jnp.sum(v.astype(jnp.float32) * k_exit, axis=1))
    dv = tiling.fma(tiling.of_token(ops.exit, t0)[:, None], k_exit, dv)
    if ops.mimo_x is not None:
        x = tiling.of_token(ops.x, t0, slice(None)).astype(jnp.float32)
        out.mimo_x[chunk] = tiling.per_rank(dv * x)
        dv *= tiling.of_rank(ops.mimo_x, slice(None))
    out.x[pl.ds(t0, tiling.c)] = tiling.per_token(dv).astype(out.x.dtype)
    states = ((u[slab.channels].astype(jnp.float32) for u in (given.entries, given.exits)) for slab in slabs)
    out.through[chunk] = sum(jnp.sum(jnp.sum(h * dS, axis=1)) for h, dS in states)


def _of_rows(tiling: Tiling, ref, chunk, *rest):
    """A chunk of (t r, ...)."""
    return ref[(pl.ds(chunk * tiling.rows, tiling.rows), *rest)]


class ProjectionGradients(NamedTuple):
    """What the kernel of one slab of the projections writes: its channels of all; N programs per group.

    B and C, and their biases, lie in one array. Sums over the tokens of a chunk (biases) and over blocks of heads are
    finished outside.
    """

    projections: jax.Array  # (2, N, rows, t r, g, n) float32
    biases: jax.Array  # (2, rows, m, h, r, n) float32
    clock: jax.Array | None  # (b, h, t); None, like the next one, where the slab does not turn
    omega: jax.Array | None  # (N g, rows, t, s)


def _projection_kernel(
    chunk, ops: Operands, given: Given, earlier, out: ProjectionGradients, *, tiling: Tiling, slab, heads: int
):
    """One slab, for `heads` heads of one group."""

    def body(head, chunk, sums):
        one = at_head(ops, head), _at_head(given, head), _at_head(out, head)
        return jax.tree.map(jnp.add, sums, _projection_gradients(*one, chunk, tiling, slab))

    def zeros(*shape):
        return jnp.zeros(shape, jnp.float32)

    sums = (zeros(tiling.rows, slab.width),) * 2
    sums += (None if slab.pair is None else zeros(tiling.c, slab.width // 2),)
    dB, dC, domega = over_heads(heads, chunk, tiling.interpret, body, sums)
    rows = pl.ds(chunk * tiling.rows, tiling.rows)
    out.projections[0, rows], out.projections[1, rows] = dB, dC
    if domega is not None:
        out.omega[pl.ds(chunk * tiling.c, tiling.c)] = domega


def _projection_gradients(ops: Operands, given: Given, out: ProjectionGradients, chunk, tiling: Tiling, slab):
    """One head: writes what is its own, returns its shares of dB, dC and domega."""
    t0 = chunk * tiling.c
    turn = tiles.turn(tiling, ops, chunk, slab)
    q = tiles.project_slab(tiling, slab, _of_rows(tiling, ops.C, chunk, slab.channels), turn, ops.C_bias, ops.x.dtype)
    v = values(tiling, ops, t0)
    dk = tiling.dot(given.M[...], q, (0, 0))
    written = (v.astype(jnp.float32) * tiling.of_token(ops.exit, t0)[:, None]).astype(v.dtype)
    dk += tiling.dot(written, given.exits[slab.channels], (1, 1))
    dB, turned = _turn_back(tiling, ops.B, ops.B_bias, dk, turn, chunk, slab)
    out.biases[0, chunk] = tiling.per_rank(dB)

    k = tiles.project_slab(tiling, slab, _of_rows(tiling, ops.B, chunk, slab.channels), turn, ops.B_bias, ops.x.dtype)
    g = _of_rows(tiling, given.g, chunk).astype(jnp.float32)
    seen = (g * tiling.of_token(ops.entry, t0)[:, None]).astype(k.dtype)
    dq = tiling.dot(given.M[...], k) + tiling.dot(seen, given.entries[slab.channels], (1, 1))
    dC, also_turned = _turn_back(tiling, ops.C, ops.C_bias, dq, turn, chunk, slab)
    out.biases[1, chunk] = tiling.per_rank(dC)
    if turn is None:
        return dB, dC, None

    tokens = pl.ds(t0, tiling.c)
    dtheta = tiling.per_token(turned + also_turned)
    # The reverse cumulative sum, of which Triton has the forward one only.
    received = jnp.sum(dtheta, axis=0)[None, :] - jnp.cumsum(dtheta, axis=0) + dtheta
    out.clock[tokens] = jnp.sum(received * ops.omega[tokens, slab.pairs], axis=1)
    return dB, dC, received * ops.clock[tokens][:, None]


def _turn_back(tiling: Tiling, ref, bias_ref, du, turn, chunk, slab):
    """From dk or dq: the gradient before the rotation, and what the angle receives, None without one."""
    back = tiles.rotate_back(tiling, du, turn)
    if turn is None:
        return back, None
    raw = tiles.biased(tiling, _of_rows(tiling, ref, chunk, slab.channels), bias_ref, slab)
    (a, b), (da, db) = tiles.pairs_of(raw), tiles.pairs_of(back)
    return back, tiling.fma(a, db, -(b * da))


def _exit_adjoints(ops: Operands, dy, dlast, first: int, tiling: Tiling, segments: int, blocks: BlockSizes):
    """Adjoints of every chunk's state on exit (b, h, chunks, n, p) in the dtype of x, and that of h0 in float32, of the
    rows from `first` on that dlast has."""
    how = dict(tiling=tiling, blocks=blocks, first=first)
    call = functools.partial(call_serial, _adjoint_kernel, "ssm_adjoints", ops, (dy,), **how)
    ends = dlast[:, :, None]
    if segments > 1:
        from_zero = jnp.zeros((*dlast.shape[:2], segments, *dlast.shape[2:]), jnp.float32)
        _, starts, through = call(from_zero, keep=False)
        ends = jnp.flip(scan_segments(dlast, jnp.flip(starts, 2), jnp.flip(through, 2)), 2)
    exits, starts, _ = call(ends, keep=True)
    return exits, starts[:, :, 0]


class _Grid(NamedTuple):
    """Blocks of heads x chunks x `rows` rows of the batch from `first` on, and the BlockSpecs of what lies on it.

    An array holds these rows, or more: those of the serial kernels, or the whole batch. Each length divides the next,
    so that the grid's rows begin at `first % length` of an array.
    """

    ops: Operands
    first: int
    rows: int
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

    def at(self, index, length: int | None = None):
        """index(block of heads, chunk, row), from the grid's axes, in an array of `length` rows or only the grid's."""
        first = self.first % (length or self.rows)
        return at_heads(self.blocks_of_heads, lambda i, c, b: index(i, c, first + b))

    def call(self, kernel, label: str, given: Given, out, earlier=None, **static):
        """Runs `kernel`; `out` holds (shape, BlockSpec) or None, and `earlier` arrays to write into, or None."""
        outs = [None if u is None else u[i] for u in out for i in (0, 1)]
        shapes, out_specs = type(out)(*outs[0::2]), type(out)(*outs[1::2])
        inputs, kept, aliases = jax.tree.leaves((self.ops, given)), {}, {}
        present = [name for name, shape in shapes._asdict().items() if shape is not None]
        for position, name in enumerate(present):
            array = getattr(earlier, name, None)
            if array is None:
                continue
            where = next((i for i, u in enumerate(inputs) if u is array), None)
            if where is None:
                where, kept[name] = len(inputs) + len(kept), array
            aliases[where] = position
        return pl.pallas_call(
            given_chunk(kernel, self.blocks_of_heads, tiling=self.tiling, heads=self.heads, **static),
            grid=(self.blocks_of_heads * self.chunks, self.rows),
            in_specs=[
                specs(self.ops, self.at(lambda i, c, b: (b, i, i // self.per_group), len(self.ops.x)), self.heads),
                Given(*map(self._given_spec, given)),
                [getattr(out_specs, name) for name in kept],
            ],
            out_specs=[out_specs],
            out_shape=[shapes],
            input_output_aliases=aliases,
            compiler_params=tiles.compiler_params(self.blocks.num_warps, self.blocks.stages),
            interpret=self.tiling.interpret,
            name=label,
        )(self.ops, given, list(kept.values()))[0]

    def _given_spec(self, array):
        """A sequence, or one matrix a chunk."""
        if array is None:
            return None
        return self._sequence_spec(array) if array.ndim == 4 else self._chunk_spec(array.shape)

    def sequence(self, array):
        """(b, t or t r, h, p), as an output in the array's dtype."""
        if array is None:
            return None
        return jax.ShapeDtypeStruct(array.shape, array.dtype), self._sequence_spec(array)

    def _sequence_spec(self, array):
        b, rows, _, p = array.shape
        return pl.BlockSpec((None, rows, self.heads, p), self.at(lambda i, c, b: (b, 0, i, 0), b))

    def _chunk_spec(self, shape):
        """One chunk of (b, h, m, ...), a matrix of every head."""
        index = self.at(lambda i, c, b: (b, i, c, 0, 0), shape[0])
        return pl.BlockSpec((None, self.heads, None, *shape[3:]), index)

    def squares(self):
        """(rows, h, m, r c, r c) in the dtype of x."""
        shape = self.rows, self.ops.x.shape[2], self.chunks, self.tiling.rows, self.tiling.rows
        return jax.ShapeDtypeStruct(shape, self.ops.x.dtype), self._chunk_spec(shape)

    def coefficient(self, length: int | None = None):
        """(b, h, t) or (b, h, length)."""
        b, t, h, _ = self.ops.x.shape
        length = length or t
        spec = pl.BlockSpec((None, self.heads, length), self.at(lambda i, c, b: (b, i, 0), b))
        return jax.ShapeDtypeStruct((b, h, length), jnp.float32), spec

    def per_chunk(self, operand, *shape):
        """(rows, m, h, *shape), or None without the operand."""
        if operand is None:
            return None
        index = self.at(lambda i, c, b: (b, 0, i, *(0 for _ in shape)))
        spec = pl.BlockSpec((None, self.chunks, self.heads, *shape), index)
        return jax.ShapeDtypeStruct((self.rows, self.chunks, self.ops.x.shape[2], *shape), jnp.float32), spec


def _call_output_gradients(grid: _Grid, given: Given, earlier: OutputGradients | None) -> OutputGradients:
    # One head to a program, as in the forward pass: what is fetched ahead needs registers that this one has not.
    grid = grid._replace(blocks=dataclasses.replace(grid.blocks, heads=1))
    ops, r = grid.ops, grid.tiling.r
    b, t, h, p = ops.x.shape
    gated = ops.z is not None or ops.mimo_o is not None
    g = jax.ShapeDtypeStruct((b if r == 1 else grid.rows, t * r, h, p), ops.x.dtype)
    mimo_z, mimo_o = (grid.per_chunk(u, r, p) for u in (ops.mimo_z, ops.mimo_o))
    out = OutputGradients(
        P=grid.squares(),
        M=grid.squares(),
        g=grid.sequence(g) if gated else None,
        z=grid.sequence(ops.z),
        mimo_z=mimo_z,
        mimo_o=mimo_o,
        D=None if ops.D is None else grid.coefficient(grid.chunks),
        **dict.fromkeys(("entry", "cs", "scale", "gamma"), grid.coefficient()),
    )
    return grid.call(_kernel, "ssm_output_gradients", given, out, earlier, of_head=_output_gradients)


def _call_value_gradients(grid: _Grid, given: Given, earlier: ValueGradients) -> ValueGradients:
    mimo_x = grid.per_chunk(grid.ops.mimo_x, grid.tiling.r, grid.tiling.p)
    out = ValueGradients(grid.sequence(grid.ops.x), mimo_x, grid.coefficient(), grid.coefficient(grid.chunks))
    return grid.call(_kernel, "ssm_value_gradients", given, out, earlier, of_head=_value_gradients)


def _call_projection_gradients(
    grid: _Grid, given: Given, slab, earlier: ProjectionGradients | None
) -> ProjectionGradients:
    (_, t, h, _), (g, n) = grid.ops.x.shape, grid.ops.B.shape[2:]
    r, s, N, w = grid.tiling.r, grid.tiling.s, grid.per_group, slab.width

    def shared(shape, block, index):
        return jax.ShapeDtypeStruct(shape, jnp.float32), pl.BlockSpec(block, grid.at(index))

    # A slab's place on the axis of channels, counted in slabs.
    place = slab.start // w
    projections = shared(
        (2, N, grid.rows, t * r, g, n),
        (2, None, None, t * r, None, w),
        lambda i, c, b: (0, i % N, b, 0, i // N, place),
    )
    biases = shared(
        (2, grid.rows, grid.chunks, h, r, n),
        (2, None, grid.chunks, grid.heads, r, w),
        lambda i, c, b: (0, b, 0, i, 0, place),
    )
    turning = (None, None)
    if slab.pair is not None:
        omega = shared((N * g, grid.rows, t, s), (None, None, t, w // 2), lambda i, c, b: (i, b, 0, place))
        turning = grid.coefficient(), omega
    out = ProjectionGradients(projections, biases, *turning)
    return grid.call(_projection_kernel, "ssm_projection_gradients", given, out, earlier, slab=slab)


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
    ops: Operands, h0, last, dy, dlast, tiling: Tiling, segments: int, blocks: BlockSizes
) -> tuple[Operands, jax.Array]:
    """Gradients of the operands and of h0, from those of y and of the last state.

    One part of the batch after the other, so that what kernels hand each other takes the memory of a part: as many rows
    as keep the GPU busy (WAVES), and of the serial kernels as fill it.
    """
    b, t, h, _ = ops.x.shape
    chunks, of_heads = t // tiling.c, _Grid(ops, 0, b, tiling, blocks).blocks_of_heads
    at_once = rows_at_once(b, of_heads * chunks, WAVES * blocks.programs)
    serial = rows_at_once(b, h * segments, blocks.programs, at_once)
    whole, sums = None, []
    states = []
    for first in range(0, b, at_once):
        # Waits for the part before, whose memory it takes over, and the first for dy: XLA would begin all at once.
        whole, sums, dy, h0 = lax.optimization_barrier((whole, sums, dy, h0))
        if first % serial == 0:
            mine = slice(first, first + serial)
            entries, _ = entry_states(ops, h0[mine], tiling, segments, blocks, first)
            exits, dh0 = _exit_adjoints(ops, dy, dlast[mine], first, tiling, segments, blocks)
            theta0 = None
            if tiling.s:
                theta0 = _start_angles(entries, exits, h0[mine], last[mine], dh0, dlast[mine], tiling)
            states.append((dh0, theta0))
        whole, own = _gradients(_Grid(ops, first, at_once, tiling, blocks), entries, exits, dy, whole)
        sums.append(own)
    dh0, theta0 = jax.tree.map(lambda *parts: jnp.concatenate(parts), *states)
    projections, omega = (
        None if u[0] is None else jnp.concatenate(u, axis) for u, axis in zip(list(zip(*sums))[:2], (1, 0))
    )
    biases, mimo_x, mimo_z, mimo_o = (None if u[0] is None else sum(u) for u in list(zip(*sums))[2:])
    outputs, values, clocks = whole
    grads = Operands(
        x=values.x,
        z=outputs.z,
        B=projections[0],
        C=projections[1],
        B_bias=biases[0],
        C_bias=biases[1],
        D=None if ops.D is None else jnp.sum(outputs.D, axis=(0, 2)),
        mimo_x=mimo_x,
        mimo_z=mimo_z,
        mimo_o=mimo_o,
        coarse=outputs.cs,
        fine=None if ops.fine is None else outputs.cs,
        entry=outputs.entry,
        exit=values.exit,
        through=values.through,
        scale=outputs.scale,
        gamma=outputs.gamma,
        clock=sum(clocks) if clocks else jnp.zeros_like(ops.clock),
        omega=omega,
        theta0=theta0,
        segment_ids=None,
    )
    like = ops._replace(segment_ids=None)
    return jax.tree.map(lambda grad, operand: grad.astype(operand.dtype), grads, like), dh0


class _Whole(NamedTuple):
    """Gradients of the whole batch, as far as the parts have come; what is of a part only is None."""

    outputs: OutputGradients
    values: ValueGradients
    clocks: list[jax.Array]  # a slab each


class _Sums(NamedTuple):
    """Of one part, summed over its programs."""

    projections: jax.Array  # (2, rows, t r, g, n)
    omega: jax.Array | None  # (rows, t, s)
    biases: jax.Array  # (2, h, r, n)
    mimo_x: jax.Array | None  # (h, r, p)
    mimo_z: jax.Array | None
    mimo_o: jax.Array | None


# Each has kernels of its own to compile.
MOST_PARTS = 4
# A part has at least so many programs for each that the GPU runs at once. At block_sizes.py's shape four parts with one
# each took 4.2 ms where the whole takes 3.85, forward and backward; MIMO's, which have four there, 3% more.
WAVES = 4


def rows_at_once(b: int, programs_per_row: int, programs: int, multiple_of: int = 1) -> int:
    """The fewest rows that make `programs` programs and divide a batch of b, in at most MOST_PARTS; b, if none do."""
    parts = (rows for rows in range(multiple_of, b, multiple_of) if b % rows == 0 and b // rows <= MOST_PARTS)
    return next((rows for rows in parts if rows * programs_per_row >= programs), b)


def _gradients(grid: _Grid, entries, exits, dy, earlier: _Whole | None) -> tuple[_Whole, _Sums]:
    """Those of the grid's rows, written into what the parts before wrote; but for theta0."""
    ops, tiling = grid.ops, grid.tiling
    slabs = tiles.slabs(tiling, grid.blocks.turning_slab)
    outputs, values, clocks = earlier or (None, None, [None for slab in slabs if slab.pair is not None])
    # g is written where dx will be.
    in_place = tiling.r == 1 and ops.z is not None
    onto = None if outputs is None else outputs._replace(g=values.x if in_place else None)
    outputs = _call_output_gradients(grid, Given(dy=dy, entries=entries), onto)
    g = dy if outputs.g is None else outputs.g

    given, parts, clocks = Given(g=g, M=outputs.M, entries=entries, exits=exits), None, list(clocks)
    for i, slab in enumerate(slabs):
        onto = None
        if earlier is not None or parts is not None:
            onto = parts or ProjectionGradients(None, None, None, None)
            onto = onto._replace(clock=clocks[i] if slab.pair is not None else None)
        own = _call_projection_gradients(grid, given, slab, onto)
        if slab.pair is not None:
            clocks[i] = own.clock
        parts = own if parts is None else own._replace(omega=parts.omega if own.omega is None else own.omega)

    # After all that read g.
    parts, g, P = lax.optimization_barrier((parts, g, outputs.P))
    values = (values or ValueGradients(*(None,) * 4))._replace(mimo_x=None)
    if in_place:
        values = values._replace(x=g)
    values = _call_value_gradients(grid, Given(g=g, P=P, entries=entries, exits=exits), values)

    def over(array, *axes):
        return None if array is None else jnp.sum(array, axes)

    dtype = jnp.result_type(ops.B, ops.C)
    sums = _Sums(
        over(parts.projections, 1).astype(dtype),
        over(parts.omega, 0),
        over(parts.biases, 1, 2),
        *(over(u, 0, 1) for u in (values.mimo_x, outputs.mimo_z, outputs.mimo_o)),
    )
    outputs = outputs._replace(P=None, M=None, g=None, mimo_z=None, mimo_o=None)
    return _Whole(outputs, values._replace(mimo_x=None), clocks), sums
