"""The complex part of the state as rotations of channel pairs: section 3.2 of arXiv:2603.15569.

    omega_t = pi tanh(raw_t)                    angular velocity, shared by the heads
    theta_t = theta_{t-1} + dt_t omega_t        modulo 2 pi; per head, because dt is
    k_t = R(theta_t) B_t    q_t = R(theta_t) C_t

R turns pair i by theta[i]: (a, b) -> (a cos - b sin, a sin + b cos). Only the first `s` of the n/2 pairs turn
(s = n * rope_fraction / 2). SISO pairs neighbouring channels (2i, 2i+1), MIMO pairs (i, i + n/2). Inside the operator
the state axis is kept in pair order, [first of each turning pair | second of each | channels that do not turn], so that
one piece of code serves both.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Pairing = Literal["interleaved", "half"]
Rotation = Literal["data_dependent", "rope", "none"]

TWO_PI = 2 * np.pi
# 2 pi in two parts, the first exact in few bits: k * TWO_PI_HIGH is exact, so wrapping adds no error per revolution.
TWO_PI_HIGH = 6.28125
TWO_PI_LOW = TWO_PI - TWO_PI_HIGH


def angular_velocity(raw: Float[Array, "*shape"], bound: float = np.pi) -> Float[Array, "*shape"]:
    """omega = pi tanh(raw), in radians per unit of time."""
    return bound * jnp.tanh(raw)


def rope_frequencies(n: int, s: int, base: float = 10000.0) -> Float[Array, " s"]:
    """Standard RoPE: radians per token of pair i, base^(-2i/n). Independent of the data and of dt (table 5b)."""
    return jnp.asarray(base ** (-2 * np.arange(s) / n), jnp.float32)


def wrap(angle: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same angle in [-pi, pi], with derivative 1."""
    turns = jnp.round(angle / TWO_PI)
    return (angle - turns * TWO_PI_HIGH) - turns * TWO_PI_LOW


def turns(omega: Float[Array, "*batch hh s"], clock: Float[Array, "*batch h"]) -> Float[Array, "*batch h s"]:
    """The angle each token adds, in [-pi, pi]: wrapped before anything is summed, to keep float32 sums small."""
    return wrap(omega * clock[..., None])


def rotate(u: Float[Array, "*#shape n"], angle: Float[Array, "*#shape s"]) -> Float[Array, "*#shape n"]:
    """R(angle) u for u in pair order; `angle` broadcasts against all axes of `u` but the last."""
    return rotate_by(u, jnp.cos(angle), jnp.sin(angle))


def rotate_by(
    u: Float[Array, "*#shape n"], cos: Float[Array, "*#shape s"], sin: Float[Array, "*#shape s"]
) -> Float[Array, "*#shape n"]:
    """R u with the cosines and sines given."""
    s = cos.shape[-1]
    if s == 0:
        return u
    first, second, rest = split_pairs(u, s)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos, rest], axis=-1)


def split_pairs(u: Float[Array, "*shape n"], s: int) -> list[Float[Array, "*shape _"]]:
    """(first of each pair, second of each pair, rest) of an array in pair order."""
    # lax.split, not slices: its transpose is one concatenation, where each slice would pay a pad and an add.
    return jax.lax.split(u, (s, s, u.shape[-1] - 2 * s), axis=u.ndim - 1)


def rotate_interleaved(u: Float[Array, "*#shape n"], angle: Float[Array, "*#shape s"]) -> Float[Array, "*#shape n"]:
    """`rotate` for u whose pairs are neighbours."""
    s = angle.shape[-1]
    return from_pair_order(rotate(to_pair_order(u, s, "interleaved"), angle), s, "interleaved")


def to_pair_order(u: Float[Array, "*shape n"], s: int, pairing: Pairing) -> Float[Array, "*shape n"]:
    """Permutes the last axis from the checkpoint's order to pair order."""
    if s == 0:
        return u
    half = u.shape[-1] // 2
    if pairing == "interleaved":
        parts = [u[..., 0 : 2 * s : 2], u[..., 1 : 2 * s : 2], u[..., 2 * s :]]
    else:
        parts = [u[..., :s], u[..., half : half + s], u[..., s:half], u[..., half + s :]]
    return jnp.concatenate(parts, axis=-1)


def from_pair_order(u: Float[Array, "*shape n"], s: int, pairing: Pairing) -> Float[Array, "*shape n"]:
    """The inverse of `to_pair_order`."""
    if s == 0:
        return u
    half = u.shape[-1] // 2
    first, second, rest = u[..., :s], u[..., s : 2 * s], u[..., 2 * s :]
    if pairing == "interleaved":
        pairs = jnp.stack([first, second], axis=-1).reshape(*u.shape[:-1], 2 * s)
        return jnp.concatenate([pairs, rest], axis=-1)
    return jnp.concatenate([first, rest[..., : half - s], second, rest[..., half - s :]], axis=-1)


def to_interleaved(u: Float[Array, "*shape n"], s: int, pairing: Pairing) -> Float[Array, "*shape n"]:
    """Permutes the last axis from the checkpoint's order to neighbouring pairs: the kernels' order, and SISO's own."""
    return u if pairing == "interleaved" else from_pair_order(to_pair_order(u, s, pairing), s, "interleaved")


def from_interleaved(u: Float[Array, "*shape n"], s: int, pairing: Pairing) -> Float[Array, "*shape n"]:
    """The inverse of `to_interleaved`."""
    return u if pairing == "interleaved" else from_pair_order(to_pair_order(u, s, "interleaved"), s, pairing)
