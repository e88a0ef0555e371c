"""How many tokens per second the data pipeline gives, against what training takes.

    mamba3 experiment data_throughput [--training_rates '[33000]']

Documents of random ids and of the lengths of web pages (log-normal, median 600 tokens, mean 1000) are written to token
shards, and read as `mamba3 train` reads them: packed, shuffled, checked, in batches, with 0, 1 and 2 workers. The
training rate beside it is that of `mamba3 train` on this machine with the configuration `training`, and those that are
given. A figure is of the batches after the first ones, which do not count, from the files (in the page cache, checked
when they were opened, as up to 1 GiB) to arrays in this process. A results directory holds summary.json and report.md.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from experiments import measured
from experiments.command import parse
from experiments.training_programs import WARM, Plan, compiled, start, steps
from mamba3_jax.command import parse as parse_options
from mamba3_jax.command import results_folder
from mamba3_jax.data.corpus import TRAIN
from mamba3_jax.data.pipeline import Data, DataConfig, batches, open_data
from mamba3_jax.data.shards import Manifest, ShardWriter, write_manifest
from mamba3_jax.training.config import TrainConfig
from mamba3_jax.training.step import StepConfig

# Lengths of documents: logarithms' mean and standard deviation.
MEDIAN, SPREAD = 600, 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        tokens: of the shards.
        vocab_size: of their ids; Llama 3's are 4 bytes each on disk.
        context, batch_size: of the batches.
        workers: processes that read ahead, one figure each.
        batches: that are timed.
        training: the configuration whose training is timed.
        training_steps: that are timed; 0 leaves it out.
        training_rates: tokens/s of other trainings, to compare with.
    """

    tokens: int = 20_000_000
    vocab_size: int = 128256
    context: int = 2048
    batch_size: int = 16
    workers: tuple[int, ...] = (0, 1, 2)
    batches: int = 300
    training: str = "configs/lm/tiny_cpu.yaml"
    training_steps: int = 20
    training_rates: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("tokens", "vocab_size", "context", "batch_size", "batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        if self.training_steps < 0:
            raise ValueError(f"training_steps: got {self.training_steps}; allowed: 0 or more")
        if not self.workers or min(self.workers) < 0:
            raise ValueError(f"workers: got {list(self.workers)}; allowed: at least one number, 0 or more")


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    command = parse("data_throughput", Config, argv)
    config, folder = command.config, results_folder(command.results_dir)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        write_shards(Path(scratch), config)
        for workers in config.workers:
            data = open_data(DataConfig(scratch, config.context, config.batch_size, workers))
            rows.append(dict(workers=workers, load=os.getloadavg()[0], **read(data, config.batches)))
            print(f"{workers} workers: {rows[-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    rates = {f"given: {rate:,.0f} tokens/s": rate for rate in config.training_rates}
    if config.training_steps:
        device = jax.devices()[0].device_kind
        rates |= {f"{config.training} on this {device}": training_rate(config)}
    summary = dict(command=command.line, cores=cores, config=dataclasses.asdict(config), rows=rows, training=rates)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "report.md").write_text(render(summary))
    print(f"report: {folder / 'report.md'}")
    return 0


def write_shards(folder: Path, config: Config) -> None:
    """Documents of random ids, in one split."""
    random = np.random.default_rng(0)
    manifest = Manifest(config.vocab_size, "bytes", None, None, {})
    writer = ShardWriter(folder, TRAIN, manifest)
    left = config.tokens
    while left > 0:
        length = min(left, 1 + int(random.lognormal(np.log(MEDIAN), SPREAD)))
        writer.add(random.integers(0, config.vocab_size, length, np.int32), "a document")
        left -= length
    writer.close()
    write_manifest(folder, dataclasses.replace(manifest, splits={TRAIN: writer.entries}))


def read(data: Data, count: int) -> dict[str, float]:
    """Tokens per second of `count` batches, and of this process' CPU time; padding is none."""
    with contextlib.closing(batches(data, TRAIN, seed=0)) as stream:
        # The workers start, and read ahead, with the first ones.
        for _ in range(max(4, count // 10)):
            next(stream)
        wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
        for batch in itertools.islice(stream, count):
            tokens += int(batch.mask.sum())
        return dict(
            tokens_per_second=tokens / (time.perf_counter() - wall),
            tokens_per_cpu_second=tokens / (time.process_time() - cpu),
        )


def training_rate(config: Config) -> float:
    """Tokens per second of training steps, the first ones not counted."""
    training = parse_options("train", TrainConfig, [f"--config={measured.ROOT / config.training}"])
    data = open_data(training.data)
    b, t = training.data.batch_size, training.data.context
    step = StepConfig(training.model.lm(data.vocab_size), training.optimizer, training.steps)
    prepared = compiled(step, Plan(b, step.remat), b, t)
    with contextlib.closing(batches(data, TRAIN, seed=training.seed)) as stream:
        taken = itertools.islice(steps(prepared, start(step, 0), stream), WARM + config.training_steps)
        ends = [time.perf_counter() for _ in taken]
    return b * t * config.training_steps / (ends[-1] - ends[WARM - 1])


def render(summary: dict) -> str:
    """report.md."""
    config = summary["config"]
    lines = [
        "# The data pipeline",
        "",
        f"    {summary['command']}",
        "",
        f"{config['tokens']:,} tokens of random documents (median {MEDIAN}) in shards on disk, packed; a figure is of",
        f"{config['batches']} batches of {config['batch_size']} x {config['context']}. {summary['cores']} cores; the",
        "load is the machine's when a figure was begun: processes that run or wait, the mean of a minute.",
        "",
        "| workers | tokens/s | load |",
        "| --- | --- | --- |",
    ]
    for row in summary["rows"]:
        lines.append(f"| {row['workers']} | {row['tokens_per_second']:,.0f} | {row['load']:.1f} |")
    for row in summary["rows"]:
        if row["workers"] == 0:
            lines += ["", f"Without workers, {row['tokens_per_cpu_second']:,.0f} tokens per second of CPU time."]
    slowest = min(row["tokens_per_second"] for row in summary["rows"])
    lines += ["", "| training | tokens/s | the slowest row above, times that |", "| --- | --- | --- |"]
    for name, rate in summary["training"].items():
        lines.append(f"| {name} | {rate:,.0f} | {slowest / rate:,.0f} |")
    return "\n".join([*lines, ""])
