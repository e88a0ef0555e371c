"""`mamba3 bench`: what the operator is predicted to cost on an accelerator that is not at hand.

    mamba3 bench --cost_model tpu --chip v5e --b 8 --t 8192 --h 32

A table of the forward and backward kernels, the decode step and the chunked form in XLA: bytes over HBM, the time of
each unit if it were always busy, the unit that binds, and the predicted time (pallas/tpu/cost_model.py). Times
measured on a GPU are `mamba3 experiment kernel_latency`'s.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from mamba3_jax.command import parse
from mamba3_jax.ops.chunked import default_chunk_size
from pallas.tpu import cost_model, decode
from pallas.tpu.block_sizes import CHUNK, BlockSizes, tiling_of, unfit
from pallas.tpu.chips import chip_of
from pallas.tpu.cost_model import INFLATION, Prediction, Sizes, Work

# What mamba3-siso-tpu reports of itself on a v5e, measured there: milliseconds.
PEER_SIZES = Sizes(b=8, t=8192, h=32, p=64, n=128, g=1, r=1, s=32)
PEER_MS = {"forward": 17.4, "forward + backward": 80.1}


@dataclasses.dataclass(frozen=True)
class Config:
    """Which call, by the letters of the operator.

    Attributes:
        cost_model: the model to ask; there is one, of the TPU kernels.
        chip: v4, v5e, v5p, v6e or tpu7x.
        b, t, h, p, n, g: batch, time, heads, head dim, state dim, groups.
        r: rank, 1 for SISO.
        rope_fraction: 0.5 or 1 of the state's channels turn, 0 none.
        dtype: of x, B, C, z and y.
        state_dtype: of the state of a decode step.
        chunk: tokens of a chunk of the kernels, 0 for the default.
        decode_b: rows of a decode step.
    """

    cost_model: Literal["tpu"] = "tpu"
    chip: str = "v5e"
    b: int = 8
    t: int = 8192
    h: int = 32
    p: int = 64
    n: int = 128
    g: int = 1
    r: int = 1
    rope_fraction: float = 0.5
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    state_dtype: Literal["bfloat16", "float32"] = "float32"
    chunk: int = 0
    decode_b: int = 128

    def __post_init__(self):
        chip_of(self.chip)
        for name in ("b", "t", "h", "p", "n", "g", "r", "decode_b"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        if self.h % self.g:
            raise ValueError(f"g: got {self.g}; allowed: a divisor of h={self.h}")
        if self.rope_fraction not in (0, 0.5, 1):
            raise ValueError(f"rope_fraction: got {self.rope_fraction:g}; allowed: 0, 0.5, 1")
        if self.chunk < 0 or self.chunk % 128:
            raise ValueError(f"chunk: got {self.chunk}; allowed: a multiple of 128, or 0 for the default")
        if self.n % 2:
            raise ValueError(f"n: got {self.n}; allowed: an even size, because channels turn in pairs")
        kind, shape = chip_of(self.chip).device_kinds[0], {name: getattr(self.sizes, name) for name in "hpngrs"}
        if reason := unfit(shape, self.dtype, kind):
            raise ValueError(f"{reason}; allowed: a chip with more, or fewer ranks")
        tiling_of(shape, self.dtype, BlockSizes(self.chunk or CHUNK, 1), kind)

    @property
    def sizes(self) -> Sizes:
        s = int(self.n * self.rope_fraction / 2)
        itemsize = jnp.dtype(self.dtype).itemsize
        return Sizes(self.b, self.t, self.h, self.p, self.n, self.g, self.r, s, itemsize)

    @property
    def step_refusal(self) -> str | None:
        """Why the decode kernel cannot do the step; None where it can."""
        itemsize = jnp.dtype(self.state_dtype).itemsize
        blocks = decode.default_block_sizes(self.decode_b, self.h, self.g, self.p, self.n, itemsize)
        return decode.unfit(blocks.heads, self.p, self.n, itemsize)


def rows(config: Config) -> dict[str, list[tuple[str, Work, Prediction]]]:
    """By name, the calls that a row of the table is the sum of: (key of INFLATION, work, prediction).

    There are none where the decode kernel refuses the step.
    """
    chip, sizes = chip_of(config.chip), config.sizes
    chunk = config.chunk or CHUNK
    step = sizes._replace(b=config.decode_b)
    forms = default_chunk_size("tpu", config.r)

    def of(what: str, work: Work, sizes: Sizes = sizes):
        return what, work, cost_model.predict(work, what, sizes, chip)

    backward = of("backward", cost_model.backward(sizes, chip, chunk))
    return {
        "forward": [of("forward", cost_model.forward(sizes, chip, chunk))],
        "backward": [backward],
        "forward + backward": [of("forward", cost_model.forward(sizes, chip, chunk, keep=True)), backward],
        f"decode step, b={step.b}": []
        if config.step_refusal
        else [of("decode", cost_model.decode(step, chip, jnp.dtype(config.state_dtype).itemsize), step)],
        "chunked XLA, forward": [of("chunked", cost_model.chunked(sizes, "forward", forms))],
        "chunked XLA, forward + backward": [of("chunked", cost_model.chunked(sizes, "forward_backward", forms))],
    }


def table(config: Config) -> str:
    """What the command prints."""
    chip = chip_of(config.chip)
    lines = [
        f"Predictions for one {chip.name} ({chip.hbm_bandwidth / 1e9:.0f} GB/s, {chip.bf16_flops / 1e12:.0f} TFLOP/s, "
        f"{chip.cores} x {chip.clock / 1e9:.2f} GHz, {chip.vmem_bytes / 2**20:.0f} MiB VMEM), not measurements:",
        f"{' '.join(f'{name}={size}' for name, size in config.sizes._asdict().items() if name != 'itemsize')}, "
        f"{config.dtype}, chunk {config.chunk or CHUNK}",
        "",
        f"{'':33}{'HBM MB':>9}{'HBM ms':>9}{'MXU ms':>9}{'VPU ms':>9}{'EUP ms':>9}  {'binds':6}{'predicted ms':>13}",
    ]
    for name, calls in rows(config).items():
        if not calls:
            lines.append(f"{name:33}not by the kernel: {config.step_refusal}")
            continue
        units, scheduled = (
            {unit: 1e3 * sum(getattr(p, kind)[unit] for *_, p in calls) for unit in calls[0][2].units}
            for kind in ("units", "scheduled")
        )
        megabytes = sum(work.bytes for _, work, _ in calls) / 1e6
        binds = max(scheduled, key=scheduled.__getitem__)
        predicted = 1e3 * sum(p.seconds for *_, p in calls)
        cells = "".join(f"{value:9.3f}" for value in units.values())
        line = f"{name:33}{megabytes:9.0f}{cells}  {binds:6}{predicted:13.3f}"
        if name in PEER_MS and (config.chip, config.sizes) == ("v5e", PEER_SIZES):
            times = PEER_MS[name] / predicted
            line += f"   (mamba3-siso-tpu's whole operator: {PEER_MS[name]} ms measured, {times:.1f} times as long)"
        lines.append(line)
    inflation = ", ".join(f"{what} {factor:g}" for what, factor in INFLATION.items())
    return "\n".join([
        *lines,
        "",
        "HBM, MXU, VPU, EUP: each if it were always busy. Predicted: HBM, or the busiest of the others times what the",
        f"compiler's schedule needs over it ({inflation}). The bytes of chunked XLA were counted in its",
        "compiled program, and its factor, on all units, is XLA's own estimate of that program's cycles. The other",
        "rows are of the kernels alone: what XLA prepares for them comes on top, and is not predicted.",
    ])  # fmt: skip


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    print(table(parse("bench", Config, argv)))
    return 0
