"""The forward pass in one kernel, which walks the chunks of a row with the states of all its heads in VMEM.

    o_i = entry_i q_i h + sum_j W_ij (q_i . k_j) v_j        y = sum over ranks of mimo_o (o + D v) silu(z)
    h  <- through h + sum_j exit_j v_j k_j^T

Sections 3.1.3 and 3.3 of arXiv:2603.15569; entry, exit and through in operands.py, W in tiles.py. A step is one block
of lanes, or several one after the other; heads that share a block are told apart by selecting their lanes of products
that the matrix unit makes 128 wide anyway.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu import tiles
from pallas.tpu.cost_model import estimate
from pallas.tpu.operands import Grid, Operands, Tiling, laid_out
from pallas.tpu.tiles import Block, dot


def _kernel(ops: Operands, h0_ref, y_ref, last_ref, entries_ref, states, kept, *, grid: Grid):
    """y (c, lanes of the step), or (r, c, lanes) where the ranks stay; states (blocks, lanes, n), kept (2, 2, r, c, n).

    entries, (lanes of the step, n) in the dtype of x, or None, takes the states at the chunk's start.
    """
    tiling = grid.tiling
    chunk, step = pl.program_id(1), pl.program_id(2)

    @pl.when(lax.rem(step, grid.steps_per_group) == 0)
    def _():
        tiles.keep_projections(tiling, ops, kept)

    mine = pl.ds(step * tiling.blocks, tiling.blocks)
    of_step = tiling.blocks, tiling.lanes, tiling.n

    @pl.when(chunk == 0)
    def _():
        states[mine] = h0_ref[...].reshape(of_step)

    if entries_ref is not None:
        entries_ref[...] = states[mine].reshape(entries_ref.shape).astype(entries_ref.dtype)
    for block in tiles.blocks(tiling, ops, step):
        states[block.index] = _block(tiling, ops, y_ref, states[block.index], kept, block)

    @pl.when(chunk == grid.chunks - 1)
    def _():
        last_ref[...] = states[mine].reshape(last_ref.shape)


def _block(tiling: Tiling, ops: Operands, y_ref, h, kept, block: Block) -> jax.Array:
    """Writes the y of one block; the state (lanes, n) after the chunk."""
    x = ops.x[:, block.lanes]
    dtype = x.dtype
    coefficients = block.coefficients
    ranks = range(tiling.r)
    v = [tiles.value(ops, x, block.index, rank) for rank in ranks]
    exit = coefficients.on_lanes("exit", tiling.p)
    written = [(u.astype(jnp.float32) * exit).astype(dtype).T for u in v]
    low = h.astype(dtype)

    inside, entered, added = [], [], []
    for head in range(tiling.heads):
        project = functools.partial(_project, tiling, ops, kept, block.index * tiling.heads + head, block.turns[head])
        k = [project("B", rank) for rank in ranks]
        W = tiles.weights(tiling, coefficients, head, tiles.later(tiling, coefficients, head))
        of_ranks = []
        for rank in ranks:
            q = project("C", rank)
            of_ranks.append(sum(dot((W * dot(q, k_, (1, 1))).astype(dtype), v_) for k_, v_ in zip(k, v)))
            entered.append(dot(q, low, (1, 1)))
        inside.append(of_ranks)
        mine = slice(head * tiling.p, (head + 1) * tiling.p)
        added.append(sum(dot(w[mine], k_) for w, k_ in zip(written, k)))

    entry = coefficients.on_lanes("entry", tiling.p)
    z = None if ops.z is None else ops.z[:, block.lanes]
    y = None
    for rank in ranks:
        o = tiles.by_head([of_ranks[rank] for of_ranks in inside], tiling.p)
        o += entry * tiles.by_head(entered[rank :: tiling.r], tiling.p)
        o = _epilogue(ops, o, v[rank], z, block.index, rank)
        if ops.mimo_x is not None and ops.mimo_o is None:
            y_ref[rank, :, block.lanes] = o.astype(y_ref.dtype)
        else:
            y = o if y is None else y + o
    if y is not None:
        y_ref[:, block.lanes] = y.astype(y_ref.dtype)
    return tiles.through(tiling, ops, block.index) * h + jnp.concatenate(added, axis=0)


def _project(tiling: Tiling, ops: Operands, kept, head, turn, of: str, rank: int) -> jax.Array:
    bias = ops.B_bias if of == "B" else ops.C_bias
    return tiles.projection(tiling, kept, bias, of, rank, head).rotated(turn).astype(ops.x.dtype)


def _epilogue(ops: Operands, o: jax.Array, v: jax.Array, z, block, rank: int) -> jax.Array:
    """mimo_o (o + D v) silu(z) of a rank."""
    if ops.D is not None:
        o += ops.D[pl.ds(block, 1)] * v.astype(jnp.float32)
    if z is not None:
        u = tiles.gate(ops, z, block, rank)
        o *= u * tiles.sigmoid(u, v.dtype)
    return o if ops.mimo_o is None else o * ops.mimo_o[rank, pl.ds(block, 1)]


def forward(ops: Operands, h0: jax.Array, tiling: Tiling, keep: bool):
    """y (b, t, h p), or (b, r, t, h p) where ranks stay; the last state (b, h p, n) in float32; and where `keep` the
    states at each chunk's start (b, chunks, h p, n) in the dtype of x, else None."""
    ops = laid_out(ops, tiling)
    grid = Grid(ops, tiling)
    b, t, width = ops.x.shape
    n, stay = tiling.n, ops.mimo_x is not None and ops.mimo_o is None
    y = jax.ShapeDtypeStruct((b, tiling.r, t, width) if stay else ops.x.shape, ops.x.dtype)
    entries = jax.ShapeDtypeStruct((b, grid.chunks, width, n), ops.x.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, grid=grid),
        grid=grid.shape,
        in_specs=[grid.operands(), grid.boundary_state(0)],
        out_specs=[
            grid.ranks() if stay else grid.sequence(),
            grid.boundary_state(grid.chunks - 1),
            grid.state() if keep else None,
        ],
        out_shape=[y, jax.ShapeDtypeStruct((b, width, n), jnp.float32), entries if keep else None],
        scratch_shapes=[
            pltpu.VMEM((grid.blocks, tiling.lanes, n), jnp.float32),
            pltpu.VMEM((2, 2 if tiling.s else 1, tiling.r, tiling.c, n), jnp.float32),
        ],
        compiler_params=compiler_params(tiling),
        cost_estimate=estimate("forward", grid.sizes, chunk=tiling.c, keep=keep),
        interpret=tiling.interpret,
        name="ssm_tpu_forward",
    )(ops, h0)


def compiler_params(tiling: Tiling) -> pltpu.CompilerParams:
    """Rows of the batch are independent, and spread over a chip's cores where it has two."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiling.vmem_bytes
    )
