"""The backward pass in one kernel, which walks the chunks in reverse with the states' adjoints dS of all heads in VMEM.

With g = dy silu(z), X = g v^T, Y = q k^T, E_ij = exp(cs_i - cs_j) for i > j, W as in tiles.py, M = W X, and h the state
on entry, which the forward pass kept:

    dq = M k + entry g h          dk = M^T q + exit v dS          dv = (W Y + D)^T g + exit k dS^T
    dS <- through dS + sum_i entry_i g_i q_i^T
    dentry_i = g_i.(h q_i)        dexit_j = v_j.(dS k_j)          dthrough = <dS, h>
    dscale_j = sum_i (E X Y)_ij   dgamma_i = (X Y)_ii             dcs_j = sum_i (E X Y scale)_ji - scale_j dscale_j
    dtheta = q x dq + k x dk per turning pair, whose reverse cumulative sum is what each token's turn receives

With R u = cos u + sin J u the gradient of u is cos du - J (sin du), so that sums of cos du and of sin du over the heads
wait for one J, and q x dq is J u (cos dq) - u (sin dq): no channel moves in the loop over heads. What rows of the batch
or chunks share is summed in blocks that stay in VMEM while a row is worked on.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu import tiles
from pallas.tpu.cost_model import estimate
from pallas.tpu.forward import compiler_params
from pallas.tpu.operands import KINDS, TWO_PI, Grid, Operands, Tiling, laid_out, swap_pairs
from pallas.tpu.tiles import Block, Turn, dot


class Gradients(NamedTuple):
    """What the kernel writes; None where the operand is absent. float32 but for x, z, B and C."""

    x: jax.Array  # (b, t, h p)
    z: jax.Array | None
    B: jax.Array  # (b, g, r, t, n)
    C: jax.Array
    B_bias: jax.Array  # (b, 2, r, h, n): sums of cos du and of sin du
    C_bias: jax.Array
    D: jax.Array | None  # (b, blocks, lanes)
    mimo_x: jax.Array | None  # (b, r, blocks, lanes)
    mimo_z: jax.Array | None
    mimo_o: jax.Array | None
    coefficients: jax.Array  # (b, blocks, rows, t)
    through: jax.Array  # (b, chunks, blocks, lanes)
    omega: jax.Array | None  # (b, t, n), of both channels of a pair
    theta0: jax.Array | None  # (b, chunks, h, n)


# Summed over the chunks of a row.
_PER_ROW = ("B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o")


class _Step(NamedTuple):
    """What all parts of one block's work read and write."""

    tiling: Tiling
    ops: Operands
    out: Gradients
    block: Block

    def store_sum(self, name: str, index: tuple, u: jax.Array) -> None:
        """Adds the sum of u (c, width) over its tokens to one row of an output."""
        getattr(self.out, name)[index] += jnp.sum(u, axis=0, keepdims=True)


def _kernel(
    ops: Operands, entries_ref, dy_ref, dlast_ref, out: Gradients, dh0_ref, adjoints, kept, summed, *, grid: Grid
):
    """entries, dlast, dh0 (lanes of the step, n); adjoints (blocks, lanes, n); kept and summed (2, 2, r, c, n).

    `summed` takes what the heads of a group give dB and dC.
    """
    tiling = grid.tiling
    visit, step = pl.program_id(1), pl.program_id(2)
    of_group = lax.rem(step, grid.steps_per_group)

    @pl.when((visit == 0) & (step == 0))
    def _():
        for name in _PER_ROW:
            _zero(getattr(out, name))

    @pl.when(step == 0)
    def _():
        _zero(out.omega)

    @pl.when(of_group == 0)
    def _():
        tiles.keep_projections(tiling, ops, kept)
        _zero(summed)

    mine = pl.ds(step * tiling.blocks, tiling.blocks)

    @pl.when(visit == 0)
    def _():
        adjoints[mine] = dlast_ref[...].reshape(tiling.blocks, tiling.lanes, tiling.n)

    for block in tiles.blocks(tiling, ops, step):
        at = _Step(tiling, ops, out, block)
        adjoints[block.index] = _block(at, entries_ref[block.lanes], dy_ref, adjoints[block.index], kept, summed)

    @pl.when(visit == grid.chunks - 1)
    def _():
        dh0_ref[...] = adjoints[mine].reshape(dh0_ref.shape)

    @pl.when(of_group == grid.steps_per_group - 1)
    def _():
        for i, ref in enumerate((out.B, out.C)):
            for rank in range(tiling.r):
                du = summed[i, 0, rank]
                if tiling.s:
                    du = du - tiles.swap(tiling, summed[i, 1, rank])
                ref[rank] = du.astype(ref.dtype)


