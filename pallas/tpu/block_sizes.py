"""How the kernels cut their work, and what the compiler says of it.

No TPU was at hand: cycles are the bundles that libtpu 0.0.52 schedules for a step, all branches counted, over its
blocks (two heads of 64 channels, 128 tokens, n=128, s=32, bfloat16), forward and backward, for v5e. A vector unit that
were always busy would take 420 and 900.

    blocks
     1    1530  3030   one block after the other, `jnp.round`, columns broadcast along the lanes
     1    1490  3140   columns transposed from rows, rows of gradients summed after a transposition
     4    1040  2220   four blocks in one step without a branch between them
     4     840  2160   the angles of all four first
     4     830  2020   the gate's sigmoid by the hardware's reciprocal alone
     4     970  2220   columns as products with ones: the matrix unit becomes the bound
     8     760     -   twice the code for less than a tenth

VMEM that the compiler takes, MiB, forward / backward, bfloat16 and n=128 p=64 s=32 unless said otherwise:

                                        v4          v5e         v5p         v6e         tpu7x
    SISO h=64, 4 blocks                 6.3 / 8.7   5.6 / 8.8   5.8 / 9.3   5.9 / 8.5   5.2 / 7.8
    MIMO r=4 h=64, 1 block              6.4 / 12.4  5.5 / 10.8  5.7 / 11.6  5.5 / 10.7  5.2 / 10.5
    SISO h=48 float32, 4 blocks (v4: 2) 5.3 / 8.7   7.8 / 11.4  8.0 / 11.8  7.6 / 11.2  6.8 / 10.3
    SISO h=32 g=8 s=64, 2 blocks        3.5 / 6.0   2.9 / 5.5   3.2 / 5.9   2.9 / 5.2   2.7 / 4.8

and backward on v5e at h=64 with one block: 5.0, in float32 7.3, with chunks of 256 and 512 8.2 and 16.0; where only
what was counted was allowed. Allowed all, the compiler takes up to a fifth more (5.9 / 9.5 for the first on v5e).

A chunk of 128 is what a matrix unit and the lanes hold. Longer ones make c/128 times the scores of a token, on the
vector unit, which is the bound, to save products with the state, which are not.

Next: MIMO (4250 and 13700 bundles for r=4, of which the matrix unit is busy 2070 and 6500) makes r^2 scores of
128 x 128 per head where tiles of 128/r tokens, each once per rank, would make r; the backward kernel stores what does
not fit the registers (1130 of its 2020 bundles); and of one row of the batch a chip of two cores uses one core.
"""

import dataclasses

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.chips import chip_of, padded_head_dim, padded_up
from pallas.tpu.operands import Tiling

CHUNK = 128
# Blocks (of two heads, fewer of more) x ranks of a step: enough for the compiler to hide latencies, few enough for it
# to finish in seconds.
UNROLLED = 4


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How the kernels cut their work.

    Attributes:
        chunk: tokens of a step and of a chunk of the algorithm, a multiple of 128.
        blocks: blocks of lanes that a step works on, a divisor of those in a group.
    """

    chunk: int
    blocks: int


def default_block_sizes(shape: dict[str, int], dtype, device_kind: str) -> BlockSizes:
    """For sizes h, p, n, g, r, s, the dtype of x and a TPU; see the table above."""
    limit = chip_of(device_kind).vmem_bytes
    heads = _tiling(shape, BlockSizes(CHUNK, 1)).heads
    per_group = shape["h"] // shape["g"] // heads
    for blocks in range(2 * UNROLLED // (shape["r"] * max(2, heads)), 1, -1):
        sizes = BlockSizes(CHUNK, blocks)
        if per_group % blocks == 0 and vmem_bytes(shape, dtype, sizes) <= limit:
            return sizes
    return BlockSizes(CHUNK, 1)


def unfit(shape: dict[str, int], dtype, device_kind: str) -> str | None:
    """Why not even the least step of a call with sizes h, p, n, g, r, s fits the TPU's VMEM; None where it does."""
    chip, needed = chip_of(device_kind), vmem_bytes(shape, dtype, BlockSizes(CHUNK, 1))
    if needed <= chip.vmem_bytes:
        return None
    of = " ".join(f"{name}={shape[name]}" for name in "hpnr")
    return f"h, p, n, r: got {of} in {jnp.dtype(dtype)}, {needed} bytes of VMEM where {chip.name} has {chip.vmem_bytes}"


def tiling_of(shape: dict[str, int], dtype, blocks: BlockSizes, device_kind: str) -> Tiling:
    """The sizes of the kernels' steps on a TPU, of a call with sizes h, p, n, g, r, s.

    Raises:
        ValueError: a chunk that does not fit the TPU's VMEM.
    """
    chip, needed = chip_of(device_kind), vmem_bytes(shape, dtype, blocks)
    if needed > chip.vmem_bytes:
        shorter = (dataclasses.replace(blocks, chunk=c) for c in range(CHUNK, blocks.chunk, CHUNK))
        fit = [sizes.chunk for sizes in shorter if vmem_bytes(shape, dtype, sizes) <= chip.vmem_bytes]
        raise ValueError(
            f"chunk: got {blocks.chunk}, which needs {needed} bytes of VMEM where {chip.name} has {chip.vmem_bytes}; "
            f"allowed: at most {max(fit, default=0)}"
        )
    return _tiling(shape, blocks, vmem_bytes=chip.vmem_bytes)


def tiling_to_interpret(shape: dict[str, int], blocks: BlockSizes, interpret: pltpu.InterpretParams | bool) -> Tiling:
    """The same on no TPU, with chunks of any length."""
    return _tiling(shape, blocks, interpret=interpret)


def _tiling(shape: dict[str, int], blocks: BlockSizes, **options) -> Tiling:
    h, p, n, g, r, s = (shape[name] for name in "hpngrs")
    return Tiling(blocks.chunk, r, padded_up(n), s, padded_head_dim(h, p, g), blocks.blocks, **options)


def vmem_bytes(shape: dict[str, int], dtype, blocks: BlockSizes) -> int:
    """What the backward kernel needs, at most: its blocks twice, as one is computed while the next is copied, its
    scratch memory, and room for values that do not fit the registers."""
    tiling = _tiling(shape, blocks)
    c, r, n, lanes, width = tiling.c, tiling.r, tiling.n, tiling.lanes, tiling.blocks * tiling.lanes
    h, itemsize = shape["h"], jnp.dtype(dtype).itemsize
    all_blocks = h // tiling.heads
    copied = ((4 + r) * c * width + 4 * r * c * n + width * n) * itemsize
    copied += 4 * (2 * tiling.blocks * tiling.rows * c + 2 * width * n + c * tiling.angle_lanes + c * n)
    copied += 4 * (all_blocks * (tiling.angle_lanes + 4 * lanes + 6 * r * lanes) + h * n + 8 * r * h * n)
    scratch = 4 * (all_blocks * lanes * n + 8 * r * c * n)
    # As measured, 10 such values live in a block (13 with two), 36 in float32, whose products are made in parts; of
    # more than two heads to a block, 5 for each of the others.
    live = (13 if itemsize == 2 else 40) + 5 * max(0, tiling.heads - 2)
    counted = 2 * copied + scratch + live * 4 * c * max(c, lanes) * r * tiling.blocks
    # Few heads need up to a fifth more than that.
    return counted + counted // 4
