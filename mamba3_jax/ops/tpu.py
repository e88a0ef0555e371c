"""From the operator's prepared inputs to the TPU kernels of pallas/tpu, and back to its output and state.

What the kernels read instead of making it is in prepass.py. Sizes that do not fill a TPU's 128 lanes are padded here: t
to whole chunks, n to a multiple of 128, and p where it neither divides 128 into heads of one group nor is a multiple.
"""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from mamba3_jax.ops import prepass
from mamba3_jax.ops.chunked import default_chunk_size, enter, leave
from mamba3_jax.ops.inputs import Inputs
from mamba3_jax.ops.state import SSMState
from pallas.tpu.block_sizes import CHUNK, BlockSizes, default_block_sizes, tiling_of, tiling_to_interpret, unfit
from pallas.tpu.chips import chip_of, device_kind
from pallas.tpu.cost_model import Sizes, chunked_seconds, train_seconds
from pallas.tpu.operands import KINDS, Operands, Tiling
from pallas.tpu.vjp import ssm

DTYPES = ("bfloat16", "float32")


def refusal(x: Array, B: Array, C: Array, omega: Array | None, z: Array | None) -> str | None:
    """Why the kernels cannot do a call of `mamba3_jax.ops.ssm` with these arguments; None where they can."""
    if omega is not None and omega.ndim == 4 and omega.shape[2] != 1:
        return f"omega: got one row for each of h={x.shape[2]} heads; allowed in the tpu kernels: one row for all heads"
    for name, array in dict(x=x, B=B, C=C, z=z).items():
        if array is not None and array.dtype.name not in DTYPES:
            return (
                f"{name}: got dtype {array.dtype}; allowed in the tpu kernels, which compute in float32: "
                + ", ".join(DTYPES)
            )
    (h, p), (r, g, n) = x.shape[2:], B.shape[2:]
    s = 0 if omega is None else omega.shape[-1]
    return _refusal_of_device(dict(h=h, p=p, n=n, g=g, r=r, s=s), x.dtype)


def _refusal_of_device(shape: dict[str, int], dtype) -> str | None:
    kind = device_kind()
    if not kind.startswith("TPU"):  # there is none when interpreting
        return None
    try:
        reason = unfit(shape, dtype, kind)
    except ValueError as unknown:
        return str(unknown)
    return reason and f"{reason}; allowed: implementation recurrent, chunked"


def slower_than_chunked(sizes: Sizes) -> str | None:
    """Why plain XLA is predicted to train faster than the kernels, which fit the TPU at hand; None where it is not."""
    chip = chip_of(device_kind())
    kernels = train_seconds(sizes, chip, CHUNK)
    chunked = chunked_seconds(sizes, chip, default_chunk_size("tpu", sizes.r))
    if kernels <= chunked:
        return None
    return f"predicted {1e3 * chunked:.2g} ms forward and backward, {1e3 * kernels:.2g} by the kernels"