def _zero(ref) -> None:
    if ref is not None:
        ref[...] = jnp.zeros_like(ref)


class _Values(NamedTuple):
    """Of the values' side, per rank (c, lanes); all but v in float32."""

    v: list[jax.Array]
    dy: list[jax.Array]
    g: list[jax.Array]
    slope: list[jax.Array] | None  # of silu


class _Head(NamedTuple):
    """What one head gives: per rank (c, lanes), of which its own lanes count; (c, n); (p, n); and its coefficients."""

    o: list[jax.Array]
    dv: list[jax.Array]
    entered: list[jax.Array]  # h q
    left: list[jax.Array]  # dS k
    dS: jax.Array
    rows: dict[str, jax.Array]  # (1, c)


def _block(at: _Step, h, dy_ref, dS, kept, summed) -> jax.Array:
    """Writes all gradients of one block; h (lanes, n) in the dtype of x. dS (lanes, n) at the chunk's start."""
    tiling, dtype = at.tiling, at.ops.x.dtype
    values = _values(at, dy_ref)
    entry, exit = (at.block.coefficients.on_lanes(kind, tiling.p) for kind in ("entry", "exit"))
    seen = [(g * entry).astype(dtype) for g in values.g]
    written = [(v.astype(jnp.float32) * exit).astype(dtype) for v in values.v]
    heads = [
        _head(at, head, turn, values, seen, written, h, dS.astype(dtype), kept, summed)
        for head, turn in enumerate(at.block.turns)
    ]

    def of_lanes(name: str) -> list[jax.Array]:
        return [tiles.by_head([getattr(u, name)[rank] for u in heads], tiling.p) for rank in range(tiling.r)]

    entered, left = of_lanes("entered"), of_lanes("left")
    _store_values(
        at,
        values,
        [o + entry * u for o, u in zip(of_lanes("o"), entered)],
        [dv + exit * u for dv, u in zip(of_lanes("dv"), left)],
    )
    dentry = sum(g * u for g, u in zip(values.g, entered))
    dexit = sum(v.astype(jnp.float32) * u for v, u in zip(values.v, left))
    _store_coefficients(at, heads, dentry, dexit)
    at.out.through[pl.ds(at.block.index, 1)] = _sum_of_rows(dS * h.astype(jnp.float32))
    return tiles.through(tiling, at.ops, at.block.index) * dS + jnp.concatenate([u.dS for u in heads], axis=0)


def _values(at: _Step, dy_ref) -> _Values:
    ops, lanes = at.ops, at.block.lanes
    x, z = ops.x[:, lanes], None if ops.z is None else ops.z[:, lanes]
    out = _Values([], [], [], None if z is None else [])
    for rank in range(at.tiling.r):
        out.v.append(tiles.value(ops, x, at.block.index, rank))
        if ops.mimo_x is not None and ops.mimo_o is None:
            dy = dy_ref[rank, :, lanes].astype(jnp.float32)
        else:
            dy = dy_ref[:, lanes].astype(jnp.float32)
        out.dy.append(dy)
        dy = _before_contraction(at, dy, rank)
        if z is None:
            out.g.append(dy)
            continue
        u = tiles.gate(ops, z, at.block.index, rank)
        sigmoid = tiles.sigmoid(u, x.dtype)
        swish = u * sigmoid
        out.g.append(dy * swish)
        out.slope.append(sigmoid + swish * (1 - sigmoid))
    return out


