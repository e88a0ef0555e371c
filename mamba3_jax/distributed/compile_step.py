"""The training step of a configuration, compiled for the devices of a topology, and what XLA says of it."""

import dataclasses
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from mamba3_jax.data.tokenizer import BYTES
from mamba3_jax.distributed.mesh import AXES, make_mesh
from mamba3_jax.distributed.program import Buffer, Collective, collectives, largest_buffers
from mamba3_jax.distributed.topology import topology_devices
from mamba3_jax.models import LMConfig, abstract_model
from mamba3_jax.models.lm import count_parameters
from mamba3_jax.ops.api import _log_choice
from mamba3_jax.training.config import TrainConfig
from mamba3_jax.training.flops import train_flops
from mamba3_jax.training.state import abstract_batch, abstract_state, check_divides
from mamba3_jax.training.step import StepConfig, compile_train_step
from pallas.tpu.chips import Chip, chip_of

LARGEST = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileConfig(TrainConfig):
    """A training run, and the TPUs that its step is compiled for.

    Attributes:
        topology: one slice: v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB or tpu7x:AxBxC in chips; mesh.slices says how many.
        summary: file that gets the report's numbers as JSON.
    """

    topology: str
    summary: str | None = None


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        arguments: parameters, optimizer and batch.
        outputs, aliased: results, and the part of them that takes the arguments' place.
        temporaries: everything in between.
        code: the program.
        peak: the most that exists at once, by the compiler's schedule.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int

    @property
    def reserved(self) -> int:
        """What the compiler sets aside: a device must have it, also where buffers of it are never used at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step, or what is known of one that does not fit.

    Attributes:
        config: what was compiled.
        model: the model.
        parameters: how many numbers it has.
        mesh: devices along each axis.
        devices: how many devices the mesh takes of all slices.
        chip: what each of them is.
        implementations: the operator's, as it logged them.
        lowering, compiling: seconds on this machine.
        flops: of a step on one device, as training/flops.py counts.
        memory: None if it does not fit.
        refusal: why it does not fit, in XLA's words; else None. Of a device's memory, or of a kernel's own.
        collectives: of a step, by kind; none known if it does not fit.
        buffers: the largest ones.
    """

    config: CompileConfig
    model: LMConfig
    parameters: int
    mesh: dict[str, int]
    devices: int
    chip: Chip
    implementations: list[str]
    lowering: float
    compiling: float
    flops: float
    memory: Memory | None
    refusal: str | None
    collectives: dict[str, Collective]
    buffers: list[Buffer]

    @property
    def fits(self) -> bool:
        return self.refusal is None

    @property
    def exhausts_hbm(self) -> bool:
        """Whether it is a device's memory that is too small, and not that of a kernel."""
        return self.refusal is not None and "hbm" in self.refusal.lower()

    @property
    def tokens(self) -> int:
        """Of a step, on all devices."""
        return self.config.data.batch_size * self.config.data.context

    @property
    def floor(self) -> float:
        """Seconds of a step on devices that reach their peak."""
        return self.flops / self.chip.bf16_flops

    @property
    def summary(self) -> dict:
        """The numbers, as JSON has them."""
        names = ("parameters", "mesh", "devices", "implementations", "lowering", "compiling", "flops", "refusal")
        return dict(
            topology=self.config.topology,
            device_kind=self.chip.device_kinds[0],
            hbm_bytes=self.chip.hbm_bytes,
            batch_size=self.config.data.batch_size,
            context=self.config.data.context,
            floor=self.floor,
            memory=None if self.memory is None else dataclasses.asdict(self.memory),
            collectives={kind: c._asdict() for kind, c in self.collectives.items()},
            buffers=[buffer._asdict() for buffer in self.buffers],
            **{name: getattr(self, name) for name in names},
        )


def compile_step(config: CompileConfig) -> Program:
    """Compiles the step that `mamba3 train` would run on those devices.

    Raises:
        ValueError: no such topology, or a mesh that does not divide its devices, the batch or the model. One line.
        NotImplementedError: an explicit implementation that cannot be on those devices.
    """
    if config.mesh.slices < 1:
        raise ValueError("mesh.slices: got -1; allowed: the number of slices, each of the topology")
    if config.model.vocab_size is None and config.data.path is not None:
        raise ValueError("model.vocab_size: got None; allowed: a number of tokens, because the data are not opened")
    model = config.model.lm(config.model.vocab_size or BYTES)
    mesh = make_mesh(config.mesh, topology_devices(config.topology, config.mesh.slices))
    check_divides(mesh, model, config.data, config.accumulation)
    step = compile_train_step(StepConfig.of(config, model), mesh)
    began = time.perf_counter()
    with _choices() as implementations:
        lowered = step.lower(abstract_state(model, config.optimizer, mesh), abstract_batch(config.data, mesh))
    lowering = time.perf_counter() - began
    memory, refusal, moved = None, None, {}
    with tempfile.TemporaryDirectory() as dump:
        began = time.perf_counter()
        try:
            compiled = lowered.compile(compiler_options=dict(xla_dump_to=dump, xla_dump_hlo_as_text=True))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = " ".join(str(error).split()).partition(" See https:")[0]
        compiling = time.perf_counter() - began
        if refusal is None:
            memory, moved = _memory(compiled), collectives(compiled.as_text())
        buffers = _buffers(Path(dump))
    return Program(
        config=config,
        model=model,
        parameters=count_parameters(abstract_model(model)),
        mesh={axis: mesh.shape[axis] for axis in AXES},
        devices=mesh.size,
        chip=chip_of(mesh.devices.flat[0].device_kind),
        implementations=implementations,
        lowering=lowering,
        compiling=compiling,
        flops=train_flops(model, config.data.context) * config.data.batch_size * config.data.context / mesh.size,
        memory=memory,
        refusal=refusal,
        collectives=moved,
        buffers=buffers,
    )


@contextmanager
def _choices() -> Iterator[list[str]]:
    """What the operator logs of its implementations meanwhile."""
    log, messages = logging.getLogger("mamba3_jax.ops.api"), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    _log_choice.cache_clear()  # else what was logged before is not logged again
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
        log.setLevel(level)


def _memory(compiled: jax.stages.Compiled) -> Memory:
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )


def _buffers(dump: Path) -> list[Buffer]:
    """The largest, if XLA came as far as to place them."""
    for path in dump.glob("*train_step*after_optimizations-buffer-assignment.txt"):
        program = path.with_name(path.name.replace("-buffer-assignment", ""))
        return largest_buffers(path.read_text(), program.read_text(), LARGEST)
    return []
