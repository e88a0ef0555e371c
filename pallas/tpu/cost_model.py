"""What a call costs on a TPU, before anything is compiled: bytes over HBM, and work for the matrix and vector units.

    seconds = max(bytes / bandwidth, INFLATION max(matrix, vector, transcendental cycles) / clock)

Bytes are those of the kernels' operands and results. A matrix unit of S x S takes a row per cycle whatever part of it a
product fills, so m x k x n costs m ceil(k/S) ceil(n/S) cycles, six times that in float32. The vector unit's operations
are counted from the kernels (tiles.py, forward.py, backward.py), in registers of 8 x 128 numbers. No unit is ever fully
busy: INFLATION is how many times longer the compiler's own schedule is than the busiest unit needs, read from kernels
compiled by `mamba3 reproduce tpu_compile`. All of it is a prediction; no TPU was at hand.

The same for the chunked form in XLA, whose bytes were counted in its compiled program (CHUNKED_BYTES).
"""

import contextlib
import math
from typing import NamedTuple

from jax.experimental import pallas as pl

from pallas.tpu.chips import CHIPS, LANES, VREG, Chip, chip_of, device_kind, padded_head_dim, padded_up

# What a kernel computes with float32 operands is made of products of bfloat16 parts.
FLOAT32_PASSES = 6
# Bundles that libtpu 0.0.50.1 schedules for one step, over the cycles of the busiest unit as counted here: for v5e 1.9,
# 2.2 and 3.0 for SISO (the vector unit), 1.7, 1.8 and 2.9 for MIMO r=4 (the matrix unit). Of chunked XLA, whose fusions
# do not hide their transfers so well: the cycles that XLA estimates for all of them, over what their bytes would take,
# for v5e 1.9 forward and 1.6 forward and backward.
INFLATION = {"forward": 1.9, "backward": 2.2, "decode": 3.0, "chunked": 1.75}
# Of the chunked form in bfloat16, counted in the HLO that libtpu 0.0.50.1 optimised for v5e at b=8 t=2048 h=64 p=64
# n=128, chunks of 256 tokens (results/tpu_compile): bytes per token, head, rank and number of p + n, forward and
# forward + backward; of ranks by proportion only.
CHUNKED_BYTES = {"forward": 42.5, "forward_backward": 181.8}


class Sizes(NamedTuple):
    """Of a call, by the letters of mamba3_jax/ops/api.py; bytes of a number of x, B, C, z and y."""

    b: int
    t: int
    h: int
    p: int
    n: int
    g: int = 1
    r: int = 1
    s: int = 0
    itemsize: int = 2


class Work(NamedTuple):
    """Bytes over HBM, cycles of one matrix unit, registers through the vector and through the transcendental unit."""

    bytes: float
    mxu: float
    vpu: float
    eup: float


class Prediction(NamedTuple):
    """Seconds of each unit: `units` if it were always busy, `scheduled` as the call takes for it, which INFLATION says.

    The longest of these `binds`, and is the call's `seconds`.
    """

    units: dict[str, float]
    scheduled: dict[str, float]

    @property
    def binds(self) -> str:
        return max(self.scheduled, key=self.scheduled.__getitem__)

    @property
    def seconds(self) -> float:
        return self.scheduled[self.binds]


def predict(work: Work, what: str, sizes: Sizes, chip: Chip) -> Prediction:
    """`what` is a key of INFLATION. A device's cores share the rows of the batch, of a decode step also the blocks of
    eight heads (decode.py); none is cut, so that a core may wait for the other's last."""
    blocks = sizes.h // 8 if what == "decode" and sizes.h // sizes.g % 8 == 0 else 1
    shares = sizes.b * blocks
    cycles = chip.clock * shares / math.ceil(shares / chip.cores)
    units = {
        "HBM": work.bytes / chip.hbm_bandwidth,
        "MXU": work.mxu / (chip.mxus * cycles),
        "VPU": work.vpu / (chip.valus * cycles),
        "EUP": work.eup / (chip.eups * cycles),
    }
    overlaps = what != "chunked"  # a kernel's transfers do
    return Prediction(
        units, {unit: time * (1 if overlaps and unit == "HBM" else INFLATION[what]) for unit, time in units.items()}
    )


