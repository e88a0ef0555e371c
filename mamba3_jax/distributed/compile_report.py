"""The report of a compiled step in words, and what to change where it does not fit."""

import math
from collections.abc import Iterator

from mamba3_jax.distributed.compile_step import CompileConfig, Program

# Parameters, gradient and AdamW's two moments, float32.
BYTES_PER_PARAMETER = 16
# Logits of one chunk that are not worth a smaller chunk, as a part of a device's memory.
SMALL = 1 / 32


def render(program: Program) -> str:
    """The report."""
    config, chip = program.config, program.chip
    mesh = " x ".join(f"{axis}={size}" for axis, size in program.mesh.items() if size > 1) or "one device"
    pod = config.topology if config.mesh.slices == 1 else f"{config.mesh.slices} slices of {config.topology}"
    lines = [
        f"model        {program.parameters:,} parameters, {program.model.n_layers} layers, {program.model.dtype}",
        f"step         {program.tokens:,} tokens: {config.data.batch_size} rows of {config.data.context}; "
        f"remat {config.remat}, accumulation {config.accumulation}",
        f"on           {pod}: {program.devices} x {chip.device_kinds[0]}, mesh {mesh}",
        *(f"operator     {choice}" for choice in program.implementations),
        f"compiled     in {program.lowering + program.compiling:.0f} s, {program.lowering:.0f} s of them for tracing",
        f"arithmetic   {program.flops / 1e12:.4g} TFLOP per device and step: at least {_time(program.floor)} "
        f"at {chip.bf16_flops / 1e12:.4g} TFLOP/s, {program.tokens / program.floor:,.0f} tokens/s in all",
        "memory       of each device:",
    ]
    if program.refusal is not None and not program.exhausts_hbm:
        lines.append(f"  a kernel needs more of its own (vmem, smem) than there is: {program.refusal}")
    elif (memory := program.memory) is None:
        lines.append(f"  does not fit into {_size(chip.hbm_bytes)}: {program.refusal}")
    else:
        lines += [
            f"  {_size(memory.arguments):>10s}  arguments: parameters, optimizer and batch",
            f"  {_size(memory.outputs):>10s}  outputs, of which {_size(memory.aliased)} take the arguments' place",
            f"  {_size(memory.temporaries):>10s}  temporaries",
            f"  {_size(memory.code):>10s}  program",
            *(
                f"  {_size(size):>10s}  {name}: {100 * size / chip.hbm_bytes:.0f}% of {_size(chip.hbm_bytes)}"
                for name, size in (("reserved, the sum", memory.reserved), ("peak, live at once", memory.peak))
            ),
        ]
    lines.append("largest      buffers of each device; not all of them exist at once:")
    for buffer in program.buffers:
        count = f" x {buffer.count}" if buffer.count > 1 else ""
        lines.append(f"  {_size(buffer.bytes):>10s}  {buffer.array}{count}  {buffer.source}")
    if program.fits:
        lines.append("collectives  of each device and step, those in loops as often as the loop runs:")
        for kind, c in program.collectives.items():
            lines.append(f"  {_size(c.bytes):>10s}  {c.count:,} x {kind}")
    return "\n".join(lines)


def advice(config: CompileConfig, program: Program) -> Iterator[str]:
    """Options that make a step smaller, the most useful first, each with what it would do."""
    mesh, hbm = program.mesh, program.chip.hbm_bytes
    copies = mesh["slice"] * mesh["data"]
    rows = config.data.batch_size // config.accumulation // (copies * mesh["fsdp"])
    state = BYTES_PER_PARAMETER * program.parameters / (mesh["fsdp"] * mesh["tensor"])
    logits = 4 * rows * min(config.loss_chunk, config.data.context) / mesh["sequence"]
    logits *= program.model.padded_vocab_size / mesh["tensor"]
    if state > hbm / 4 and mesh["data"] > 1:
        yield (
            f"--mesh.data 1 --mesh.fsdp {mesh['data'] * mesh['fsdp']}: {_size(state)} of parameters, gradient and "
            f"optimizer become {_size(state / mesh['data'])}"
        )
    if config.remat == "none":
        yield "--remat blocks: a block keeps its input alone, and is computed again in the backward pass"
    if rows > 1:
        more = config.accumulation * rows
        yield f"--accumulation {more}: one row on a device at once instead of {rows}, for the same update"
    if logits > SMALL * hbm and config.loss_chunk > 64:
        chunk = max(64, 2 ** math.floor(math.log2(config.loss_chunk * SMALL * hbm / logits)))
        yield f"--loss_chunk {chunk}: {_size(logits)} of logits become {_size(logits * chunk / config.loss_chunk)}"
    if rows == 1 and mesh["fsdp"] % 2 == 0:
        yield (
            f"--mesh.fsdp {mesh['fsdp'] // 2} --mesh.sequence {2 * mesh['sequence']} "
            f"--accumulation {2 * config.accumulation}: two devices share a row"
        )
    if state > hbm / 4:
        yield f"more chips than {config.topology}: {_size(state)} of parameters, gradient and optimizer are cut further"
    yield f"a smaller batch than {config.data.batch_size} rows, or shorter rows than {config.data.context} tokens"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _size(size: int | float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"
