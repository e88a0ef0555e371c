"""One decode step of Mamba-3 in one TPU kernel: SISO and MIMO, from the last state to the next and the gated output.

    theta' = theta + omega clock     k = R(theta') (B + B_bias)     q = R(theta') (C + C_bias)
    h' = decay (h + carry sum_r v_prev k_prev^T) + gamma sum_r v k^T
    y  = sum_r mimo_o (h' q + D v) silu(mimo_z z)     with v = mimo_x x, and all three mimo arrays 1 for SISO

Section 3 of arXiv:2603.15569; letters as in mamba3_jax/ops/api.py. Where n is a multiple of 128 the step reads and
writes the state h (b, h, p, n) once, in place, and is bound by those bytes; all else has to hide behind them, which on
a v5e leaves 120 cycles a head. Another n lies on whole lanes here but not in XLA's arrays, so that XLA copies the state
there and back: for n=64 on a v5e ten times its bytes, where the recurrence in XLA moves thirteen times.
So the channels n stay on the lanes in the checkpoint's order, where a pair is (2i, 2i+1) ("interleaved") or
(i, i + n/2) ("half"): the partner of a channel is one or two rolls away. Updates are made by the vector unit, exactly,
from columns of v that are transposed for all heads of a block at once, and reads of the state by the matrix unit.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.step import Pairing, State, Token, Weights, check_dtypes, output_shape
from pallas.tpu.chips import padded_up
from pallas.tpu.cost_model import Sizes, estimate
from pallas.tpu.tiles import cosine, nearest

# As in mamba3_jax/ops/rotation.py: 2 pi in two parts, the first exact in few bits.
TWO_PI = 2 * math.pi
TWO_PI_HIGH = 6.28125
TWO_PI_LOW = TWO_PI - TWO_PI_HIGH

# Heads of a block are unrolled; 8 fill the sublanes of what is computed for all of them at once.
HEADS = 8
# Of the state in one block: a transfer of this size takes 1 to 2 us, several times what starting it does.
BLOCK_BYTES = 2**20
# The least block of states is in VMEM four times, of which the compiler gives a kernel 16 MiB on every chip.
MAX_BLOCK_BYTES = 3 * 2**20


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """`rows` of the batch and `heads` at a time: divisors of b, and of the heads that share B and C."""

    rows: int
    heads: int


def default_block_sizes(b: int, h: int, g: int, p: int, n: int, itemsize: int) -> BlockSizes:
    """For a state of `itemsize` bytes per number. Without 8 heads that share B and C, all heads are one block."""
    heads = HEADS if h // g % HEADS == 0 else h
    most = max(1, BLOCK_BYTES // (heads * _head_bytes(p, n, itemsize)))
    return BlockSizes(max(rows for rows in range(1, b + 1) if b % rows == 0 and rows <= most), heads)


def unfit(heads: int, p: int, n: int, itemsize: int) -> str | None:
    """Why the states of `heads` that share a block do not fit; None where they do."""
    needed = heads * _head_bytes(p, n, itemsize)
    if needed <= MAX_BLOCK_BYTES:
        return None
    return (
        f"state.ssm: got {needed} bytes of {heads} heads that share a block (8, or all where groups are not of a "
        f"multiple of 8); allowed in the tpu decode kernel: at most {MAX_BLOCK_BYTES}"
    )


def _head_bytes(p: int, n: int, itemsize: int) -> int:
    """Of one head's state in VMEM: n on whole lanes, p on whole tiles of sublanes."""
    sublanes = 32 // itemsize
    return -(-p // sublanes) * sublanes * padded_up(n) * itemsize


class _Token(NamedTuple):
    """One token as the kernel reads it; B and C are per head where a block has heads of several groups."""

    x: jax.Array  # (b, h, p)
    B: jax.Array  # (b, g or h, r, n)
    C: jax.Array  # (b, g or h, r, n)
    coefficients: jax.Array  # (b, h, 4): log decay, carry, gamma, clock
    omega: jax.Array | None  # (b, 1 or h, s)
    z: jax.Array | None  # (b, h, p)


def _decode_kernel(state_ref, token_ref, weights_ref, y_ref, new_ref, *, pairing: Pairing):
    """A block of rows and heads."""

    def one_row(row, _):
        at = functools.partial(_at_row, row=row)
        _row(at(state_ref), at(token_ref), weights_ref, y_ref.at[row], at(new_ref), pairing)
        return _

    lax.fori_loop(0, y_ref.shape[0], one_row, 0)


def _at_row(refs, row):
    return type(refs)(*(None if ref is None else ref.at[row] for ref in refs))


def _row(state_ref, token_ref, weights_ref, y_ref, new_ref, pairing: Pairing) -> None:
    """The heads of a block, of one row. Refs: ssm (heads, p, n), x and v (heads, p), k and biases (heads, r, n)."""
    heads, r, n = state_ref.k.shape
    coefficients = token_ref.coefficients[...]
    decay, gamma = jnp.exp(coefficients[:, 0:1]), coefficients[:, 2:3]
    owed = decay * coefficients[:, 1:2]
    turn = _turn(state_ref, token_ref, coefficients[:, 3:4], new_ref, n, pairing)
    v, v_prev = (_ranks(_f32(ref), weights_ref.mimo_x) for ref in (token_ref.x, state_ref.v))
    if r == 1:
        columns, columns_prev = v[0].T, v_prev[0].T
    o = []
    for i in range(heads):
        k = _rotated(token_ref.B, weights_ref.B_bias, i, turn, pairing)
        q = _rotated(token_ref.C, weights_ref.C_bias, i, turn, pairing)
        new_ref.k[i] = k.astype(new_ref.k.dtype)
        new, old = gamma[i : i + 1] * k, owed[i : i + 1] * _f32(state_ref.k, i)
        h = decay[i : i + 1] * _f32(state_ref.ssm, i)
        if r == 1:
            h += columns_prev[:, i : i + 1] * old + columns[:, i : i + 1] * new
        else:
            rows = jnp.concatenate([u[j][i : i + 1] for u in (v_prev, v) for j in range(r)])
            h += _outer(rows, jnp.concatenate([old, new]))
        new_ref.ssm[i] = h.astype(new_ref.ssm.dtype)
        o.append(_dot(q, h, (1, 1)))
    _output(y_ref, [jnp.concatenate([o_i[j : j + 1] for o_i in o]) for j in range(r)], v, token_ref, weights_ref)
    new_ref.v[...] = token_ref.x[...].astype(new_ref.v.dtype)


def _output(y_ref, o: list, v: list, token_ref, weights_ref) -> None:
    """Skip, gate and the sum over ranks, or the ranks themselves; o and v (heads, p) of every rank."""
    if weights_ref.D is not None:
        o = [o_j + _f32(weights_ref.D) * v_j for o_j, v_j in zip(o, v)]
    if token_ref.z is not None:
        gates = _ranks(_f32(token_ref.z), weights_ref.mimo_z)
        o = [o_j * (gate * jax.nn.sigmoid(gate)) for o_j, gate in zip(o, gates)]
    if weights_ref.mimo_o is not None:
        o = [sum(o_j * _f32(weights_ref.mimo_o, slice(None), j) for j, o_j in enumerate(o))]
    for j, o_j in enumerate(o):
        y_ref[j if y_ref.ndim == 3 else ...] = o_j.astype(y_ref.dtype)


def _ranks(u, mimo_ref) -> list:
    """(heads, p) of every rank: itself for SISO."""
    return [u] if mimo_ref is None else [u * _f32(mimo_ref, slice(None), j) for j in range(mimo_ref.shape[1])]


def _turn(state_ref, token_ref, clock, new_ref, n: int, pairing: Pairing):
    """Advances the angles; their cosine, and the sine with the sign of each channel's partner, both (heads, n)."""
    if state_ref.angle is None:
        return None
    angle = _wrap(state_ref.angle[...] + _wrap(_f32(token_ref.omega) * clock))
    new_ref.angle[...] = angle
    pair, channel = (lax.broadcasted_iota(jnp.int32, (angle.shape[1], n), axis) for axis in (0, 1))
    # To the channels of each pair, by a product with 0 and 1 that is exact; 0 where a channel does not turn.
    turns = _dot(angle, (pair == _pair(channel, n, pairing)).astype(jnp.float32), (1, 0)) * (1 / TWO_PI)
    cos, sin = cosine(turns), cosine(turns - 0.25)
    first = _is_first(lax.broadcasted_iota(jnp.int32, sin.shape, 1), n, pairing)
    return cos, jnp.where(first, -sin, sin)


def _wrap(angle):
    """rotation.wrap"""
    turns = nearest(angle * (1 / TWO_PI))
    return (angle - turns * TWO_PI_HIGH) - turns * TWO_PI_LOW


def _pair(channel, n: int, pairing: Pairing):
    return channel >> 1 if pairing == "interleaved" else jnp.where(channel < n // 2, channel, channel - n // 2)


def _is_first(channel, n: int, pairing: Pairing):
    return channel & 1 == 0 if pairing == "interleaved" else channel < n // 2


def _rotated(ref, bias_ref, i: int, turn, pairing: Pairing):
    """R(theta') (ref + bias) of head i, (r, n)."""
    u = _f32(ref, i if ref.shape[0] > 1 else 0)
    if bias_ref is not None:
        u += _f32(bias_ref, i)
    if turn is None:
        return u
    cos, sin = (part[i : i + 1] for part in turn)
    n = u.shape[1]
    if pairing == "half":
        partner = pltpu.roll(u, n // 2, 1)
    else:
        first = _is_first(lax.broadcasted_iota(jnp.int32, u.shape, 1), n, pairing)
        partner = jnp.where(first, pltpu.roll(u, n - 1, 1), pltpu.roll(u, 1, 1))
    return u * cos + partner * sin


# A float32 is the sum of three bfloat16 numbers, and a product of two needs the six of their products that are not
# below its last bit.
PARTS = 3


def _parts(u) -> list:
    parts = []
    for _ in range(PARTS):
        parts.append(u.astype(jnp.bfloat16))
        u = u - parts[-1].astype(jnp.float32)
    return parts


def _outer(a, b):
    """a^T b of (m, p) and (m, n) in float32: all products of parts as one, as m is far below a matrix unit's rows."""
    pairs = [(i, j) for i in range(PARTS) for j in range(PARTS - i)]
    a, b = _parts(a), _parts(b)
    a, b = jnp.concatenate([a[i] for i, _ in pairs]), jnp.concatenate([b[j] for _, j in pairs])
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _dot(a, b, contract: tuple[int, int]):
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _f32(ref, *index):
    return ref[index if index else ...].astype(jnp.float32)


def _call(
    state: State,
    token: _Token,
    weights: Weights,
    y: jax.ShapeDtypeStruct,
    pairing: Pairing,
    blocks: BlockSizes,
    interpret,
) -> tuple[jax.Array, State]:
    b, h, p, n = state.ssm.shape
    r = token.B.shape[2]
    rows, heads = blocks.rows, blocks.heads
    per_group = h // token.B.shape[1]
    block = {
        "b h p": pl.BlockSpec((rows, heads, p), lambda i, j: (j, i, 0)),
        "b h p n": pl.BlockSpec((rows, heads, p, n), lambda i, j: (j, i, 0, 0)),
        "b h r n": pl.BlockSpec((rows, heads, r, n), lambda i, j: (j, i, 0, 0)),
        "b g r n": pl.BlockSpec((rows, 1, r, n), lambda i, j: (j, lax.div(i * heads, per_group), 0, 0)),
        "b r h p": pl.BlockSpec((rows, r, heads, p), lambda i, j: (j, 0, i, 0)),
        "b h 4": pl.BlockSpec((rows, heads, 4), lambda i, j: (j, i, 0)),
        "h 1": pl.BlockSpec((heads, 1), lambda i, j: (i, 0)),
        "h r n": pl.BlockSpec((heads, r, n), lambda i, j: (i, 0, 0)),
        "h r p": pl.BlockSpec((heads, r, p), lambda i, j: (i, 0, 0)),
    }
    if state.angle is not None:
        s = state.angle.shape[2]
        block["b h s"] = pl.BlockSpec((rows, heads, s), lambda i, j: (j, i, 0))
        block["b 1 s"] = pl.BlockSpec((rows, 1, s), lambda i, j: (j, 0, 0))

    def specs(arrays, **letters):
        """The blocks of the arrays that are there."""
        return type(arrays)(*(None if a is None else block[letters[name]] for name, a in arrays._asdict().items()))

    projections = "b h r n" if per_group == 1 else "b g r n"
    omega = "b 1 s" if token.omega is None or token.omega.shape[1] == 1 else "b h s"
    state_specs = specs(state, angle="b h s", ssm="b h p n", k="b h r n", v="b h p")
    return pl.pallas_call(
        functools.partial(_decode_kernel, pairing=pairing),
        # Rows last: what the rows share is then fetched once per block of heads.
        grid=(h // heads, b // rows),
        in_specs=(
            state_specs,
            specs(token, x="b h p", B=projections, C=projections, coefficients="b h 4", omega=omega, z="b h p"),
            specs(weights, B_bias="h r n", C_bias="h r n", D="h 1", mimo_x="h r p", mimo_z="h r p", mimo_o="h r p"),
        ),
        out_specs=(block["b h p" if y.ndim == 3 else "b r h p"], state_specs),
        out_shape=(y, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)),
        input_output_aliases={i: i + 1 for i in range(len(jax.tree.leaves(state)))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=_cost(state, token),
        interpret=interpret,
        name="ssm_tpu_decode",
    )(state, token, weights)


def _cost(state: State, token: _Token) -> pl.CostEstimate:
    b, h, p, n = state.ssm.shape
    s = 0 if state.angle is None else state.angle.shape[2]
    sizes = Sizes(b, 1, h, p, n, g=token.B.shape[1], r=token.B.shape[2], s=s, itemsize=token.x.dtype.itemsize)
    return estimate("decode", sizes, state_itemsize=state.ssm.dtype.itemsize)


def decode_step(
    state: State,
    token: Token,
    weights: Weights,
    *,
    pairing: Pairing,
    block_sizes: BlockSizes | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, State]:
    """One token of every row.

    Args:
        state: what the last step returned. Its arrays are overwritten where the caller donates them, else copied.
        token, weights: shapes as in their classes; float32 or bfloat16.
        pairing: which channels turn together, "interleaved" for SISO and "half" for MIMO.
        block_sizes: None takes the defaults.
        interpret: runs without a TPU.

    Returns:
        y in the dtype of x, (b, h, p), or (b, r, h, p) with mimo_x but no mimo_o; and the next state, in its dtypes.

    Raises:
        NotImplementedError: a size or dtype that the kernel does not cover.
    """
    b, h, p, n = state.ssm.shape
    g = token.B.shape[2]
    check_dtypes(state, token, weights)
    blocks = block_sizes or default_block_sizes(b, h, g, p, n, state.ssm.dtype.itemsize)
    if reason := unfit(blocks.heads, p, n, state.ssm.dtype.itemsize):
        raise NotImplementedError(reason)
    clock = jnp.ones((b, h), jnp.float32) if token.clock is None else token.clock
    coefficients = (token.log_decay, token.carry, token.gamma, clock)

    def per_group(u):
        """(b, r, g, n) with the groups first, or with the heads where a block has several groups."""
        u = jnp.moveaxis(u, 1, 2)
        return u if h // g % blocks.heads == 0 else jnp.repeat(u, h // g, axis=1)

    omega = token.omega
    if omega is not None and token.clock is None:
        omega = jnp.broadcast_to(omega, (b, 1, omega.shape[0]))
    return _call(
        state,
        _Token(
            x=token.x,
            B=per_group(token.B),
            C=per_group(token.C),
            coefficients=jnp.stack([u.astype(jnp.float32) for u in coefficients], axis=-1),
            omega=omega,
            z=token.z,
        ),
        weights._replace(D=None if weights.D is None else weights.D[:, None]),
        output_shape(state, token, weights),
        pairing,
        blocks,
        interpret,
    )