def _before_contraction(at: _Step, dy: jax.Array, rank: int) -> jax.Array:
    return dy if at.ops.mimo_o is None else dy * at.ops.mimo_o[rank, pl.ds(at.block.index, 1)]


def _head(at: _Step, head: int, turn: Turn | None, values: _Values, seen, written, h, dS, kept, summed) -> _Head:
    """One head's part in all gradients; adds its own to `summed`. h, dS (lanes, n) in the dtype of x."""
    tiling, ops, coefficients = at.tiling, at.ops, at.block.coefficients
    dtype, ranks = ops.x.dtype, range(tiling.r)
    mine = functools.partial(tiles.only_head, tiling, head=head)
    index = at.block.index * tiling.heads + head
    B = [tiles.projection(tiling, kept, ops.B_bias, "B", rank, index) for rank in ranks]
    C = [tiles.projection(tiling, kept, ops.C_bias, "C", rank, index) for rank in ranks]
    k, q = ([u.rotated(turn).astype(dtype) for u in projections] for projections in (B, C))
    g = [mine(u).astype(dtype) for u in values.g]
    decays = tiles.later(tiling, coefficients, head)
    W = tiles.weights(tiling, coefficients, head, decays)

    o, dv, XY = [None] * tiling.r, [None] * tiling.r, None
    dq = [dot(mine(seen[rank]), h) for rank in ranks]
    dk = [dot(mine(written[rank]), dS) for rank in ranks]
    for i in ranks:
        for j in ranks:
            X, Y = dot(g[i], values.v[j], (1, 1)), dot(q[i], k[j], (1, 1))
            XY = X * Y if XY is None else XY + X * Y
            M, WY = (W * X).astype(dtype), (W * Y).astype(dtype)
            dq[i] += dot(M, k[j])
            dk[j] += dot(M, q[i], (0, 0))
            o[i] = _add(o[i], dot(WY, values.v[j]))
            dv[j] = _add(dv[j], dot(WY, g[i], (0, 0)))
    rows = _of_weights(at, head, decays * XY, XY) | _project_back(at, head, turn, (B, C), (dk, dq), summed)
    channels = slice(head * tiling.p, (head + 1) * tiling.p)
    return _Head(
        o,
        dv,
        entered=[dot(u, h, (1, 1)) for u in q],
        left=[dot(u, dS, (1, 1)) for u in k],
        dS=sum(dot(u.T[channels], q_) for u, q_ in zip(seen, q)),
        rows=rows,
    )


def _add(total: jax.Array | None, u: jax.Array) -> jax.Array:
    return u if total is None else total + u


def _of_weights(at: _Step, head: int, EXY: jax.Array, XY: jax.Array) -> dict[str, jax.Array]:
    """The rows that the decays and weights receive."""
    i, j = (lax.broadcasted_iota(jnp.int32, XY.shape, axis) for axis in (0, 1))
    scale = at.block.coefficients.row("scale", head)
    dscale = jnp.sum(EXY, axis=0, keepdims=True)
    dgamma = jnp.sum(jnp.where(i == j, XY, 0.0), axis=0, keepdims=True)
    dcs = _sum_of_rows(EXY * scale) - scale * dscale
    return dict(coarse=dcs, fine=dcs, scale=dscale, gamma=dgamma)


def _sum_of_rows(u: jax.Array) -> jax.Array:
    """(c, width) -> (1, c): a transposition is cheaper than a sum along the lanes, and leaves tokens on them."""
    return jnp.sum(u.T, axis=0, keepdims=True)


