"""The tables and figures of this project by name, each with its command and what it costs."""

import concurrent.futures
import dataclasses
import functools
import importlib
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.command import RESULTS
from mamba3_jax.command import fail


@dataclasses.dataclass(frozen=True)
class Result:
    """One table or figure.

    Attributes:
        what: what it shows.
        experiment: the module of experiments/ that makes it.
        options: its command line.
        results: the folder under results/ that holds it.
        cpu, gpu: expected time on two CPU cores and on one H100.
        smoke: options that shrink it until it runs in seconds, with results that mean nothing.
    """

    what: str
    experiment: str
    options: tuple[str, ...]
    results: str
    cpu: str
    gpu: str
    smoke: tuple[str, ...]

    def argv(self, results_dir: Path, smoke: bool) -> list[str]:
        """The command line after `mamba3 experiment NAME`."""
        return [*self.options, *(self.smoke if smoke else ()), f"--results_dir={results_dir}"]


# A single sweep, shrunk as grid.smoke_options shrinks a cell.
SMOKE_SWEEP = (
    *("--curriculum.lengths=[8]", "--learning_rates=[1e-3]", "--batch_size=4", "--max_steps=2", "--interval=1"),
    *("--evaluate_every=2", "--validation_rows=8", "--test_rows=8", "--exact_lengths=[8]", "--uniform_from=null"),
    "--curve_lengths=[16]",
)
SMOKE_LOCAL_ERROR = (
    *("--dts=[0.125,0.0625,0.03125,0.015625]", "--starts=4", "--systems=16", "--train_steps=20", "--seeds=[0]"),
)
PARITY_CPU = ("--config", "configs/state_tracking/parity_cpu.yaml")

RESULTS_BY_NAME: dict[str, Result] = {
    "parity_cpu": Result(
        "parity of 255 bits, trained on a laptop's CPU",
        "state_tracking", PARITY_CPU, "parity_cpu", "4 min", "2 min", SMOKE_SWEEP,
    ),
    "parity_cpu_seed_1": Result(
        "the same with another seed",
        "state_tracking", (*PARITY_CPU, "--seed", "1"), "parity_cpu,seed=1", "4 min", "2 min", SMOKE_SWEEP,
    ),
    "parity_cpu_seed_2": Result(
        "the same with a third seed",
        "state_tracking", (*PARITY_CPU, "--seed", "2"), "parity_cpu,seed=2", "4 min", "2 min", SMOKE_SWEEP,
    ),
    "parity_cpu_no_rotation": Result(
        "the same without rotations: no parity",
        "state_tracking", (*PARITY_CPU, "--model.rotation", "none"), "parity_cpu,model.rotation=none", "3 min", "2 min",
        SMOKE_SWEEP,
    ),
    "table_5b": Result(
        "table 5b: five models on parity and modular arithmetic",
        "table_5b", ("--config", "configs/state_tracking/table_5b.yaml"), "table_5b", "days", "8 h", ("--smoke",),
    ),
    "local_error": Result(
        "order of the local error of Euler, the trapezoid, and a learned lambda",
        "local_error", (), "local_error", "1 min", "1 min", SMOKE_LOCAL_ERROR,
    ),
    "discretization": Result(
        "tables 5a, 8 and 10: Euler against trapezoid, biases and convolution, on tasks and on a language model",
        "discretization", ("--config", "configs/discretization.yaml"), "discretization", "days", "1 h", ("--smoke",),
    ),
    "retrieval": Result(
        "MQAR, selective copying, induction heads, needles and word problems, five models and two variants",
        "retrieval", ("--config", "configs/retrieval.yaml"), "retrieval", "days", "5 h",
        ("--smoke", "--rows=8", "--needle_depths=[0.0,1.0]"),
    ),
    "chunked_latency": Result(
        "time and memory of the chunked form",
        "chunked_latency", (), "chunked_latency", "2 min", "1 min",
        ("--b=1", "--t=64", "--h=1", "--p=8", "--n=8", "--lengths=[64]", "--repeats=1"),
    ),
    "kernel_latency": Result(
        "time, bandwidth, memory and accuracy of the operator's implementations beside Mamba-2 and attention",
        "kernel_latency", (), "kernel_latency", "not for CPUs", "8 min", ("--smoke",),
    ),
    "block_sizes": Result(
        "the GPU kernels with other block sizes than the defaults",
        "block_sizes", (), "block_sizes", "not for CPUs", "10 min", ("--smoke",),
    ),
    "tpu_compile": Result(
        "TPU kernels compiled for five generations without a TPU: VMEM, bytes beside others, predicted times",
        "tpu_compile", (), "tpu_compile", "30 min", "not for GPUs", ("--smoke",),
    ),
    "generation_latency": Result(
        "reading and writing text with the 1.5B models: decode against the bytes it moves, prefill, table 7",
        "generation_latency", (), "generation_latency", "not for CPUs", "10 min", ("--smoke",),
    ),
    "training_throughput": Result(
        "training whole 1.5B models: tokens/s, MFU, memory, rows up to 65,536 tokens, losses in bfloat16 kernels",
        "training_throughput", (), "training_throughput", "not for CPUs", "7 min", ("--smoke",),
    ),
    "data_throughput": Result(
        "the data pipeline's tokens/s against the training rate",
        "data_throughput", (), "data_throughput", "1 min", "1 min",
        ("--tokens=20000", "--context=64", "--batch_size=2", "--workers=[0]", "--batches=4", "--training_steps=0"),
    ),
    "conversion": Result(
        "time and memory of converting a released 1.5B checkpoint, there and back",
        "conversion", (), "conversion", "6 min", "6 min", ("--smoke", "--forms=[torch]"),
    ),
    "pod_compile": Result(
        "the 1.5B models' training step compiled for TPU pods: memory per chip, compile time, collectives",
        "pod_compile", (), "pod_compile", "hours", "hours", ("--smoke",),
    ),
    "sweep_throughput": Result(
        "training many runs at once against a loop of single runs",
        "sweep_throughput", (), "sweep_throughput", "10 min", "6 min",
        (
            *("--d_models=[32]", "--lengths=[8]", "--learning_rates=[1e-3,2e-3]"),
            *("--batch_size=4", "--steps=1", "--repeats=1"),
        ),
    ),
}  # fmt: skip

