"""The backward pass, from the inputs and the angles before chunks alone.

    coefficients  made as in the forward pass, and at the end their gradients handed on to what they were made of
    states        h, that every chunk starts from, as in the forward pass
    outputs       every chunk by itself: g, P and M for the kernels below; dz, dD, dentry, dcs, dscale, dgamma
    adjoints      dS <- through dS + sum_i entry_i q_i g_i^T, from chunk to chunk in reverse     (as forward's states)
    projections   every chunk and slab of the state by itself: dB, dC, their biases', what the angles receive, dthrough
    values        every chunk by itself: dx, where g lay, dexit

What each computes is in gradient_kernels.py. The batch is gone through in parts, whose kernels write into arrays of the
whole batch.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas.triton import coefficients, tiles
from pallas.triton import gradient_kernels as kernels
from pallas.triton.block_sizes import BlockSizes
from pallas.triton.coefficients import Received
from pallas.triton.forward import call_serial, entry_states, scan_segments, through_segments
from pallas.triton.gradient_kernels import Given, OutputGradients, ProjectionGradients, ValueGradients
from pallas.triton.operands import Arguments, Operands, at_heads, given_chunk, heads_per_program, specs
from pallas.triton.tiles import Tiling


class _Grid(NamedTuple):
    """`slabs` of the state x blocks of heads x chunks x `rows` rows of the batch from `first` on, and the BlockSpecs of
    what lies on it. Slabs are innermost, so that what they all read can come from the cache.

    An array holds these rows, or the whole batch: the grid's begin at `first % length` of it.
    """

    ops: Operands
    first: int
    rows: int
    tiling: Tiling
    blocks: BlockSizes
    slabs: int = 1

    @property
    def heads(self) -> int:
        """Of a program: fewer where they would leave the GPU empty."""
        h, g = self.ops.x.shape[2], self.ops.B.shape[2]
        enough = h * self.chunks * self.rows // self.blocks.programs
        return heads_per_program(h, g, max(1, min(self.blocks.heads, enough)))

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

    @property
    def gated(self) -> bool:
        """Whether g is not dy."""
        return self.ops.z is not None or self.ops.mimo_o is not None

    def at(self, index, length: int | None = None):
        """index(block of heads, chunk, row), from the grid's axes, in an array of `length` rows or only the grid's."""
        return self.at_slab(lambda k, *where: index(*where), length)

    def at_slab(self, index, length: int | None = None):
        """The same of index(slab, block of heads, chunk, row)."""
        first = self.first % (length or self.rows)

        def of_slab(i, c, b):
            return index(i % self.slabs, i // self.slabs, c, first + b)

        return at_heads(self.slabs * self.blocks_of_heads, of_slab)

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
            given_chunk(kernel, self.slabs * self.blocks_of_heads, tiling=self.tiling, heads=self.heads, **static),
            grid=(self.slabs * self.blocks_of_heads * self.chunks, self.rows),
            in_specs=[
                specs(self.ops, self.at(lambda i, c, b: (b, i, i // self.per_group), len(self.ops.x)), self.heads),
                self._given_specs(given),
                [getattr(out_specs, name) for name in kept],
            ],
            out_specs=[out_specs],
            out_shape=[shapes],
            input_output_aliases=aliases,
            compiler_params=tiles.compiler_params(self.blocks.num_warps, self.blocks.stages),
            interpret=self.tiling.interpret,
            name=label,
        )(self.ops, given, list(kept.values()))[0]

    def _given_specs(self, given: Given) -> Given:
        """Of a sequence, of one matrix a chunk and head, or of a vector a head."""

        def spec(name, array):
            if array is None:
                return None
            if name == "end":
                return pl.BlockSpec((None, self.heads, array.shape[2]), self.at(lambda i, c, b: (b, i, 0), len(array)))
            if name in ("dy", "g"):
                return self._sequence_spec(array)
            return self._chunk_spec(array.shape, following=name == "following")

        return Given(**{name: spec(name, array) for name, array in given._asdict().items()})

    def sequence(self, array):
        """(b, t or t r, h, p), as an output in the array's dtype."""
        if array is None:
            return None
        return jax.ShapeDtypeStruct(array.shape, array.dtype), self._sequence_spec(array)

    def _sequence_spec(self, array):
        b, rows, _, p = array.shape
        return pl.BlockSpec((None, rows, self.heads, p), self.at(lambda i, c, b: (b, 0, i, 0), b))

    def _chunk_spec(self, shape, following: bool = False):
        """One chunk of (b, h, m, ...), a matrix of every head: the grid's, or the one after it where there is one."""

        def index(i, c, b):
            return b, i, jnp.minimum(c + 1, self.chunks - 1) if following else c, 0, 0

        index = self.at(index, shape[0])
        return pl.BlockSpec((None, self.heads, None, *shape[3:]), index)

    def squares(self):
        """(rows, h, m, r c, r c) in the dtype of x."""
        shape = self.rows, self.ops.x.shape[2], self.chunks, self.tiling.rows, self.tiling.rows
        return jax.ShapeDtypeStruct(shape, self.ops.x.dtype), self._chunk_spec(shape)

    def coefficient(self, *parts: int):
        """(b, h, t), or (parts, b, h, t)."""
        b, t, h, _ = self.ops.x.shape
        index = self.at(lambda i, c, b: (*(0 for _ in parts), b, i, 0), b)
        spec = pl.BlockSpec((*parts, None, self.heads, t), index)
        return jax.ShapeDtypeStruct((*parts, b, h, t), jnp.float32), spec

    def per_rank(self, operand):
        """(rows, m, h, r, p), or None without the operand."""
        if operand is None:
            return None
        r, p = self.tiling.r, self.tiling.p
        spec = pl.BlockSpec((None, self.chunks, self.heads, r, p), self.at(lambda i, c, b: (b, 0, i, 0, 0)))
        return jax.ShapeDtypeStruct((self.rows, self.chunks, self.ops.x.shape[2], r, p), jnp.float32), spec


