"""From the coefficients as the layer wrote them to those of the kernels, and back.

For every chunk of c tokens, with cs the inclusive cumulative sum of the log decay from the chunk's start,

    entry_i = exp(cs_i)    exit_j = exp(cs_c - cs_j) scale_j    through = exp(cs_c)

each (b, h, t), or one a chunk, from arrays (b, t, h). `decays` of mamba3_jax/ops/prepass.py is the same in plain JAX,
which a GPU runs as a dozen small kernels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas.triton import ptx, tiles
from pallas.triton.operands import Arguments, Operands, at_heads, given_chunk
from pallas.triton.tiles import Tiling

# Most heads of a program.
HEADS = 32
# The log decay's coarse part is a multiple of it, whose sums are exact, as in mamba3_jax/ops/chunked.py.
GRAIN = 1 / 8


class _Given(NamedTuple):
    """Of what the layer wrote."""

    log_decay: jax.Array  # (b, t, h), like all of them
    scale: jax.Array
    gamma: jax.Array
    clock: jax.Array


class _Made(NamedTuple):
    """As in `Operands`, of which these are fields."""

    coarse: jax.Array
    fine: jax.Array | None
    entry: jax.Array
    exit: jax.Array
    through: jax.Array
    scale: jax.Array
    gamma: jax.Array
    clock: jax.Array


class Received(NamedTuple):
    """Gradients: of coarse and fine alike `cs`, the others of what they are named after.

    `cs` lacks what a token's decays receive as the earlier of two, -scale dscale. scale and clock come in parts,
    (parts, b, h, t); clock is None where nothing turns.
    """

    cs: jax.Array
    entry: jax.Array
    exit: jax.Array
    through: jax.Array
    scale: jax.Array
    gamma: jax.Array
    clock: jax.Array | None


def _kernel(chunk, given: _Given, made: _Made, *, tiling: Tiling):
    """Of one chunk and a block of heads."""
    tokens = pl.ds(chunk * tiling.c, tiling.c)
    log_decay = given.log_decay[tokens].T
    coarse = jnp.floor(log_decay * (1 / GRAIN) + 0.5) * GRAIN
    fine = log_decay - coarse
    (coarse, coarse_end), (fine, fine_end) = ((jnp.cumsum(u, axis=1), jnp.sum(u, axis=1)) for u in (coarse, fine))
    scale = given.scale[tokens].T
    made.coarse[:, tokens] = coarse if made.fine is not None else coarse + fine
    if made.fine is not None:
        made.fine[:, tokens] = fine
    made.entry[:, tokens] = _exp(tiling, coarse + fine)
    made.exit[:, tokens] = _exp(tiling, (coarse_end[:, None] - coarse) + (fine_end[:, None] - fine)) * scale
    made.through[:, chunk] = _exp(tiling, coarse_end + fine_end)
    made.scale[:, tokens] = scale
    made.gamma[:, tokens] = given.gamma[tokens].T
    made.clock[:, tokens] = given.clock[tokens].T


def _exp(tiling: Tiling, u):
    return tiling.exp2(u * ptx.LOG2_E)


def _gradient_kernel(chunk, made: _Made, received: Received, given: _Given, *, tiling: Tiling):
    """The gradients of `given`, written into it, from those of `made`."""
    tokens = pl.ds(chunk * tiling.c, tiling.c)
    end = chunk * tiling.c + tiling.c - 1
    rest = made.coarse[:, end][:, None] - made.coarse[:, tokens]
    if made.fine is not None:
        rest += made.fine[:, end][:, None] - made.fine[:, tokens]
    dexit, weight = received.exit[:, tokens], _exp(tiling, rest)
    to_exit = dexit * made.exit[:, tokens]
    dscale, dclock = (_of_parts(u, tokens, dexit) for u in (received.scale, received.clock))
    dcs = received.cs[:, tokens] - made.scale[:, tokens] * dscale
    dcs += received.entry[:, tokens] * made.entry[:, tokens] - to_exit
    after = jnp.sum(to_exit + dcs, axis=1) + received.through[:, chunk] * made.through[:, chunk]
    # The reverse cumulative sum, of which Triton has the forward one only.
    given.log_decay[tokens] = (after[:, None] - jnp.cumsum(dcs, axis=1) + dcs).T
    given.scale[tokens] = (dscale + dexit * weight).T
    given.gamma[tokens] = received.gamma[:, tokens].T
    given.clock[tokens] = dclock.T


def _of_parts(ref, tokens, like):
    """The sum of the parts of what the tokens receive; 0 where there are none."""
    parts = 0 if ref is None else ref.shape[0]
    return sum((ref[k, :, tokens] for k in range(parts)), jnp.zeros_like(like))


def _of(fields, kind):
    return kind(*(getattr(fields, name) for name in kind._fields))


def _call(kernel, name: str, inputs: list, out, shape: tuple[int, int, int], tiling: Tiling):
    """`kernel` for every chunk, row and block of heads."""
    b, t, h = shape
    # A power of two, as every size of a tile: one of an odd number, whose loads are then scattered.
    heads = min(HEADS, h & -h)
    at = functools.partial(at_heads, h // heads)
    time_major = pl.BlockSpec((None, t, heads), at(lambda i, c, b: (b, 0, i)))

    def head_major(array):
        parts = array.shape[:-3]
        block = (*parts, None, heads, array.shape[-1])
        return pl.BlockSpec(block, at(lambda i, c, b: (*(0 for _ in parts), b, i, 0)))

    def specs(tree):
        if isinstance(tree, _Given):
            return _Given(*(time_major,) * len(tree))
        return jax.tree.map(head_major, tree)

    return pl.pallas_call(
        given_chunk(kernel, h // heads, tiling=tiling),
        grid=(h // heads * (t // tiling.c), b),
        in_specs=[specs(tree) for tree in inputs],
        out_specs=[specs(out)],
        out_shape=[out],
        compiler_params=tiles.compiler_params(num_warps=4, num_stages=1),
        interpret=tiling.interpret,
        name=name,
    )(*inputs)[0]


def operands(args: Arguments, theta0: jax.Array | None, tiling: Tiling) -> Operands:
    """What the kernels read; theta0 (b, chunks, h, s) is there where something turns."""
    b, t, h = args.clock.shape
    tokens = jax.ShapeDtypeStruct((b, h, t), jnp.float32)
    chunks = jax.ShapeDtypeStruct((b, h, t // tiling.c), jnp.float32)
    made = _Made(*(tokens,) * len(_Made._fields))._replace(through=chunks)
    if not tiling.precise:
        made = made._replace(fine=None)
    made = _call(_kernel, "ssm_coefficients", [_of(args, _Given)], made, args.clock.shape, tiling)
    made = made._asdict() | dict(theta0=theta0)
    rest = {name: getattr(args, name) for name in Operands._fields if name not in made}
    return Operands(**rest, **made)


def gradients(ops: Operands, received: Received, tiling: Tiling) -> dict[str, jax.Array]:
    """Of the fields of `Arguments` that were made into others, by name."""
    b, h, t = ops.clock.shape
    given = _Given(*(jax.ShapeDtypeStruct((b, t, h), jnp.float32),) * len(_Given._fields))
    inputs = [_of(ops, _Made), received]
    return _call(_gradient_kernel, "ssm_coefficient_gradients", inputs, given, (b, t, h), tiling)._asdict()
