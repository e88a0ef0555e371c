"""How the kernels cut their work, and what was measured; `mamba3 experiment block_sizes` measures other cuts.

One H100, ms, medians, b=8 t=2048 h=64 p=64 n=128 g=1 and bfloat16 unless said otherwise (official Triton kernels:
forward 0.93, forward + backward 4.02). The kernels alone, without what api.py prepares for them.

    forward, forward + backward, round after round:
    1.06  15.5   one gradient kernel over all heads, dB and dC in registers: spills of 3 kB per thread reach DRAM
    0.86   4.9   values' and projections' gradients apart, one kernel per slab: spills of 0.6 kB per thread
    0.82   4.5   cumulative decays loaded where they are used, not handed between layouts; gradients summed in memory
    0.81   4.3   weights' gradients apart, dq and dk apart; sums over heads back in registers: hardly any spills
    0.78   4.2   serial passes fetch three chunks ahead
    0.74   4.1   of bfloat16 operands one cumulative sum of decays, channels that do not turn biased two at a time,
                 angles not wrapped, silu by tanh: an eighth fewer instructions, a twentieth less time. With what turns
                 receive from later chunks read off the states (by XLA, not in these times) the gradients of dt and
                 omega are off by 0.004 and 0.005 at t=1024, before by up to 0.02 and 0.06

    Of the outputs' 0.51 ms reading and writing alone take 0.26 (a kernel that does nothing else). Left out one at a
    time: turns 0.47, the state's share 0.42, decays 0.45, gate 0.46, the cumulative sum of angles 0.54. So half of it
    is bytes, hardly hidden: two programs share a multiprocessor, and one waits for its loads while the other computes.

    angles summed by tensor cores (a triangle of ones, two bfloat16 halves): outputs 0.53, spills in the gradients
    weights' gradients made by the values' kernel: 1500 instructions fewer, 0.5 kB of spills, 1.64 against 1.34
    all slabs in one kernel of dq and one of dk: 1300 instructions fewer, 1.53 to 1.58 against 1.53
    values' gradients with dx first, dz last: half of the spills, 1.01 against 0.89: what is loaded late is waited for
    registers capped at 168 again (three programs per multiprocessor): outputs 0.51, all others slower by 33 to 80%

    chunk 128, 8 warps, forward: 0.34 + 0.76 (states + outputs) against 0.25 + 0.52 with 64, 4 warps
    chunk 32, 4 warps, forward: 0.38 + 0.68 (states + outputs), because states are written twice as often
    8 warps, chunk 64: 0.43 + 1.07: two warp groups then compute the same product
    outputs in a loop over heads, loads fetched ahead: 0.57 against 0.52: the pointers spill
    values' gradients in such a loop: 2.3 against 0.95; weights' gradients: 0.47 against 0.52
    registers capped at 168 (three programs per multiprocessor): outputs 0.47, all others slower by half and more
    a spill costs more than its traffic: 22 spilled registers doubled the time of the gradients of an unturned slab
    float32, b=2, rows 16 / 32 / 32 with 8 warps: forward 0.93 / 1.06 / 1.21, forward + backward 5.2 / 5.9 / 19.6
    b=1 t=65536, 1 / 4 / 8 segments: forward 4.8 / 3.6 / 3.6, forward + backward 21.4 / 18.1 / 18.2

By the compiler (shared memory of the largest kernel): SISO bfloat16 83 kB, float32 55 kB, so that 99 kB of a consumer
GPU hold them; MIMO r=4 bfloat16 with loads fetched ahead 206 kB, without 35 kB. MIMO r=4, rows 64, forward and
forward + backward: 3.8 and 32.4 with, 3.2 and 21.6 without (official TileLang kernels: 2.0 and 16.9).

Next: neither bandwidth (the gradients of values take twice their bytes' time) nor the schedulers (36% of what they
could issue) bind by themselves: loads and arithmetic of so few programs do not overlap. Triton fetches ahead in loops
only, where the pointers of all tiles spill. Hopper's bulk copies need no such pointers; Mosaic GPU has them. MIMO's
chunks of 16 tokens keep four times SISO's states (1.1 GB): tiles of 128 rows would halve that.
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
        heads: most heads of one program of those passes; what heads share is summed over programs outside.
        turning_slab: most state channels that turn of one program of the projections' gradients.
        programs: serial programs that fill the GPU; below, time is cut into segments.
    """

    rows: int
    num_warps: int
    serial_stages: int
    stages: int
    heads: int
    turning_slab: int
    programs: int


def default_block_sizes(r: int, dtype, compute_capability: str) -> BlockSizes:
    """For rank r, the dtype of x and a GPU such as "9.0" (H100); see the table above."""
    # Four warps are one warp group, whose matrix product takes 64 rows; float32 tiles are twice as wide in registers.
    rows = 64 if jnp.dtype(dtype).itemsize == 2 else 16
    # Where loads are fetched ahead, the gradients of 64 turning channels of B and C spill.
    serial_stages, stages, turning_slab = (3, 2, 32) if r == 1 else (1, 1, 64)
    if float(compute_capability) >= 10:
        # Loads fetched ahead were silently wrong there in the official kernels; not tried on such a GPU by us.
        serial_stages = stages = 1
    return BlockSizes(max(rows, r), 4, serial_stages, stages, 16, turning_slab, programs=256)