def _exit_adjoints(grid: _Grid, g, dlast, segments: int):
    """Adjoints of every chunk's state on exit (rows, h, chunks, n, p) in the dtype of x, and that of h0 in float32, of
    the grid's rows, which dlast has; None is 0."""
    ops, first = grid.ops, grid.first
    how = dict(first=first, rows=grid.rows, segments=segments, tiling=grid.tiling, blocks=grid.blocks)
    call = functools.partial(call_serial, kernels.adjoint_kernel, "ssm_adjoints", ops, g, **how)
    ends = None if dlast is None else dlast[:, :, None]
    if segments > 1:
        starts, _ = call(None, keep=False)
        through = through_segments(ops, first, starts)
        ends = jnp.flip(scan_segments(dlast, jnp.flip(starts, 2), jnp.flip(through, 2)), 2)
    starts, exits = call(ends, keep=True)
    return exits, starts[:, :, 0]


def _call_output_gradients(grid: _Grid, given: Given, earlier: OutputGradients | None) -> OutputGradients:
    # One head to a program, as in the forward pass: what is fetched ahead needs registers that this one has not.
    grid = grid._replace(blocks=dataclasses.replace(grid.blocks, heads=1))
    ops, r = grid.ops, grid.tiling.r
    b, t, h, p = ops.x.shape
    mimo_z, mimo_o = map(grid.per_rank, (ops.mimo_z, ops.mimo_o))
    g = jax.ShapeDtypeStruct((b if r == 1 else grid.rows, t * r, h, p), ops.x.dtype)
    out = OutputGradients(
        P=grid.squares(),
        M=grid.squares(),
        g=grid.sequence(g) if grid.gated else None,
        z=grid.sequence(ops.z),
        mimo_z=mimo_z,
        mimo_o=mimo_o,
        D=None if ops.D is None else grid.coefficient(),
        scale=grid.coefficient(grid.tiling.groups),
        **dict.fromkeys(("entry", "cs", "gamma"), grid.coefficient()),
    )
    return grid.call(kernels.output_kernel, "ssm_output_gradients", given, out, earlier)


def _call_value_gradients(grid: _Grid, given: Given, earlier: ValueGradients) -> ValueGradients:
    out = ValueGradients(grid.sequence(grid.ops.x), grid.per_rank(grid.ops.mimo_x), grid.coefficient())
    return grid.call(kernels.value_kernel, "ssm_value_gradients", given, out, earlier, ahead=grid.blocks.stages > 1)


