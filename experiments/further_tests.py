"""Tests of models that a grid has trained, at lengths and depths that no cell trains on: induction heads and needles.

The selected parameters come from the cell's checkpoint; each score is on disk before the next test begins.
"""

import contextlib
import dataclasses
import fnmatch
import json
from typing import NamedTuple

import jax
from jaxtyping import PRNGKeyArray

from experiments import cell, grid
from experiments.command import Command
from experiments.grid import Cell, GridConfig
from experiments.training import Training, evaluate
from mamba3_jax.checks import check_choice
from mamba3_jax.command import INTERRUPTED, fail
from mamba3_jax.tasks import Batch, Task, induction_heads, needle
from mamba3_jax.tasks.induction_heads import TEST_LENGTHS
from mamba3_jax.training.run_directory import RunDirectory

# Of one forward pass, so that a row of 2^20 tokens goes alone: bounds memory, not the result.
TOKENS_AT_ONCE = 2**20
SCORES_AT_ONCE = 2**28
# Streams of random rows that neither training nor a cell's own sets use.
FURTHER_KEY = 10_004
FURTHER = "further_tests.json"


@dataclasses.dataclass(frozen=True)
class RetrievalConfig(GridConfig):
    """The grid, and the further tests of its trained models.

    Attributes:
        induction_lengths: lengths of rows of induction heads.
        needle_lengths, needle_depths: lengths of haystacks, and where in them the needle lies, from 0 to 1.
        rows: rows of each of these tests.
        tokens: tokens of each of these tests, which has fewer rows where they would be more.
        longest: the longest rows of a model, for those whose memory does not suffice for all of the lengths.
    """

    induction_lengths: tuple[int, ...] = TEST_LENGTHS
    needle_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    needle_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    rows: int = 1024
    tokens: int = 2**24
    longest: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        for name, task in (("induction_lengths", induction_heads()), ("needle_lengths", needle())):
            lengths = list(getattr(self, name))
            if lengths != sorted(set(lengths)) or (lengths and lengths[0] < task.min_length):
                raise ValueError(f"{name}: got {lengths}; allowed: increasing lengths >= {task.min_length}")
        for depth in self.needle_depths:
            needle(depth)
        for name in ("rows", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        for model in self.longest:
            check_choice("longest", model, tuple(self.models))


class Probe(NamedTuple):
    """Rows of one length, of a task with the vocabulary that a cell trained on."""

    task: Task
    length: int

    @property
    def name(self) -> str:
        return f"{self.task.name},n={self.length}"


def run_further_tests(command: Command[RetrievalConfig]) -> int:
    """The further tests of all finished cells that `--only` names; returns the exit status."""
    try:
        for place in grid.cells(command.config, command.smoke):
            if fnmatch.fnmatch(place.name, command.only):
                _run_further_tests(command, place)
    except KeyboardInterrupt:
        print("interrupted; the same command continues with the test that it was at")
        return INTERRUPTED
    return 0


def further_tests(command: Command[RetrievalConfig], place: Cell) -> list[Probe]:
    """What a cell's selected model is tested on after its training."""
    config = command.config
    if place.config.task == "induction_heads":
        tests = [Probe(induction_heads(), length) for length in config.induction_lengths]
    elif place.config.task == "needle":
        tests = [Probe(needle(depth), length) for length in config.needle_lengths for depth in config.needle_depths]
    else:
        return []
    if command.smoke:
        tests = [test for test in tests if test.length == tests[0].length]
    return [test for test in tests if place.model not in config.longest or test.length <= config.longest[place.model]]


def _run_further_tests(command: Command[RetrievalConfig], place: Cell) -> None:
    """Tests the selected model of a finished cell; each score is on disk before the next test begins."""
    directory = command.results_dir / place.name
    file = directory / FURTHER
    scores = json.loads(file.read_text()) if file.exists() else {}
    missing = [test for test in further_tests(command, place) if test.name not in scores]
    if not missing:
        return
    with contextlib.closing(RunDirectory(directory, place.text)) as run:
        if run.latest_step is None:
            fail(f"results_dir: got {directory}, without a checkpoint to test; allowed: one in which the cell trained")
        training = Training.fresh(place.config.sweep(), place.config.schedule)
        with cell.one_line_errors(command):
            training = training.resumed(run)
    best = jax.tree.map(lambda p: p[training.selected : training.selected + 1], training.best)
    for test in missing:
        batches = _batches(test, command.config, place)
        with jax.default_matmul_precision("highest"):
            score = evaluate(training.sweep, best, batches)
        scores[test.name] = dict(accuracy=score["accuracy"][0], rows=sum(len(batch.tokens) for batch in batches))
        run.write(FURTHER, json.dumps(scores, indent=2) + "\n")
        print(f"{place.name}: accuracy {100 * scores[test.name]['accuracy']:.1f}% on {test.name}", flush=True)


def _batches(test: Probe, config: RetrievalConfig, place: Cell) -> list[Batch]:
    """The rows of a test, as many at once as fit."""
    rows = max(1, min(config.rows, config.tokens // test.length))
    at_once = max(1, TOKENS_AT_ONCE // test.length)
    if place.config.model.mixer == "attention":
        at_once = max(1, min(at_once, SCORES_AT_ONCE // test.length**2))
    key = jax.random.fold_in(jax.random.key(FURTHER_KEY), test.length)
    return [
        _draw(test, jax.random.fold_in(key, start), min(at_once, rows - start)) for start in range(0, rows, at_once)
    ]


@jax.jit(static_argnames=("test", "rows"))
def _draw(test: Probe, key: PRNGKeyArray, rows: int) -> Batch:
    return test.task.sample(key, rows, test.length, test.length, test.length)
