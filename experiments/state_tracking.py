"""State tracking: can a model keep a running state far beyond its training length? Table 5b of arXiv:2603.15569.

    mamba3 experiment state_tracking --config configs/state_tracking/parity_cpu.yaml

Trains all learning rates and seeds of a config at once through a curriculum of growing lengths, keeps each run's best
parameters by validation accuracy, and tests the best run on rows it has never seen. A results directory holds
config.yaml, metrics.jsonl, checkpoints/ (resume), summary.json, accuracy.png and report.md.
"""

import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from experiments import report
from experiments.command import Command, fail, flatten, parse, to_dict
from experiments.progress import progress
from experiments.sweep import CurriculumConfig, Runs, Sweep
from mamba3_jax.checks import check_choice
from mamba3_jax.layers import Mamba3Config
from mamba3_jax.models import LMConfig
from mamba3_jax.tasks import TASKS, Batch, Task, get_task, scaled_accuracy
from mamba3_jax.training.optimizer import OptimizerConfig
from mamba3_jax.training.run_directory import RunDirectory

# What a shell expects of a command that Ctrl-C ended.
INTERRUPTED = 130
# Rows of one forward pass during evaluation; bounds memory, not the result.
EVALUATION_ROWS = 1024
# Streams of random rows that never meet the training data, which is keyed by (seed, step).
VALIDATION_KEY, TEST_KEY, CURVE_KEY = 10_001, 10_002, 10_003


@dataclasses.dataclass(frozen=True)
class ModelConfig(Mamba3Config):
    """A Mamba-3 mixer, repeated `n_layers` times without MLP."""

    n_layers: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.n_layers < 1:
            raise ValueError(f"n_layers: got {self.n_layers}; allowed: a positive integer")
        check_choice("implementation", self.implementation, ("recurrent", "chunked", None))