def _call_projection_gradients(
    grid: _Grid, given: Given, slabs: list[tiles.Slab], earlier: ProjectionGradients
) -> ProjectionGradients:
    """Of slabs of one width, that all turn or do not."""
    grid = grid._replace(slabs=len(slabs))
    (batch, t, h, _), (g, n) = grid.ops.x.shape, grid.ops.B.shape[2:]
    r, s, groups, N, w = grid.tiling.r, grid.tiling.s, grid.tiling.groups, grid.per_group, slabs[0].width

    def out(shape, block, index, length=None):
        return jax.ShapeDtypeStruct(shape, jnp.float32), pl.BlockSpec(block, grid.at_slab(index, length))

    # A slab's place on the axis of channels, counted in slabs.
    place = slabs[0].start // w
    projections = out(
        (2, N, grid.rows, t * r, g, n),
        (2, None, None, t * r, None, w),
        lambda k, i, c, b: (0, i % N, b, 0, i // N, place + k),
    )
    biases = out(
        (2, grid.rows, grid.chunks, h, groups, r, n),
        (2, None, grid.chunks, grid.heads, groups, r, w),
        lambda k, i, c, b: (0, b, 0, i, 0, 0, place + k),
    )
    through = out(
        (batch, h, grid.chunks, n),
        (None, grid.heads, grid.chunks, w),
        lambda k, i, c, b: (b, i, 0, place + k),
        batch,
    )
    clock = omega = None
    if slabs[0].pair is not None:
        clock = out((len(slabs), batch, h, t), (None, None, grid.heads, t), lambda k, i, c, b: (k, b, i, 0), batch)
        omega = out((N * g, grid.rows, t, s), (None, None, t, w // 2), lambda k, i, c, b: (i, b, 0, place + k))
    out = ProjectionGradients(projections, biases, through, clock, omega)
    kernel = functools.partial(kernels.projection_kernel, slabs=slabs)
    static = dict(chunks=grid.chunks, ahead=grid.blocks.stages > 1)
    return grid.call(kernel, "ssm_projection_gradients", given, out, earlier, **static)


def _turned(h, dS, tiling: Tiling) -> jax.Array:
    """<dS, J h> of every pair, (b, h, s), what turning the state h backwards receives (`_received_later` in
    gradient_kernels.py); 0 where h or dS is 0, which is None."""
    if h is None or dS is None:
        return jnp.float32(0)
    h, dS = (u[..., : 2 * tiling.s, :].astype(jnp.float32) for u in (h, dS))
    return jnp.sum(h[..., 0::2, :] * dS[..., 1::2, :] - h[..., 1::2, :] * dS[..., 0::2, :], axis=-1)


def backward(
    args: Arguments, h0, theta0, last, dy, dlast, tiling: Tiling, segments: int, blocks: BlockSizes
) -> tuple[Arguments, jax.Array | None]:
    """Gradients of the arguments and of h0, from those of y and of the last state; h0 and dlast of None are 0.

    One part of the batch after the other, so that what kernels hand each other takes the memory of a part: as few rows
    as fill the GPU with programs of the serial kernels, and WAVES times with those of the others.
    """
    # Without it XLA could keep the forward pass's coefficients, which are the same, until dy is there.
    args, dy = lax.optimization_barrier((args, dy))
    ops = coefficients.operands(args, theta0, tiling)
    b, _, h, _ = ops.x.shape
    every = _Grid(ops, 0, b, tiling, blocks)
    at_once = rows_at_once(b, every.blocks_of_heads * every.chunks, h * segments, blocks.programs)
    whole, parts = None, []
    for first in range(0, b, at_once):
        # Waits for the part before, whose memory it takes over: XLA would begin all at once.
        whole, parts, dy, h0 = lax.optimization_barrier((whole, parts, dy, h0))
        grid = _Grid(ops, first, at_once, tiling, blocks)
        states = jax.tree.map(lambda u: u[first : first + at_once], (h0, last, dlast))
        whole, own = _gradients(grid, dy, *states, segments, whole)
        parts.append(own)
    parts = _OfPart(*zip(*parts))
    projections, biases = jnp.concatenate(parts.projections, 1), sum(parts.biases)
    mimo_x, mimo_z, mimo_o = (None if u[0] is None else sum(u) for u in (parts.mimo_x, parts.mimo_z, parts.mimo_o))
    dh0 = None if h0 is None else jnp.concatenate(parts.dh0)
    outputs, values, of_slabs = whole
    received = Received(
        **{name: getattr(outputs, name) for name in ("cs", "entry", "scale", "gamma")},
        exit=values.exit,
        through=jnp.sum(of_slabs.through, axis=-1),
        clock=of_slabs.clock,
    )
    grads = Arguments(
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
        **coefficients.gradients(ops, received, tiling),
        omega=jnp.concatenate(parts.omega) if tiling.s else None,
        turned=None,
        angle=None if args.angle is None else jnp.concatenate(parts.angle),
        segment_ids=None,
    )
    like = args._replace(segment_ids=None)
    return jax.tree.map(lambda grad, given: grad.astype(given.dtype), grads, like), dh0


class _Whole(NamedTuple):
    """Gradients of the whole batch, as far as the parts have come; what is of a part only is None."""

    outputs: OutputGradients
    values: ValueGradients
    of_slabs: ProjectionGradients


class _OfPart(NamedTuple):
    """Of one part: of its rows, and summed over its programs."""

    dh0: jax.Array  # (rows, h, n, p)
    angle: jax.Array | None  # (rows, h, s), of before the first chunk
    projections: jax.Array  # (2, rows, t r, g, n)
    omega: jax.Array | None  # (rows, t, s)
    biases: jax.Array  # (2, h, r, n)
    mimo_x: jax.Array | None  # (h, r, p)
    mimo_z: jax.Array | None
    mimo_o: jax.Array | None


# Each has kernels of its own to compile.
MOST_PARTS = 4
# A part has at least so many programs over chunks for each that the GPU runs at once. At TUNING.md's shape four parts
# with one each took 4.2 ms where the whole took 3.85, forward and backward, on an earlier form of the kernels.
WAVES = 4


def rows_at_once(b: int, of_chunks: int, serial: int, programs: int) -> int:
    """The fewest rows that divide a batch of b, in at most MOST_PARTS, and make enough programs; b, if none do.

    Of the serial kernels, with `serial` programs a row, `programs` are enough, and of those over chunks, with
    `of_chunks` a row, WAVES times as many.
    """
    parts = (rows for rows in range(1, b) if b % rows == 0 and b // rows <= MOST_PARTS)
    return next((n for n in parts if n * serial >= programs and n * of_chunks >= WAVES * programs), b)


def _gradients(grid: _Grid, dy, h0, last, dlast, segments: int, earlier: _Whole | None) -> tuple[_Whole, _OfPart]:
    """Those of the grid's rows, which h0, last and dlast have, written into what the parts before wrote; but for the
    angle and the coefficients."""
    ops, tiling, blocks = grid.ops, grid.tiling, grid.blocks
    entries, _ = entry_states(ops, h0, tiling, segments, blocks, grid.first, grid.rows)
    outputs, values, of_slabs = earlier or (None, None, ProjectionGradients(*(None,) * 5))
    # g is written where dx will be.
    in_place = tiling.r == 1 and grid.gated
    onto = None if outputs is None else outputs._replace(g=values.x if in_place else None)
    outputs = _call_output_gradients(grid, Given(dy=dy, entries=entries), onto)
    g = dy if outputs.g is None else outputs.g
    exits, dh0 = _exit_adjoints(grid, g, dlast, segments)
    given, angle = Given(g=g, M=outputs.M, entries=entries, exits=exits), None
    turning = given
    if tiling.s:
        end = _turned(last, dlast, tiling)
        turning = given._replace(following=entries, end=None if dlast is None else end)
        # Before the first token, whom all turns follow.
        angle = jnp.broadcast_to(end - _turned(h0, dh0, tiling), (*dh0.shape[:2], tiling.s))
    for still, slabs in itertools.groupby(tiles.slabs(tiling, blocks.turning_slab), lambda slab: slab.pair is None):
        own = _call_projection_gradients(grid, given if still else turning, list(slabs), of_slabs)
        of_slabs = ProjectionGradients(*(old if new is None else new for old, new in zip(of_slabs, own)))

    # After all that read g.
    of_slabs, g = lax.optimization_barrier((of_slabs, g))
    values = (values or ValueGradients(*(None,) * 3))._replace(mimo_x=None)
    if in_place:
        values = values._replace(x=g)
    values = _call_value_gradients(grid, Given(g=g, P=outputs.P, exits=exits), values)

    def over(array, *axes):
        return None if array is None else jnp.sum(array, axes)

    of_part = _OfPart(
        dh0,
        angle,
        over(of_slabs.projections, 1).astype(jnp.result_type(ops.B, ops.C)),
        over(of_slabs.omega, 0),
        over(of_slabs.biases, 1, 2, 4),
        *(over(u, 0, 1) for u in (values.mimo_x, outputs.mimo_z, outputs.mimo_o)),
    )
    outputs = outputs._replace(P=None, M=None, g=None, mimo_z=None, mimo_o=None)
    of_slabs = of_slabs._replace(projections=None, biases=None, omega=None)
    return _Whole(outputs, values._replace(mimo_x=None), of_slabs), of_part
