"""What every form of the operator starts from: arrays discretised, in float32 where sums are taken.

The state axis is in pair order, and for the GPU kernels in the order of neighbouring pairs (rotation.py).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mamba3_jax.ops.discretization import Coefficients


class Inputs(NamedTuple):
    """Prepared inputs; `omega * clock` is the turn of each token. Letters as in ops/api.py.

    `omega` has one row for all heads (`hh` = 1) or one per head, and `clock` is dt, or 1 per token for standard RoPE.
    """

    x: Float[Array, "b t h p"]
    B: Float[Array, "b t r g n"]
    C: Float[Array, "b t r g n"]
    B_bias: Float[Array, "h r n"]
    C_bias: Float[Array, "h r n"]
    coefficients: Coefficients
    omega: Float[Array, "b t hh s"]
    clock: Float[Array, "b t h"]
    mimo_x: Float[Array, "h r p"] | None
    segment_ids: Int[Array, "b t"] | None


def per_head(
    u: Float[Array, "*batch r g n"], bias: Float[Array, "h r n"], dtype: jnp.dtype
) -> Float[Array, "*batch h r n"]:
    """B or C of each head: its group's projection plus its own bias."""
    grouped = jnp.moveaxis(u.astype(dtype), -2, -3)
    return jnp.repeat(grouped, bias.shape[0] // u.shape[-2], axis=-3) + jnp.expand_dims(bias, range(u.ndim - 3))


def expand_ranks(x: Float[Array, "*batch h p"], mimo_x: Float[Array, "h r p"] | None) -> Float[Array, "*batch h r p"]:
    """v^(j) = x * mimo_x[:, j]; SISO has the one rank v = x."""
    v = x[..., None, :]
    return v if mimo_x is None else v * jnp.expand_dims(mimo_x, range(x.ndim - 2))
