"""What the kernels compute inside one block: c tokens of the heads that share its lanes.

    theta  = theta0 + cumsum(omega clock)             per head, modulo one turn, never written to device memory
    k, q   = R(theta)(B + B_bias), R(theta)(C + C_bias)
    W_ij   = exp(cs_i - cs_j) scale_j for i > j,  gamma_i on the diagonal,  0 above

All of it is section 3 of arXiv:2603.15569 with the letters of mamba3_jax/ops/api.py; `cs` is the inclusive cumulative
sum of the log decay inside the chunk. The state axis is in pair order, [first of each pair | second | rest], on the
lanes: R u = cos u + sin J u with J of `swap`, which for B and C is made once per chunk. Sums along t are products with
a triangle of ones, which the matrix unit makes exactly of operands split into bfloat16 parts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.operands import KINDS, Operands, Tiling


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """a b with float32 accumulation; float32 operands keep float32's precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def sums(ones: jax.Array, u: jax.Array, dtype) -> jax.Array:
    """ones @ u in float32 for a matrix of zeros and ones: exact products, as `ones` and the parts of u are bfloat16.

    Two parts keep 16 bits of u, which is what an operator in bfloat16 needs, three keep all.
    """
    total = None
    for _ in range(2 if dtype == jnp.bfloat16 else 3):
        part = u.astype(jnp.bfloat16)
        u = u - part.astype(jnp.float32)
        product = dot(ones, part)
        total = product if total is None else total + product
    return total


def triangle(c: int, upper: bool = False) -> jax.Array:
    """Ones on the diagonal and below it, or above."""
    i, j = (lax.broadcasted_iota(jnp.int32, (c, c), axis) for axis in (0, 1))
    return jnp.where(j >= i if upper else i >= j, 1.0, 0.0).astype(jnp.bfloat16)


def lane(shape: tuple[int, int]) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, 1)


class Coefficients:
    """The coefficients of a block's heads, with tokens on lanes (rows) or on sublanes (columns).

    Columns are transposed from rows that are repeated on sublanes: seven times cheaper than a column's broadcast along
    the lanes, one of the slow instructions.
    """

    def __init__(self, tiling: Tiling, rows: jax.Array):
        self._tiling, self._rows = tiling, rows

    def row(self, kind: str, head: int) -> jax.Array:
        """(1, c)"""
        i = row_of(self._tiling, kind, head)
        return self._rows[i : i + 1]

    def columns(self, kind: str, head: int, width: int) -> jax.Array:
        """(c, width), the same column on every lane."""
        return repeated(self.row(kind, head), width).T

    def on_lanes(self, kind: str, per_head: int) -> jax.Array:
        """(c, heads per_head): each head's column on its own lanes."""
        return jnp.concatenate(
            [repeated(self.row(kind, head), per_head) for head in range(self._tiling.heads)], axis=0
        ).T


def repeated(row: jax.Array, size: int) -> jax.Array:
    """(1, c) -> (size, c)"""
    return jnp.broadcast_to(row, (size, row.shape[1]))


def row_of(tiling: Tiling, kind: str, head: int) -> int:
    return KINDS.index(kind) * tiling.heads + head


def by_head(each: list[jax.Array], per_head: int) -> jax.Array:
    """Of arrays (c, width), one per head: every head's own `per_head` lanes."""
    out = each[0]
    for head, u in enumerate(each[1:], 1):
        out = jnp.where(lane(out.shape) >= head * per_head, u, out)
    return out


def only_head(tiling: Tiling, u: jax.Array, head: int) -> jax.Array:
    """u (c, lanes) with zeros on the other heads' lanes."""
    if tiling.heads == 1:
        return u
    channel = lane(u.shape)
    mine = (channel >= head * tiling.p) & (channel < (head + 1) * tiling.p)
    return jnp.where(mine, u, jnp.zeros_like(u))


class Turn(NamedTuple):
    """Cosines and sines of a head's angles on the state's channels, (c, n): 1 and 0 where they do not turn."""

    cos: jax.Array
    sin: jax.Array


def turns(tiling: Tiling, ops: Operands, block, coefficients: Coefficients) -> list[Turn | None]:
    """Each head's rotation."""
    s, n, heads, width = tiling.s, tiling.n, tiling.heads, tiling.angle_lanes
    if s == 0:
        return [None] * heads
    clock = coefficients.on_lanes("clock", 2 * s)
    clock = jnp.pad(clock, ((0, 0), (0, width - clock.shape[1])))
    step = ops.omega[...] * clock
    step = step - nearest(step)
    angle = ops.theta0[pl.ds(block, 1)] + sums(triangle(tiling.c), step, ops.x.dtype)
    both = cosine(angle)
    channel = lane((tiling.c, n))

    def moved(start: int) -> jax.Array:
        """Lanes from `start` on at the front."""
        shift = -start % width
        return (pltpu.roll(both, shift, 1) if shift else both)[:, :n]

    def turn(head: int) -> Turn:
        at = head * 2 * s
        cos = jnp.where(channel < s, moved(at + s), jnp.where(channel < 2 * s, moved(at), 1.0))
        sin = jnp.where(channel < s, moved(at), jnp.where(channel < 2 * s, moved(at - s), 0.0))
        return Turn(cos, sin)

    return [turn(head) for head in range(heads)]


class Block(NamedTuple):
    """One block of a step."""

    i: int  # of the step
    index: jax.Array  # of the row
    lanes: slice  # of the step
    coefficients: Coefficients
    turns: list[Turn | None]


