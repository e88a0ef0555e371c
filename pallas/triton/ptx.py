"""Instructions of the GPU that the Triton lowering has no name for, and what they mean where a kernel is interpreted.

Each works element by element and broadcasts its arguments. Errors are those of NVIDIA's PTX manual.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

LOG2_E = float(np.log2(np.e))


def _instruction(code: str, meaning: Callable, dtype=jnp.float32) -> Callable:
    """(*args, interpret) -> the instruction, or a block with operands $0, $1, ...; of bfloat16 two at a time."""
    named = "$" in code
    kind, pack = ("f", 1) if dtype == jnp.float32 else ("r", 2)

    def call(*args, interpret: bool) -> jax.Array:
        if interpret:
            return meaning(*args)
        args = jnp.broadcast_arrays(*(jnp.asarray(a, dtype) for a in args))
        operands = ", ".join(f"${i}" for i in range(len(args) + 1))
        return plgpu.elementwise_inline_asm(
            code if named else f"{code} {operands};",
            args=args,
            constraints=",".join([f"={kind}"] + [kind] * len(args)),
            pack=pack,
            result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
        )[0]

    return call


# a b + c in one instruction, which the lowering does not make of two.
fma = _instruction("fma.rn.f32", lambda a, b, c: a * b + c)
# To 2^-20.5 in [-2 pi, 2 pi] and 2^-14.7 in [-100 pi, 100 pi]; nothing is said of larger angles, which float32 itself
# holds to 2^-11 at 10^4. libdevice's cost half a kernel.
cos = _instruction("cos.approx.f32", jnp.cos)
sin = _instruction("sin.approx.f32", jnp.sin)
# To 2^-22 relative; the reciprocal to 2^-23.
exp2 = _instruction("ex2.approx.ftz.f32", jnp.exp2)
reciprocal = _instruction("rcp.approx.ftz.f32", jnp.reciprocal)
# To 2^-11 relative.
tanh = _instruction("tanh.approx.f32", jnp.tanh)
# Of bfloat16, two sums in one instruction. Not add.bf16x2, which GPUs before Hopper lack.
add_bfloat16 = _instruction(
    "{ .reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, $1, one, $2; }", lambda a, b: a + b, jnp.bfloat16
)


def sigmoid(u: jax.Array, interpret: bool) -> jax.Array:
    """To 2^-21 absolute, without the division's slow path."""
    if interpret:
        return jax.nn.sigmoid(u)
    return reciprocal(1 + exp2(u * -LOG2_E, interpret=False), interpret=False)


def varying(value: jax.Array, index: jax.Array, interpret: bool) -> jax.Array:
    """An int32 that never changes, which the compiler takes to depend on a loop's index."""
    if interpret:
        return value
    # Of one element each, for the lowering gives no number back; the sum makes one of it.
    moved = plgpu.elementwise_inline_asm(
        "mov.b32 $0, $1;",
        args=[jnp.full((1,), u, jnp.int32) for u in (value, index)],
        constraints="=r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((1,), jnp.int32)],
    )[0]
    return jnp.sum(moved)
