"""What the kernels of the backward pass compute; backward.py runs them.

They are several, because what does not fit the registers costs more than what is made twice; but the scores of a chunk
are made once, for a matrix read is cheaper than its exponentials. With g = dy silu(z), X = g v^T, Y = q k^T, dS the
adjoint of the state at a chunk's end, E_ij = exp(cs_i - cs_j) for i later than j, W as in tiles.py, M = W X, and P =
W Y with D added on its diagonal:

    o  = P v + entry q h          dz = dy o silu'(z)              dD = sum_i X_ii
    dq = M k + entry g h^T        dk = M^T q + exit v dS^T        dv = P^T g + exit k dS
    dentry_i = g_i.(q_i h)        dexit_j = v_j.(k_j dS)          dthrough = <dS, h>, of every slab
    dscale_j = sum_i (E X Y)_ij   dgamma_i = (X Y)_ii             dcs_j = sum_i (E X Y scale)_ji - scale_j dscale_j
    dtheta = q x dq + k x dk per turning pair, whose reverse cumulative sum is what each token's turn receives

dB, dC and domega are summed over a program's heads in a fixed order, and over programs outside. What the coefficients
receive, dcs without its second term, is handed on by a kernel of coefficients.py, which adds it; what a turn receives
from later chunks is read off the states (`_received_later`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas.triton import tiles
from pallas.triton.forward import gate, values, walk
from pallas.triton.operands import OfHead, Operands, at_head, over_heads
from pallas.triton.tiles import Tiling


def adjoint_kernel(segment, ops: Operands, g_ref, *refs, tiling: Tiling, chunks: int, ahead: bool):
    """As forward's _state_kernel, in reverse: dS enters at the segment's end and leaves at its start."""

    def load(t0):
        return tiles.load_slabs(tiling, ops.C, t0), g_ref[pl.ds(t0 * tiling.r, tiling.rows)]

    last = (segment + 1) * chunks - 1
    walk(tiling, ops, lambda i: last - i, chunks, load, lambda g: g, ops.C_bias, ops.entry, refs, ahead)


class Given(NamedTuple):
    """What a kernel of the gradients is given beside the operands, None what it does not need; m chunks.

    Of all these b is the grid's rows or the batch (backward.py, `_Grid`), as of what the kernels write.
    """

    dy: jax.Array | None = None
    g: jax.Array | None = None  # (b, t r, h, p) in the dtype of x, like the next four
    P: jax.Array | None = None  # (b, h, m, rows, rows)
    M: jax.Array | None = None
    entries: jax.Array | None = None  # (b, h, m, n, p)
    exits: jax.Array | None = None
    following: jax.Array | None = None  # entries, of which a kernel sees those of the chunk after its own
    end: jax.Array | None = None  # (b, h, s), what all turns receive through the last state; None is 0


# Where refs keep the block's heads, beside the batch; None: they are shared by the heads.
_HEAD_AXES = dict(
    dy=1, g=1, P=0, M=0, entries=0, exits=0, following=0, end=0,
    x=1, mimo_x=1, exit=0, z=1, mimo_z=1, mimo_o=1, entry=0, D=0, cs=0, scale=1, gamma=0,
    projections=None, biases=2, through=0, clock=0, omega=None,
)  # fmt: skip


def _at_head(refs, head):
    """What is given or written, of one head, from refs to a block of heads."""
    return type(refs)(**{
        name: ref if ref is None or _HEAD_AXES[name] is None else OfHead(ref, _HEAD_AXES[name], head)
        for name, ref in refs._asdict().items()
    })  # fmt: skip


def _over_turning_heads(heads: int, chunk, ops: Operands, slabs, tiling: Tiling, ahead: bool, body, carry=None):
    """`over_heads`, with the head's angles in every slab: body(head, chunk, angles, carry) -> carry.

    What the compiler fetches `ahead` it asks for at the end of a head, and waits for all of it before it uses any. So
    that angles become turns meanwhile, none of it is theirs: omega, which the heads share, stays in registers, and the
    vectors of the next head are carried along. Where nothing is fetched ahead that would only fill the registers.
    """
    if not ahead:

        def loading(head, chunk, carry):
            return body(head, chunk, tiles.load_angles(tiling, at_head(ops, head), chunk, slabs), carry)

        return over_heads(heads, chunk, tiling.interpret, loading, carry)

    def omega(slab):
        return None if slab.pair is None else tiling.of_token(ops.omega, chunk * tiling.c, slab.pairs)

    def vectors(head, chunk):
        """(clock, theta0) of every slab."""
        of, t0 = at_head(ops, head), chunk * tiling.c
        return [None if slab.pair is None else (tiling.of_token(of.clock, t0), of.theta0[chunk, slab.pairs])
                for slab in slabs]  # fmt: skip

    def carrying(head, chunk, carry):
        carry, now = carry
        following = vectors(jnp.minimum(head + 1, heads - 1), chunk)
        angles = [None if own is None else tiles.Angles(shared, *own) for shared, own in zip(omegas, now)]
        return body(head, chunk, angles, carry), following

    omegas = [omega(slab) for slab in slabs]
    return over_heads(heads, chunk, tiling.interpret, carrying, (carry, vectors(0, chunk)))[0]


class OutputGradients(NamedTuple):
    """What the kernel of the outputs writes; None where the operand is absent.

    Sums over tokens (D), over the groups of a tile's rows (scale) and over chunks and rows (mimo_*) are finished
    outside. P, M, and mimo_* are of a part of the batch, and so is g of several ranks; of one it is as large as x,
    whose gradient takes its place.
    """

    P: jax.Array  # (rows, h, m, r c, r c) in the dtype of x
    M: jax.Array
    g: jax.Array | None  # (b, t r, h, p) in the dtype of x; None where it is dy
    z: jax.Array | None  # (b, t, h, p)
    mimo_z: jax.Array | None  # (rows, m, h, r, p)
    mimo_o: jax.Array | None
    D: jax.Array | None  # (b, h, t)
    entry: jax.Array  # (b, h, t)
    cs: jax.Array  # (b, h, t), without -scale dscale
    scale: jax.Array  # (groups, b, h, t)
    gamma: jax.Array  # (b, h, t)


def output_kernel(chunk, ops: Operands, given: Given, earlier, out: OutputGradients, *, tiling: Tiling, heads: int):
    """One chunk of one row, for `heads` heads of one group.

    `earlier` is the memory of `out` where parts before have written, and is not read.
    """

    def body(head, chunk, _):
        _output_gradients(at_head(ops, head), _at_head(given, head), _at_head(out, head), chunk, tiling)

    over_heads(heads, chunk, tiling.interpret, body)


def _output_gradients(ops: Operands, given: Given, out: OutputGradients, chunk, tiling: Tiling) -> None:
    """One head: X and Y under their weights with their sums against the decays, then what the read receives."""
    t0 = chunk * tiling.c
    tokens, rows = pl.ds(t0, tiling.c), pl.ds(t0 * tiling.r, tiling.rows)
    dtype = ops.x.dtype
    # First what comes from the device's memory: a load behind a barrier is waited for.
    angles, decays = tiles.load_angles(tiling, ops, chunk), tiles.load_decays(tiling, ops, t0)
    entry = tiling.of_token(ops.entry, t0)
    h = [given.entries[slab.channels] for slab in tiles.slabs(tiling)]
    B, C = tiles.load_slabs(tiling, ops.B, t0), tiles.load_slabs(tiling, ops.C, t0)
    v, g = values(tiling, ops, t0), _gated(tiling, ops, given.dy, t0).g.astype(dtype)
    turns = tiles.turns(tiling, angles)
    q = tiles.project(tiling, C, ops.C_bias, turns, dtype)
    k = tiles.project(tiling, B, ops.B_bias, turns, dtype)
    X = tiling.dot(g, v, (1, 1))
    Y = sum(tiling.dot(q_, k_, (1, 1)) for q_, k_ in zip(q, k))
    E = tiles.later(tiling, ops, t0, decays)
    W = tiles.weights(tiling, decays, E)
    P = tiles.weighted(tiling, ops, W, Y).astype(dtype)
    out.P[...] = P
    out.M[...] = (W * X).astype(dtype)
    XY = X * Y
    EXY = E * XY
    out.scale[:, tokens] = tiling.per_token(tiling.in_groups(EXY), axis=1)
    out.cs[tokens] = tiling.per_token(jnp.sum(EXY * decays.scale[None, :], axis=1))
    i, j = tiles.row_and_column(tiling)
    out.gamma[tokens] = tiling.per_token(jnp.sum(jnp.where(i == j, XY, 0), axis=1))
    if ops.D is not None:
        i, j = (lax.broadcasted_iota(jnp.int32, X.shape, axis) for axis in (0, 1))
        out.D[tokens] = tiling.per_token(jnp.sum(jnp.where(i == j, X, 0), axis=1))

    o = tiling.dot(P, v)
    o_entry = sum(tiling.dot(q_, h_) for h_, q_ in zip(h, q))
    # dy and z are read again: kept from above they would fill the registers.
    gated = _gated(tiling, ops, given.dy, t0)
    out.entry[tokens] = tiling.per_token(jnp.sum(gated.g * o_entry, axis=1))
    o = tiling.fma(entry[:, None], o_entry, o)
    if out.g is not None:
        out.g[rows] = gated.g.astype(dtype)
    if ops.mimo_o is not None:
        out.mimo_o[chunk] = tiling.per_rank(gated.to_ranks * o)
    if ops.z is None:
        return
    dz = gated.to_gate * o
    if ops.mimo_z is not None:
        out.mimo_z[chunk] = tiling.per_rank(dz * tiling.of_token(ops.z, t0, slice(None)).astype(jnp.float32))
        dz *= tiling.of_rank(ops.mimo_z, slice(None))
    out.z[tokens] = tiling.per_token(dz).astype(out.z.dtype)


class _Gated(NamedTuple):
    """What the read o receives, g, and what o is multiplied by to be what the gate and the contraction of ranks
    receive, None where they are absent; (rows, p) in float32."""

    g: jax.Array
    to_gate: jax.Array | None
    to_ranks: jax.Array | None


def _gated(tiling: Tiling, ops: Operands, dy_ref, t0) -> _Gated:
    if ops.mimo_o is None:
        g, to_ranks = dy_ref[pl.ds(t0 * tiling.r, tiling.rows)].astype(jnp.float32), None
    else:
        to_ranks = tiling.of_token(dy_ref, t0, slice(None)).astype(jnp.float32)
        g = to_ranks * tiling.of_rank(ops.mimo_o, slice(None))
    if ops.z is None:
        return _Gated(g, None, to_ranks)
    u = gate(tiling, ops, tiling.of_token(ops.z, t0, slice(None)))
    sigmoid = tiling.sigmoid(u)
    swish = u * sigmoid
    read, to_gate = g * swish, g * tiling.fma(swish, 1 - sigmoid, sigmoid)
    return _Gated(read, to_gate, None if to_ranks is None else to_ranks * swish)


class ValueGradients(NamedTuple):
    """What the kernel of the values writes; None where the operand is absent.

    Sums over chunks and rows (mimo_x) are finished outside.
    """

    x: jax.Array  # (b, t, h, p)
    mimo_x: jax.Array | None  # (rows, m, h, r, p)
    exit: jax.Array  # (b, h, t)


def value_kernel(
    chunk, ops: Operands, given: Given, earlier, out: ValueGradients, *, tiling: Tiling, heads: int, ahead: bool
):
    """As output_kernel; `ahead` as in `_over_turning_heads`."""

    def body(head, chunk, angles, _):
        _value_gradients(at_head(ops, head), _at_head(given, head), _at_head(out, head), chunk, angles, tiling)

    _over_turning_heads(heads, chunk, ops, tiles.slabs(tiling), tiling, ahead, body)


def _value_gradients(ops: Operands, given: Given, out: ValueGradients, chunk, angles, tiling: Tiling) -> None:
    """One head."""
    t0 = chunk * tiling.c
    slabs = tiles.slabs(tiling)
    exit_ = tiling.of_token(ops.exit, t0)
    v = values(tiling, ops, t0)
    turns = tiles.turns(tiling, angles)
    B = tiles.load_slabs(tiling, ops.B, t0)
    k = tiles.project(tiling, B, ops.B_bias, turns, v.dtype)
    dv = tiling.dot(given.P[...], _of_rows(tiling, given.g, chunk), (0, 0))
    k_exit = sum(tiling.dot(k_, given.exits[slab.channels]) for slab, k_ in zip(slabs, k))
    out.exit[pl.ds(t0, tiling.c)] = tiling.per_token(jnp.sum(v.astype(jnp.float32) * k_exit, axis=1))
    dv = tiling.fma(exit_[:, None], k_exit, dv)
    if ops.mimo_x is not None:
        x = tiling.of_token(ops.x, t0, slice(None)).astype(jnp.float32)
        out.mimo_x[chunk] = tiling.per_rank(dv * x)
        dv *= tiling.of_rank(ops.mimo_x, slice(None))
    out.x[pl.ds(t0, tiling.c)] = tiling.per_token(dv).astype(out.x.dtype)


def _of_rows(tiling: Tiling, ref, chunk, *rest):
    """A chunk of (t r, ...)."""
    return ref[(pl.ds(chunk * tiling.rows, tiling.rows), *rest)]


class ProjectionGradients(NamedTuple):
    """What the kernel of the projections writes: of all the channels of its slabs; N programs per group.

    B and C, and their biases, lie in one array. Sums over blocks of heads (projections, omega), over the groups of a
    tile's rows, chunks and rows (biases), over channels (through) and over slabs (clock) are finished outside.
    """

    projections: jax.Array  # (2, N, rows, t r, g, n) float32
    biases: jax.Array  # (2, rows, m, h, groups, r, n) float32
    through: jax.Array  # (b, h, m, n)
    clock: jax.Array | None  # (slabs, b, h, t); None, like the next one, where they do not turn
    omega: jax.Array | None  # (N g, rows, t, s)


def projection_kernel(
    chunk,
    ops: Operands,
    given: Given,
    earlier,
    out: ProjectionGradients,
    *,
    tiling: Tiling,
    slabs,
    heads: int,
    chunks: int,
    ahead: bool,
):
    """As value_kernel, of one of the slabs; into `earlier` also those of the other kind have written."""
    slab = slabs[0].after(pl.program_id(0) % len(slabs)) if len(slabs) > 1 else slabs[0]

    def body(head, chunk, angles, sums):
        one = at_head(ops, head), _at_head(given, head), _at_head(out, head)
        [of_slab] = angles
        return jax.tree.map(jnp.add, sums, _projection_gradients(*one, chunk, chunks, of_slab, tiling, slab))

    def zeros(*shape):
        return jnp.zeros(shape, jnp.float32)

    sums = (zeros(tiling.rows, slab.width),) * 2
    sums += (None if slab.pair is None else zeros(tiling.c, slab.width // 2),)
    dB, dC, domega = _over_turning_heads(heads, chunk, ops, [slab], tiling, ahead, body, sums)
    rows = pl.ds(chunk * tiling.rows, tiling.rows)
    out.projections[0, rows], out.projections[1, rows] = dB, dC
    if domega is not None:
        out.omega[pl.ds(chunk * tiling.c, tiling.c)] = domega


def _projection_gradients(
    ops: Operands, given: Given, out: ProjectionGradients, chunk, chunks: int, angles, tiling: Tiling, slab
):
    """One head: writes what is its own, returns its shares of dB, dC and domega."""
    t0 = chunk * tiling.c
    # Asked for early: the compiler fetches ahead only what a matrix product is made of.
    exit_, entry = tiling.of_token(ops.exit, t0), tiling.of_token(ops.entry, t0)
    end = None if angles is None or given.end is None else given.end[slab.pairs]
    turn = tiles.turn(tiling, angles)
    q = tiles.project_slab(tiling, slab, _of_rows(tiling, ops.C, chunk, slab.channels), turn, ops.C_bias, ops.x.dtype)
    dS = given.exits[slab.channels]
    # Decays after the products: what is multiplied then goes from memory to the tensor cores as it is.
    written = tiling.dot(values(tiling, ops, t0), dS, (1, 1))
    dk = tiling.fma(exit_[:, None], written, tiling.dot(given.M[...], q, (0, 0)))
    dB, turned = _turn_back(tiling, ops.B, ops.B_bias, dk, turn, chunk, slab)
    out.biases[0, chunk] = tiling.per_rank_in_groups(dB)

    k = tiles.project_slab(tiling, slab, _of_rows(tiling, ops.B, chunk, slab.channels), turn, ops.B_bias, ops.x.dtype)
    h = given.entries[slab.channels]
    seen = tiling.dot(_of_rows(tiling, given.g, chunk), h, (1, 1))
    dq = tiling.fma(entry[:, None], seen, tiling.dot(given.M[...], k))
    dC, also_turned = _turn_back(tiling, ops.C, ops.C_bias, dq, turn, chunk, slab)
    out.biases[1, chunk] = tiling.per_rank_in_groups(dC)
    out.through[chunk] = jnp.sum(h.astype(jnp.float32) * dS.astype(jnp.float32), axis=1)
    if turn is None:
        return dB, dC, None

    later = _received_later(given.following, dS, end, slab, chunk + 1 < chunks)
    tokens = pl.ds(t0, tiling.c)
    dtheta = tiling.per_token(turned + also_turned)
    # The reverse cumulative sum, of which Triton has the forward one only.
    received = (jnp.sum(dtheta, axis=0) + later)[None, :] - jnp.cumsum(dtheta, axis=0) + dtheta
    omega, clock = angles.omega, angles.clock
    if tiling.r > 1:
        omega, clock = ops.omega[tokens, slab.pairs], ops.clock[tokens]
    out.clock[tokens] = jnp.sum(received * omega, axis=1)
    return dB, dC, received * clock[:, None]


def _received_later(following, dS, end, slab, there):
    """What the turns of all tokens after a chunk receive, if any are there: <dlast, J last> - <dS, J h>, h being what
    the next chunk finds and J the quarter turn of every pair. To turn these tokens is to turn that state backwards, and
    the last state; the sum of what they receive, of terms that cancel but for rounding, would in bfloat16 be the worse
    the longer the sequence is."""
    other = slab.start + (lax.broadcasted_iota(jnp.int32, (slab.width,), 0) ^ 1)
    h = following[(other, slice(None))]
    of_channels = jnp.sum(h.astype(jnp.float32) * dS.astype(jnp.float32), axis=1)
    first, second = jnp.unstack(of_channels.reshape(slab.width // 2, 2), axis=-1)
    turned = second - first
    return jnp.where(there, -turned if end is None else end - turned, 0)


def _turn_back(tiling: Tiling, ref, bias_ref, du, turn, chunk, slab):
    """From dk or dq: the gradient before the rotation, and what the angle receives, None without one."""
    back = tiles.rotate_back(tiling, du, turn)
    if turn is None:
        return back, None
    raw = tiles.biased(tiling, _of_rows(tiling, ref, chunk, slab.channels), bias_ref, slab)
    (a, b), (da, db) = tiles.pairs_of(raw), tiles.pairs_of(back)
    return back, tiling.fma(a, db, -(b * da))