def blocks(tiling: Tiling, ops: Operands, step) -> list[Block]:
    """Those of a step: unrolled, without a branch between them, and with all their angles made first, so that one
    block's latencies hide behind another's work (a fifth of the forward kernel's cycles)."""

    def block(i: int) -> Block:
        index = step * tiling.blocks + i
        coefficients = Coefficients(tiling, ops.coefficients[i])
        lanes = slice(i * tiling.lanes, (i + 1) * tiling.lanes)
        return Block(i, index, lanes, coefficients, turns(tiling, ops, index, coefficients))

    return [block(i) for i in range(tiling.blocks)]


def cosine(turns: jax.Array) -> jax.Array:
    """cos(2 pi turns) to 1e-7: a quarter turn less the distance to the nearest whole turn, then a polynomial in it."""
    u = 0.25 - jnp.abs(turns - nearest(turns))
    square = u * u
    out = jnp.float32(SINE[-1])
    for coefficient in SINE[-2::-1]:
        out = out * square + jnp.float32(coefficient)
    return out * u


def nearest(u: jax.Array) -> jax.Array:
    """u rounded: two operations, where `jnp.round` takes eight."""
    return jnp.floor(u + 0.5)


def _sine_coefficients() -> tuple[float, ...]:
    """Of sin(2 pi u) = u P(u^2) on [-1/4, 1/4], |error| < 1e-8: interpolated at Chebyshev's points in u^2."""
    points = (1 - np.cos((np.arange(5) + 0.5) * np.pi / 5)) / 32
    u = np.sqrt(points)
    return tuple(np.polynomial.polynomial.polyfit(points, np.sin(2 * np.pi * u) / u, 4))


SINE = _sine_coefficients()


def swap(tiling: Tiling, u: jax.Array) -> jax.Array:
    """J u of (c, n): see `operands.swap_pairs`."""
    s, n = tiling.s, tiling.n
    channel = lane(u.shape)
    first, second = -pltpu.roll(u, n - s, 1), pltpu.roll(u, s, 1)
    return jnp.where(channel < s, first, jnp.where(channel < 2 * s, second, 0.0))


class Projection(NamedTuple):
    """B or C of a head and rank plus its bias, (c, n) float32, and its `swap`; None where nothing turns."""

    u: jax.Array
    swapped: jax.Array | None

    def rotated(self, turn: Turn | None) -> jax.Array:
        """k or q."""
        return self.u if turn is None else self.u * turn.cos + self.swapped * turn.sin


def keep_projections(tiling: Tiling, ops: Operands, kept) -> None:
    """B, J B, C and J C of a chunk in float32, for the steps over heads; kept (2, 2, r, c, n)."""
    for i, ref in enumerate((ops.B, ops.C)):
        for rank in range(tiling.r):
            u = ref[rank].astype(jnp.float32)
            kept[i, 0, rank] = u
            if tiling.s:
                kept[i, 1, rank] = swap(tiling, u)


def projection(tiling: Tiling, kept, bias, of: str, rank: int, head) -> Projection:
    """Of "B" or "C"; bias (2, r, h, n), `head` of all."""
    u, swapped = (
        kept["BC".index(of), i, rank] + bias[i, rank, pl.ds(head, 1)] if i == 0 or tiling.s else None for i in (0, 1)
    )
    return Projection(u, swapped)


def later(tiling: Tiling, coefficients: Coefficients, head: int) -> jax.Array:
    """exp(cs_i - cs_j) for i > j, else 0; (c, c). A document's first token decays to 0 what came before."""
    c = tiling.c
    exponent = sum(
        coefficients.columns(kind, head, c) - coefficients.row(kind, head) for kind in ("coarse", "fine")
    )
    i, j = (lax.broadcasted_iota(jnp.int32, exponent.shape, axis) for axis in (0, 1))
    return jnp.exp(jnp.where(i > j, exponent, -jnp.inf))


def weights(tiling: Tiling, coefficients: Coefficients, head: int, decays: jax.Array) -> jax.Array:
    """W from `later`."""
    i, j = (lax.broadcasted_iota(jnp.int32, decays.shape, axis) for axis in (0, 1))
    return jnp.where(i == j, coefficients.row("gamma", head), decays * coefficients.row("scale", head))


def through(tiling: Tiling, ops: Operands, block) -> jax.Array:
    """What the state's rows keep, (lanes, n)."""
    return repeated(ops.through[pl.ds(block, 1)], tiling.n).T


def value(ops: Operands, x: jax.Array, block, rank: int) -> jax.Array:
    """v of a rank, (c, lanes) in the dtype of x."""
    if ops.mimo_x is None:
        return x
    return (x.astype(jnp.float32) * ops.mimo_x[rank, pl.ds(block, 1)]).astype(x.dtype)


def gate(ops: Operands, z: jax.Array, block, rank: int) -> jax.Array:
    """The gate before silu, (c, lanes) in float32."""
    z = z.astype(jnp.float32)
    return z if ops.mimo_z is None else z * ops.mimo_z[rank, pl.ds(block, 1)]


def sigmoid(u: jax.Array, dtype) -> jax.Array:
    """In bfloat16's precision by the hardware's reciprocal alone: an exact quotient takes ten operations more."""
    return jax.nn.sigmoid(u) if dtype == jnp.float32 else pltpu.reciprocal(1 + jnp.exp(-u), approx=True)
