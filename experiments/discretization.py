"""What discretisation, biases and short convolution are worth: tables 5a, 8 and 10a of arXiv:2603.15569, in small.

    mamba3 experiment discretization --config configs/discretization.yaml

Exponential-Euler (lambda = 1), the trapezoid (lambda from the data) and lambda = 1/2, each with and without biases and
convolution, on synthetic tasks and on a language model of bytes; there also other initial biases. Every cell is a sweep
over learning rates and seeds; a seed's best run by validation is tested once.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from experiments import cell, grid, state_tracking
from experiments.command import Command, parse
from experiments.grid import GridConfig
from experiments.report import PAIRS
from mamba3_jax.checks import check_choice
from mamba3_jax.models import abstract_model, count_parameters
from mamba3_jax.tasks import RETRIEVAL_TASKS, TASKS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

TEXT = "pydoc_bytes_train"
LAMBDAS = {"trapezoid": "trapezoidal", "half": 0.5, "euler": "euler"}
LAMBDA_NAMES = {
    "trapezoid": "trapezoid, lambda from the data",
    "half": "lambda = 1/2",
    "euler": "exponential-Euler",
}
CONV_WIDTH = 4


def variant(lam: str = "trapezoid", biases: bool = True, conv: bool = False) -> str:
    """The name of a model of the factorial."""
    return lam + ("" if biases else "-no_bias") + ("-conv" if conv else "")


FACTORIAL: dict[str, dict[str, Any]] = {
    variant(lam, biases, conv): dict(
        discretization=LAMBDAS[lam], bc_bias_init="ones" if biases else None, conv_width=CONV_WIDTH if conv else 0
    )
    for lam, biases, conv in itertools.product(LAMBDAS, (True, False), (False, True))
}
# Table 10a beyond its first row, which is the factorial's trapezoid.
BIAS_INITS: dict[str, dict[str, Any]] = {
    "bias_zeros": dict(bc_bias_init="zeros"),
    "bias_ones_frozen": dict(bc_bias_init="ones", bc_bias_trainable=False),
    "bias_uniform": dict(bc_bias_init="uniform"),
    "bias_symmetric": dict(bc_bias_init="symmetric"),
}

INIT_NAMES = {
    variant(): "ones",
    "bias_zeros": "zeros",
    "bias_ones_frozen": "frozen ones",
    "bias_uniform": "U(0, 1)",
    "bias_symmetric": "U(-1, 1)",
}
# The paper's perplexity of each variant that its tables 5a, 8 and 10a have; the full model is in all three.
PAPER = {
    variant(): 15.72,
    variant("euler", biases=False): 16.68,
    variant(biases=False): 16.49,
    variant(conv=True): 15.85,
    variant("half"): 15.76,
    variant("euler"): 15.81,
    "bias_zeros": 16.57,
    "bias_ones_frozen": 15.80,
    "bias_uniform": 15.76,
    "bias_symmetric": 16.07,
}
TASK_NAMES = {"parity": "parity", "modular_arithmetic": "mod 5, no brackets"}


@dataclasses.dataclass(frozen=True)
class Config:
    """The cells: all variants on every task and on the language model, each of them `shared` with overrides.

    Attributes:
        shared: options of experiments/cell.py for all cells.
        tasks: options of the cell, by the synthetic task's name; `model.d_model` among them.
        language_model: options of the language model's cells, likewise.
    """

    shared: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    language_model: dict[str, Any]

    def __post_init__(self):
        for name in self.tasks:
            check_choice("tasks", name, (*TASKS, *RETRIEVAL_TASKS))
        for name, options in self.options.items():
            if "d_model" not in options.get("model", {}):
                raise ValueError(f"{name}: got no model.d_model; allowed: a positive integer")

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """Options of the cells of every task, the language model last."""
        return {**self.tasks, TEXT: self.language_model}

    def grids(self, smoke: bool) -> list[GridConfig]:
        """A grid for each task, since widths and models differ; for a smoke test one model on each."""
        found = []
        for i, (task, options) in enumerate(self.options.items()):
            models = FACTORIAL | (BIAS_INITS if task == TEXT else {})
            if smoke:
                name = list(models)[-1 - i]
                models = {name: models[name]}
            found.append(GridConfig(self.shared, models, {task: options}, (options["model"]["d_model"],)))
        return found


Done = dict[tuple[str, str], dict]


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    command = parse("discretization", Config, argv, cells=True)
    cell.use_all_cores()
    grids = command.config.grids(command.smoke)
    grid.check_only(command, *grids)
    status = grid.run(command, *grids, deviations=deviations)
    write_report(command)
    return status


def deviations(config: cell.Config) -> list[str] | None:
    """Of state tracking, every setting that differs from the paper's; the other tasks have no protocol."""
    return state_tracking.deviations(config) if config.task in TASKS else None