def estimate(what: str, sizes: Sizes, **options) -> pl.CostEstimate:
    """For `pallas_call` on the TPU at hand, for XLA to schedule around the kernel; `what` is a function here."""
    chip = CHIPS["v5e"]
    with contextlib.suppress(ValueError):  # there is none when interpreting
        chip = chip_of(device_kind())
    work = {"forward": forward, "backward": backward, "decode": decode}[what](sizes, chip, **options)
    flops = 2 * chip.mxu_size**2 * work.mxu
    return pl.CostEstimate(flops=int(flops), bytes_accessed=int(work.bytes), transcendentals=int(work.eup * VREG))


def forward(sizes: Sizes, chip: Chip, chunk: int, keep: bool = False) -> Work:
    """The forward kernel; `keep` writes the states at each chunk's start, for a backward pass."""
    of = _Blocks(sizes, chip, chunk)
    c, r, n, p, product = of.c, sizes.r, of.n, of.p, of.product
    mxu = r**2 * (product(c, n, c) + product(c, c, of.lanes))  # scores, and times v
    mxu += r * (product(c, n, of.lanes) + product(p, c, n))  # the state is read, and written
    vpu = r * 11 * of.channels + 4 * of.channels  # k and q with bias and rotation; cosines to their channels
    vpu += (12 + 1.5 * r**2) * of.square  # decays and weights; scores weighed
    block = (19 * r + 3) * of.values + 3 * of.state  # skip, gate, selections between heads; the state decays
    work = Work(
        bytes=0,
        mxu=of.heads * mxu + of.turn_products,
        vpu=of.heads * vpu + block + of.turn_operations,
        eup=of.heads * of.square + 2 * r * of.values,
    )
    return of.all(work)._replace(bytes=of.bytes(sequences=3, projections=2, kept=keep))


def backward(sizes: Sizes, chip: Chip, chunk: int) -> Work:
    """The backward kernel, from what `forward` kept."""
    of = _Blocks(sizes, chip, chunk)
    c, r, n, p, product = of.c, sizes.r, of.n, of.p, of.product
    mxu = r**2 * (2 * product(c, n, c) + 4 * product(c, c, of.lanes))  # X, Y; M k, M q, (W Y) v, (W Y) g
    mxu += r * (4 * product(c, of.lanes, n) + product(p, c, n))  # four products with states, one into the adjoint
    mxu += of.parts * product(c, c, n)  # what the turns receive
    vpu = (20 * r + 11 * r + 4 + 12) * of.channels  # k, q and back; sums; what the turns receive
    vpu += (18 + 5 * r**2) * of.square
    block = (45 * r + 12) * of.values + 6 * of.state
    work = Work(
        bytes=0,
        mxu=of.heads * mxu + of.turn_products,
        vpu=of.heads * vpu + block + of.turn_operations,
        eup=of.heads * of.square + 2 * r * of.values,
    )
    return of.all(work)._replace(bytes=of.bytes(sequences=5, projections=4, kept=True, gradients=True))


def decode(sizes: Sizes, chip: Chip, state_itemsize: int = 4) -> Work:
    """The decode kernel, one step: t is not read. Bytes as the arrays lie in memory, with last axes of 128.

    Where n is not a multiple of 128, XLA's copies of the state to that and back come on top.
    """
    b, _, h, p, _, g, r, s, itemsize = sizes
    n, lanes = padded_up(sizes.n), padded_up(p)
    state = b * h * (p * n + r * n + lanes) * state_itemsize + b * h * LANES * 4 * (s > 0)
    token = b * h * (3 * lanes * itemsize + LANES * 4) + 2 * b * r * g * n * itemsize
    weights = h * r * (2 * n + (3 * lanes if r > 1 else 0)) * 4
    registers = p * n / VREG
    # Reads of the state hand it to the matrix unit 8 rows per cycle, in 6 passes; updates of r > 1 are one of p rows.
    mxu = FLOAT32_PASSES * (p / 8 + 8) + (p if r > 1 else 0)
    vpu = registers * (10 if r == 1 else 7) + (54 if r == 1 else 30 * r)
    return Work(2 * state + token + weights, b * h * mxu, b * h * vpu, b * h)