# Those of many cells, which can run side by side.
GRIDS = ("table_5b", "discretization", "retrieval")
USAGE = (
    "usage: mamba3 reproduce NAME [--smoke] [--processes=N], mamba3 reproduce --smoke (all of them), "
    "or mamba3 reproduce --list"
)


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    if argv == ["--list"]:
        print(table())
        return 0
    names = [word for word in argv if not word.startswith("-")] or list(RESULTS_BY_NAME)
    smoke = "--smoke" in argv
    processes = [word for word in argv if word.startswith("--processes=")]
    if unknown := [word for word in argv if word.startswith("-") and word not in ("--smoke", *processes)]:
        fail(f"reproduce: got {unknown[0]}; allowed: --smoke, --processes=N, or --list alone")
    if (not smoke and len(names) != 1) or not argv:
        fail(USAGE)
    for name in names:
        if name not in RESULTS_BY_NAME:
            fail(f"reproduce: got {name!r}; allowed: {', '.join(RESULTS_BY_NAME)}")
    if processes and (smoke or RESULTS_BY_NAME[names[0]].experiment not in GRIDS):
        fail(f"reproduce: got {processes[0]}; allowed: with one of {', '.join(GRIDS)}, and without --smoke")
    if not smoke:
        result = RESULTS_BY_NAME[names[0]]
        return _run(result, RESULTS / result.results, smoke, processes)
    # Nothing is to be learned, so that XLA's own effort is most of the time.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
    # Two at a time, because tracing and compiling keep hardly more than one core busy.
    pool = concurrent.futures.ProcessPoolExecutor(min(2, len(names)), multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as scratch, pool:
        for name, (status, seconds) in zip(names, pool.map(functools.partial(_smoke, Path(scratch)), names)):
            if status:
                pool.shutdown(cancel_futures=True)
                return status
            print(f"smoke: {name} ran end to end in {seconds:.0f} s", flush=True)
    return 0


def table() -> str:
    """Names, expected times and commands."""
    width = max(map(len, RESULTS_BY_NAME))
    lines = []
    for name, result in RESULTS_BY_NAME.items():
        command = shlex.join(["mamba3", "experiment", result.experiment, *result.options])
        lines.append(f"{name:{width}s}  {result.what}")
        lines.append(f"{'':{width}s}  2 CPU cores: {result.cpu}, one H100: {result.gpu}; {command}")
    return "\n".join(lines)


def _smoke(scratch: Path, name: str) -> tuple[int, float]:
    """The exit status of a result in smoke form, and its seconds."""
    began = time.perf_counter()
    return _run(RESULTS_BY_NAME[name], scratch / name, smoke=True), time.perf_counter() - began


def _run(result: Result, results_dir: Path, smoke: bool, further: Sequence[str] = ()) -> int:
    module = importlib.import_module(f"experiments.{result.experiment}")
    return module.main([*result.argv(results_dir, smoke), *further])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
