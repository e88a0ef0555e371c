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
from pallas.triton.forward import call_serial, entry_states, gate, scan_segments, values
from pallas.triton.operands import AXES, OfHead, Operands, at_head, at_heads, heads_per_program, over_heads, specs
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
        g = _gated_gradient(tiling, ops, dy_ref, t0)
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
    x=1, mimo_x=1, exit=0, through=0, z=1, mimo_z=1, mimo_o=1, entry=0, D=1, cs=0, scale=0, gamma=0,
    B=None, C=None, B_bias=1, C_bias=1, clock=0, omega=None,
)  # fmt: skip


def _at_head(refs, head):
    """What is given or written, of one head, from refs to a block of heads."""
    return type(refs)(**{
        name: ref if ref is None or _HEAD_AXES[name] is None else OfHead(ref, _HEAD_AXES[name], head)
        for name, ref in refs._asdict().items()
    })  # fmt: skip


def _kernel(chunk_ref, ops: Operands, given: Given, earlier_ref, out, *, of_head, tiling: Tiling, heads: int):
    """`of_head(ops, given, out, chunk, tiling)` of one chunk of one row, for `heads` heads of one group."""

    def body(head, chunk, _):
        of_head(at_head(ops, head), _at_head(given, head), _at_head(out, head), chunk, tiling)

    over_heads(heads, chunk_ref, body)


class OutputGradients(NamedTuple):
    """What the kernel of the outputs writes; None where the operand is absent.

    Sums over the tokens of a chunk (mimo_*, D) are finished outside.
    """

    P: jax.Array  # (b, h, m, rows, rows) in the dtype of x
    M: jax.Array
    g: jax.Array | None  # (b, t r, h, p) in the dtype of x; None where it is dy
    z: jax.Array | None  # (b, t, h, p)
    mimo_z: jax.Array | None  # (b, m, h, r, p)
    mimo_o: jax.Array | None
    D: jax.Array | None  # (b, m, h)
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
    B, C = tiles.load_slabs(tiling, ops.B, t0), tiles.load_slabs(tiling, ops.C, t0)
    turns = tiles.turns(tiling, ops, chunk)
    q = tiles.project(tiling, C, ops.C_bias, turns, dtype)
    k = tiles.project(tiling, B, ops.B_bias, turns, dtype)
    v = values(tiling, ops, t0)
    g = _gated_gradient(tiling, ops, given.dy, t0).astype(dtype)
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
    o_entry = sum(tiling.dot(q_, given.entries[slab.channels]) for slab, q_ in zip(slabs, q))
    dy = _of_ranks(tiling, ops, given.dy, t0)
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


def _gated_gradient(tiling: Tiling, ops: Operands, dy_ref, t0):
    """g, (rows, p) in float32."""
    g = _of_ranks(tiling, ops, dy_ref, t0)
    if ops.z is None:
        return g
    u = gate(tiling, ops, tiling.of_token(ops.z, t0, slice(None)))
    return g * (u * tiling.sigmoid(u))


class ProjectionGradients(NamedTuple):
    """What the kernel of one slab of w channels of the projections writes; N programs per group.

    Sums over the tokens of a chunk (biases) and over blocks of heads are finished outside.
    """

    B: jax.Array  # (N, b, t r, g, w) float32
    C: jax.Array
    B_bias: jax.Array  # (b, m, h, r, w) float32
    C_bias: jax.Array
    clock: jax.Array | None  # (b, h, t); None, like the next one, where the slab does not turn
    omega: jax.Array | None  # (N g, b, t, w / 2)