def write_report(command: Command[Config]) -> None:
    """report.md and discretization.png, of the cells that are done."""
    done: Done = {}
    for one in command.config.grids(command.smoke):
        summaries = grid.summaries(dataclasses.replace(command, config=one))
        done |= {(model, task): summary for (model, task, _), summary in summaries.items()}
    if not done:
        return
    command.results_dir.mkdir(parents=True, exist_ok=True)
    (command.results_dir / "report.md").write_text(render(command, done))
    plot(command, done)
    print(f"report: {command.results_dir / 'report.md'}")


class Perplexity(NamedTuple):
    """exp of the mean loss over the whole test split, of each seed's best run by validation."""

    seeds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.seeds))

    @property
    def bits(self) -> float:
        """Mean bits per byte."""
        return float(np.mean(np.log2(self.seeds)))

    def __str__(self) -> str:
        spread = f" +- {np.std(self.seeds, ddof=1):.3f}" if len(self.seeds) > 1 else ""
        return f"{self.mean:.3f}{spread}"


def perplexities(done: Done) -> dict[str, Perplexity]:
    """Of every variant of the language model that is done."""
    found = {}
    for (model, task), summary in done.items():
        if task == TEXT:
            losses = [seed["test"][summary["headline"]]["loss"] for seed in summary["seeds"]]
            # A loss that is not finite is None in a summary.
            found[model] = Perplexity(tuple(math.inf if loss is None else math.exp(loss) for loss in losses))
    return found


class Comparison(NamedTuple):
    """Two variants of one of the paper's tables, the one that is better there first."""

    what: str
    better: str
    worse: str


COMPARISONS = (
    Comparison("trapezoid instead of Euler, without biases", variant(biases=False), variant("euler", biases=False)),
    Comparison("biases, with the trapezoid", variant(), variant(biases=False)),
    Comparison("biases, with Euler", variant("euler"), variant("euler", biases=False)),
    Comparison("no convolution, with biases and trapezoid", variant(), variant(conv=True)),
    Comparison("lambda from the data instead of 1/2", variant(), variant("half")),
    Comparison("lambda from the data instead of 1", variant(), variant("euler")),
    Comparison("lambda = 1/2 instead of 1", variant("half"), variant("euler")),
    *(
        Comparison(f"initial biases of ones instead of {name}", variant(), model)
        for model, name in INIT_NAMES.items()
        if model != variant()
    ),
)


def verdict(better: Perplexity, worse: Perplexity) -> str:
    """Whether every seed of one variant beats every seed of the other, and whether that is the paper's order."""
    if min(len(better.seeds), len(worse.seeds)) < 2:
        return "one seed: no spread to compare with"
    if max(better.seeds) < min(worse.seeds):
        return "exceeds the seeds' spread, the paper's order"
    if max(worse.seeds) < min(better.seeds):
        return "exceeds the seeds' spread, the opposite order"
    return "within the seeds' spread"


def render(command: Command[Config], done: Done) -> str:
    """The paper's three tables beside ours, which differences are larger than the seeds', the tasks, the deviations."""
    found = perplexities(done)
    lines = [
        "# Discretisation, biases and convolution: tables 5a, 8 and 10a of arXiv:2603.15569",
        "",
        f"    {command.line}",
        "",
        *NOT_COMPARABLE,
        "",
        "![perplexity and accuracy of every variant](discretization.png)",
        "",
        *_table_5a(found),
        *_table_8(found),
        *_table_10a(found),
        *_comparisons(found),
        *_accuracies(command.config, done),
        *_deviations(command, done),
        "",
        f"{len(done)} cells, in {grid.training_time(done.values())}; float32 with full matmul precision. Learning rate "
        "and step of every run: the report.md of its cell.",
        "",
    ]
    return "\n".join(lines)


NOT_COMPARABLE = (
    "**Only the order of the variants can be compared with the paper's.** The paper's numbers are perplexities per",
    "word-piece of models of 440M parameters on FineWeb-Edu; ours are per byte, of a tiny model on the text of",
    "Python's `help()`: exp of the mean loss over every byte of the test split. No topic, nor any that shares a",
    "paragraph with it, is in two of the training, validation and test splits. +- is the standard deviation over",
    "seeds. Each seed's learning rate and step are those of the lowest validation loss.",
)


def _table(head: tuple[str, ...], rows: list[tuple]) -> list[str]:
    cells = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(map(str, row)) + " |" for row in cells] + [""]


def _ours(found: dict[str, Perplexity], model: str) -> tuple[str, str]:
    """Perplexity and bits per byte."""
    if model not in found:
        return "not run", "not run"
    return str(found[model]), f"{found[model].bits:.3f}"


def _papers(model: str) -> str:
    return f"{PAPER[model]:.2f}" if model in PAPER else "-"


