"""From the operator's prepared inputs to the GPU kernels of pallas/triton, and back to its output and state.

The angles and weights that they start from are in prepass.py.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mamba3_jax.ops import prepass
from mamba3_jax.ops.chunked import enter, leave
from mamba3_jax.ops.inputs import Inputs
from mamba3_jax.ops.rotation import rotate_interleaved, turns
from mamba3_jax.ops.state import SSMState
from pallas.triton.block_sizes import BlockSizes, default_block_sizes
from pallas.triton.operands import Arguments
from pallas.triton.tiles import Tiling
from pallas.triton.vjp import ssm

RANKS = (1, 2, 4, 8)
# Triton multiplies matrices of at least 16 rows and columns, and a slab of the state may have only n/2 channels.
STATE_SIZES = (32, 64, 128, 256)
HEAD_DIMS = (16, 32, 64, 128)
# float16 is missing: the states of the chunks, kept in the dtype of x, would overflow it.
DTYPES = ("bfloat16", "float32")


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
    state: SSMState | None,
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
        inputs, state: prepared, with neighbouring pairs on the state axis (`rotation.to_interleaved`). Without a state,
            which is one of zeros, nothing is read of it.
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
        blocks = default_block_sizes(r, p, n, inputs.x.dtype, capability)
    c = blocks.rows // r
    chunks = -(-t // c)
    segments = segments or _segments(b * h, chunks, blocks)
    chunks = -(-chunks // segments) * segments

    precise = inputs.x.dtype == jnp.float32
    padded, z = prepass.pad(inputs, chunks * c), prepass.pad(z, chunks * c)
    h0 = None if state is None else jnp.swapaxes(enter(inputs, state), 2, 3)
    start = SSMState.zeros(b, h, p, n, r, s) if state is None else state
    turned = _turned(padded, c)
    angles = _angles(padded, start, turned, c)
    log_decay, gamma, scale = prepass.weights(padded)
    arguments = Arguments(
        x=padded.x,
        z=z,
        B=padded.B.reshape(b, -1, g, n),
        C=padded.C.reshape(b, -1, g, n),
        B_bias=inputs.B_bias,
        C_bias=inputs.C_bias,
        D=prepass.float32(D),
        mimo_x=prepass.float32(inputs.mimo_x),
        mimo_z=prepass.float32(mimo_z),
        mimo_o=prepass.float32(mimo_o),
        log_decay=log_decay,
        scale=scale,
        gamma=gamma,
        clock=padded.clock,
        omega=padded.omega[:, :, 0] if s else None,
        turned=lax.stop_gradient(turned) if s else None,
        angle=None if state is None or not s else state.angle,
        segment_ids=padded.segment_ids,
    )
    y, last = ssm(arguments, h0, Tiling(c, r, n, s, p, precise, interpret), segments, blocks)
    if inputs.mimo_x is not None and mimo_o is None:
        y = y.reshape(b, -1, r, h, p)
    return y[:, :t], leave(inputs, angles.after, jnp.swapaxes(last, 2, 3), angles.at_start, rotate_interleaved)


def _turned(inputs: Inputs, c: int) -> Float[Array, "b m h s"]:
    """What each chunk's tokens turn by in all, not wrapped. Of 16-bit operands, whose turns the kernels do not wrap
    either, by one product of matrices: 0.005 instead of 0.014 ms of an H200's at TUNING.md's shape.

    It is then as exact as a float32 sum of a chunk's turns, however large, and a row has t / c of them: after 65536
    tokens the angle was off by 1.3e-4 with steps of 1, by 1e-2 with steps of 10 that all turn the same way.
    """
    b, t, h = inputs.clock.shape

    def chunks(u):
        return u.reshape(b, t // c, c, *u.shape[2:])

    if inputs.x.dtype == jnp.float32:
        return jnp.sum(chunks(turns(inputs.omega, inputs.clock)), axis=2)
    omega, clock = chunks(inputs.omega[:, :, 0]), chunks(inputs.clock)
    return jnp.einsum("bmcs,bmch->bmhs", omega, clock, precision="highest")


def _angles(inputs: Inputs, state: SSMState, turned: Float[Array, "b m h s"], c: int) -> prepass.Angles:
    """`prepass.angles`, of rows that are not packed from what their chunks `turned`."""
    if inputs.segment_ids is not None:
        return prepass.angles(inputs, state, c)
    b, m, h, _ = turned.shape
    # Each chunk as one token; of all inputs only these are read.
    return prepass.angles(inputs._replace(omega=turned, clock=jnp.ones((b, m, h))), state, 1)


def _segments(programs: int, chunks: int, blocks: BlockSizes) -> int:
    """The least power of two that gives the serial kernels as many programs as they want, at most one per chunk."""
    segments = 1
    while programs * segments < blocks.programs and 2 * segments <= chunks:
        segments *= 2
    return segments
