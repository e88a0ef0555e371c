"""The SwiGLU MLP of the Llama layout: fc2(a * silu(g)) with (a, g) = fc1(x)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mamba3_jax.distributed.rules import exchanged
from mamba3_jax.layers.parameters import linear

WIDTH_MULTIPLE = 128


class SwiGLU(nnx.Module):
    """A gated MLP whose hidden width is rounded up to a multiple of 128, as the released models round it."""

    def __init__(
        self,
        d_model: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        residual_branches: int = 1,
    ):
        width = -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self.fc1 = linear(d_model, 2 * width, rngs=rngs, dtype=dtype)
        self.fc2 = linear(width, d_model, rngs=rngs, dtype=dtype, residual_branches=residual_branches)

    def __call__(self, x: Float[Array, "*shape d"]) -> Float[Array, "*shape d"]:
        # One product, whose halves are each cut over devices.
        dtype = self.fc1.dtype
        kernel = self.fc1.kernel[...].astype(dtype).reshape(x.shape[-1], 2, -1)
        halves = jnp.einsum("...d,dkw->...kw", x.astype(dtype), exchanged(kernel, "mlp"))
        return self.fc2(halves[..., 0, :] * jax.nn.silu(halves[..., 1, :]))