def _table_5a(found: dict[str, Perplexity]) -> list[str]:
    rows = []
    for biases, trapezoid, conv in itertools.product((False, True), (False, True), (False, True)):
        marks = ("yes" if on else "no" for on in (biases, trapezoid, conv))
        model = variant("trapezoid" if trapezoid else "euler", biases, conv)
        rows.append((*marks, *_ours(found, model), _papers(model)))
    head = ("biases", "trapezoid", "convolution", "perplexity per byte", "bits per byte", "paper, per word-piece, 440M")
    note = "Without the trapezoid is exponential-Euler; the paper's value with biases is that of its table 8."
    return ["## Table 5a: biases, trapezoid, convolution", "", note, "", *_table(head, rows)]


def _table_8(found: dict[str, Perplexity]) -> list[str]:
    combinations = ((True, False), (False, False), (True, True), (False, True))
    rows = [
        (name, *(_ours(found, variant(lam, *combination))[0] for combination in combinations), _papers(variant(lam)))
        for lam, name in LAMBDA_NAMES.items()
    ]
    head = ("lambda", "perplexity per byte, biases", "no biases", "biases, convolution", "no biases, convolution",
            "paper, biases, per word-piece, 440M")  # fmt: skip
    return ["## Table 8: lambda", "", *_table(head, rows)]


def _table_10a(found: dict[str, Perplexity]) -> list[str]:
    rows = [(name, *_ours(found, model), _papers(model)) for model, name in INIT_NAMES.items()]
    head = ("initial biases", "perplexity per byte", "bits per byte", "paper, per word-piece, 440M")
    return ["## Table 10a: initial B and C biases, with the trapezoid and no convolution", "", *_table(head, rows)]


def _comparisons(found: dict[str, Perplexity]) -> list[str]:
    """Each difference of the paper's tables: ours, and whether it is larger than what seeds make."""
    rows, verdicts = [], []
    for what, better, worse in COMPARISONS:
        if better in found and worse in found:
            verdicts.append(verdict(found[better], found[worse]))
            ours = (f"{100 * (found[worse].mean / found[better].mean - 1):+.2f}%", verdicts[-1])
        else:
            ours = ("not run", "not run")
        rows.append((what, f"{100 * (PAPER[worse] / PAPER[better] - 1):+.2f}%", *ours))
    compared = [v for v in verdicts if "no spread" not in v]
    conclusion = "No two variants were run with several seeds, so nothing is said about their order."
    if compared:
        outside = [v for v in compared if v.startswith("exceeds")]
        agree = sum(v.endswith("the paper's order") for v in outside)
        conclusion = (
            f"Of the {len(compared)} differences measured, {len(outside)} exceed the seeds' spread, {agree} of them in "
            f"the paper's order and {len(outside) - agree} in the opposite one; {len(compared) - len(outside)} do not, "
            "and of those this experiment says nothing."
        )
    n = min((len(p.seeds) for p in found.values()), default=0)
    rare = "" if n < 2 else (
        f" With {n} seeds each, equal variants do so in one comparison of {math.comb(2 * n, n) // 2}, and these share "
        "variants."
    )  # fmt: skip
    head = ("what helps in the paper", "without it, paper", "without it, ours", "the difference between ours")
    return [
        "## Do the differences exceed the seeds' spread?",
        "",
        f"{conclusion} A difference exceeds the spread if every seed of one variant is better than every seed of the "
        f"other.{rare}",
        "",
        *_table(head, rows),
    ]


def _accuracies(config: Config, done: Done) -> list[str]:
    rows = []
    for model in FACTORIAL:
        scores = [_score(done, model, task) for task in config.tasks]
        rows.append((model, *("not run" if s is None else f"{s['scaled']:.2f}" for s in scores)))
    seeds = {len(summary["seeds"]) for (_, task), summary in done.items() if task in config.tasks}
    spread = " One seed each: of small differences this says nothing." if seeds == {1} else ""
    return [
        "## Synthetic tasks",
        "",
        "Scaled accuracy in percent (0 is a guess, 100 is perfect) on unseen rows of exactly the length named; the "
        f"learning rate, seed and step are the best by validation. The paper has no such table.{spread}",
        "",
        *_table(("variant", *(_task_name(done, task) for task in config.tasks)), rows),
    ]


def _score(done: Done, model: str, task: str) -> dict | None:
    summary = done.get((model, task))
    return None if summary is None else summary["test"][summary["headline"]]


def _task_name(done: Done, task: str) -> str:
    lengths = {summary["headline"] for (_, name), summary in done.items() if name == task}
    name = TASK_NAMES.get(task, task.replace("mqar_", "MQAR, pairs: "))
    return f"{name} (length {', '.join(sorted(lengths))})" if lengths else name


