"""The differentiable boundary of the kernels.

Kept for the backward pass are the operands and the states at each chunk's start, in the dtype of x: as many bytes as x
with chunks of n tokens. Several devices run it inside a `shard_map`.
"""

import functools

import jax
import jax.numpy as jnp

from pallas.tpu.backward import backward
from pallas.tpu.forward import forward
from pallas.tpu.operands import Operands, Tiling


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def ssm(ops: Operands, h0: jax.Array, tiling: Tiling) -> tuple[jax.Array, jax.Array]:
    """y (b, t, h p), or (b, r, t, h p) where the ranks stay, and the last state from h0 (b, h p, n), both float32.

    See `Operands`.
    """
    return tuple(forward(ops, h0, tiling, keep=False)[:2])


def _forward(ops, h0, tiling):
    y, last, entries = forward(ops, h0, tiling, keep=True)
    return (y, last), (ops, entries)


def _backward(tiling, saved, grads):
    ops, entries = saved
    dy, dlast = grads
    return backward(ops, entries, dy, dlast.astype(jnp.float32), tiling)


ssm.defvjp(_forward, _backward)