def _project_back(at: _Step, head: int, turn: Turn | None, projections, gradients, summed) -> dict[str, jax.Array]:
    """From dk and dq to dB, dC, their biases and the angles; the row dclock is returned."""
    tiling = at.tiling
    index = at.block.index * tiling.heads + head
    dtheta = None
    for i, name in enumerate(("B_bias", "C_bias")):
        for rank in range(tiling.r):
            u, du = projections[i][rank], gradients[i][rank]
            parts = [du] if turn is None else [turn.cos * du, turn.sin * du]
            for part, value in enumerate(parts):
                summed[i, part, rank] += value
                at.store_sum(name, (part, rank, pl.ds(index, 1)), value)
            if turn is not None:
                dtheta = _add(dtheta, u.swapped * parts[0] - u.u * parts[1])
    if turn is None:
        return {}
    received = tiles.sums(tiles.triangle(tiling.c, upper=True), dtheta, at.ops.x.dtype)
    at.out.theta0[pl.ds(index, 1)] = received[:1]
    at.out.omega[...] += received * at.block.coefficients.columns("clock", head, tiling.n)
    omega = at.ops.omega[:, : tiling.n] * TWO_PI
    return dict(clock=_sum_of_rows(received * omega))


def _store_values(at: _Step, values: _Values, o: list[jax.Array], dv: list[jax.Array]) -> None:
    """dx, dz, dD and those of the rank projections, from what was read (without the skip) and dv."""
    ops, row = at.ops, pl.ds(at.block.index, 1)
    x, z = (None if u is None else u[:, at.block.lanes].astype(jnp.float32) for u in (ops.x, ops.z))
    dx = dz = None
    for rank, (v, dy, g) in enumerate(zip(values.v, values.dy, values.g)):
        dv_ = dv[rank]
        read = o[rank]
        if ops.D is not None:
            v = v.astype(jnp.float32)
            at.store_sum("D", (row,), g * v)
            dv_ += ops.D[row] * g
            read += ops.D[row] * v
        if ops.mimo_x is not None:
            at.store_sum("mimo_x", (rank, row), dv_ * x)
            dv_ *= ops.mimo_x[rank, row]
        dx = _add(dx, dv_)
        if ops.mimo_o is not None:
            gated = read
            if z is not None:
                u = tiles.gate(ops, z, at.block.index, rank)
                gated = read * (u * tiles.sigmoid(u, ops.x.dtype))
            at.store_sum("mimo_o", (rank, row), dy * gated)
        if z is not None:
            dgate = _before_contraction(at, dy, rank) * read * values.slope[rank]
            if ops.mimo_z is not None:
                at.store_sum("mimo_z", (rank, row), dgate * z)
                dgate *= ops.mimo_z[rank, row]
            dz = _add(dz, dgate)
    at.out.x[:, at.block.lanes] = dx.astype(at.out.x.dtype)
    if z is not None:
        at.out.z[:, at.block.lanes] = dz.astype(at.out.z.dtype)


def _store_coefficients(at: _Step, heads: list[_Head], dentry: jax.Array, dexit: jax.Array) -> None:
    """dentry and dexit (c, lanes) before their sum over a head's lanes; every row of the block is written."""
    tiling = at.tiling
    of_lanes = dict(entry=dentry.T, exit=dexit.T)
    for head, one in enumerate(heads):
        mine = slice(head * tiling.p, (head + 1) * tiling.p)
        rows = one.rows | {kind: jnp.sum(u[mine], axis=0, keepdims=True) for kind, u in of_lanes.items()}
        for kind in KINDS:
            i = tiles.row_of(tiling, kind, head)
            at.out.coefficients[at.block.i, i : i + 1] = rows.get(kind, jnp.zeros((1, tiling.c), jnp.float32))
    unused = tiling.rows - len(KINDS) * tiling.heads
    if unused:
        at.out.coefficients[at.block.i, -unused:] = jnp.zeros((unused, tiling.c), jnp.float32)


