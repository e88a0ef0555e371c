"""From the arguments of `ssm_step` to the decode kernels, pallas/triton/decode.py and pallas/tpu/decode.py."""

from typing import Literal

import jax.numpy as jnp
from jax.experimental.pallas.tpu import InterpretParams
from jaxtyping import Array, Float

from mamba3_jax.ops.discretization import exponential_trapezoidal
from mamba3_jax.ops.rotation import Rotation
from mamba3_jax.ops.state import SSMState
from pallas.step import State, Token, Weights
from pallas.tpu.decode import decode_step as tpu_step
from pallas.triton.decode import decode_step as triton_step

Kernel = Literal["triton", "tpu"]


def decode(
    x: Float[Array, "b h p"],
    B: Float[Array, "b r g n"],
    C: Float[Array, "b r g n"],
    dt: Float[Array, "b h"],
    A: Float[Array, "b h"],
    lam: Float[Array, "b h"] | float,
    omega: Float[Array, " b #h s"] | Float[Array, " s"] | None = None,
    *,
    state: SSMState,
    B_bias: Float[Array, "h r n"] | None = None,
    C_bias: Float[Array, "h r n"] | None = None,
    D: Float[Array, " h"] | None = None,
    z: Float[Array, "b h p"] | None = None,
    mimo_x: Float[Array, "h r p"] | None = None,
    mimo_z: Float[Array, "h r p"] | None = None,
    mimo_o: Float[Array, "h r p"] | None = None,
    rotation: Rotation = "data_dependent",
    kernel: Kernel = "triton",
    interpret: bool | InterpretParams = False,
) -> tuple[Float[Array, "b h p"] | Float[Array, "b r h p"], SSMState]:
    """`ssm_step` on checked arguments, in one kernel; `interpret` runs it without its device.

    The state keeps its dtypes (ssm, k and v float32 or bfloat16) and is updated in place where the caller donates it.

    Raises:
        NotImplementedError: float64; "triton": p or n not a power of two, or a rank other than 1, 2, 4, 8; "tpu": heads
            whose states are too large for VMEM.
    """
    turns = rotation != "none"
    token = Token(
        x=x,
        B=B,
        C=C,
        **_coefficients(dt, A, lam),
        omega=omega,
        clock=dt if rotation == "data_dependent" else None,
        z=z,
    )
    step = triton_step if kernel == "triton" else tpu_step
    y, new = step(
        State(*state)._replace(**({} if turns else dict(angle=None))),
        token,
        Weights(B_bias=B_bias, C_bias=C_bias, D=D, mimo_x=mimo_x, mimo_z=mimo_z, mimo_o=mimo_o),
        pairing="interleaved" if mimo_x is None else "half",
        interpret=interpret,
    )
    return y, SSMState(*(new if turns else new._replace(angle=state.angle)))


def _coefficients(dt, A, lam) -> dict[str, Array]:
    """Three numbers per head: XLA makes them together with the softplus and sigmoid that dt, A and lam come from."""
    dtype = jnp.promote_types(dt.dtype, jnp.float32)
    dt, A, lam = (jnp.broadcast_to(jnp.asarray(u, dtype), dt.shape)[:, None] for u in (dt, A, lam))
    return {name: u[:, 0] for name, u in exponential_trapezoidal(dt, A, lam)._asdict().items()}
