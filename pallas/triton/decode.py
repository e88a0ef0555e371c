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

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas.step import Pairing, State, Token, Weights, check_dtypes, output_shape
from pallas.triton import ptx
from pallas.triton.tiles import TWO_PI, TWO_PI_HIGH, TWO_PI_LOW

RANKS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """`block_p` rows of the state at a time, by `num_warps` warps. Powers of two, `block_p` at most p."""

    block_p: int
    num_warps: int


def default_block_sizes(p: int, n: int, r: int) -> BlockSizes:
    """64 numbers of the state in each thread, of two warps or with 4 ranks one; with 8 ranks half as many, for their
    vectors would spill.

    One H200, b=128 h=64 p=64 and 4 ranks for MIMO, ms of one of eight steps in a program by rows / warps, and of the
    choice in brackets times what the bytes of the states take at the rate of a copy, before the choice was made:

        n=128            32 / 2        16 / 1        8 / 1     n=64            64 / 2        32 / 1        16 / 1
        SISO float32     0.163 (0.96)  0.170         0.175     SISO float32    0.084 (0.98)  0.089         0.089
        SISO bfloat16    0.087 (1.01)  0.088         0.115     SISO bfloat16   0.048 (1.09)  0.048         0.064
        MIMO float32     0.201         0.187 (1.05)  0.204     MIMO float32    0.123         0.115 (1.28)  0.118
        MIMO bfloat16    0.143         0.127 (1.42)  0.147     MIMO bfloat16   0.099         0.086 (1.87)  0.085

    Fewer warps wait less for each other. What is left of MIMO is waiting: 255 registers let eight warps share a
    multiprocessor, which issue in two cycles of five. The outputs by tensor cores were slower, and off by 1.3e-2.
    """
    warps = 1 if r >= 4 else 2
    per_thread = 64 if r < 8 else 32
    block_p = min(p, max(1, 32 * warps * per_thread // n))
    return BlockSizes(block_p, num_warps=max(1, min(warps, block_p * n // (32 * per_thread))))


def _decode_kernel(
    state_ref, token_ref, weights_ref, y_ref, new_ref, *, pairing: Pairing, block_p: int, interpret: bool
):
    """One head of one row. Refs: ssm (p, n), B, C, k and biases (r, n), mimo (r, p), y (p,) or (r, p), angle (s,)."""
    r, n = state_ref.k.shape
    fma = functools.partial(ptx.fma, interpret=interpret)
    decay, carry, gamma = jnp.exp(_f32(token_ref.log_decay)), _f32(token_ref.carry), _f32(token_ref.gamma)
    rotate = _rotation(state_ref, token_ref, n, pairing, interpret)
    k, q = rotate(token_ref.B, weights_ref.B_bias), rotate(token_ref.C, weights_ref.C_bias)
    angle = None if state_ref.angle is None else _advance(state_ref, token_ref, slice(None))
    # Channels of one load: of MIMO's float32 two, that a thread holds 8 numbers of a row, as of bfloat16, and a row's
    # vectors and the steps of its sum serve twice as many.
    width = n // 2 if r > 1 and n > 1 and state_ref.ssm.dtype == jnp.float32 else n
    channels = [pl.ds(start, width) for start in range(0, n, width)]
    # The scalars weigh the vectors along n, of which a thread holds fewer numbers than of those along p.
    owed, new, q = (_along_n(u, width) for u in (decay * carry * _f32(state_ref.k), gamma * k, q))

    def some_rows(i, _):
        rows = pl.ds(i * block_p, block_p)
        v, v_prev = (_ranks(u[rows], weights_ref.mimo_x, rows) for u in (token_ref.x, state_ref.v))
        h = [decay * _f32(state_ref.ssm, rows, c) for c in channels]
        # One product at a time, each added to h: a sum of two products would be laid out on its own, and moved.
        for v_prev_j, owed_j, v_j, new_j in zip(_along_p(v_prev), owed, _along_p(v), new):
            h = [fma(v_j, new_c, fma(v_prev_j, owed_c, h_c)) for owed_c, new_c, h_c in zip(owed_j, new_j, h)]
        if not interpret:
            # The new state lies where the old one does, and several warps may read one number: read all, then write.
            plgpu.debug_barrier()
        for c, h_c in zip(channels, h):
            new_ref.ssm[rows, c] = h_c.astype(new_ref.ssm.dtype)
        new_ref.v[rows] = token_ref.x[rows].astype(new_ref.v.dtype)
        _output(y_ref, rows, h, q, v, token_ref, weights_ref, interpret)
        return _

    lax.fori_loop(0, state_ref.ssm.shape[0] // block_p, some_rows, 0)
    new_ref.k[...] = k.astype(new_ref.k.dtype)
    if angle is not None:
        new_ref.angle[:] = angle


def _output(y_ref, rows, h: list, q: list, v, token_ref, weights_ref, interpret: bool) -> None:
    """(h q + D v) silu(mimo_z z), of every rank or weighed by mimo_o and summed."""
    skip = None if weights_ref.D is None else _f32(weights_ref.D) * v
    gate = None
    if token_ref.z is not None:
        gate = _ranks(token_ref.z[rows], weights_ref.mimo_z, rows)
        gate *= ptx.sigmoid(gate, interpret)
    if weights_ref.mimo_o is None:
        skips, gates = ([None] * len(q) if u is None else _split(u) for u in (skip, gate))
        for j, (q_j, skip_j, gate_j) in enumerate(zip(q, skips, gates)):
            o = _dot(h, q_j, interpret)
            o = o if skip_j is None else o + skip_j
            o = o if gate_j is None else o * gate_j
            y_ref[(j, rows) if y_ref.ndim == 2 else rows] = o.astype(y_ref.dtype)
        return
    # What a rank's output is multiplied by weighs its q, so that one sum along n does for all ranks.
    weight = _f32(weights_ref.mimo_o, slice(None), rows)
    weight = weight if gate is None else weight * gate
    w = [0.0] * len(h)
    for weight_j, q_j in zip(_along_p(weight), q):
        w = [ptx.fma(weight_j, q_c, w_c, interpret=interpret) for q_c, w_c in zip(q_j, w)]
    y = _dot(h, w, interpret)
    if skip is not None:
        y += jnp.sum(weight * skip, axis=0)
    y_ref[rows] = y.astype(y_ref.dtype)


def _dot(h: list, q: list, interpret: bool):
    """The sum along n."""
    o = h[0] * q[0]
    for h_c, q_c in zip(h[1:], q[1:]):
        o = ptx.fma(h_c, q_c, o, interpret=interpret)
    return jnp.sum(o, axis=1)


def _ranks(u, mimo_ref, rows):
    """u of every rank, (r, rows): itself for SISO.

    In one array, so that each number is made by one thread: the compiler lays out vectors of fewer numbers than threads
    as the state is, and every thread of a row loads and makes the row's.
    """
    u = u.astype(jnp.float32)[None, :]
    return u if mimo_ref is None else u * _f32(mimo_ref, slice(None), rows)


def _split(u) -> list:
    """u along its first axis."""
    return [u_j.reshape(u.shape[1:]) for u_j in lax.split(u, (1,) * u.shape[0], 0)]


def _along_p(u) -> list:
    """(r, rows) as r columns."""
    return [u_j[:, None] for u_j in _split(u)]


def _along_n(u, width: int) -> list:
    """(r, n) as r lists of rows, `width` channels each."""
    r, n = u.shape
    return [lax.split(u_j, (width,) * (n // width), 1) for u_j in lax.split(u, (1,) * r, 0)]


def _rotation(state_ref, token_ref, n: int, pairing: Pairing, interpret: bool):
    """The function (ref, bias) -> R(theta') (ref + bias) of all ranks, (r, n)."""

    def biased(ref, bias_ref, *index):
        return _f32(ref, *index) + (0.0 if bias_ref is None else _f32(bias_ref, *index))

    if state_ref.angle is None:
        return biased
    s = state_ref.angle.shape[0]
    channel = lax.broadcasted_iota(jnp.int32, (1, n), 1)
    pair, bit = (channel // 2, 1) if pairing == "interleaved" else (channel % (n // 2), n // 2)
    # Channels beyond the s pairs do not turn: they read a valid angle and drop it.
    theta = jnp.where(pair < s, _advance(state_ref, token_ref, jnp.where(pair < s, pair, 0)), 0.0)
    cos, sin = ptx.cos(theta, interpret=interpret), ptx.sin(theta, interpret=interpret)
    sin = jnp.where((channel & bit) == 0, -sin, sin)
    rank, channel = (lax.broadcasted_iota(jnp.int32, state_ref.k.shape, axis) for axis in (0, 1))
    # Not an exclusive or where the bit is n / 2: the compiler sees that neighbours stay neighbours, and loads 16 bytes.
    partner = channel ^ 1 if bit == 1 else jnp.where(channel < bit, channel + bit, channel - bit)
    return lambda ref, bias_ref: ptx.fma(
        biased(ref, bias_ref, rank, partner), sin, biased(ref, bias_ref) * cos, interpret=interpret
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