def _call(ops: Operands, entries, dy, dlast, grid: Grid) -> tuple[Gradients, jax.Array]:
    """ops as `laid_out`."""
    tiling = grid.tiling
    b, t, width = ops.x.shape
    n, r, h = tiling.n, tiling.r, grid.blocks * tiling.heads

    def float32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def like(array):
        return None if array is None else jax.ShapeDtypeStruct(array.shape, array.dtype)

    def when(operand, *out):
        return (None, None) if operand is None else out

    def per_row(operand, *shape):
        return when(operand, float32(b, *shape), grid.per_row(*shape))

    of_ranks = r, grid.blocks, tiling.lanes
    pairs = Gradients(
        x=(like(ops.x), grid.sequence()),
        z=when(ops.z, like(ops.z), grid.sequence()),
        B=(like(ops.B), grid.projection()),
        C=(like(ops.C), grid.projection()),
        B_bias=per_row(ops.B_bias, 2, r, h, n),
        C_bias=per_row(ops.C_bias, 2, r, h, n),
        D=per_row(ops.D, grid.blocks, tiling.lanes),
        mimo_x=per_row(ops.mimo_x, *of_ranks),
        mimo_z=per_row(ops.mimo_z, *of_ranks),
        mimo_o=per_row(ops.mimo_o, *of_ranks),
        coefficients=(like(ops.coefficients), grid.coefficients()),
        through=(like(ops.through), grid.per_chunk(grid.blocks, tiling.lanes)),
        omega=when(ops.omega, float32(b, t, n), grid.shared(n)),
        theta0=when(ops.theta0, float32(b, grid.chunks, h, n), grid.per_chunk(h, n)),
    )
    stay = ops.mimo_x is not None and ops.mimo_o is None
    kept = pltpu.VMEM((2, 2 if tiling.s else 1, r, tiling.c, n), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, grid=grid),
        grid=grid.shape,
        in_specs=[
            grid.operands(),
            grid.state(),
            grid.ranks() if stay else grid.sequence(),
            grid.boundary_state(grid.chunks - 1),
        ],
        out_specs=[Gradients(*(spec for _, spec in pairs)), grid.boundary_state(0)],
        out_shape=[Gradients(*(shape for shape, _ in pairs)), float32(b, width, n)],
        scratch_shapes=[pltpu.VMEM((grid.blocks, tiling.lanes, n), jnp.float32), kept, kept],
        compiler_params=compiler_params(tiling),
        cost_estimate=estimate("backward", grid.sizes, chunk=tiling.c),
        interpret=tiling.interpret,
        name="ssm_tpu_backward",
    )(ops, entries, dy, dlast)


def backward(ops: Operands, entries, dy, dlast, tiling: Tiling) -> tuple[Operands, jax.Array]:
    """Gradients of the operands and of h0, from those of y and of the last state.

    entries: the states at each chunk's start, as `forward` kept them.
    """
    read = laid_out(ops, tiling)
    found, dh0 = _call(read, entries, dy, dlast, Grid(read, tiling, reverse=True))
    s = tiling.s

    def bias(u):
        return jnp.sum(u[:, 0] - swap_pairs(u[:, 1], s), axis=0)

    def of_pairs(u):
        return None if u is None else u[..., :s] + u[..., s : 2 * s]

    def over_rows(u):
        return None if u is None else jnp.sum(u, axis=0)

    grads = Operands(
        **found._replace(
            B_bias=bias(found.B_bias),
            C_bias=bias(found.C_bias),
            **{name: over_rows(getattr(found, name)) for name in ("D", "mimo_x", "mimo_z", "mimo_o")},
            omega=of_pairs(found.omega),
            theta0=of_pairs(found.theta0),
        )._asdict()
    )
    return jax.tree.map(lambda grad, operand: grad.astype(operand.dtype), grads, ops), dh0
