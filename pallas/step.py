"""The arrays of one decode step, as the kernels for GPUs and for TPUs read and write them. Letters as in ops/api.py."""

from typing import Literal, NamedTuple

import jax

Pairing = Literal["interleaved", "half"]


class State(NamedTuple):
    """The state between steps, float32 or bfloat16; the angle is float32, or None without rotation."""

    angle: jax.Array | None  # (b, h, s)
    ssm: jax.Array  # (b, h, p, n)
    k: jax.Array  # (b, h, r, n)
    v: jax.Array  # (b, h, p)


class Token(NamedTuple):
    """One token of every row. `omega` is (b, 1 or h, s) with a `clock`, else (s,) per token; None without rotation."""

    x: jax.Array  # (b, h, p)
    B: jax.Array  # (b, r, g, n)
    C: jax.Array  # (b, r, g, n)
    log_decay: jax.Array  # (b, h)
    gamma: jax.Array  # (b, h)
    carry: jax.Array  # (b, h)
    omega: jax.Array | None
    clock: jax.Array | None  # (b, h)
    z: jax.Array | None  # (b, h, p)


class Weights(NamedTuple):
    """What all tokens share; None where the layer has none."""

    B_bias: jax.Array | None  # (h, r, n)
    C_bias: jax.Array | None  # (h, r, n)
    D: jax.Array | None  # (h,)
    mimo_x: jax.Array | None  # (h, r, p)
    mimo_z: jax.Array | None  # (h, r, p)
    mimo_o: jax.Array | None  # (h, r, p)


def output_shape(state: State, token: Token, weights: Weights) -> jax.ShapeDtypeStruct:
    """y in the dtype of x: (b, h, p), or (b, r, h, p) with mimo_x but no mimo_o."""
    b, h, p, _ = state.ssm.shape
    ranks_kept = weights.mimo_x is not None and weights.mimo_o is None
    return jax.ShapeDtypeStruct((b, token.B.shape[1], h, p) if ranks_kept else (b, h, p), token.x.dtype)


def check_dtypes(state: State, token: Token, weights: Weights) -> None:
    """The kernels compute in float32.

    Raises:
        NotImplementedError: a dtype that they do not read.
    """
    named = {f"state.{name}": a for name, a in state._asdict().items()} | token._asdict() | weights._asdict()
    for name, array in named.items():
        allowed = ("float32",) if name == "state.angle" else ("float32", "bfloat16")
        if array is not None and array.dtype.name not in allowed:
            raise NotImplementedError(
                f"{name}: got dtype {array.dtype}; allowed in the decode kernel, which computes in float32: "
                + ", ".join(allowed)
            )
