"""Angles inside the TPU kernels: wrapping, and cosine and sine, which Mosaic's own make with many more operations.

On [-pi, pi] both are one odd polynomial S of degree 9, the minimax approximation of sin on [0, pi/2]:

    cos(a) = S(pi/2 - |a|)        sin(a) = sign(a) S(min(|a|, pi - |a|))

It errs by 3.3e-9; evaluated in float32 both are within 1.8e-7 of the truth (tests/kernels/test_tpu_decode.py).
"""

import math

import jax
import jax.numpy as jnp

# As in mamba3_jax/ops/rotation.py: 2 pi in two parts, the first exact in few bits.
TWO_PI = 2 * math.pi
TWO_PI_HIGH = 6.28125
TWO_PI_LOW = TWO_PI - TWO_PI_HIGH

_SIN = (0.99999997659, -0.166666476346, 0.00833289982336, -0.000198008977633, 2.59048850141e-06)
# pi/2 and pi as a float32 and what it lacks, so that cosine and sine are exact near their zeros.
_HALF_PI, _HALF_PI_REST = 1.57079637050628662, -4.37113882867e-8
_PI, _PI_REST = 3.14159274101257324, -8.74227765735e-8


def wrap(angle: jax.Array) -> jax.Array:
    """The same angle in [-pi, pi]; any shape, float32."""
    turns = jnp.round(angle * (1 / TWO_PI))
    return (angle - turns * TWO_PI_HIGH) - turns * TWO_PI_LOW


def cos_sin(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of an angle in [-pi, pi]; any shape, float32."""
    size = jnp.abs(angle)
    folded = jnp.minimum(size, (_PI - size) + _PI_REST)
    return _sin((_HALF_PI - size) + _HALF_PI_REST), _sin(jnp.where(angle < 0, -folded, folded))


def _sin(u: jax.Array) -> jax.Array:
    square = u * u
    p = _SIN[-1]
    for coefficient in _SIN[-2::-1]:
        p = p * square + coefficient
    return u * p
