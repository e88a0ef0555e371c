"""One sweep, from its configuration to its report: every learning rate and seed of one model on one task.

Each seed's best run by validation, over learning rates and steps, is tested on rows that it has never seen. A results
directory holds config.yaml, metrics.jsonl, checkpoints/ (resume), summary.json, accuracy.png, report.md, and in model/
the best run's model, for `mamba3 generate` and its siblings.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterator
from typing import Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from experiments import report
from experiments.command import Command, completed
from experiments.models import ModelConfig
from experiments.sweep import CurriculumConfig, Sweep, check_memory
from experiments.training import Schedule, Training, evaluate, train
from mamba3_jax.checks import check_choice
from mamba3_jax.command import INTERRUPTED, fail
from mamba3_jax.layers import Mamba3Config
from mamba3_jax.models.checkpoint import MODEL, save_model
from mamba3_jax.tasks import RETRIEVAL_TASKS, TASKS, TEXT_TASKS, Batch, Task, get_task, unscaled_accuracy
from mamba3_jax.training.optimizer import OptimizerConfig
from mamba3_jax.training.run_directory import RunDirectory

# Tokens of one forward pass during evaluation; bounds memory, not the result.
EVALUATION_TOKENS = 2**18
EVALUATION_ROWS = 1024
# Streams of random rows that never meet the training data, which is keyed by (seed, step).
VALIDATION_KEY, TEST_KEY, CURVE_KEY = 10_001, 10_002, 10_003


@dataclasses.dataclass(frozen=True)
class Config:
    """One sweep.

    Attributes:
        model: the model.
        task: which task; see mamba3_jax/tasks.
        supervision: "final" supervises what is scored (the paper's protocol), "every" each position's running answer.
        curriculum: the growing training lengths.
        optimizer: AdamW and its schedule.
        learning_rates: peak rates, one run each.
        seed: first seed; data, initialisation and everything random follow from it.
        n_seeds: consecutive seeds, one run each for every learning rate.
        batch_size: rows per step.
        max_steps: steps at most, and the length of the cosine schedule.
        interval: steps between two lines of metrics, and between two looks at the curriculum's gates.
        evaluate_every: steps between two validations, and between two checkpoints; a multiple of `interval`.
        validation_rows: rows of the fixed validation set at each length, unless the task holds out a split of its text.
        test_rows: rows of the disjoint test set at each length, likewise.
        exact_lengths: lengths of validation and test; the last is the headline, by which runs are selected.
        uniform_from: a mixed set draws lengths from here to the last of `exact_lengths`; None is no such set.
        curve_lengths: further lengths of the figure, with `validation_rows` rows each.
        select: what is best in validation, the highest "accuracy" or the lowest "loss".
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
    uniform_from: int | None = 40
    curve_lengths: tuple[int, ...] = (20, 80, 120, 200, 320, 384, 448, 512)
    select: Literal["accuracy", "loss"] = "accuracy"
    stop_accuracy: float = 1.1

    def __post_init__(self):
        check_choice("task", self.task, (*TASKS, *RETRIEVAL_TASKS, *TEXT_TASKS))
        check_choice("supervision", self.supervision, ("final", "every"))
        check_choice("select", self.select, ("accuracy", "loss"))
        task = get_task(self.task)
        if self.supervision == "every" and not task.every:
            raise ValueError(f"supervision: got 'every' with task {self.task!r}; allowed: 'final'")
        for name in ("n_seeds", "batch_size", "max_steps", "interval", "validation_rows", "test_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        if self.batch_size % 2 and not self.curriculum.exact:
            raise ValueError(f"batch_size: got {self.batch_size}; allowed: an even number, because rows train in pairs")
        if self.evaluate_every < 1 or self.evaluate_every % self.interval:
            raise ValueError(
                f"evaluate_every: got {self.evaluate_every}; allowed: a multiple of interval={self.interval}"
            )
        if self.max_steps % self.evaluate_every:
            raise ValueError(
                f"max_steps: got {self.max_steps}; allowed: a multiple of evaluate_every={self.evaluate_every}"
            )
        if not self.learning_rates or not all(rate > 0 for rate in self.learning_rates):
            raise ValueError(f"learning_rates: got {list(self.learning_rates)}; allowed: positive rates, at least one")
        if not self.exact_lengths:
            raise ValueError("exact_lengths: got []; allowed: at least one length")
        for name in ("exact_lengths", "curve_lengths"):
            lengths = getattr(self, name)
            if lengths and min(lengths) < task.min_length:
                raise ValueError(f"{name}: got {list(lengths)}; allowed: lengths >= {task.min_length}")
        if self.uniform_from is not None and not task.min_length <= self.uniform_from <= self.exact_lengths[-1]:
            raise ValueError(
                f"uniform_from: got {self.uniform_from}; allowed: {task.min_length} to {self.exact_lengths[-1]}"
            )
        if task.held_out is not None and (self.uniform_from is not None or self.curve_lengths):
            raise ValueError(
                f"uniform_from, curve_lengths: got {self.uniform_from}, {list(self.curve_lengths)} with task "
                f"{self.task!r}; allowed: null, [], because its text is evaluated whole"
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

    @property
    def schedule(self) -> Schedule:
        solved = unscaled_accuracy(self.stop_accuracy, get_task(self.task).chance)
        return Schedule(self.interval, self.evaluate_every, self.headline, self.select, solved)

    def sweep(self) -> Sweep:
        task = get_task(self.task)
        rates, seeds = zip(*self.pairs)
        return Sweep(
            task=task,
            model=self.model.lm(task.vocab_size),
            optimizer=self.optimizer,
            curriculum=self.curriculum,
            supervision=self.supervision,
            batch_size=self.batch_size,
            max_steps=self.max_steps,
            peaks=rates,
            seeds=seeds,
        )


def execute(command: Command[Config], deviations: list[str] | None = None) -> int:
    """Opens the results directory and runs the sweep there; returns the exit status.

    Args:
        command: the configuration, and where results go.
        deviations: what the report says of a published protocol; None says nothing.
    """
    try:
        with jax.default_matmul_precision("highest"):
            sweep = command.config.sweep()
            with one_line_errors(command):
                check_memory(sweep, command.config.interval)
                directory = RunDirectory(command.results_dir, command.text, fixed=functools.partial(completed, Config))
            with contextlib.closing(directory):
                training = Training.fresh(sweep, command.config.schedule)
                with one_line_errors(command):
                    training = training.resumed(directory)
                train(training, evaluation_sets(command.config, "validation"), directory)
            _report(command, training, directory, deviations)
    except KeyboardInterrupt:
        print(f"interrupted; the same command resumes {command.results_dir} from its last checkpoint")
        return INTERRUPTED
    return 0


@contextlib.contextmanager
def one_line_errors(command: Command[Config]) -> Iterator[None]:
    """A ValueError or a folder that cannot be written ends the command with one line and status 2."""
    try:
        yield
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        fail(f"results_dir: got {command.results_dir} ({error.strerror}); allowed: a folder that can be written")


def use_all_cores() -> None:
    """On a CPU, one device per core: XLA hardly threads steps as small as these, but runs spread over devices."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        jax.config.update("jax_num_cpu_devices", cores)
    except RuntimeError:
        pass  # JAX is already running, with the devices that whoever started it chose.


def evaluation_sets(config: Config, split: Literal["validation", "test"]) -> dict[str, list[Batch]]:
    """The fixed sets of rows: one per exact length, and one of mixed lengths up to the longest.

    They are drawn from keys that training never sees, or are all of the task's held-out split, if it has one.
    """
    task = get_task(config.task)
    if task.held_out is not None:
        return {str(length): _pieces(task.held_out(split, length)) for length in config.exact_lengths}
    key, rows = {
        "validation": (VALIDATION_KEY, config.validation_rows),
        "test": (TEST_KEY, config.test_rows),
    }[split]
    ranges = {str(length): (length, length) for length in config.exact_lengths}
    if config.uniform_from is not None:
        longest = config.exact_lengths[-1]
        ranges |= {f"{config.uniform_from}-{longest}": (config.uniform_from, longest)}
    return {name: _rows(config, key, rows, *lengths) for name, lengths in ranges.items()}


def _pieces(text: Batch) -> list[Batch]:
    """A text in pieces that fit. Its last row, which is padded, is one: within a piece all rows ask equally often."""
    rows, size = text.tokens.shape
    starts = [*range(0, rows - 1, max(1, EVALUATION_TOKENS // size)), rows - 1]
    return [jax.tree.map(lambda a: a[start:end], text) for start, end in zip(starts, [*starts[1:], rows])]


def _rows(config: Config, key: int, rows: int, shortest: int, longest: int) -> list[Batch]:
    task = get_task(config.task)
    stream = jax.random.fold_in(jax.random.fold_in(jax.random.key(key), shortest), longest)
    # Padded to one of a few widths, because each width is a compilation.
    size = min(width for width in (*config.exact_lengths, *config.curve_lengths[-1:], longest) if width >= longest)
    at_once = max(1, min(EVALUATION_ROWS, EVALUATION_TOKENS // size))
    return [
        _draw(task, jax.random.fold_in(stream, i), min(at_once, rows - start), longest, size, shortest)
        for i, start in enumerate(range(0, rows, at_once))
    ]


@jax.jit(static_argnames=("task", "rows", "size"))
def _draw(task: Task, key: PRNGKeyArray, rows: int, longest: int, size: int, shortest: int) -> Batch:
    return task.sample(key, rows, longest, size, shortest)


def _report(command: Command[Config], training: Training, directory: RunDirectory, deviations) -> None:
    """Tests each seed's best run, and writes summary.json, accuracy.png and report.md."""
    config, sweep = command.config, training.sweep
    # A seed whose runs all failed before their first validation has nothing to be tested.
    chosen = [i for i in map(training.best_of, training.by_seed) if training.best_step[i]]
    if not chosen:
        fail(
            f"learning_rates: got {list(config.learning_rates)}, of which every run failed before its first "
            f"validation (a loss or gradient that is not finite, see {directory.path}); allowed: lower ones"
        )
    print(f"testing the best run of each of {len(chosen)} seeds ...", flush=True)
    parameters = jax.tree.map(lambda p: p[np.array(chosen)], training.best)
    sets = evaluation_sets(config, "test")
    test = {name: evaluate(sweep, parameters, batches) for name, batches in sets.items()}
    rows = {name: sum(len(batch.tokens) for batch in batches) for name, batches in sets.items()}
    selected = training.best_of(chosen)
    best = jax.tree.map(lambda p: p[selected : selected + 1], training.best)
    curve = {
        length: evaluate(sweep, best, _rows(config, CURVE_KEY, config.validation_rows, length, length))
        for length in config.curve_lengths
    }
    model = sweep.merge(jax.tree.map(lambda p: p[0], best))
    # One that is there was written by an evaluation that did not reach its end.
    shutil.rmtree(directory.path / MODEL, ignore_errors=True)
    save_model(directory.path / MODEL, model.config, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    turns = None
    if isinstance(config.model.mixer_config(), Mamba3Config) and config.curve_lengths:
        length = max(64, get_task(config.task).min_length)
        turns = report.turns_by_token(model, _rows(config, CURVE_KEY, 64, length, length)[0].tokens)
    summary = report.summarize(command, training, chosen, test, rows, curve, deviations)
    report.plot(directory.path / "accuracy.png", summary, turns)
    directory.write("report.md", report.render(command, summary))
    # The last to be written, because it marks the cell of a grid as done.
    directory.write("summary.json", json.dumps(summary, indent=2) + "\n")
    print(report.headline(summary))
    print(f"report: {directory.path / 'report.md'}, figure: {directory.path / 'accuracy.png'}")
