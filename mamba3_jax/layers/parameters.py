"""How parameters are declared and drawn."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Rows that XLA for GPUs multiplies as a matrix.
MATRIX_ROWS = 8
# No head starts with a smaller step, as in the released models.
DT_FLOOR = 1e-4


class Undecayed(nnx.Param):
    """A parameter that weight decay leaves alone: A_log, D, dt_bias, norms and biases."""


class Projection(nnx.Linear):
    """A linear layer that, when called, reads its kernel once, also for a single row on a GPU.

    There XLA makes of one row's product an array as large as the kernel, each number rounded to the layer's dtype, and
    then a sum of it. More rows it multiplies as matrices. Of Mamba-3 only out_proj and fc2 are called, and so are the
    baselines' projections: in_proj, fc1 and the head multiply by themselves, and their products, in float32 or with
    kernels wider than long, become proper matrix-vector kernels.
    """

    def __call__(self, x: Float[Array, "*shape d_in"]) -> Float[Array, "*shape d_out"]:
        multiply = super().__call__
        if math.prod(x.shape[:-1]) != 1:
            return multiply(x)

        def as_matrix(x):
            rows = jnp.pad(x.reshape(1, -1), ((0, MATRIX_ROWS - 1), (0, 0)))
            return multiply(rows)[:1].reshape(*x.shape[:-1], -1)

        return jax.lax.platform_dependent(x, cuda=as_matrix, default=multiply)


def linear(
    d_in: int,
    d_out: int,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
    residual_branches: int = 1,
    use_bias: bool = False,
) -> Projection:
    """A projection drawn from U(-1/sqrt(d_in), 1/sqrt(d_in)); its bias, if it has one, starts at 0.

    Projections that write into the residual stream are scaled by 1/sqrt(residual_branches), so that the stream's
    variance does not grow with depth.
    """
    bound = nnx.initializers.variance_scaling(1 / 3 / residual_branches, "fan_in", "uniform")
    projection = Projection(d_in, d_out, use_bias=use_bias, kernel_init=bound, dtype=dtype, rngs=rngs)
    if use_bias:
        projection.bias = Undecayed(projection.bias[...])
    return projection


def inverse_softplus(y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x with softplus(x) = y, for y > 0."""
    return y + jnp.log(-jnp.expm1(-y))


def log_uniform(key: Array, shape: tuple[int, ...], low: float, high: float) -> Array:
    """exp of a uniform draw between log(low) and log(high)."""
    return jnp.exp(jax.random.uniform(key, shape, minval=jnp.log(low), maxval=jnp.log(high)))


def step_size_bias(key: Array, h: int, low: float, high: float) -> Float[Array, " h"]:
    """dt_bias: softplus of it is log-uniform between low and high, and at least 1e-4."""
    return inverse_softplus(jnp.maximum(log_uniform(key, (h,), low, high), DT_FLOOR))


def log_decay_rate(key: Array, h: int, low: float, high: float) -> Float[Array, " h"]:
    """A_log: exp of it, |A| of each head, is uniform between low and high."""
    return jnp.log(jax.random.uniform(key, (h,), minval=low, maxval=high))
