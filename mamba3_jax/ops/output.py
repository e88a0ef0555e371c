"""From the operator's reads to its output: the D skip, the gate, and the down-projection of MIMO's ranks (section 3.3).

    SISO   y = (o + D x) silu(z)
    MIMO   y = sum_r mimo_o^(r) (o^(r) + D v^(r)) silu(mimo_z^(r) z)        with v^(r) = mimo_x^(r) x
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mamba3_jax.ops.inputs import expand_ranks


def skip(
    o: Float[Array, "b t r h p"], x: Float[Array, "b t h p"], D: Float[Array, " h"] | None, mimo_x: Array | None
) -> Float[Array, "b t r h p"]:
    """o + D v, where the skip sees x as the state does, after the expansion to ranks."""
    if D is None:
        return o
    v = jnp.moveaxis(expand_ranks(x, mimo_x), 3, 2)
    return o + D[None, None, None, :, None] * v


def gate(
    o: Float[Array, "b t r h p"], z: Float[Array, "b t h p"] | None, mimo_z: Float[Array, "h r p"] | None
) -> Float[Array, "b t r h p"]:
    """o silu(z), z expanded to ranks."""
    return o if z is None else o * jax.nn.silu(jnp.moveaxis(expand_ranks(z, mimo_z), 3, 2))


def reduce_ranks(o: Float[Array, "b t r h p"], mimo_o: Float[Array, "h r p"]) -> Float[Array, "b t h p"]:
    """sum over ranks of mimo_o o."""
    return jnp.einsum("btrhp,hrp->bthp", o, mimo_o, preferred_element_type=o.dtype)
