"""What the kernels compute inside one tile: c tokens of one head, as c*r rows (every token once per MIMO rank).

    theta  = theta0 + cumsum(wrap(omega clock))       per head, never written to device memory
    k, q   = R(theta)(B + B_bias), R(theta)(C + C_bias)
    W_ij   = exp(cs_i - cs_j) scale_j for i later than j,  gamma_i for the same token,  0 otherwise

All of it is section 3 of arXiv:2603.15569 with the letters of mamba3_jax/ops/api.py; `cs` is the inclusive cumulative
sum of the log decay inside the tile. What depends on it alone is made outside (coefficients.py): a vector that is
loaded costs less than one that is made and handed from one layout of registers to the next. The state axis is in kernel
order, pairs side by side, so that a rotation stays inside a thread, and is worked on in slabs of at most 64 channels.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas.triton import ptx

TWO_PI = 2 * np.pi
# As in mamba3_jax/ops/rotation.py: in two parts, the first exact in few bits.
TWO_PI_HIGH = 6.28125
TWO_PI_LOW = TWO_PI - TWO_PI_HIGH


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of a tile: c tokens, r ranks, n state channels of which 2s turn, p head channels.

    `precise` says that operands are float32, and errors of 2^-11 would show.
    """

    c: int
    r: int
    n: int
    s: int
    p: int
    precise: bool
    interpret: bool = False

    @property
    def rows(self) -> int:
        return self.c * self.r

    def of_token(self, ref, t0, *rest):
        """ref[t0 : t0 + c, *rest], each token repeated for its ranks."""
        if self.r == 1:
            return ref[(pl.ds(t0, self.c), *rest)]
        return ref[(t0 + lax.broadcasted_iota(jnp.int32, (self.rows,), 0) // self.r, *rest)]

    def of_rank(self, ref, *rest):
        """ref[rank of each row, *rest], broadcast over the rows of SISO."""
        if self.r == 1:
            return ref[(0, *rest)][None, :]
        return ref[(lax.broadcasted_iota(jnp.int32, (self.rows,), 0) % self.r, *rest)]

    def per_token(self, u, axis: int = 0):
        """Sum over the ranks of each token: rows -> c along the axis."""
        if self.r == 1:
            return u
        return jnp.sum(u.reshape(*u.shape[:axis], self.c, self.r, *u.shape[axis + 1 :]), axis=axis + 1)

    @property
    def groups(self) -> int:
        """Groups of 16 rows: of a tile of 64 what each of four warps holds of a product, so that no warp waits for
        others to sum over a group. Of several ranks one group, for their sums are as many times larger."""
        return self.rows // 16 if self.r == 1 else 1

    def in_groups(self, u):
        """Sum over the rows of each group: (rows, w) -> (groups, w)."""
        return jnp.sum(u.reshape(self.groups, self.rows // self.groups, u.shape[1]), axis=1)

    def per_rank_in_groups(self, u):
        """Sum over the tokens of each rank in a group: (rows, w) -> (groups, r, w)."""
        return self.in_groups(u)[:, None] if self.r == 1 else self.per_rank(u)[None]

    def per_rank(self, u):
        """Sum over the tokens of each rank: (rows, w) -> (r, w)."""
        return jnp.sum(u.reshape(self.c, self.r, u.shape[1]), axis=0)

    def once_per_token(self, u):
        """Zero but in the first rank of each token, so that sums over rows count every token once."""
        if self.r == 1:
            return u
        first = lax.broadcasted_iota(jnp.int32, u.shape, 0) % self.r == 0
        return jnp.where(first, u, 0)

    def dot(self, a, b, contract=(1, 0)):
        """a b with float32 accumulation; float32 operands keep (nearly) float32's precision."""
        precision = None
        if a.dtype == jnp.float32:
            precision = lax.Precision.HIGHEST if self.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        return lax.dot_general(
            a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    def cos_sin(self, angle):
        """Cosine and sine; if precise, of the wrapped angle."""
        angle = self.wrap(angle) if self.precise and not self.interpret else angle
        return ptx.cos(angle, interpret=self.interpret), ptx.sin(angle, interpret=self.interpret)

    def wrap(self, angle):
        """The same angle in [-pi, pi]."""
        turns = jnp.floor(self.fma(angle, 1 / TWO_PI, 0.5))
        return self.fma(turns, -TWO_PI_LOW, self.fma(turns, -TWO_PI_HIGH, angle))

    def fma(self, a, b, c):
        """a b + c in one instruction."""
        return ptx.fma(a, b, c, interpret=self.interpret)

    def add(self, u, v):
        """u + v in the dtype of u, bfloat16: nothing to convert."""
        return ptx.add_bfloat16(u, jnp.broadcast_to(v, u.shape).astype(u.dtype), interpret=self.interpret)

    def exp2(self, u):
        return ptx.exp2(u, interpret=self.interpret)

    def sigmoid(self, u):
        """To 2^-21; to 2^-12 where that is enough."""
        if self.precise or self.interpret:
            return ptx.sigmoid(u, self.interpret)
        return self.fma(ptx.tanh(0.5 * u, interpret=False), 0.5, 0.5)


class Slab(NamedTuple):
    """`width` state channels from `start`; `pair` is the first of its turning pairs, None where they do not turn."""

    start: int
    width: int
    pair: int | None

    @property
    def channels(self):
        return pl.ds(self.start, self.width)

    @property
    def pairs(self):
        return pl.ds(self.pair, self.width // 2)

    def after(self, k) -> "Slab":
        """The k-th slab after this one, of its kind."""
        pair = None if self.pair is None else self.pair + k * (self.width // 2)
        return Slab(self.start + k * self.width, self.width, pair)


# Per slab, as wide tensors in registers are what runs out first; 64 is the least that a Hopper matrix product of state
# rows takes.
SLAB = 64


def slabs(tiling: Tiling, turning_width: int = SLAB) -> tuple[Slab, ...]:
    """The state axis in kernel order, [first_0, second_0, first_1, ... | channels that do not turn], in slabs."""
    turning, n = 2 * tiling.s, tiling.n
    out = []
    for begin, end, turns in ((0, turning, True), (turning, n, False)):
        width = min(turning_width if turns else SLAB, end - begin)
        out += [Slab(i, width, i // 2 if turns else None) for i in range(begin, end, width or 1)]
    return tuple(out)


class Angles(NamedTuple):
    """What the angles of a tile are made of, in one slab."""

    omega: jax.Array  # (rows, width / 2)
    clock: jax.Array  # (rows,)
    theta0: jax.Array  # (width / 2,)


class Turn(NamedTuple):
    """cos and sin of a tile's angles in one slab, (rows, width / 2)."""

    cos: jax.Array
    sin: jax.Array


def load_angles(tiling: Tiling, ops, chunk, of_slabs: Sequence[Slab] | None = None) -> list[Angles | None]:
    """Each slab's in a chunk, or those of some slabs; None where it does not turn."""
    t0 = chunk * tiling.c

    def load(pairs):
        return Angles(tiling.of_token(ops.omega, t0, pairs), tiling.of_token(ops.clock, t0), ops.theta0[chunk, pairs])

    return [None if slab.pair is None else load(slab.pairs) for slab in of_slabs or slabs(tiling)]


def turn(tiling: Tiling, angles: Angles | None) -> Turn | None:
    """A slab's rotation; None where it does not turn."""
    if angles is None:
        return None
    step = angles.omega * angles.clock[:, None]
    step = tiling.wrap(step) if tiling.precise else step
    return Turn(*tiling.cos_sin(angles.theta0[None, :] + jnp.cumsum(tiling.once_per_token(step), axis=0)))


def turns(tiling: Tiling, angles: list[Angles | None]) -> list[Turn | None]:
    """Each slab's rotation."""
    return [turn(tiling, of_slab) for of_slab in angles]


def load_slabs(tiling: Tiling, ref, t0) -> list[jax.Array]:
    """B or C of a tile as they lie in memory, ref (t*r, n)."""
    return [ref[pl.ds(t0 * tiling.r, tiling.rows), slab.channels] for slab in slabs(tiling)]


def biased(tiling: Tiling, raw: jax.Array, bias_ref, slab: Slab) -> jax.Array:
    """A slab of B + B_bias or C + C_bias in float32; bias_ref (r, n)."""
    return raw.astype(jnp.float32) + tiling.of_rank(bias_ref, slab.channels)


def rotate(tiling: Tiling, u: jax.Array, by: Turn | None) -> jax.Array:
    """R(theta) u of one slab."""
    if by is None:
        return u
    a, b = pairs_of(u)
    first, second = tiling.fma(a, by.cos, -(b * by.sin)), tiling.fma(a, by.sin, b * by.cos)
    return jnp.stack([first, second], axis=-1).reshape(u.shape)


def rotate_back(tiling: Tiling, u: jax.Array, by: Turn | None) -> jax.Array:
    """R(theta)^T u of one slab."""
    return rotate(tiling, u, None if by is None else Turn(by.cos, -by.sin))


def pairs_of(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and second of each pair: neighbouring registers of one thread."""
    return jnp.unstack(u.reshape(u.shape[0], u.shape[1] // 2, 2), axis=-1)


def project(tiling: Tiling, raw: list[jax.Array], bias_ref, by: list[Turn | None], dtype) -> list[jax.Array]:
    """k or q, per slab (rows, width) in `dtype`."""
    return [project_slab(tiling, *of_slab, bias_ref, dtype) for of_slab in zip(slabs(tiling), raw, by)]


def project_slab(tiling: Tiling, slab: Slab, raw: jax.Array, by: Turn | None, bias_ref, dtype) -> jax.Array:
    """k or q of one slab."""
    if by is None and raw.dtype == dtype == jnp.bfloat16:
        return tiling.add(raw, tiling.of_rank(bias_ref, slab.channels))
    return rotate(tiling, biased(tiling, raw, bias_ref, slab), by).astype(dtype)


class Decays(NamedTuple):
    """Of each row, what W is made of; as in operands.py."""

    coarse: jax.Array
    fine: jax.Array | None
    scale: jax.Array
    gamma: jax.Array


def load_decays(tiling: Tiling, ops, t0) -> Decays:
    """Those of a tile."""
    refs = (getattr(ops, name) for name in Decays._fields)
    return Decays(*(None if ref is None else tiling.of_token(ref, t0) for ref in refs))


def later(tiling: Tiling, ops, t0, decays: Decays) -> jax.Array:
    """E_ij = exp(cs_i - cs_j) where row i is later than j and of its document, else 0; (rows, rows)."""
    i, j = row_and_column(tiling)
    same = None
    if ops.segment_ids is not None:
        same = tiling.of_token(ops.segment_ids, t0)[:, None] == tiling.of_token(ops.segment_ids, t0)[None, :]
    coarse, fine = decays.coarse, decays.fine
    if fine is None:
        cs = coarse * ptx.LOG2_E
        exponent = cs[:, None] - cs[None, :]
    else:
        exponent = ((coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])) * ptx.LOG2_E
    return jnp.where(i > j if same is None else (i > j) & same, tiling.exp2(exponent), 0)


def weights(tiling: Tiling, decays: Decays, E: jax.Array) -> jax.Array:
    """W from E, (rows, rows)."""
    i, j = row_and_column(tiling)
    # gamma by rows, of which a thread holds fewer than columns.
    return jnp.where(i == j, decays.gamma[:, None], E * decays.scale[None, :])


def weighted(tiling: Tiling, ops, W: jax.Array, scores: jax.Array) -> jax.Array:
    """W times the scores, and D on the diagonal, so that the product with v makes the skip too."""
    if ops.D is None:
        return W * scores
    i, j = (lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
    return tiling.fma(W, scores, jnp.where(i == j, ops.D[...], 0))


def row_and_column(tiling: Tiling) -> list[jax.Array]:
    """The token of each element's row, and of its column."""
    shape = (tiling.rows, tiling.rows)
    return [lax.broadcasted_iota(jnp.int32, shape, axis) // tiling.r for axis in (0, 1)]


def compiler_params(num_warps: int, num_stages: int):
    """Explicit, because which backend pallas_call takes without them differs by version."""
    return plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)