@dataclasses.dataclass(frozen=True)
class Config:
    """One sweep.

    Attributes:
        model: the model.
        task: which task; see mamba3_jax/tasks.
        supervision: "final" supervises the answer only (the paper's protocol), "every" each position's running answer.
        curriculum: the growing training lengths.
        optimizer: AdamW and its schedule.
        learning_rates: peak rates, one run each.
        seed: first seed; data, initialisation and everything random follow from it.
        n_seeds: consecutive seeds, one run each for every learning rate.
        batch_size: rows per step.
        max_steps: steps at most, and the length of the cosine schedule.
        interval: steps between two lines of metrics, and between two looks at the curriculum's gates.
        evaluate_every: steps between two validations, and between two checkpoints; a multiple of `interval`.
        validation_rows: rows of the fixed validation set at each length.
        test_rows: rows of the disjoint test set at each length.
        exact_lengths: lengths of validation and test; the last is the headline, by which runs are selected.
        uniform_from: the mixed set draws lengths from here to the last of `exact_lengths`.
        curve_lengths: further lengths of the figure, with `validation_rows` rows each.
        stop_accuracy: scaled validation accuracy of the best run that ends training early; above 1 is never.
    """

    model: ModelConfig
    task: str = "parity"
    supervision: Literal["final", "every"] = "final"
    curriculum: CurriculumConfig = CurriculumConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learning_rates: tuple[float, ...] = (1e-3,)
    seed: int = 0
    n_seeds: int = 1
    batch_size: int = 256
    max_steps: int = 40_000
    interval: int = 50
    evaluate_every: int = 500
    validation_rows: int = 1024
    test_rows: int = 16384
    exact_lengths: tuple[int, ...] = (40, 160, 256)
    uniform_from: int = 40
    curve_lengths: tuple[int, ...] = (20, 80, 120, 200, 320, 384, 448, 512)
    stop_accuracy: float = 1.1

    def __post_init__(self):
        check_choice("task", self.task, tuple(TASKS))
        check_choice("supervision", self.supervision, ("final", "every"))
        task = get_task(self.task)
        if self.supervision == "every" and not task.every:
            raise ValueError(f"supervision: got 'every' with task {self.task!r}; allowed: 'final'")
        for name in ("n_seeds", "batch_size", "max_steps", "interval", "validation_rows", "test_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        if self.evaluate_every < 1 or self.evaluate_every % self.interval:
            raise ValueError(
                f"evaluate_every: got {self.evaluate_every}; allowed: a multiple of interval={self.interval}"
            )
        if self.max_steps % self.evaluate_every:
            raise ValueError(
                f"max_steps: got {self.max_steps}; allowed: a multiple of evaluate_every={self.evaluate_every}"
            )
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates: got {list(self.learning_rates)}; allowed: positive rates, at least one")
        for name in ("exact_lengths", "curve_lengths"):
            lengths = getattr(self, name)
            if not lengths or min(lengths) < task.min_length:
                raise ValueError(f"{name}: got {list(lengths)}; allowed: lengths >= {task.min_length}, at least one")
        if not task.min_length <= self.uniform_from <= self.exact_lengths[-1]:
            raise ValueError(
                f"uniform_from: got {self.uniform_from}; allowed: {task.min_length} to {self.exact_lengths[-1]}"
            )
        if self.curriculum.lengths[0] < task.min_length:
            raise ValueError(f"curriculum.lengths: got {list(self.curriculum.lengths)}; allowed: >= {task.min_length}")

    @property
    def headline(self) -> str:
        """The set by which runs are selected: exactly the last length."""
        return str(self.exact_lengths[-1])

    @property
    def pairs(self) -> list[tuple[float, int]]:
        """(learning rate, seed) of every run."""
        return [(rate, self.seed + i) for i in range(self.n_seeds) for rate in self.learning_rates]

    def sweep(self) -> Sweep:
        model = LMConfig(mixer=self.model, n_layers=self.model.n_layers, vocab_size=get_task(self.task).vocab_size)
        rates, seeds = zip(*self.pairs)
        return Sweep(
            task=get_task(self.task),
            model=model,
            optimizer=self.optimizer,
            curriculum=self.curriculum,
            supervision=self.supervision,
            batch_size=self.batch_size,
            max_steps=self.max_steps,
            peaks=rates,
            seeds=seeds,
        )


def protocol(task: str) -> Config:
    """The paper's settings (appendix D); where it is silent, this project's defaults."""
    return Config(
        model=ModelConfig(d_model=64, n_layers=1 if task == "parity" else 3, d_state=64, head_dim=64),
        task=task,
        learning_rates=(1e-4, 1.9e-4, 3.7e-4, 7.2e-4, 1.4e-3, 2.7e-3, 5.2e-3, 1e-2),
    )


# What the protocol leaves open: how a run is watched and seeded, not how it is trained.
FREE = (
    *("seed", "n_seeds", "interval", "evaluate_every", "validation_rows", "test_rows"),
    *("exact_lengths", "uniform_from", "curve_lengths", "model.implementation", "model.chunk_size"),
)
# The paper trains both widths.
ALSO_ALLOWED = {"model.d_model": (32,)}


def deviations(config: Config) -> list[str]:
    """Every setting that differs from the protocol, one line each."""
    ours, papers = flatten(to_dict(config)), flatten(to_dict(protocol(config.task)))
    return [
        f"`{key}` is {value}; the protocol has {papers[key]}"
        for key, value in ours.items()
        if key not in FREE and value != papers[key] and value not in ALSO_ALLOWED.get(key, ())
    ]


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    command = parse("state_tracking", Config, argv)
    _use_all_cores()
    try:
        directory = RunDirectory(command.results_dir, command.text)
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        fail(f"results_dir: got {command.results_dir} ({error.strerror}); allowed: a folder that can be written")
    try:
        with jax.default_matmul_precision("highest"):
            return run(command, directory)
    except KeyboardInterrupt:
        print(f"stopped at once; the same command resumes {directory.path} from its last checkpoint")
        return INTERRUPTED


def run(command: Command[Config], directory: RunDirectory) -> int:
    """Trains until done or interrupted, then reports; resumes whatever the directory holds."""
    config, sweep = command.config, command.config.sweep()
    training = _Training.start(config, sweep, directory)
    validation = _sets(config, VALIDATION_KEY, config.validation_rows)
    with _interrupts() as stop, progress(config.max_steps, training.step) as show:
        while not training.done(config):
            if stop:
                training.save(directory)
                directory.close()
                print(f"interrupted at step {training.step}; the same command resumes from {directory.path}")
                return INTERRUPTED
            began = time.perf_counter()
            training.advance(config, sweep, validation, directory)
            training.seconds += time.perf_counter() - began
            show(training.step, training.status(config))
            if training.step % config.evaluate_every == 0:
                training.save(directory)
    directory.close()
    _report(command, sweep, training, directory)
    return 0


@dataclasses.dataclass
class _Training:
    """A sweep in progress: the runs, and each run's best parameters with the validation they scored."""

    runs: Runs
    best: nnx.State
    best_validation: list[dict[str, float]]
    best_step: list[int]
    seconds: float
    last: dict

    @classmethod
    def start(cls, config: Config, sweep: Sweep, directory: RunDirectory) -> "_Training":
        runs = sweep.init()
        fresh = cls(runs, runs.parameters, [{} for _ in config.pairs], [0] * len(config.pairs), 0.0, {})
        restored = directory.restore(dict(runs=runs, best=fresh.best))
        if restored is None:
            return fresh
        arrays, extra = restored
        return cls(arrays["runs"], arrays["best"], **extra)

    @property
    def step(self) -> int:
        return int(self.runs.step[0])

    def save(self, directory: RunDirectory) -> None:
        names = ("best_validation", "best_step", "seconds", "last")
        extra = {name: getattr(self, name) for name in names}
        directory.save(self.step, dict(runs=self.runs, best=self.best), extra)

    def done(self, config: Config) -> bool:
        return self.step >= config.max_steps or self.headline(config) >= config.stop_accuracy

    def headline(self, config: Config) -> float:
        """Best scaled validation accuracy so far, of any run."""
        chance = get_task(config.task).chance
        return max(scaled_accuracy(v.get(config.headline, 0.0), chance) for v in self.best_validation)

    def advance(
        self, config: Config, sweep: Sweep, validation: dict[str, list[Batch]], directory: RunDirectory
    ) -> None:
        """One interval of training, and a validation when it is due; one line of metrics."""
        stages = self.runs.stage.tolist()
        self.runs, metrics = sweep.train(self.runs, config.interval)
        self.last = dict(
            step=self.step,
            max_length=[config.curriculum.lengths[stage] for stage in stages],
            learning_rate=sweep.learning_rates(self.step - 1).tolist(),
            loss=metrics.loss.tolist(),
            accuracy=metrics.accuracy.tolist(),
        )
        if self.step % config.evaluate_every == 0:
            self.last |= dict(validation=self._validate(config, sweep, validation))
        directory.log(self.last)

    def _validate(self, config: Config, sweep: Sweep, validation: dict[str, list[Batch]]) -> dict[str, list[float]]:
        scores = {name: _accuracy(sweep, self.runs.parameters, sets).tolist() for name, sets in validation.items()}
        better = []
        for i in range(len(config.pairs)):
            mine = {name: accuracies[i] for name, accuracies in scores.items()}
            better.append(mine[config.headline] > self.best_validation[i].get(config.headline, -1.0))
            if better[i]:
                self.best_validation[i], self.best_step[i] = mine, self.step
        keep = jnp.asarray(better)

        def newer(new, old):
            return jnp.where(keep.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        self.best = jax.tree.map(newer, self.runs.parameters, self.best)
        return scores

    def status(self, config: Config) -> dict[str, str]:
        """What the progress bar shows, of the run that is furthest ahead."""
        leader = int(np.lexsort((self.last["accuracy"], self.last["max_length"]))[-1])
        longest = self.last["max_length"][leader]
        shown = dict(
            loss=f"{self.last['loss'][leader]:.3f}",
            accuracy=f"{100 * self.last['accuracy'][leader]:.1f}%",
            stage=f"{config.curriculum.lengths.index(longest) + 1}/{len(config.curriculum.lengths)} (length {longest})",
        )
        if any(self.best_validation):
            shown[f"best@{config.headline}"] = f"{100 * self.headline(config):.1f}"
        return shown


def _use_all_cores() -> None:
    """On a CPU, one device per core: XLA hardly threads steps as small as these, but runs spread over devices."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        jax.config.update("jax_num_cpu_devices", cores)
    except RuntimeError:
        pass  # JAX is already running, with the devices that whoever started it chose.


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that becomes true at the first Ctrl-C or SIGTERM; the second one interrupts at once."""
    received: list[int] = []

    def handler(number, frame):
        received.append(number)
        print("finishing this interval, to save it; again stops at once", flush=True)
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, original in before.items():
            signal.signal(number, original)


def _sets(config: Config, key: int, rows: int) -> dict[str, list[Batch]]:
    """The fixed sets of rows: one per exact length, and one of mixed lengths up to the longest."""
    longest = config.exact_lengths[-1]
    ranges = {str(length): (length, length) for length in config.exact_lengths}
    ranges |= {f"{config.uniform_from}-{longest}": (config.uniform_from, longest)}
    return {name: _rows(config, key, rows, *lengths) for name, lengths in ranges.items()}


def _rows(config: Config, key: int, rows: int, shortest: int, longest: int) -> list[Batch]:
    task = get_task(config.task)
    stream = jax.random.fold_in(jax.random.fold_in(jax.random.key(key), shortest), longest)
    # Padded to one of a few widths, because each width is a compilation.
    size = min(width for width in (*config.exact_lengths, *config.curve_lengths[-1:], longest) if width >= longest)
    return [
        _draw(task, jax.random.fold_in(stream, i), min(EVALUATION_ROWS, rows - start), longest, size, shortest)
        for i, start in enumerate(range(0, rows, EVALUATION_ROWS))
    ]


@jax.jit(static_argnames=("task", "rows", "size"))
def _draw(task: Task, key: PRNGKeyArray, rows: int, longest: int, size: int, shortest: int) -> Batch:
    return task.sample(key, rows, longest, size, shortest)


def _accuracy(sweep: Sweep, parameters: nnx.State, batches: list[Batch]) -> np.ndarray:
    """Accuracy of every run over a set, in (runs,)."""
    correct = sum(np.asarray(sweep.accuracy(parameters, b), np.float64) * len(b.tokens) for b in batches)
    return correct / sum(len(b.tokens) for b in batches)


def _report(command: Command[Config], sweep: Sweep, training: _Training, directory: RunDirectory) -> None:
    """Tests the run that validated best, and writes summary.json, accuracy.png and report.md."""
    config = command.config
    selected = max(range(len(config.pairs)), key=lambda i: training.best_validation[i].get(config.headline, -1.0))
    parameters = jax.tree.map(lambda p: p[selected : selected + 1], training.best)
    print(f"testing the best run (learning rate {config.pairs[selected][0]:g}, seed {config.pairs[selected][1]}) ...")
    test = {k: float(_accuracy(sweep, parameters, v)[0]) for k, v in _sets(config, TEST_KEY, config.test_rows).items()}
    curve = {
        length: float(_accuracy(sweep, parameters, _rows(config, CURVE_KEY, config.validation_rows, length, length))[0])
        for length in config.curve_lengths
    }
    model = sweep.merge(jax.tree.map(lambda p: p[0], parameters))
    turns = report.turns_by_token(model, _rows(config, CURVE_KEY, 64, 64, 64)[0].tokens)
    summary = report.summarize(command, training, selected, test, curve, deviations(config))
    directory.write("summary.json", json.dumps(summary, indent=2) + "\n")
    report.plot(directory.path / "accuracy.png", config, summary, turns)
    directory.write("report.md", report.render(command, summary))
    print(report.headline(summary))
    print(f"report: {directory.path / 'report.md'}, figure: {directory.path / 'accuracy.png'}")