def _deviations(command: Command[Config], done: Done) -> list[str]:
    """What every cell of a task does otherwise than the paper."""
    language_model = next(grid.cells(command.config.grids(command.smoke)[-1], command.smoke)).config
    lines = ["## Deviations from the paper", "", *(f"- language model: {text}" for text in _recipe(language_model))]
    for task in command.config.tasks:
        told = [summary["deviations"] for (_, name), summary in done.items() if name == task]
        if told and told[0] is not None:
            lines.append(f"- {_task_name(done, task)}, whose protocol is table 5b's:")
            lines += [f"    - {text}" for text in told[0] if not text.startswith(COMPARED)]
        elif told:
            lines.append(f"- {_task_name(done, task)}: not a task of these tables, so no protocol to deviate from")
    return [*lines, "", PAIRS + " Where all rows of a task have one length, that does not apply."]


# How a deviation begins that is what this experiment varies.
COMPARED = tuple(f"`model.{option}`" for option in FACTORIAL[variant()])


def _recipe(config: cell.Config) -> list[str]:
    """The language model's setting, and the paper's."""
    lm, optimizer = config.sweep().model, config.optimizer
    size = count_parameters(abstract_model(lm))
    length = config.curriculum.lengths[-1]
    asked = config.max_steps * config.batch_size * length
    mixer = config.model
    return [
        f"{size:,} parameters, {mixer.n_layers} layers of width {mixer.d_model}, state {mixer.d_state} and MLP "
        f"{mixer.mlp_width}; the paper's has 440M, state 128",
        f"bytes of Python's help() instead of word-pieces of FineWeb-Edu; {asked:,} bytes are trained on, with "
        "repetition, instead of a Chinchilla-optimal number of tokens once",
        f"context of {length} bytes instead of 2048 word-pieces, in training and, in windows that do not overlap, in "
        "validation and test; batches of "
        f"{config.batch_size * length:,} bytes instead of 0.5M tokens or more",
        f"float32 instead of bfloat16; AdamW ({optimizer.b1}, {optimizer.b2}), weight decay {optimizer.weight_decay}, "
        f"clip {optimizer.clip_norm}, {optimizer.warmup_steps} steps of warm-up, cosine to "
        f"{optimizer.end_learning_rate:g}, where the paper's recipe has (0.9, 0.95), 0.1, 1.0, cosine to 1e-05",
        f"peak rate chosen by validation loss among {', '.join(f'{rate:g}' for rate in config.learning_rates)}, and "
        "the step among validations; the paper's recipe has one fixed rate and its last step",
    ]


MARKERS = (dict(marker="o", color="black"), dict(marker="s", color="0.45"), dict(marker="^", color="0.7"))


def plot(command: Command[Config], done: Done) -> None:
    """discretization.png: perplexity of every variant, its mean and each seed; accuracy on every task."""
    found, names = perplexities(done), [*FACTORIAL, *BIAS_INITS]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained", sharey=True)
    for row, name in enumerate(names):
        if name in found:
            seeds = found[name].seeds
            left.plot(seeds, [row] * len(seeds), "o", color="0.45", markerfacecolor="none", markersize=6,
                      label="one seed" if "one seed" not in left.get_legend_handles_labels()[1] else None)  # fmt: skip
            left.plot(found[name].mean, row, "|", color="black", markersize=16, markeredgewidth=2,
                      label="mean" if "mean" not in left.get_legend_handles_labels()[1] else None)  # fmt: skip
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set(xlabel="perplexity per byte, test", title="language model of bytes")
    offsets = np.linspace(-0.27, 0.27, len(command.config.tasks)) if command.config.tasks else ()
    for shift, task, style in zip(offsets, command.config.tasks, itertools.cycle(MARKERS)):
        scores = {row: s["scaled"] for row, name in enumerate(FACTORIAL) if (s := _score(done, name, task))}
        right.plot(list(scores.values()), [row + shift for row in scores], linestyle="", markersize=7,
                   label=_task_name(done, task), **style)  # fmt: skip
    right.axvline(0, color="0.4", linestyle=":", label="chance")
    right.set(xlabel="scaled accuracy, %, test", title="synthetic tasks", xlim=(-15, 107))
    for axis in (left, right):
        for row in range(0, len(names), 2):
            axis.axhspan(row - 0.5, row + 0.5, color="0.95", zorder=0)
        axis.axhline(len(FACTORIAL) - 0.5, color="0.4", linewidth=1)
    if found:
        left.legend(fontsize=8, loc="best")
    # In the rows of variants that no synthetic task has.
    right.legend(fontsize=8, loc="lower center", title="below the line: language model only", title_fontsize=8)
    figure.savefig(command.results_dir / "discretization.png", dpi=130, metadata={"Software": None})
    plt.close(figure)
