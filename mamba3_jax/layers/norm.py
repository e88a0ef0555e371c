"""RMSNorm, as a function of arrays and as a layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mamba3_jax.layers.parameters import Undecayed

EPS = 1e-5


def rms_norm(
    x: Float[Array, "*shape"], weight: Float[Array, "*weight"], axis: int | tuple[int, ...] = -1
) -> Float[Array, "*shape"]:
    """x / sqrt(mean(x^2 over axis) + 1e-5) * weight, computed in at least float32, returned in x's dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=axis, keepdims=True) + EPS)
    return (wide * scale * jnp.expand_dims(weight, range(x.ndim - weight.ndim))).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm over the last axis, with a weight per channel."""

    def __init__(self, d: int):
        self.weight = Undecayed(jnp.ones(d))

    def __call__(self, x: Float[Array, "*shape d"]) -> Float[Array, "*shape d"]:
        return rms_norm(x, self.weight[...])