def _projection_kernel(
    chunk_ref, ops: Operands, given: Given, earlier_ref, out: ProjectionGradients, *, tiling: Tiling, slab, heads: int
):
    """One slab, for `heads` heads of one group."""

    def body(head, chunk, sums):
        one = at_head(ops, head), _at_head(given, head), _at_head(out, head)
        return jax.tree.map(jnp.add, sums, _projection_gradients(*one, chunk, tiling, slab))

    def zeros(*shape):
        return jnp.zeros(shape, jnp.float32)

    sums = (zeros(tiling.rows, slab.width),) * 2
    sums += (None if slab.pair is None else zeros(tiling.c, slab.width // 2),)
    dB, dC, domega = over_heads(heads, chunk_ref, body, sums)
    chunk = chunk_ref[...]
    rows = pl.ds(chunk * tiling.rows, tiling.rows)
    out.B[rows], out.C[rows] = dB, dC
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
    out.B_bias[chunk] = tiling.per_rank(dB)

    k = tiles.project_slab(tiling, slab, _of_rows(tiling, ops.B, chunk, slab.channels), turn, ops.B_bias, ops.x.dtype)
    g = _of_rows(tiling, given.g, chunk).astype(jnp.float32)
    seen = (g * tiling.of_token(ops.entry, t0)[:, None]).astype(k.dtype)
    dq = tiling.dot(given.M[...], k) + tiling.dot(seen, given.entries[slab.channels], (1, 1))
    dC, also_turned = _turn_back(tiling, ops.C, ops.C_bias, dq, turn, chunk, slab)
    out.C_bias[chunk] = tiling.per_rank(dC)
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

    def call(self, kernel, name: str, given: Given, out, onto: str | None = None, earlier=None, **static):
        """Runs `kernel`; `out` holds (shape, BlockSpec) or None.

        `onto` names an output of the whole batch, of which `earlier` has the rows of the parts before, None at the
        first.
        """
        outs = [None if u is None else u[i] for u in out for i in (0, 1)]
        shapes, out_specs = type(out)(*outs[0::2]), type(out)(*outs[1::2])
        operands = jnp.arange(self.chunks, dtype=jnp.int32), self.ops, given
        aliases = {}
        if earlier is not None:
            present = [field for field, shape in shapes._asdict().items() if shape is not None]
            aliases = {len(jax.tree.leaves(operands)): present.index(onto)}
        return pl.pallas_call(
            functools.partial(kernel, tiling=self.tiling, heads=self.heads, **static),
            grid=(self.blocks_of_heads * self.chunks, self.rows),
            in_specs=[
                pl.BlockSpec((None,), self.at(lambda i, c, b: (c,))),
                specs(self.ops, self.at(lambda i, c, b: (b, i, i // self.per_group), len(self.ops.x)), self.heads),
                Given(*map(self._given_spec, given)),
                getattr(out_specs, onto) if aliases else None,
            ],
            out_specs=[out_specs],
            out_shape=[shapes],
            input_output_aliases=aliases,
            compiler_params=tiles.compiler_params(self.blocks.num_warps, self.blocks.stages),
            interpret=self.tiling.interpret,
            name=name,
        )(*operands, earlier)[0]

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
        """(rows, h, t) or (rows, h, length)."""
        _, t, h, _ = self.ops.x.shape
        length = length or t
        spec = pl.BlockSpec((None, self.heads, length), self.at(lambda i, c, b: (b, i, 0)))
        return jax.ShapeDtypeStruct((self.rows, h, length), jnp.float32), spec

    def per_chunk(self, operand, *shape):
        """(rows, m, h, *shape), or None without the operand."""
        if operand is None:
            return None
        index = self.at(lambda i, c, b: (b, 0, i, *(0 for _ in shape)))
        spec = pl.BlockSpec((None, self.chunks, self.heads, *shape), index)
        return jax.ShapeDtypeStruct((self.rows, self.chunks, self.ops.x.shape[2], *shape), jnp.float32), spec


def _call_output_gradients(grid: _Grid, given: Given, earlier) -> OutputGradients:
    # One head to a program, as in the forward pass: what is fetched ahead needs registers that this one has not.
    grid = grid._replace(blocks=dataclasses.replace(grid.blocks, heads=1))
    ops, r = grid.ops, grid.tiling.r
    _, t, h, p = ops.x.shape
    gated = ops.z is not None or ops.mimo_o is not None
    mimo_z, mimo_o = (grid.per_chunk(u, r, p) for u in (ops.mimo_z, ops.mimo_o))
    out = OutputGradients(
        P=grid.squares(),
        M=grid.squares(),
        g=grid.sequence(jax.ShapeDtypeStruct((grid.rows, t * r, h, p), ops.x.dtype)) if gated else None,
        z=grid.sequence(ops.z),
        mimo_z=mimo_z,
        mimo_o=mimo_o,
        D=grid.per_chunk(ops.D),
        **dict.fromkeys(("entry", "cs", "scale", "gamma"), grid.coefficient()),
    )
    return grid.call(_kernel, "ssm_output_gradients", given, out, "z", earlier, of_head=_output_gradients)


def _call_value_gradients(grid: _Grid, given: Given, earlier) -> ValueGradients:
    mimo_x = grid.per_chunk(grid.ops.mimo_x, grid.tiling.r, grid.tiling.p)
    out = ValueGradients(grid.sequence(grid.ops.x), mimo_x, grid.coefficient(), grid.coefficient(grid.chunks))
    return grid.call(_kernel, "ssm_value_gradients", given, out, "x", earlier, of_head=_value_gradients)


def _call_projection_gradients(grid: _Grid, given: Given, slab) -> ProjectionGradients:
    t, g, b = grid.ops.x.shape[1], grid.ops.B.shape[2], grid.rows
    r, N, w = grid.tiling.r, grid.per_group, slab.width

    def shared(shape, block, index):
        return jax.ShapeDtypeStruct(shape, jnp.float32), pl.BlockSpec(block, grid.at(index))

    projection = shared((N, b, t * r, g, w), (None, None, t * r, None, w), lambda i, c, b: (i % N, b, 0, i // N, 0))
    bias = grid.per_chunk(grid.ops.B_bias, r, w)
    omega = shared((N * g, b, t, w // 2), (None, None, t, w // 2), lambda i, c, b: (i, b, 0, 0))
    turning = (None, None) if slab.pair is None else (grid.coefficient(), omega)
    out = ProjectionGradients(projection, projection, bias, bias, *turning)
    return grid.call(_projection_kernel, "ssm_projection_gradients", given, out, slab=slab)


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
    as fill the GPU, of the serial kernels and of the others.
    """
    b, t, h, _ = ops.x.shape
    chunks, of_heads = t // tiling.c, _Grid(ops, 0, b, tiling, blocks).blocks_of_heads
    at_once = rows_at_once(b, of_heads * chunks, blocks.programs)
    serial = rows_at_once(b, h * segments, blocks.programs, at_once)
    # The first two are of the whole batch and handed on, each time with more rows written.
    dx = dz = None
    grads: list[Operands] = []
    states = []
    for first in range(0, b, at_once):
        # Waits for the part before, whose memory it takes over, and the first for dy: XLA would begin all at once.
        dx, dz, grads, dy, h0 = lax.optimization_barrier((dx, dz, grads, dy, h0))
        if first % serial == 0:
            mine = slice(first, first + serial)
            entries, _ = entry_states(ops, h0[mine], tiling, segments, blocks, first)
            exits, dh0 = _exit_adjoints(ops, dy, dlast[mine], first, tiling, segments, blocks)
            theta0 = None
            if tiling.s:
                theta0 = _start_angles(entries, exits, h0[mine], last[mine], dh0, dlast[mine], tiling)
            states.append((dh0, theta0))
        own = _gradients(_Grid(ops, first, at_once, tiling, blocks), entries, exits, dy, dx, dz)
        dx, dz = own.x, own.z
        grads.append(own._replace(x=None, z=None))
    dh0, theta0 = jax.tree.map(lambda *parts: jnp.concatenate(parts), *states)
    joined = {name: _join(name, [getattr(own, name) for own in grads]) for name in Operands._fields}
    joined = Operands(**joined | dict(x=dx, z=dz, theta0=theta0))
    like = ops._replace(segment_ids=None)
    return jax.tree.map(lambda grad, operand: grad.astype(operand.dtype), joined, like), dh0


# Each has kernels of its own to compile.
MOST_PARTS = 4


def rows_at_once(b: int, programs_per_row: int, programs: int, multiple_of: int = 1) -> int:
    """The fewest rows that make `programs` programs and divide a batch of b, in at most MOST_PARTS; b, if none do."""
    parts = (rows for rows in range(multiple_of, b, multiple_of) if b % rows == 0 and b // rows <= MOST_PARTS)
    return next((rows for rows in parts if rows * programs_per_row >= programs), b)


def _join(name: str, parts: list[jax.Array | None]) -> jax.Array | None:
    """A gradient of the whole batch."""
    if parts[0] is None:
        return None
    return jnp.concatenate(parts) if AXES[name][0] == "b" else sum(parts)


def _gradients(grid: _Grid, entries, exits, dy, dx, dz) -> Operands:
    """Those of the grid's rows, but for theta0; dx and dz of the whole batch, None before any row is written."""
    ops, tiling, blocks = grid.ops, grid.tiling, grid.blocks
    outputs = _call_output_gradients(grid, Given(dy=dy, entries=entries), dz)
    g = dy if outputs.g is None else outputs.g
    of_values = _call_value_gradients(grid, Given(g=g, P=outputs.P, entries=entries, exits=exits), dx)
    given = Given(g=g, M=outputs.M, entries=entries, exits=exits)
    slabs = tiles.slabs(tiling, blocks.turning_slab)
    projections = [_call_projection_gradients(grid, given, slab) for slab in slabs]

    def joined(name: str, over) -> jax.Array:
        """Of the slabs that have it."""
        parts = [getattr(one, name) for one in projections if getattr(one, name) is not None]
        return jnp.concatenate([jnp.sum(part, axis=over) for part in parts], axis=-1)

    return Operands(
        x=of_values.x,
        z=outputs.z,
        B=joined("B", 0),
        C=joined("C", 0),
        B_bias=joined("B_bias", (0, 1)),
        C_bias=joined("C_bias", (0, 1)),
        D=None if ops.D is None else jnp.sum(outputs.D, axis=(0, 1)),
        **{
            name: None if u is None else jnp.sum(u, axis=(0, 1))
            for name, u in dict(mimo_x=of_values.mimo_x, mimo_z=outputs.mimo_z, mimo_o=outputs.mimo_o).items()
        },
        coarse=outputs.cs,
        fine=None if ops.fine is None else outputs.cs,
        entry=outputs.entry,
        exit=of_values.exit,
        through=of_values.through,
        scale=outputs.scale,
        gamma=outputs.gamma,
        clock=sum((u.clock for u in projections if u.clock is not None), jnp.zeros((grid.rows, *ops.clock.shape[1:]))),
        omega=joined("omega", 0) if tiling.s else None,
        theta0=None,
        segment_ids=None,
    )