def chunked(sizes: Sizes, what: str, chunk: int) -> Work:
    """The chunked form in XLA, "forward" or "forward_backward": its matrix products, and its bytes as counted."""
    b, t, h, p, n, _, r, _, itemsize = sizes
    rows = chunk * r
    flops = 2 * b * h * t * r * (rows * (n + p) + 2 * n * p)
    passes = {"forward": 1, "forward_backward": 4}[what]  # the backward pass makes the forward pass again
    bytes = CHUNKED_BYTES[what] * b * t * h * r * (p + n) * itemsize / 2
    return Work(bytes, passes * flops / (2 * 128**2), 0, 0)


def train_seconds(sizes: Sizes, chip: Chip, chunk: int) -> float:
    """Of the kernels, forward and backward."""
    passes = dict(forward=forward(sizes, chip, chunk, keep=True), backward=backward(sizes, chip, chunk))
    return sum(predict(work, what, sizes, chip).seconds for what, work in passes.items())


def chunked_seconds(sizes: Sizes, chip: Chip, chunk: int) -> float:
    """Of the chunked form in XLA, forward and backward."""
    return predict(chunked(sizes, "forward_backward", chunk), "chunked", sizes, chip).seconds


class _Blocks:
    """How a call falls into blocks of 128 lanes and chunks: registers of each kind of array, and totals."""

    def __init__(self, sizes: Sizes, chip: Chip, chunk: int):
        self.sizes, self.size, self.c = sizes, chip.mxu_size, chunk
        self.p, self.n = padded_head_dim(sizes.h, sizes.p, sizes.g), padded_up(sizes.n)
        self.lanes = max(self.p, LANES)
        self.heads = self.lanes // self.p
        self.blocks = sizes.h // self.heads
        self.chunks = -(-sizes.t // chunk)
        self.parts = 2 if sizes.itemsize == 2 else 3
        self.angle_lanes = max(self.n, padded_up(self.heads * 2 * sizes.s)) if sizes.s else 0
        self.channels, self.values = chunk * self.n / VREG, chunk * self.lanes / VREG
        self.square, self.state = chunk * chunk / VREG, self.lanes * self.n / VREG

    def product(self, m: int, k: int, n: int) -> int:
        """Cycles of one matrix unit for an m x k x n product in the dtype of x."""
        passes = 1 if self.sizes.itemsize == 2 else FLOAT32_PASSES
        return passes * m * math.ceil(k / self.size) * math.ceil(n / self.size)

    @property
    def turn_products(self) -> int:
        """Cycles for the angles' sums over the tokens of a chunk: parts in bfloat16."""
        return self.parts * self.c * math.ceil(self.c / self.size) * math.ceil(self.angle_lanes / self.size)

    @property
    def turn_operations(self) -> float:
        """Registers for the angles of a block and their cosines."""
        return 28 * self.c * self.angle_lanes / VREG

    def all(self, block: Work) -> Work:
        count = self.sizes.b * self.chunks * self.blocks
        return Work(*(count * amount for amount in block))

    def bytes(self, sequences: int, projections: int, kept: bool, gradients: bool = False) -> int:
        """Of operands and results: arrays like x, like B, and what is float32 (operands.py)."""
        b, _, _, _, _, g, r, s, itemsize = self.sizes
        t, width = self.chunks * self.c, self.blocks * self.lanes
        rows = -(-7 * self.heads // 8) * 8 * self.blocks
        total = sequences * b * t * width * itemsize + projections * b * g * r * t * self.n * itemsize
        small = b * t * (rows + self.angle_lanes) + b * self.chunks * self.blocks * (self.lanes + self.angle_lanes)
        total += 4 * small * (2 if gradients else 1)
        total += 2 * b * width * self.n * 4 + (b * self.chunks * width * self.n * itemsize if kept else 0)
        return total
