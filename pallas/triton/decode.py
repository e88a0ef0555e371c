"""One decode step of Mamba-3 in one GPU kernel: SISO and MIMO, from the last state to the next and the gated output.

    theta' = theta + omega clock     k = R(theta') (B + B_bias)     q = R(theta') (C + C_bias)
    h' = decay (h + carry sum_r v_prev k_prev^T) + gamma sum_r v k^T
    y  = sum_r mimo_o (h' q + D v) silu(mimo_z z)     with v = mimo_x x, and all three mimo arrays 1 for SISO

Section 3 of arXiv:2603.15569; letters as in mamba3_jax/ops/api.py. The step reads and writes the state h (b, h, p, n)
once, in place, and is bound by those bytes: all else is small and comes from the cache. So the channels stay in the
checkpoint's order, where a pair is (2i, 2i+1) ("interleaved") or (i, i + n/2) ("half"): the second member of a pair is
its first with one bit of the index set, and B and C are read a second time with that bit flipped.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas.step import Pairing, State, Token, Weights, check_dtypes, output_shape
from pallas.triton import ptx

RANKS = (1, 2, 4, 8)

# As in mamba3_jax/ops/rotation.py: 2 pi in two parts, the first exact in few bits.
TWO_PI = 2 * math.pi
TWO_PI_HIGH = 6.28125
TWO_PI_LOW = TWO_PI - TWO_PI_HIGH


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """`block_p` rows of the state at a time, by `num_warps` warps. Powers of two, `block_p` at most p."""

    block_p: int
    num_warps: int


def default_block_sizes(p: int, n: int, r: int) -> BlockSizes:
    """64 numbers of the state in each thread of two warps; with 8 ranks half of that, for their vectors would spill.

    One H100, b=128 h=64 p=64 n=128, ms by rows / warps, the smaller of two runs, and in brackets times what the bytes
    of the states take at the rate of a copy. One step to a program, and 0.117 is about as long as it takes to call; of
    eight in a program each takes 0.210, 0.111, 0.255 and 0.172 with the choice below:

                        64 / 4        32 / 4  32 / 2        16 / 1  64 / 2  outputs by tensor cores
        SISO float32    0.205 (1.10)  0.209   0.208 (1.12)  0.213   0.212   0.235 (32 / 2)
        SISO bfloat16   0.120 (1.28)  0.121   0.116 (1.24)  0.115   0.117   0.120 (16 / 2)
        MIMO float32    0.286 (1.46)  0.308   0.257 (1.31)  0.280   0.384   0.271 (32 / 2)
        MIMO bfloat16   0.193 (1.97)  0.215   0.172 (1.76)  0.175   0.170   0.178 (32 / 1)

    Fewer warps wait less for each other. What is left of MIMO is its instructions: every thread of a row makes the
    row's gates, and the vectors along n are made by every warp. On the tensor cores bfloat16 outputs are off by 1.3e-2.
    """
    per_thread = 64 if r < 8 else 32
    block_p = min(p, max(1, 64 * per_thread // n))
    return BlockSizes(block_p, num_warps=max(1, min(2, block_p * n // (32 * per_thread))))


def _decode_kernel(
    state_ref, token_ref, weights_ref, y_ref, new_ref, *, pairing: Pairing, block_p: int, interpret: bool
):
    """One head of one row. Refs: ssm (p, n), B, C, k and biases (r, n), mimo (r, p), y (p,) or (r, p), angle (s,)."""
    r, n = state_ref.k.shape
    fma = functools.partial(ptx.fma, interpret=interpret)
    decay, carry, gamma = jnp.exp(_f32(token_ref.log_decay)), _f32(token_ref.carry), _f32(token_ref.gamma)
    rotate = _rotation(state_ref, token_ref, n, pairing, interpret)
    k = [rotate(token_ref.B, weights_ref.B_bias, j) for j in range(r)]
    q = [rotate(token_ref.C, weights_ref.C_bias, j) for j in range(r)]
    # The scalars weigh the vectors along n, of which a thread holds fewer numbers than of those along p.
    owed = [decay * carry * _f32(state_ref.k, j) for j in range(r)]
    new = [gamma * k_j for k_j in k]
    angle = None if state_ref.angle is None else _advance(state_ref, token_ref, slice(None))

    def some_rows(i, _):
        rows = pl.ds(i * block_p, block_p)
        v, v_prev = (_ranks(u[rows], weights_ref.mimo_x, rows, r) for u in (token_ref.x, state_ref.v))
        h = decay * _f32(state_ref.ssm, rows)
        # One product at a time, each added to h: a sum of two products would be laid out on its own, and moved.
        for j in range(r):
            h = fma(v_prev[j][:, None], owed[j][None, :], h)
            h = fma(v[j][:, None], new[j][None, :], h)
        if not interpret:
            # The new state lies where the old one does, and several warps may read one number: read all, then write.
            plgpu.debug_barrier()
        new_ref.ssm[rows, :] = h.astype(new_ref.ssm.dtype)
        new_ref.v[rows] = token_ref.x[rows].astype(new_ref.v.dtype)
        o = [jnp.sum(h * q_j[None, :], axis=1) for q_j in q]
        _output(y_ref, rows, o, v, token_ref, weights_ref, interpret)
        return _

    lax.fori_loop(0, state_ref.ssm.shape[0] // block_p, some_rows, 0)
    for j in range(r):
        new_ref.k[j, :] = k[j].astype(new_ref.k.dtype)
    if angle is not None:
        new_ref.angle[:] = angle


def _output(y_ref, rows, o: list, v: list, token_ref, weights_ref, interpret: bool) -> None:
    """Skip, gate and the sum over ranks, or the ranks themselves."""
    if weights_ref.D is not None:
        o = [o_j + _f32(weights_ref.D) * v_j for o_j, v_j in zip(o, v)]
    if token_ref.z is not None:
        gates = _ranks(token_ref.z[rows], weights_ref.mimo_z, rows, len(o))
        # Every thread of a row makes its gates, so they must be cheap.
        o = [o_j * (gate * ptx.sigmoid(gate, interpret)) for o_j, gate in zip(o, gates)]
    if weights_ref.mimo_o is not None:
        o = [sum(o_j * _f32(weights_ref.mimo_o, j, rows) for j, o_j in enumerate(o))]
    for j, o_j in enumerate(o):
        y_ref[(j, rows) if y_ref.ndim == 2 else rows] = o_j.astype(y_ref.dtype)


def _ranks(u, mimo_ref, rows, r: int) -> list:
    """u of every rank: itself for SISO."""
    u = u.astype(jnp.float32)
    return [u] if mimo_ref is None else [u * _f32(mimo_ref, j, rows) for j in range(r)]


def _rotation(state_ref, token_ref, n: int, pairing: Pairing, interpret: bool):
    """The function (ref, bias, rank) -> R(theta') (ref[rank] + bias[rank])."""

    def biased(ref, bias_ref, j, channels):
        return _f32(ref, j, channels) + (0.0 if bias_ref is None else _f32(bias_ref, j, channels))

    if state_ref.angle is None:
        return functools.partial(biased, channels=slice(None))
    s = state_ref.angle.shape[0]
    channel = lax.broadcasted_iota(jnp.int32, (n,), 0)
    pair, bit = (channel // 2, 1) if pairing == "interleaved" else (channel % (n // 2), n // 2)
    # Channels beyond the s pairs do not turn: they read a valid angle and drop it.
    theta = jnp.where(pair < s, _advance(state_ref, token_ref, jnp.where(pair < s, pair, 0)), 0.0)
    cos, sin = ptx.cos(theta, interpret=interpret), ptx.sin(theta, interpret=interpret)
    sin = jnp.where((channel & bit) == 0, -sin, sin)
    return lambda ref, bias_ref, j: (
        biased(ref, bias_ref, j, channel) * cos + biased(ref, bias_ref, j, channel ^ bit) * sin
    )


def _advance(state_ref, token_ref, pairs):
    """theta' of some pairs, in [-pi, pi]."""
    turn = _f32(token_ref.omega, pairs)
    if token_ref.clock is not None:
        turn *= _f32(token_ref.clock)
    return _wrap(state_ref.angle[pairs] + _wrap(turn))


def _wrap(angle):
    """rotation.wrap; the turns are rounded by floor because the Triton lowering has no round."""
    turns = jnp.floor(angle * (1 / TWO_PI) + 0.5)
    return (angle - turns * TWO_PI_HIGH) - turns * TWO_PI_LOW


def _f32(ref, *index):
    return ref[index if index else ...].astype(jnp.float32)


def _call(
    state: State,
    token: Token,
    weights: Weights,
    y: jax.ShapeDtypeStruct,
    pairing: Pairing,
    blocks: BlockSizes,
    interpret,
) -> tuple[jax.Array, State]:
    b, h, p, n = state.ssm.shape
    r, g = token.B.shape[1:3]
    of_head = {
        "b h": pl.BlockSpec((None, None), lambda i, j: (j, i)),
        "b h p": pl.BlockSpec((None, None, p), lambda i, j: (j, i, 0)),
        "b h p n": pl.BlockSpec((None, None, p, n), lambda i, j: (j, i, 0, 0)),
        "b h r n": pl.BlockSpec((None, None, r, n), lambda i, j: (j, i, 0, 0)),
        "b r h p": pl.BlockSpec((None, r, None, p), lambda i, j: (j, 0, i, 0)),
        "b r g n": pl.BlockSpec((None, r, None, n), lambda i, j: (j, 0, i // (h // g), 0)),
        "h": pl.BlockSpec((None,), lambda i, j: (i,)),
        "h r n": pl.BlockSpec((None, r, n), lambda i, j: (i, 0, 0)),
        "h r p": pl.BlockSpec((None, r, p), lambda i, j: (i, 0, 0)),
    }

    def specs(arrays, **letters):
        """The blocks of the arrays that are there."""
        return type(arrays)(*(None if a is None else of_head[letters[name]] for name, a in arrays._asdict().items()))

    if state.angle is not None:
        s = state.angle.shape[-1]
        of_head["b h s"] = pl.BlockSpec((None, None, s), lambda i, j: (j, i, 0))
        of_head["b 1 s"] = pl.BlockSpec((None, None, s), lambda i, j: (j, 0, 0))
        of_head["s"] = pl.BlockSpec((s,), lambda i, j: (0,))
    omega = "s" if token.clock is None else "b 1 s" if token.omega.shape[1] == 1 else "b h s"
    state_specs = specs(state, angle="b h s", ssm="b h p n", k="b h r n", v="b h p")
    token_specs = specs(
        token, x="b h p", B="b r g n", C="b r g n", log_decay="b h", gamma="b h", carry="b h", omega=omega, clock="b h",
        z="b h p",
    )  # fmt: skip
    weights_specs = specs(
        weights, B_bias="h r n", C_bias="h r n", D="h", mimo_x="h r p", mimo_z="h r p", mimo_o="h r p"
    )
    return pl.pallas_call(
        functools.partial(_decode_kernel, pairing=pairing, block_p=blocks.block_p, interpret=interpret),
        # Heads first: programs that run together read neighbouring states, and share the B and C of their row.
        grid=(h, b),
        in_specs=(state_specs, token_specs, weights_specs),
        out_specs=(of_head["b h p" if y.ndim == 3 else "b r h p"], state_specs),
        out_shape=(y, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)),
        input_output_aliases={i: i + 1 for i in range(len(jax.tree.leaves(state)))},
        compiler_params=plgpu.CompilerParams(num_warps=blocks.num_warps, num_stages=1),
        interpret=interpret,
        name="ssm_decode",
    )(state, token, weights)


def decode_step(
    state: State,
    token: Token,
    weights: Weights,
    *,
    pairing: Pairing,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, State]:
    """One token of every row.

    Args:
        state: what the last step returned. Its arrays are overwritten where the caller donates them, else copied.
        token, weights: shapes as in their classes; float32 or bfloat16.
        pairing: which channels turn together, "interleaved" for SISO and "half" for MIMO.
        block_sizes: None takes the defaults.
        interpret: runs without a GPU.

    Returns:
        y in the dtype of x, (b, h, p), or (b, r, h, p) with mimo_x but no mimo_o; and the next state, in its dtypes.

    Raises:
        NotImplementedError: a size or dtype that the kernel does not cover.
    """
    b, h, p, n = state.ssm.shape
    r = token.B.shape[1]
    _check(state, token, weights, p, n, r)
    y = output_shape(state, token, weights)
    return _call(state, token, weights, y, pairing, block_sizes or default_block_sizes(p, n, r), interpret)


def _check(state: State, token: Token, weights: Weights, p: int, n: int, r: int) -> None:
    for name, size in (("x: got head dim p", p), ("B: got state size n", n)):
        if size & (size - 1):
            raise NotImplementedError(f"{name}={size}; allowed in the decode kernel: powers of two")
    if r not in RANKS:
        raise NotImplementedError(f"B: got rank r={r}; allowed in the decode kernel: {', '.join(map(str, RANKS))}")
    check_dtypes(state, token, weights)
