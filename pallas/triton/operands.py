"""The arrays of the kernels' boundary, and how every kernel sees them."""

from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl

from pallas.triton import ptx


class Arguments(NamedTuple):
    """What the SSM takes, as the layer wrote it, and gives gradients of; None is absent.

    Attributes:
        x, z: input and gate.
        B, C: projections in kernel order (tiles.py), the ranks of a token one after the other.
        B_bias, C_bias: added per head before the rotation.
        D: skip.
        mimo_x, mimo_z, mimo_o: rank projections.
        log_decay: log alpha, as good as -inf where a document starts.
        scale, gamma: weights of a token for later ones and for itself.
        clock: what omega is multiplied by.
        omega: angular velocity of all heads.
        turned: what each chunk's tokens turn by in all, the sum of omega clock, modulo 2 pi. It has no gradient of its
            own (None): what it receives goes into those of clock and omega.
        angle: before the row's first token; None is 0.
        segment_ids: packed documents.
    """

    x: jax.Array  # (b, t, h, p)
    z: jax.Array | None  # (b, t, h, p)
    B: jax.Array  # (b, t r, g, n)
    C: jax.Array  # (b, t r, g, n)
    B_bias: jax.Array  # (h, r, n)
    C_bias: jax.Array  # (h, r, n)
    D: jax.Array | None  # (h,)
    mimo_x: jax.Array | None  # (h, r, p)
    mimo_z: jax.Array | None  # (h, r, p)
    mimo_o: jax.Array | None  # (h, r, p)
    log_decay: jax.Array  # (b, t, h), like the next three; all coefficients are float32
    scale: jax.Array
    gamma: jax.Array
    clock: jax.Array
    omega: jax.Array | None  # (b, t, s)
    turned: jax.Array | None  # (b, chunks, h, s)
    angle: jax.Array | None  # (b, h, s)
    segment_ids: jax.Array | None  # (b, t) int32


class Operands(NamedTuple):
    """What the kernels read: `Arguments`, and of every token and head what depends on the coefficients alone.

    Attributes:
        coarse, fine: two parts of the cumulative sum of the log decay from each chunk's start; of 16-bit operands
            coarse is all of it, and fine absent.
        entry: exp(coarse + fine), what a token still sees of the state at the chunk's start; 0 in later documents.
        exit: exp(rest of the chunk's log decay) scale, what the chunk's end sees of a token; 0 for earlier documents.
        through: what the chunk's end keeps of the state at its start.
        scale, gamma, clock: with time last, so that a tile's lie side by side.
        theta0: angle before each chunk's first token.
    """

    x: jax.Array
    z: jax.Array | None
    B: jax.Array
    C: jax.Array
    B_bias: jax.Array
    C_bias: jax.Array
    D: jax.Array | None
    mimo_x: jax.Array | None
    mimo_z: jax.Array | None
    mimo_o: jax.Array | None
    coarse: jax.Array  # (b, h, t), like all of them but through
    fine: jax.Array | None
    entry: jax.Array
    exit: jax.Array
    through: jax.Array  # (b, h, chunks)
    scale: jax.Array
    gamma: jax.Array
    clock: jax.Array
    omega: jax.Array | None
    segment_ids: jax.Array | None
    theta0: jax.Array | None  # (b, chunks, h, s)


def specs(operands: Operands, at, heads: int | None = None) -> Operands:
    """A BlockSpec per operand that gives one row of the batch, and one head or a block of `heads` of one group.

    `at(*grid)` is (b, h, g), h counted in blocks. Every time axis is whole: a kernel slices its own chunk, so that
    passes over chunks and loops over them read alike.
    """

    def spec(name, array):
        if array is None:
            return None
        axes = AXES[name]
        squeezed = {"b": None, "h": heads, "g": None}
        block = tuple(squeezed.get(axis, size) for axis, size in zip(axes, array.shape))

        def index(*grid):
            where = dict(zip("bhg", at(*grid)))
            return tuple(where.get(axis, 0) for axis in axes)

        return pl.BlockSpec(block, index)

    return Operands(**{name: spec(name, array) for name, array in operands._asdict().items()})


_HEADS, _SMALL, _PROJECTION, _RANKS = ("b", "t", "h", "p"), ("b", "h", "t"), ("b", "tr", "g", "n"), ("h", "r", "p")
_SHARED_AXES = dict(
    x=_HEADS,
    z=_HEADS,
    B=_PROJECTION,
    C=_PROJECTION,
    B_bias=("h", "r", "n"),
    C_bias=("h", "r", "n"),
    D=("h",),
    mimo_x=_RANKS,
    mimo_z=_RANKS,
    mimo_o=_RANKS,
    omega=("b", "t", "s"),
    segment_ids=("b", "t"),
)
THETA0_AXES = ("b", "chunks", "h", "s")
ARGUMENT_AXES = _SHARED_AXES | dict.fromkeys(("log_decay", "scale", "gamma", "clock"), ("b", "t", "h"))
ARGUMENT_AXES |= dict(turned=THETA0_AXES, angle=("b", "h", "s"))
AXES = _SHARED_AXES | dict.fromkeys(("coarse", "fine", "entry", "exit", "scale", "gamma", "clock"), _SMALL)
AXES |= dict(through=("b", "h", "chunks"), theta0=THETA0_AXES)


def at_heads(h: int, index):
    """index(h, chunk or segment, b) of a grid (h x chunks or segments, b), heads innermost, so that they share B and C.

    Two axes, not three, because vmap adds one and a GPU's grid has three.
    """
    return lambda i, b: index(i % h, i // h, b)


def given_chunk(kernel, h: int, **static):
    """kernel(chunk or segment of the program, *refs, **static), for a grid as in `at_heads`."""
    return lambda *refs: kernel(pl.program_id(0) // h, *refs, **static)


def heads_per_program(h: int, g: int, most: int) -> int:
    """The most heads, up to `most`, that divide a group."""
    return max(k for k in range(1, most + 1) if (h // g) % k == 0)


def over_heads(heads: int, chunk, interpret: bool, body, carry=None):
    """body(head, chunk, carry) -> carry, for every head of a program.

    A loop, because only in loops are loads fetched ahead. To the compiler the chunk varies: addresses that depend on it
    are then made where they are used. Made before the loop, they would fill the registers.
    """
    return lax.fori_loop(0, heads, lambda head, carry: body(head, ptx.varying(chunk, head, interpret), carry), carry)


class OfHead:
    """A ref with its axis of heads held at one head: the lowering takes one indexer per access, not a chain of them."""

    def __init__(self, ref, axis: int, head):
        self._ref, self._axis, self._head = ref, axis, head
        self.dtype = ref.dtype

    def __getitem__(self, index):
        return self._ref[self._with_head(index)]

    def __setitem__(self, index, value):
        self._ref[self._with_head(index)] = value

    def _with_head(self, index):
        index = index if isinstance(index, tuple) else () if index is Ellipsis else (index,)
        index += (slice(None),) * (self._axis - len(index))
        return (*index[: self._axis], self._head, *index[self._axis :])


def at_head(operands: Operands, head) -> Operands:
    """Operands of one head, from refs to a block of heads."""

    def one(name, ref):
        axes = [axis for axis in AXES[name] if axis not in ("b", "g")]
        return OfHead(ref, axes.index("h"), head) if ref is not None and "h" in axes else ref

    return Operands(**{name: one(name, ref) for name, ref in operands._asdict().items()})
