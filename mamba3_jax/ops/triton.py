"""From the operator's prepared inputs to the GPU kernels of pallas/triton, and back to its output and state.

Made here, in plain JAX that autodiff sees through, is what the kernels read instead of making it (operands.py there),
for every chunk of c tokens. With cs the inclusive cumulative sum of log alpha from the chunk's start, and 0 wherever a
token belongs to another document than the state it would see or reach,

    entry_i = exp(cs_i)    exit_j = exp(cs_c - cs_j) scale_j    through = exp(cs_c)    theta0 = theta before the chunk
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mamba3_jax.ops.chunked import cumulative, enter, leave, split_log_decay
from mamba3_jax.ops.discretization import next_carry
from mamba3_jax.ops.inputs import Inputs
from mamba3_jax.ops.rotation import rotate_interleaved, turns, wrap
from mamba3_jax.ops.state import SSMState
from pallas.triton.block_sizes import BlockSizes, default_block_sizes
from pallas.triton.operands import Operands
from pallas.triton.tiles import Tiling
from pallas.triton.vjp import ssm

RANKS = (1, 2, 4, 8)
# Triton multiplies matrices of at least 16 rows and columns, and a slab of the state may have only n/2 channels.
STATE_SIZES = (32, 64, 128, 256)
HEAD_DIMS = (16, 32, 64, 128)
# float16 is missing: the states of the chunks, kept in the dtype of x, would overflow it.
DTYPES = ("bfloat16", "float32")

# So many chunks' turns, each in [-pi, pi], are summed before the sum is wrapped: float32 keeps the angle to 1e-5.
SUMMED = 32


def refusal(x: Array, B: Array, C: Array, omega: Array | None, z: Array | None) -> str | None:
    """Why the kernels cannot do a call of `mamba3_jax.ops.ssm` with these arguments; None where they can."""
    h, p = x.shape[2:]
    r, _, n = B.shape[2:]
    for what, size, allowed in (
        ("x: got head dim p", p, HEAD_DIMS),
        ("B: got state size n", n, STATE_SIZES),
        ("B: got rank r", r, RANKS),
    ):
        if size not in allowed:
            return f"{what}={size}; allowed in the triton kernels: {', '.join(map(str, allowed))}"
    if omega is not None and omega.ndim == 4 and omega.shape[2] != 1:
        return f"omega: got one row for each of h={h} heads; allowed in the triton kernels: one row for all heads"
    for name, array in dict(x=x, B=B, C=C, z=z).items():
        if array is not None and array.dtype.name not in DTYPES:
            return (
                f"{name}: got dtype {array.dtype}; allowed in the triton kernels, which compute in float32: "
                + ", ".join(DTYPES)
            )
    return None


def triton(
    inputs: Inputs,
    state: SSMState,
    *,
    D: Float[Array, " h"] | None,
    z: Float[Array, "b t h p"] | None,
    mimo_z: Float[Array, "h r p"] | None,
    mimo_o: Float[Array, "h r p"] | None,
    blocks: BlockSizes | None = None,
    segments: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b t h p"] | Float[Array, "b t r h p"], SSMState]:
    """The operator with its skip, gate and contraction of ranks, of arguments without a `refusal`.

    Args:
        inputs, state: prepared, with neighbouring pairs on the state axis (`rotation.to_interleaved`).
        D, z, mimo_z, mimo_o: as in `ssm`.
        blocks, segments: how the kernels cut their work; None takes the defaults of the GPU at hand.
        interpret: runs without a GPU, slowly; for tests.

    Returns:
        y in the dtype of x, ranks before heads where they stay; and the state, ordered as it came.
    """
    b, t, h, p = inputs.x.shape
    _, _, r, g, n = inputs.B.shape
    s = inputs.omega.shape[-1]
    if blocks is None:
        capability = getattr(jax.local_devices()[0], "compute_capability", "9.0")
        blocks = default_block_sizes(r, inputs.x.dtype, capability)
    c = blocks.rows // r
    chunks = -(-t // c)
    segments = segments or _segments(b * h, chunks, blocks)
    chunks = -(-chunks // segments) * segments

    padded, z = _pad(inputs, chunks * c), _pad(z, chunks * c)
    angles = _angles(padded, state, c)
    operands = Operands(
        x=padded.x,
        z=z,
        B=padded.B.reshape(b, -1, g, n),
        C=padded.C.reshape(b, -1, g, n),
        B_bias=inputs.B_bias,
        C_bias=inputs.C_bias,
        D=_float32(D),
        mimo_x=_float32(inputs.mimo_x),
        mimo_z=_float32(mimo_z),
        mimo_o=_float32(mimo_o),
        **_decays(padded, c),
        clock=_head_major(padded.clock),
        omega=padded.omega[:, :, 0] if s else None,
        theta0=angles.before if s else None,
        segment_ids=padded.segment_ids,
    )
    h0 = jnp.swapaxes(enter(inputs, state), 2, 3)
    y, last = ssm(operands, h0, Tiling(c, r, n, s, p, interpret), segments, blocks)
    if inputs.mimo_x is not None and mimo_o is None:
        y = y.reshape(b, -1, r, h, p)
    return y[:, :t], leave(inputs, angles.after, jnp.swapaxes(last, 2, 3), angles.at_start, rotate_interleaved)


def _segments(programs: int, chunks: int, blocks: BlockSizes) -> int:
    """The least power of two that gives the serial kernels as many programs as they want, at most one per chunk."""
    segments = 1
    while programs * segments < blocks.programs and 2 * segments <= chunks:
        segments *= 2
    return segments


def _pad(tree, t: int):
    """Every array with a time axis, padded to t tokens that neither decay, turn, write nor open a document."""

    def pad(u):
        fill = {"mode": "edge"} if jnp.issubdtype(u.dtype, jnp.integer) else {}
        return jnp.pad(u, ((0, 0), (0, t - u.shape[1])) + ((0, 0),) * (u.ndim - 2), **fill)

    if isinstance(tree, Inputs):
        shared = dict(B_bias=tree.B_bias, C_bias=tree.C_bias, mimo_x=tree.mimo_x)
        return jax.tree.map(pad, tree._replace(**dict.fromkeys(shared)))._replace(**shared)
    return jax.tree.map(pad, tree)


def _float32(u: Array | None) -> Array | None:
    return None if u is None else u.astype(jnp.float32)


def _head_major(u: Float[Array, "b t h"]) -> Float[Array, "b h t"]:
    return jnp.moveaxis(u, 1, 2)


def _decays(inputs: Inputs, c: int) -> dict[str, Array]:
    """The operands that say what of each token is seen when: all float32, (b, h, t), but through, (b, h, chunks)."""
    b, t, h = inputs.coefficients.gamma.shape
    m = t // c
    log_decay, gamma, carry = inputs.coefficients
    gamma, scale = _head_major(gamma), _head_major(gamma + next_carry(carry, inputs.segment_ids))
    parts = split_log_decay(_head_major(log_decay))
    coarse, fine = (cumulative(u.reshape(b, h * m, c), 2).reshape(b, h, m, c) for u in parts)
    since_entry, to_exit = coarse + fine, (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)
    if inputs.segment_ids is not None:
        ids = inputs.segment_ids.reshape(b, 1, m, c)
        document = jnp.concatenate([ids[:, :, :1, :1], ids[:, :, :-1, -1:]], axis=2)
        since_entry = jnp.where(ids == document, since_entry, -jnp.inf)
        to_exit = jnp.where(ids == ids[..., -1:], to_exit, -jnp.inf)
    entry = jnp.exp(since_entry)
    exit = jnp.exp(to_exit).reshape(b, h, t) * scale
    tokens = dict(coarse=coarse, fine=fine, entry=entry)
    tokens = {name: u.reshape(b, h, t) for name, u in tokens.items()}
    return tokens | dict(exit=exit, through=entry[..., -1], scale=scale, gamma=gamma)


class _Angles(NamedTuple):
    """Before every chunk, after the last token, and for packed rows before the last document."""

    before: Float[Array, "b m h s"]
    after: Float[Array, "b h s"]
    at_start: Float[Array, "b h s"] | None


def _angles(inputs: Inputs, state: SSMState, c: int) -> _Angles:
    b, t, h = inputs.clock.shape
    m = t // c

    def total(clock):
        """Of each chunk. The turns of single tokens are summed as they are made, and never lie in memory."""
        turn = turns(inputs.omega, clock)
        return wrap(jnp.sum(turn.reshape(b, m, c, h, -1), axis=2))

    turned = total(inputs.clock)
    before = wrap(_sums_before(turned) + state.angle[:, None])
    after = wrap(before[:, -1] + turned[:, -1])
    if inputs.segment_ids is None:
        return _Angles(before, after, None)
    ids = inputs.segment_ids
    earlier = ids != ids[:, -1:]
    begins = (jnp.pad(earlier, ((0, 0), (1, 0)))[:, :-1] & ~earlier).reshape(b, m, c).any(2)
    until = before + total(jnp.where(earlier[..., None], inputs.clock, 0))
    return _Angles(before, after, wrap(jnp.sum(jnp.where(begins[..., None, None], until, 0), axis=1)))


def _sums_before(u: Float[Array, "b m h s"]) -> Float[Array, "b m h s"]:
    """Of angles, along m and modulo 2 pi: exclusive cumulative sums of at most SUMMED at a time."""
    b, m, h, s = u.shape
    if m <= SUMMED:
        u = jnp.moveaxis(u, 1, 2)
        return jnp.moveaxis(cumulative(u, 2) - u, 2, 1)
    groups = -(-m // SUMMED)
    u = jnp.pad(u, ((0, 0), (0, groups * SUMMED - m), (0, 0), (0, 0)))
    inside = _sums_before(u.reshape(b * groups, SUMMED, h, s))
    u = u.reshape(b, groups, SUMMED, h, s)
    inside = inside.reshape(u.shape)
    before = _sums_before(wrap(inside[:, :, -1] + u[:, :, -1]))
    return wrap(inside + before[:, :, None]).reshape(b, groups * SUMMED, h, s)[:, :m]
