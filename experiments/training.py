"""A sweep from first to last step: intervals, validation, each run's best parameters, checkpoints, interrupts."""

import dataclasses
import math
import time
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.progress import progress
from experiments.sweep import Runs, Sweep
from mamba3_jax.inference.reports import environment
from mamba3_jax.tasks import Batch
from mamba3_jax.training.interrupts import interrupts
from mamba3_jax.training.run_directory import RunDirectory

Score = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When a sweep is looked at, and when it ends.

    Attributes:
        interval: steps between two lines of metrics.
        evaluate_every: steps between two validations, and between two checkpoints.
        headline: the validation set by which parameters and runs are selected.
        select: what is best there: the highest "accuracy" or the lowest "loss".
        solved: the headline's accuracy that ends the sweep early.
    """

    interval: int
    evaluate_every: int
    headline: str
    select: Literal["accuracy", "loss"]
    solved: float


@dataclasses.dataclass
class Training:
    """A sweep in progress: the runs, and each run's best parameters with the validation they scored.

    `trained_on` has the device and the versions of every machine that took it further, one after the other.
    """

    sweep: Sweep
    schedule: Schedule
    runs: Runs
    best: nnx.State
    best_validation: list[dict[str, Score]]
    best_step: list[int]
    best_length: list[int]
    seconds: float
    trained_on: list[dict]
    last: dict

    @classmethod
    def fresh(cls, sweep: Sweep, schedule: Schedule) -> "Training":
        """Before the first step."""
        runs, n = sweep.init(), len(sweep.seeds)
        return cls(sweep, schedule, runs, runs.parameters, [{} for _ in range(n)], [0] * n, [0] * n, 0.0, [], {})

    def resumed(self, directory: RunDirectory) -> "Training":
        """From the directory's newest checkpoint, itself if there is none; raises ValueError if that is damaged."""
        restored = directory.restore(dict(runs=self.runs, best=self.best))
        if restored is None:
            return self
        arrays, extra = restored
        # Which checkpoints have not always told.
        extra.setdefault("trained_on", [dict(device="devices that were not recorded", versions={})])
        return dataclasses.replace(self, runs=arrays["runs"], best=arrays["best"], **extra)

    @property
    def step(self) -> int:
        return int(self.runs.step[0])

    @property
    def done(self) -> bool:
        """At the last step, or when each seed has a run that solved the headline or none that lives."""
        return self.step >= self.sweep.max_steps or all(map(self._settled, self.by_seed))

    def _settled(self, seed: list[int]) -> bool:
        best = self.best_validation[self.best_of(seed)].get(self.schedule.headline)
        solved = best is not None and best["accuracy"] >= self.schedule.solved
        return solved or all(np.asarray(self.runs.failed)[seed])

    @property
    def by_seed(self) -> list[list[int]]:
        """The runs of each seed."""
        seeds = self.sweep.seeds
        return [[i for i, other in enumerate(seeds) if other == seed] for seed in dict.fromkeys(seeds)]

    @property
    def selected(self) -> int:
        """The run that validated best."""
        return self.best_of(range(len(self.best_validation)))

    def best_of(self, candidates: Iterable[int]) -> int:
        """The one of some runs that validated best."""
        return max(candidates, key=lambda i: _rank(self.best_validation[i], self.schedule))

    def save(self, directory: RunDirectory) -> None:
        """Starts to write a checkpoint."""
        names = ("best_validation", "best_step", "best_length", "seconds", "trained_on", "last")
        extra = {name: getattr(self, name) for name in names}
        directory.save(self.step, dict(runs=self.runs, best=self.best), extra)

    def advance(self, validation: dict[str, list[Batch]], directory: RunDirectory) -> None:
        """One interval of training, and a validation when it is due; one line of metrics."""
        began, lengths = time.perf_counter(), self.sweep.curriculum.lengths
        stages = self.runs.stage.tolist()
        self.runs, metrics = self.sweep.train(self.runs, self.schedule.interval)
        self.last = dict(
            step=self.step,
            max_length=[lengths[stage] for stage in stages],
            learning_rate=self.sweep.learning_rates(self.step - 1).tolist(),
            loss=_finite(metrics.loss),
            accuracy=_finite(metrics.accuracy),
            failed=[i for i, failed in enumerate(self.runs.failed.tolist()) if failed],
        )
        if self.step % self.schedule.evaluate_every == 0:
            self.last |= dict(validation=self._validate(validation))
        self.seconds += time.perf_counter() - began
        directory.log(self.last)

    def _validate(self, validation: dict[str, list[Batch]]) -> dict[str, dict[str, list[float | None]]]:
        scores = {name: evaluate(self.sweep, self.runs.parameters, batches) for name, batches in validation.items()}
        better = []
        for i, failed in enumerate(self.runs.failed.tolist()):
            mine = {name: {key: values[i] for key, values in score.items()} for name, score in scores.items()}
            previous = self.best_validation[i]
            better.append(not failed and _rank(mine, self.schedule) > _rank(previous, self.schedule))
            if better[i]:
                self.best_validation[i], self.best_step[i] = mine, self.step
                self.best_length[i] = self.last["max_length"][i]
        keep = jnp.asarray(better)

        def newer(new, old):
            return jnp.where(keep.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        self.best = jax.tree.map(newer, self.runs.parameters, self.best)
        return scores

    def status(self) -> dict[str, str]:
        """What the progress bar shows, of the run that is furthest ahead."""
        lengths = self.sweep.curriculum.lengths
        accuracies = [-1.0 if a is None else a for a in self.last["accuracy"]]
        leader = int(np.lexsort((accuracies, self.last["max_length"]))[-1])
        loss, longest = self.last["loss"][leader], self.last["max_length"][leader]
        shown = dict(
            loss="not finite" if loss is None else f"{loss:.3f}",
            accuracy=f"{100 * accuracies[leader]:.1f}%",
            stage=f"{lengths.index(longest) + 1}/{len(lengths)} (length {longest})",
        )
        best = self.best_validation[self.selected].get(self.schedule.headline)
        if best is not None:
            shown[f"best at {self.schedule.headline}"] = f"{100 * best['accuracy']:.1f}%"
        if self.last["failed"]:
            shown["failed"] = str(len(self.last["failed"]))
        return shown


def train(training: Training, validation: dict[str, list[Batch]], directory: RunDirectory) -> None:
    """Trains until done. However it ends, once the directory is closed its checkpoints are on disk.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the interval in progress was saved.
    """
    with interrupts() as stop, progress(training.sweep.max_steps, training.step) as show:
        if not training.done and environment() not in training.trained_on[-1:]:
            training.trained_on.append(environment())
        while not training.done:
            if stop:
                training.save(directory)
                raise KeyboardInterrupt
            training.advance(validation, directory)
            show(training.step, training.status())
            if training.step % training.schedule.evaluate_every == 0:
                training.save(directory)


def evaluate(sweep: Sweep, parameters: nnx.State, batches: list[Batch]) -> dict[str, list[float | None]]:
    """Accuracy and loss of every run over a set: the means over all that is scored and asked there, in float64."""
    metrics = [sweep.evaluate(parameters, batch) for batch in batches]
    counts = dict(accuracy=[batch.scored.sum() for batch in batches], loss=[batch.mask.sum() for batch in batches])
    return {
        name: _finite(np.average(np.array([getattr(m, name) for m in metrics], np.float64), 0, np.array(counts[name])))
        for name in SCORES
    }


SCORES = ("accuracy", "loss")


def _rank(scores: dict[str, Score], schedule: Schedule) -> tuple[float, float]:
    """Higher is better: by the selected score, then by the other one."""
    score = scores.get(schedule.headline)
    if score is None:
        return -math.inf, -math.inf
    loss = math.inf if score["loss"] is None else score["loss"]
    return (score["accuracy"], -loss) if schedule.select == "accuracy" else (-loss, score["accuracy"])


def _finite(values) -> list[float | None]:
    """As JSON can hold them."""
    return [value if math.isfinite(value) else None for value in np.asarray(values, np.float64).tolist()]