def tpu(
    inputs: Inputs,
    state: SSMState,
    *,
    D: Float[Array, " h"] | None,
    z: Float[Array, "b t h p"] | None,
    mimo_z: Float[Array, "h r p"] | None,
    mimo_o: Float[Array, "h r p"] | None,
    blocks: BlockSizes | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> tuple[Float[Array, "b t h p"] | Float[Array, "b t r h p"], SSMState]:
    """The operator with its skip, gate and contraction of ranks, of arguments without a `refusal`.

    Args:
        inputs, state: prepared, the state axis in pair order.
        D, z, mimo_z, mimo_o: as in `ssm`.
        blocks: how the kernels cut their work; None takes the defaults of the TPU at hand.
        interpret: runs without a TPU, slowly; for tests.

    Returns:
        y in the dtype of x, ranks before heads where they stay; and the state, ordered as it came.

    Raises:
        ValueError: a chunk that does not fit the TPU's VMEM.
    """
    b, t, h, p = inputs.x.shape
    _, _, r, g, n = inputs.B.shape
    s = inputs.omega.shape[-1]
    shape = dict(h=h, p=p, n=n, g=g, r=r, s=s)
    if blocks is None:
        blocks = default_block_sizes(shape, inputs.x.dtype, device_kind())
    if interpret:
        tiling = tiling_to_interpret(shape, blocks, interpret)
    else:
        tiling = tiling_of(shape, inputs.x.dtype, blocks, device_kind())
    c, t_padded = tiling.c, -(-t // tiling.c) * tiling.c

    padded = prepass.pad(inputs, t_padded)
    angles = prepass.angles(padded, state, c)
    operands = Operands(
        x=_merge_heads(padded.x, tiling),
        z=None if z is None else _merge_heads(prepass.pad(z, t_padded), tiling),
        B=_projection(padded.B, tiling),
        C=_projection(padded.C, tiling),
        B_bias=_pad_last(jnp.moveaxis(inputs.B_bias, 0, 1), tiling.n),
        C_bias=_pad_last(jnp.moveaxis(inputs.C_bias, 0, 1), tiling.n),
        D=None if D is None else _on_lanes(prepass.float32(D), tiling),
        mimo_x=_ranks_on_lanes(inputs.mimo_x, tiling),
        mimo_z=_ranks_on_lanes(mimo_z, tiling),
        mimo_o=_ranks_on_lanes(mimo_o, tiling),
        **_coefficients(padded, tiling),
        omega=padded.omega[:, :, 0] if s else None,
        theta0=angles.before if s else None,
    )
    h0 = _pad_last(jnp.swapaxes(_pad_last(jnp.swapaxes(enter(inputs, state), 2, 3), tiling.p), 2, 3), tiling.n)
    y, last = ssm(operands, h0.reshape(b, -1, tiling.n), tiling)
    if inputs.mimo_x is not None and mimo_o is None:
        y = jnp.moveaxis(y, 1, 2)
    y = y.reshape(*y.shape[:-1], h, tiling.p)[:, :t, ..., :p]
    last = last.reshape(b, h, tiling.p, tiling.n)[:, :, :p, :n]
    return y, leave(inputs, angles.after, last, angles.at_start)


def _pad_last(u: Array, size: int) -> Array:
    return jnp.pad(u, ((0, 0),) * (u.ndim - 1) + ((0, size - u.shape[-1]),))


def _merge_heads(u: Float[Array, "b t h p"], tiling: Tiling) -> Float[Array, "b t hp"]:
    return _pad_last(u, tiling.p).reshape(*u.shape[:2], -1)


def _projection(u: Float[Array, "b t r g n"], tiling: Tiling) -> Float[Array, "b g r t nn"]:
    return _pad_last(jnp.moveaxis(u, 1, 3).swapaxes(1, 2), tiling.n)


def _on_lanes(u: Float[Array, "*batch h"], tiling: Tiling) -> Float[Array, "*batch blocks lanes"]:
    return jnp.repeat(u, tiling.p, axis=-1).reshape(*u.shape[:-1], -1, tiling.lanes)


def _ranks_on_lanes(u: Float[Array, "h r p"] | None, tiling: Tiling) -> Float[Array, "r blocks lanes"] | None:
    if u is None:
        return None
    u = _pad_last(prepass.float32(u), tiling.p)
    return jnp.moveaxis(u, 1, 0).reshape(u.shape[1], -1, tiling.lanes)


def _coefficients(inputs: Inputs, tiling: Tiling) -> dict[str, Array]:
    """`coefficients` and `through` of the operands."""
    decays = prepass.decays(inputs, tiling.c)
    through = jnp.moveaxis(decays.pop("through"), 1, 2)
    named = decays | dict(clock=prepass.head_major(inputs.clock))
    rows = jnp.stack([named[kind] for kind in KINDS], axis=1)
    b, kinds, h, t = rows.shape
    rows = jnp.moveaxis(rows.reshape(b, kinds, h // tiling.heads, tiling.heads, t), 1, 2)
    rows = rows.reshape(b, h // tiling.heads, kinds * tiling.heads, t)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, tiling.rows - rows.shape[2]), (0, 0)))
    return dict(coefficients=rows, through=_on_lanes(through, tiling))
