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
    0.69   3.2   scores of a chunk made once, by the kernel of the gates' gradients, and read by the others as P and
                 M; states of the forward pass kept; dq and dk together, 32 turning channels at a time: no spills
                 (sums of kernels' times by the profiler; the row before, so measured: 0.69 and 3.8)
    0.70   3.4   states made again by the backward pass (0.21), nothing kept of them; one part of the batch after the
                 other. By the compiler at b=8 1 / 2 / 4 parts take 1.80 / 1.40 / 1.32 GB and, timed with XLA's share,
                 3.85 / 4.06 / 4.22 ms (MIMO 5.27 / 3.20 / 2.67 GB and 18.4 / 18.7 / 19.0 ms, before the next row):
                 small kernels and their ends cost time, so parts are no smaller than four waves of programs
    0.59   3.2   the outputs' entry states read first of all, 0.38 instead of 0.48; MIMO's serial kernels load the next
                 chunk by hand, where the compiler fetches nothing ahead: states 1.02 instead of 1.14, at n=64 0.70
                 instead of 1.32. Chunk numbers of the other kernels off the grid, their outputs written into arrays of
                 the whole batch, g where dx will be: 70 launches instead of 121 in four parts, 41 in one

    Of the row before this line XLA made 0.077 of 0.67 ms forward, in 17 launches, and 0.38 of 3.58 forward and backward
    (by the profiler). Since then on one H200, in whole, where the official Triton kernels take 0.890 and 3.70:
    0.647 3.47   coefficients and their gradients by a kernel each, what turns receive from later chunks added by the
                 projections' kernel, slabs that turn in one launch: 30 launches instead of 42, XLA's 0.037 and 0.18
                 (n=64 0.579 and 2.70; MIMO r=4 2.99 and 17.5; b=1 t=65536 3.46 and 15.5)
    0.618 3.28   outputs: the state's share and the gate last, so that three programs fit a multiprocessor. Adjoints
                 after the gradients of the outputs, whose g they read instead of dy and z. dthrough by the kernels of
                 the projections, which have both states, instead of the values', which read 0.27 GB for it
                 (0.527 and 2.59; 2.74 and 16.4, in two parts instead of four, 3.15 GB instead of 2.62; 3.38 and 15.0)
    By kernel, before and after: outputs 0.356, 0.347 (n=64 0.312, 0.282; MIMO 1.93, 1.63), states 0.214, 0.216, twice,
    adjoints 0.231, 0.214 (MIMO 1.09, 0.87), gradients of outputs 0.725, 0.726, of values 0.408, 0.271, of projections
    0.937, 1.004, coefficients and theirs 0.045. What lost on that H200, kernels alone:
    one slab of the state to a program of the serial kernels, three to a multiprocessor: predicted 0.14 for the states,
    0.252 (two chunks ahead 0.292); n=64 no gain, MIMO 1.41 against 0.91: address arithmetic and x are paid for twice
    dthrough and <dS, J h> by the adjoints, where dS is in registers: 0.45 to 0.48 against 0.23, of which XLA and the
    values' kernel give back 0.20
    dcs and dscale read off q.dq and k.dk of the projections (rule 5's algebra): outputs' gradients 0.633 against 0.725
    (MIMO 3.29 against 3.85), the projections' 0.16 (0.49) slower, for k then lies in registers twice
    dthrough by XLA: 0.12 for it, and the projections' 1.13 (nothing but the sum taken out); by the values' again 3.61
    outputs in a loop over 2 or 4 heads without loads ahead, so that B and C come from the first cache: 0.54, 0.56 (255
    registers); their gradients so 0.79, 0.81
    values' gradients and the projections' without loads ahead: 0.35 against 0.27, 1.54 against 1.09
    the outputs' gradients slab by slab: 0.649 against 0.633, n=64 0.599 against 0.655
    decays after the products of the projections instead of on their factors: 150 instructions fewer, no time
    MIMO, turning slabs of 32: the projections 6.8 against 5.6
    So three programs instead of two gain 3% for the outputs, whose DRAM traffic alone (0.67 GB) an H200 moves in 0.16,
    and whose instructions take 0.13: what they wait for is still not known.
    One pass, in which the program of each chunk waits for the one before it (a counter per head, by atomics) and
    updates the state in place, in float32: the same bits in 0.71 to 0.77 against 0.60, at n=64 0.60 against 0.53,
    MIMO 2.9 to 3.2 against 2.85, the counter read first or last, the state written before or after the outputs.

    Of the last round in the table, kernels alone: outputs 0.38 if the chunk's number comes from memory, 0.47 if
    from the grid, the instructions being the same but for that load (n=64: 0.32 and 0.33); not understood. In the
    gradients of the outputs it makes no difference, nor does reading the entries first (n=64: 0.68 against 0.72;
    MIMO 3.78 against 3.71).
    one program of outputs through two chunks, the states written of every other one (a quarter fewer bytes): 0.57 for
    two unrolled, 0.86 to 0.91 in loops that fetch ahead (130 spills); MIMO 2.5 for two, 3.6 to 5.3 for four
    states as (p, n): states 0.24 against 0.22, adjoints twice as long; at n=64 states 0.18 against 0.20, MIMO's 0.62
    against 0.70, adjoints 0.69 against 0.81 (MIMO), 0.23 against 0.20 (SISO); outputs read either order alike
    MIMO's adjoints with z loaded ahead as well: 1.33 against 1.21 (51 spills); SISO's states by hand 0.26 against 0.22
    programs of 32 heads: 0.04 GB less, as fast; of 8: 3% slower; XLA's command buffers: no difference

    Of the outputs' 0.51 ms reading and writing alone take 0.26 (a kernel that does nothing else). Left out one at a
    time: turns 0.47, the state's share 0.42, decays 0.45, gate 0.46, the cumulative sum of angles 0.54. So half of it
    is bytes, hardly hidden: two programs share a multiprocessor, and one waits for its loads while the other computes.

    angles summed by tensor cores (a triangle of ones, two bfloat16 halves): outputs 0.53, spills in the gradients
    weights' gradients made by the values' kernel: 1500 instructions fewer, 0.5 kB of spills, 1.64 against 1.34
    all slabs in one kernel of dq and one of dk: 1300 instructions fewer, 1.53 to 1.58 against 1.53
    values' gradients with dx first, dz last: half of the spills, 1.01 against 0.89: what is loaded late is waited for
    registers capped at 168 again (three programs per multiprocessor): outputs 0.51, all others slower by 33 to 80%

    since P and M, by kernel: outputs 0.48, states 0.21, adjoints 0.23, gradients of outputs 0.81, of values 0.47, of
    projections 0.34 and 0.34 (turning), 0.29; what XLA adds 0.37. Bytes alone would take 1.5 of the gradients' 2.5.
    values' gradients with the gates' (P read once, 17 spills): 0.84 against 0.47 + 0.44 apart; with those of the
    projections that do not turn: 0.97 against 0.47 + 0.29
    gates' gradients apart from the scores: 0.45 + 0.44 and g by the adjoints (+ 0.04) against 0.81
    the same in a loop over heads, loads fetched ahead: 1.08 (8 spills); values' gradients without the loop: 0.47
    dq and dk together of 64 turning channels: 1.01 (100 spills), apart 0.67, together of 32 twice 0.66
    loads of three heads under way: 0.66 instead of 0.67 for dq and dk apart, with dq and dk together spills
    MIMO: rotations made once a token and handed to its ranks, x and z loaded once a token: a tenth fewer instructions
    and more barriers, 4.33 against 3.93 (outputs' gradients), 2.14 against 1.98 (outputs), 2.77 against 2.50 (values')
    MIMO, gradients of projections: turning 3.3 (64 channels, 100 spills), 4.3 (32 twice), dq and dk apart 3.6
    MIMO, before scores and gates were one kernel: tiles of 128 rows by 8 warps 25.6 against 20.1, of 64 rows 32.5

    Of the kernels before P and M:
    chunk 128, 8 warps, forward: 0.34 + 0.76 (states + outputs) against 0.25 + 0.52 with 64, 4 warps
    chunk 32, 4 warps, forward: 0.38 + 0.68 (states + outputs), because states are written twice as often
    8 warps, chunk 64: 0.43 + 1.07: two warp groups then compute the same product
    outputs in a loop over heads, loads fetched ahead: 0.57 against 0.52: the pointers spill
    values' gradients in such a loop: 2.3 against 0.95; weights' gradients: 0.47 against 0.52
    registers capped at 168 (three programs per multiprocessor): outputs 0.47, all others slower by half and more
    a spill costs more than its traffic: 22 spilled registers doubled the time of the gradients of an unturned slab
    float32, b=2, rows 16 / 32 / 32 with 8 warps: forward 0.93 / 1.06 / 1.21, forward + backward 5.2 / 5.9 / 19.6
    float32, n=64, rows of 168 tokens, one step of a sweep (kernels alone), one H200, ms, rows 16 / 32 / 64: 4 runs of 8
    heads of 16 18.5 (13.8) / 17.2 (12.6) / 14.1 (9.5), 64 by 8 warps 24.4, in plain XLA 21.5; 8 runs of 2 heads of 64
    18.4 (11.1) / 18.2 (10.9), with nothing fetched ahead 16.9 (9.6) / 64 by 8 warps 21.6 (14.5), in plain XLA 17.9
    the same steps on one H100: 14.6 (9.9) and 18.5 (10.6; in plain XLA 20.2), of one such run 3.1 (1.5); of 4 runs of 4
    heads of 64, n=64, 64 rows of 512 tokens, two layers 20.0 (9.8), MIMO r=4 62.7 (46.0). The outputs' gradients then
    issue 3500 instructions a warp in the time of 14,000, two programs to a multiprocessor: they wait for one another
    the same by programs of two warps, half as many rows: 8 runs of 2 heads of 64, rows 16, 17.35 (9.2), with two heads'
    loads under way 17.5 (9.3); 4 runs of 8 heads of 16, rows 32, 12.7 (7.8); both kept, though states are written
    twice as often
    b=1 t=65536, 1 / 4 / 8 segments: forward 4.8 / 3.6 / 3.6, forward + backward 21.4 / 18.1 / 18.2

Shared memory of the largest kernel in kB, by the compiler, for an H100 / RTX 4090: SISO bfloat16 n=128 p=64 108 / 92,
float32 n=64 63 / 63 (by four warps, rows of 32), n=128 - / 57; MIMO r=4 - / 41, n=256 - / 66. With loads fetched ahead
as at n=128 p=64 a RTX 4090 would need 135 at n=256, 125 at p=128 and has 101; an A100 would need 184 at n=256 p=128 and
has 167; with 2 stages of serial loads and no others n=256 p=128 takes 100. MIMO r=4, forward and forward + backward
with what XLA adds: 3.1 and 18.3 (before P and M 3.2 and 21.4; with loads fetched ahead 3.8, 32.4).

Next: what the outputs wait for. A profiler's counters would tell (ncu with all its sections does not end in a minute of
such a program: one section, one kernel). The gradients move 0.27 MB a tile of 64 tokens, a third of it states: the sums
over heads of the slabs that turn keep their kernels from being one (registers), and the outputs' gradients run at a
third of what the schedulers could issue, two programs to a multiprocessor. A column sum over a tile, of which the
projections' gradients take two for the biases, is an eighth of their instructions. Hopper's bulk copies need no
registers for what is under way; Mosaic GPU has them. A row of 65536 tokens is not cut: its states, P and M are 3.2 of
7.2 GB; a few heads at a time would take less.

Registers and spills need no GPU: compile for the topology of an H100 with the wheels of jax[cuda12], without
libnvJitLink so that XLA calls ptxas, and ptxas with -v, but for the calls that ask its version. The shared memory of a
kernel is in XLA's refusal where the topology has too little.
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
        programs: programs that fill the GPU: of fewer serial ones time is cut into segments, and the backward pass
            takes no fewer rows of the batch at once (backward.py's WAVES times as many of the others).
    """

    rows: int
    num_warps: int
    serial_stages: int
    stages: int
    heads: int
    turning_slab: int
    programs: int


def default_block_sizes(r: int, p: int, n: int, dtype, compute_capability: str) -> BlockSizes:
    """For rank r, head dim p, state size n, the dtype of x and a GPU such as "9.0" (H100); see the table above."""
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
    return BlockSizes(max(rows, r), num_warps, serial_stages, stages, 16, turning_slab, programs=256)
