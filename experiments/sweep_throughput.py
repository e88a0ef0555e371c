"""What it gains to train many runs at once: a vmapped sweep against a loop of single runs.

    mamba3 experiment sweep_throughput

Both train the same runs, learning rates of one model, on the same devices; a loop takes as long as one run by itself
does, times their number. Times are medians of `repeats` calls of `steps` steps, compilation apart. A results directory
holds summary.json and report.md.
"""

import dataclasses
import itertools
import json
import statistics
import time

import jax

from experiments.command import Command, parse
from experiments.models import ModelConfig
from experiments.state_tracking import LEARNING_RATES
from experiments.sweep import CurriculumConfig, Sweep
from mamba3_jax.command import results_folder
from mamba3_jax.inference.reports import environment
from mamba3_jax.tasks import get_task
from mamba3_jax.training.optimizer import OptimizerConfig

# (task, layers): the cells of table 5b that differ in cost.
CELLS = (("parity", 1), ("modular_arithmetic", 3))


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        d_models: widths.
        lengths: longest training rows.
        learning_rates: one run each.
        batch_size: rows per step of a run.
        steps: steps per call.
        repeats: calls per figure.
    """

    d_models: tuple[int, ...] = (32, 64)
    lengths: tuple[int, ...] = (40, 160)
    learning_rates: tuple[float, ...] = LEARNING_RATES
    batch_size: int = 256
    steps: int = 20
    repeats: int = 5

    def __post_init__(self):
        for name in ("d_models", "lengths", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name}: got []; allowed: at least one")
        for name in ("batch_size", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    command = parse("sweep_throughput", Config, argv)
    folder = results_folder(command.results_dir)
    config = command.config
    summary = dict(command=command.line, **environment(), rows=[])
    with jax.default_matmul_precision("highest"):
        for (task, n_layers), d_model, length in itertools.product(CELLS, config.d_models, config.lengths):
            summary["rows"].append(_measure(config, task, n_layers, d_model, length))
            # Row by row, since each compiles for most of a minute.
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            (folder / "report.md").write_text(render(command, summary))
    print(f"report: {folder / 'report.md'}")
    return 0


def _measure(config: Config, task: str, n_layers: int, d_model: int, length: int) -> dict:
    """Milliseconds of one step of all runs: together, and as a loop of runs."""
    together = _step_ms(config, _sweep(config, task, n_layers, d_model, length, config.learning_rates))
    alone = _step_ms(config, _sweep(config, task, n_layers, d_model, length, config.learning_rates[:1]))
    runs = len(config.learning_rates)
    # Rows of every length up to the longest, so that half of it is the mean.
    tokens = config.batch_size * (get_task(task).min_length + length) / 2
    row = dict(
        task=task, n_layers=n_layers, d_model=d_model, length=length, runs=runs, together_ms=together, alone_ms=alone,
        tokens_per_second_per_run=1e3 * tokens / together, loop_tokens_per_second_per_run=1e3 * tokens / (runs * alone),
        ratio=runs * alone / together,
    )  # fmt: skip
    print(f"{task}, d={d_model}, length {length}: {runs} runs at once {together:.2f} ms per step, one {alone:.2f} ms, "
          f"{row['ratio']:.2f}x the loop", flush=True)  # fmt: skip
    return row


def _sweep(config: Config, task: str, n_layers: int, d_model: int, length: int, rates: tuple[float, ...]) -> Sweep:
    model = ModelConfig(d_model=d_model, n_layers=n_layers, d_state=64, head_dim=64)
    return Sweep(
        task=get_task(task),
        model=model.lm(get_task(task).vocab_size),
        optimizer=OptimizerConfig(),
        curriculum=CurriculumConfig((length,)),
        supervision="final",
        batch_size=config.batch_size,
        max_steps=10_000,
        peaks=rates,
        seeds=(0,) * len(rates),
    )


def _step_ms(config: Config, sweep: Sweep) -> float:
    runs, _ = jax.block_until_ready(sweep.train(sweep.init(), config.steps))
    times = []
    for _ in range(config.repeats):
        began = time.perf_counter()
        runs, _ = jax.block_until_ready(sweep.train(runs, config.steps))
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times) / config.steps


def render(command: Command[Config], summary: dict) -> str:
    """report.md."""
    lines = [
        "# Training many runs at once",
        "",
        f"    {summary['command']}",
        "",
        f"{len(command.config.learning_rates)} learning rates of one model, vmapped, against a loop of them, which",
        f"is one run's time as often; batches of {command.config.batch_size} rows, float32 with full matmul precision,",
        f"on {summary['device']}, jax {summary['versions']['jax']}. Medians of {command.config.repeats} calls of "
        f"{command.config.steps} steps. Tokens are those of the rows, without padding.",
        "",
        "| task | layers | width | longest rows | runs at once, ms per step | one run, ms per step | tokens/s per run, "
        "at once | tokens/s per run, loop | gain |",
        "|" + " --- |" * 9,
    ]
    for row in summary["rows"]:
        cells = (
            row["task"], row["n_layers"], row["d_model"], row["length"], f"{row['together_ms']:.2f}",
            f"{row['alone_ms']:.2f}", f"{row['tokens_per_second_per_run']:,.0f}",
            f"{row['loop_tokens_per_second_per_run']:,.0f}", f"{row['ratio']:.2f}x",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])
