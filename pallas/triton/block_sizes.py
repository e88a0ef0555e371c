"""How the kernels cut their work; TUNING.md beside this file has what was measured, with what lost and what comes next.

`mamba3 experiment block_sizes` measures other cuts.

Shared memory of the largest kernel, in kB by the compiler: SISO bfloat16 n=128 p=64 107 of the 232 that an H100 has, 76
of a RTX 4090's 101 and of an A100's 167; of these two, MIMO r=4 takes 41 and SISO float32 n=64 23. Of earlier kernels,
which took 92 where these take 76: with as much fetched ahead a RTX 4090 would need 135 at n=256 and 125 at p=128, an
A100 184 at n=256 p=128; with 2 stages of serial loads and no others n=256 p=128 takes 100.
"""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How the kernels cut their work.

    Attributes:
        rows: rows of a tile, c tokens x r ranks.
        num_warps: warps of every program.
        serial_stages: chunks whose loads are under way at once in the passes from chunk to chunk.
        stages: heads whose loads are under way at once in the passes over chunks.
        heads: most heads of one program of those passes, if there are enough programs; what heads share is summed over
            programs outside.
        turning_slab: most state channels that turn of one program of the projections' gradients.
        programs: programs that fill the GPU: of fewer serial ones time is cut into segments, of fewer others each has
            fewer heads, and the backward pass takes no fewer rows of the batch at once (backward.py's WAVES times as
            many of the others).
    """

    rows: int
    num_warps: int
    serial_stages: int
    stages: int
    heads: int
    turning_slab: int
    programs: int


def default_block_sizes(r: int, p: int, n: int, dtype, compute_capability: str) -> BlockSizes:
    """For rank r, head dim p, state size n, the dtype of x and a GPU such as "9.0" (H100); see TUNING.md."""
    # Gradients of 64 turning channels of B and C spill; where no loads are fetched ahead that costs less than twice 32.
    serial_stages, stages, turning_slab = (3, 2, 32) if r == 1 else (1, 1, 64)
    # Four warps are one warp group, whose matrix product takes 64 rows; float32 tiles are twice as wide in registers.
    # Two warps are faster for states of 64 with heads of 16 and of 64, and taken for the sizes near them.
    rows, num_warps = 64, 4
    if jnp.dtype(dtype).itemsize == 4:
        rows = 16
        if r == 1 and n <= 64:
            num_warps = 2
            rows, stages = (32, stages) if p <= 16 else (16, 1)
    # What is fetched ahead of larger states does not fit the shared memory: 99 kB of a consumer GPU, 163 of an A100.
    consumer = compute_capability in ("8.6", "8.9")
    if r == 1 and n * p > (128 * 64 if consumer else 256 * 64):
        serial_stages, stages = 2, 1
    if float(compute_capability) >= 10:
        # Loads fetched ahead were silently wrong there in the official kernels; not tried on such a GPU by us.
        serial_stages = stages = 1
    return BlockSizes(max(rows, r), num_warps, serial_stages, stages, heads=32, turning_slab=turning_slab, programs=256)
