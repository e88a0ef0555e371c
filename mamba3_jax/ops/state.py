"""What the operator carries from one call to the next.

A call that takes the state of the previous one continues its sequence exactly, wherever the cut was made.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class SSMState(NamedTuple):
    """State after the last token, in at least float32. `k` and `v` are what the trapezoid still owes the next token.

    Attributes:
        angle: accumulated rotation theta in radians, modulo 2 pi; `s` is 0 without rotation.
        ssm: the SSM state, in the frame rotated by theta.
        k: last input projection B, biased and rotated, not scaled by dt.
        v: last input x, before any MIMO projection.
    """

    angle: Float[Array, "b h s"]
    ssm: Float[Array, "b h p n"]
    k: Float[Array, "b h r n"]
    v: Float[Array, "b h p"]

    @classmethod
    def zeros(cls, b: int, h: int, p: int, n: int, r: int = 1, s: int = 0, dtype=jnp.float32) -> "SSMState":
        """The state before the first token."""
        return cls(*(jnp.zeros(shape, dtype) for shape in cls.shapes(b, h, p, n, r, s)))

    @classmethod
    def shapes(cls, b: int, h: int, p: int, n: int, r: int, s: int) -> tuple[tuple[int, ...], ...]:
        """The shape of every field, in their order."""
        return (b, h, s), (b, h, p, n), (b, h, r, n), (b, h, p)

    def map(self, f) -> "SSMState":
        """`f` applied to each of the four arrays."""
        return jax.tree.map(f, self)
