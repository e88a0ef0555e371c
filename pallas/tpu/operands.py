"""The arrays of the kernels' boundary, and how the kernels see them.

A TPU's registers are 8 rows of 128 lanes. What is as long as the input keeps the layout in which the layer wrote it,
(b, t, h p): a block of lanes is 128 of the last axis, two heads of 64 channels, or one head where p is a multiple of
128. The coefficients of a block's heads are the rows of one array with t on the lanes. Nothing long has a last axis
under 128, which memory would pad to it.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.chips import LANES, SUBLANES, padded_up
from pallas.tpu.cost_model import Sizes

TWO_PI = 2 * np.pi

# Rows of `Operands.coefficients`: each kind for all heads of a block, then the next kind.
KINDS = ("coarse", "fine", "entry", "exit", "scale", "gamma", "clock")


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of a step: c tokens, r ranks, n state channels of which 2s turn, p head channels, blocks per step.

    n is a multiple of 128, and p one or a divisor of it; c is a multiple of 128 except when interpreting; vmem_bytes is
    what the compiler may take.
    """

    c: int
    r: int
    n: int
    s: int
    p: int
    blocks: int = 1
    vmem_bytes: int | None = None
    interpret: pltpu.InterpretParams | bool = False

    @property
    def lanes(self) -> int:
        """Of a block."""
        return max(self.p, LANES)

    @property
    def heads(self) -> int:
        """Of a block."""
        return self.lanes // self.p

    @property
    def rows(self) -> int:
        """Of a block's coefficients."""
        return -(-len(KINDS) * self.heads // SUBLANES) * SUBLANES

    @property
    def angle_lanes(self) -> int:
        """Of the packed angles: 2s per head of a block, at least n so that a head's can be moved to its channels."""
        return max(self.n, padded_up(self.heads * 2 * self.s))


class Operands(NamedTuple):
    """What the SSM reads; None is absent. Only these and the states between chunks are kept for the backward pass.

    Attributes:
        x, z: input and gate.
        B, C: projections in pair order.
        B_bias, C_bias: added per head before the rotation.
        D: skip, on every lane of its head.
        mimo_x, mimo_z, mimo_o: rank projections.
        coefficients: float32 rows (KINDS) of the block's heads.
            coarse, fine: two parts of the cumulative sum of the log decay from each chunk's start.
            entry: exp(coarse + fine), what a token still sees of the state at the chunk's start.
            exit: exp(rest of the chunk's log decay) scale, what the chunk's end sees of a token.
            scale, gamma: weights of a token for later ones and for itself.
            clock: what omega is multiplied by.
        through: what the chunk's end keeps of the state at its start, on every lane of its head.
        omega: angular velocity of all heads, radians per unit of `clock`.
        theta0: angle before each chunk's first token, radians.
    """

    x: jax.Array  # (b, t, h p)
    z: jax.Array | None  # (b, t, h p)
    B: jax.Array  # (b, g, r, t, n)
    C: jax.Array  # (b, g, r, t, n)
    B_bias: jax.Array  # (r, h, n)
    C_bias: jax.Array  # (r, h, n)
    D: jax.Array | None  # (blocks, lanes)
    mimo_x: jax.Array | None  # (r, blocks, lanes)
    mimo_z: jax.Array | None  # (r, blocks, lanes)
    mimo_o: jax.Array | None  # (r, blocks, lanes)
    coefficients: jax.Array  # (b, blocks, rows, t)
    through: jax.Array  # (b, chunks, blocks, lanes)
    omega: jax.Array | None  # (b, t, s)
    theta0: jax.Array | None  # (b, chunks, h, s)


def laid_out(ops: Operands, tiling: Tiling) -> Operands:
    """The operands as the kernels read them: biases (2, r, h, n) with their `swap`, angles packed and in turns.

    A block's angles lie side by side, (theta - 1/4, theta) of one head after the other, so that one cosine makes the
    sine and cosine of all of them.
    """
    s, heads, lanes = tiling.s, tiling.heads, tiling.angle_lanes
    ops = ops._replace(
        B_bias=jnp.stack([ops.B_bias, swap_pairs(ops.B_bias, s)]),
        C_bias=jnp.stack([ops.C_bias, swap_pairs(ops.C_bias, s)]),
    )
    if s == 0:
        return ops
    omega = jnp.tile(ops.omega / TWO_PI, (1, 1, -(-lanes // s)))[:, :, :lanes]
    theta = ops.theta0 / TWO_PI
    theta = jnp.concatenate([theta - 0.25, theta], axis=-1).reshape(*theta.shape[:2], -1, heads * 2 * s)
    theta = jnp.pad(theta, ((0, 0),) * 3 + ((0, lanes - theta.shape[-1]),))
    return ops._replace(omega=omega, theta0=theta)


def swap_pairs(u: jax.Array, s: int) -> jax.Array:
    """J u: (a, b) -> (-b, a) for every turning pair, 0 for the rest, so that R u = cos u + sin J u."""
    first, second, rest = u[..., :s], u[..., s : 2 * s], u[..., 2 * s :]
    return jnp.concatenate([-second, first, jnp.zeros_like(rest)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Rows of the batch x chunks x steps over the blocks, steps innermost so that B and C are fetched once per chunk.

    `reverse` walks the chunks from the last to the first.
    """

    ops: Operands
    tiling: Tiling
    reverse: bool = False

    @property
    def chunks(self) -> int:
        return self.ops.x.shape[1] // self.tiling.c

    @property
    def blocks(self) -> int:
        return self.ops.x.shape[2] // self.tiling.lanes

    @property
    def steps(self) -> int:
        return self.blocks // self.tiling.blocks

    @property
    def steps_per_group(self) -> int:
        return self.steps // self.ops.B.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.ops.x.shape[0], self.chunks, self.steps

    @property
    def sizes(self) -> Sizes:
        """For the cost model; heads and channels that were padded count."""
        b, t, _ = self.ops.x.shape
        tiling, itemsize = self.tiling, self.ops.x.dtype.itemsize
        h, g = self.blocks * tiling.heads, self.ops.B.shape[1]
        return Sizes(b, t, h, tiling.p, tiling.n, g, tiling.r, tiling.s, itemsize)

    def spec(self, block, index):
        """index(b, chunk, step, group)."""

        def at(b, i, step):
            chunk = self.chunks - 1 - i if self.reverse else i
            return index(b, chunk, step, lax.div(step, self.steps_per_group))

        return pl.BlockSpec(block, at)

    def sequence(self):
        """Of (b, t, h p)."""
        return self.spec((None, self.tiling.c, self.tiling.blocks * self.tiling.lanes), lambda b, c, j, g: (b, c, j))

    def ranks(self):
        """Of (b, r, t, h p)."""
        block = (None, self.tiling.r, self.tiling.c, self.tiling.blocks * self.tiling.lanes)
        return self.spec(block, lambda b, c, j, g: (b, 0, c, j))

    def projection(self):
        """Of (b, g, r, t, n)."""
        block = (None, None, self.tiling.r, self.tiling.c, self.tiling.n)
        return self.spec(block, lambda b, c, j, g: (b, g, 0, c, 0))

    def coefficients(self):
        """Of (b, blocks, rows, t)."""
        block = (None, self.tiling.blocks, self.tiling.rows, self.tiling.c)
        return self.spec(block, lambda b, c, j, g: (b, j, 0, c))

    def shared(self, width: int):
        """Of (b, t, width)."""
        return self.spec((None, self.tiling.c, width), lambda b, c, j, g: (b, c, 0))

    def per_chunk(self, rows: int, width: int):
        """Of (b, chunks, rows, width), for all heads at once: rows of one block would be padded to eight."""
        return self.spec((None, None, rows, width), lambda b, c, j, g: (b, c, 0, 0))

    def per_row(self, *shape: int):
        """Of (b, *shape)."""
        return self.spec((None, *shape), lambda b, c, j, g: (b,) + (0,) * len(shape))

    def whole(self, array):
        return None if array is None else self.spec(array.shape, lambda *_: (0,) * array.ndim)

    def state(self):
        """Of (b, chunks, h p, n)."""
        block = (None, None, self.tiling.blocks * self.tiling.lanes, self.tiling.n)
        return self.spec(block, lambda b, c, j, g: (b, c, j, 0))

    def boundary_state(self, chunk: int):
        """Of (b, h p, n), read or written at one chunk only; at the others the block stays, so that nothing moves."""
        away = self.steps - 1 if (chunk == 0) != self.reverse else 0
        block = (None, self.tiling.blocks * self.tiling.lanes, self.tiling.n)
        return self.spec(block, lambda b, c, j, g: (b, jnp.where(c == chunk, j, away), 0))

    def operands(self) -> Operands:
        """Of `laid_out` operands."""
        ops, tiling = self.ops, self.tiling
        turns = tiling.s > 0
        return Operands(
            x=self.sequence(),
            z=None if ops.z is None else self.sequence(),
            B=self.projection(),
            C=self.projection(),
            B_bias=self.whole(ops.B_bias),
            C_bias=self.whole(ops.C_bias),
            D=self.whole(ops.D),
            mimo_x=self.whole(ops.mimo_x),
            mimo_z=self.whole(ops.mimo_z),
            mimo_o=self.whole(ops.mimo_o),
            coefficients=self.coefficients(),
            through=self.per_chunk(self.blocks, tiling.lanes),
            omega=self.shared(tiling.angle_lanes) if turns else None,
            theta0=self.per_chunk(self.blocks, tiling.angle_lanes) if turns else None,
        )
