"""Many sweeps as one experiment: models x tasks x widths, one results directory each, resumable at any moment.

A cell whose summary.json exists is done and is not run again; one that was interrupted continues from its checkpoint.
Several may run at a time, each in a process of its own (`--processes`).
"""

import copy
import dataclasses
import fnmatch
import functools
import json
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from experiments import cell
from experiments.command import Command, completed, from_dict
from experiments.processes import run_apart
from mamba3_jax.checks import check_choice
from mamba3_jax.command import fail
from mamba3_jax.tasks import get_task
from mamba3_jax.training.run_directory import check_same_config


def smoke_options(task: str) -> dict[str, Any]:
    """What a smoke test changes in a cell: everything runs, and nothing is learned."""
    length = max(8, get_task(task).min_length)
    return {
        "curriculum": {"lengths": [length], "stage_steps": 2},
        "learning_rates": [1e-3],
        "n_seeds": 1,
        "batch_size": 4,
        "max_steps": 2,
        "interval": 1,
        "evaluate_every": 2,
        "validation_rows": 8,
        "test_rows": 8,
        "exact_lengths": [length],
        "uniform_from": None,
        "curve_lengths": [],
        "model": {"n_layers": 1, "d_state": 8},
    }


@dataclasses.dataclass(frozen=True)
class GridConfig:
    """The cells: every model on every task at every width, each of them `shared` with three overrides.

    Attributes:
        shared: options of experiments/cell.py for all cells.
        models: options of the model, by its name in the report.
        tasks: options of the cell, by the task's name, or by any name if `task` is among them. Besides, a task may have
            its own `d_models`; and `models`, which of them it is for, each with options that this cell alone has.
        d_models: widths of the residual stream.
    """

    shared: dict[str, Any]
    models: dict[str, dict[str, Any]]
    tasks: dict[str, dict[str, Any]]
    d_models: tuple[int, ...]

    def __post_init__(self):
        for name in ("models", "tasks", "d_models"):
            if not getattr(self, name):
                raise ValueError(f"{name}: got nothing; allowed: at least one")
        for task, options in self.tasks.items():
            for model in options["models"] if "models" in options else ():
                check_choice(f"tasks.{task}.models", model, tuple(self.models))

    @property
    def places(self) -> list[tuple[str, str, int]]:
        """(model, task, width) of every cell."""
        axes = {"models": self.models, "d_models": self.d_models}
        return [
            (model, task, d)
            for task, options in self.tasks.items()
            for model in (axes | options)["models"]
            for d in (axes | options)["d_models"]
        ]


class Cell(NamedTuple):
    """One cell, by its place in the grid."""

    model: str
    task: str
    d_model: int
    config: cell.Config
    text: str

    @property
    def name(self) -> str:
        return f"{self.model},{self.task},d={self.d_model}"


def cells(config: GridConfig, smoke: bool = False) -> Iterator[Cell]:
    """All cells; for a smoke test the fewest that have every model and every task, shrunk."""
    for model, task, d_model in _cover(config) if smoke else config.places:
        own = {key: value for key, value in config.tasks[task].items() if key not in ("models", "d_models")}
        alone = config.tasks[task]["models"][model] if "models" in config.tasks[task] else {}
        options = merge({"task": task}, config.shared, own, {"model": config.models[model]}, alone)
        options = merge(options, {"model": {"d_model": d_model}}, smoke_options(options["task"]) if smoke else {})
        parsed, text = from_dict(cell.Config, options, f"cell {model},{task},d={d_model}")
        yield Cell(model, task, d_model, parsed, text)


def check_only(command: Command, *grids: GridConfig) -> None:
    """One line and status 2 if `--only` names no cell."""
    names = [place.name for config in grids for place in cells(config, command.smoke)]
    if not fnmatch.filter(names, command.only):
        fail(f"only: got {command.only!r}, which matches no cell; allowed: a pattern of {', '.join(names)}")


def run(command: Command, *grids: GridConfig, deviations=None) -> int:
    """Runs every cell that is not done yet and that `--only` names; returns the exit status."""
    missing = [
        place
        for config in grids
        for place in cells(config, command.smoke)
        if fnmatch.fnmatch(place.name, command.only) and not _is_done(command, place)
    ]
    if command.processes > 1 and len(missing) > 1:
        return run_apart(command, [place.name for place in missing])
    for place in missing:
        print(f"== {place.name}", flush=True)
        line = f"{command.line} --only '{place.name}'"
        one = Command(place.config, place.text, command.results_dir / place.name, line)
        if status := cell.execute(one, None if deviations is None else deviations(place.config)):
            return status
    return 0


def summaries(command: Command[GridConfig]) -> dict[tuple[str, str, int], dict]:
    """The summary of every cell that is done."""
    found = {}
    for place in cells(command.config, command.smoke):
        if _is_done(command, place):
            summary = (command.results_dir / place.name / "summary.json").read_text()
            found[place.model, place.task, place.d_model] = json.loads(summary)
    return found


def training_time(done: Collection[dict]) -> str:
    """Of the summaries of some cells."""
    devices = " / ".join(sorted({summary["device"] for summary in done}))
    hours = sum(summary["seconds"] for summary in done) / 3600
    return f"{hours:.2f} hours of training on {devices} (each cell's own time, also where several shared a device)"


def _is_done(command: Command[GridConfig], place: Cell) -> bool:
    """Whether a cell has its summary; one line and status 2 if that is of another configuration."""
    directory = command.results_dir / place.name
    if not (directory / "summary.json").exists():
        return False
    try:
        check_same_config(directory, place.text, fixed=functools.partial(completed, cell.Config))
    except ValueError as error:
        fail(str(error))
    return True


def merge(*options: dict) -> dict:
    """Nested options, the later ones first."""
    merged: dict = {}
    for layer in options:
        for key, value in layer.items():
            nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if nested else copy.deepcopy(value)
    return merged


def _cover(config: GridConfig) -> list[tuple[str, str, int]]:
    """Every model and every task at least once: places where both are new, then where one is; the narrowest first.

    Tasks that the same code draws, like MQAR's settings, count as one.
    """

    def task(place):
        row = get_task(config.tasks[place[1]].get("task", place[1])).row
        return getattr(row, "func", row)

    chosen: list[tuple[str, str, int]] = []
    for new in (2, 1):
        for place in sorted(config.places, key=lambda place: place[2]):
            models, tasks = {p[0] for p in chosen}, {task(p) for p in chosen}
            if (place[0] not in models) + (task(place) not in tasks) >= new:
                chosen.append(place)
    return chosen
