"""The angle before every chunk, from what every chunk's tokens turn by.

    theta0_k = theta0_0 + sum_{j < k} turned_j        modulo 2 pi

The sums are of binary angles, int32, of which 2^32 make a revolution: they wrap by themselves and are exact in any
order. In plain JAX it is `angles` of mamba3_jax/ops/prepass.py, which a GPU runs as three kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas.triton import tiles
from pallas.triton.operands import at_heads
from pallas.triton.tiles import Tiling

# At most so many chunks at a time.
GROUP = 32
# Binary angles are made with 2^31 to a revolution and then doubled, because rounding may leave a wrapped angle just
# beyond pi. So many to the radian, in two parts, so that none of float32's digits is lost.
HALVES = 2**31 / tiles.TWO_PI
HALVES_HIGH = float(np.float32(HALVES))
HALVES_LOW = HALVES - HALVES_HIGH


def _kernel(turned_ref, start_ref, theta0_ref, *, tiling: Tiling):
    """Of one row and head: turned and theta0 (chunks, s), start (s,) or None."""
    m, s = turned_ref.shape
    group = min(GROUP, pl.next_power_of_2(m))

    def some_chunks(i, before):
        chunks = i * group + lax.broadcasted_iota(jnp.int32, (group, s), 0)
        at = pl.ds(i * group, group)
        turned = _binary(tiling, plgpu.load(turned_ref.at[at], mask=chunks < m, other=0.0))
        after = before[None, :] + jnp.cumsum(turned, axis=0, dtype=jnp.int32)
        plgpu.store(theta0_ref.at[at], _radians(after - turned), mask=chunks < m)
        return before + jnp.sum(turned, axis=0, dtype=jnp.int32)

    start = jnp.zeros((s,), jnp.int32) if start_ref is None else _binary(tiling, start_ref[...])
    lax.fori_loop(0, pl.cdiv(m, group), some_chunks, start)


def _binary(tiling: Tiling, angle):
    angle = tiling.wrap(angle)
    high = angle * HALVES_HIGH
    rest = tiling.fma(angle, HALVES_LOW, tiling.fma(angle, HALVES_HIGH, -high))
    return 2 * (high.astype(jnp.int32) + rest.astype(jnp.int32))


def _radians(binary):
    """In [-pi, pi]."""
    return binary.astype(jnp.float32) * (0.5 / HALVES)


def before_chunks(turned: jax.Array, start: jax.Array | None, tiling: Tiling) -> jax.Array:
    """theta0 (b, chunks, h, s) from `turned`, of its shape, and the angle before the row (b, h, s), None is 0."""
    b, m, h, s = turned.shape
    at = functools.partial(at_heads, h)
    chunks = pl.BlockSpec((None, m, None, s), at(lambda h, _, b: (b, 0, h, 0)))
    row = None if start is None else pl.BlockSpec((None, None, s), at(lambda h, _, b: (b, h, 0)))
    return pl.pallas_call(
        functools.partial(_kernel, tiling=tiling),
        grid=(h, b),
        in_specs=[chunks, row],
        out_specs=chunks,
        out_shape=jax.ShapeDtypeStruct(turned.shape, jnp.float32),
        compiler_params=tiles.compiler_params(num_warps=4, num_stages=1),
        interpret=tiling.interpret,
        name="ssm_angles",
    )(turned, start)
