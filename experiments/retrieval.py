"""Recall from the context, and word problems as its control: what does a state of fixed size hold?

    mamba3 experiment retrieval --config configs/retrieval.yaml

MQAR, selective copying, induction heads, a needle in a haystack and the word problems of three groups, for Mamba-3,
Mamba-2, Gated DeltaNet and softmax attention. Each cell is a sweep over learning rates whose best run by validation is
tested; induction heads and needles are tested again at lengths and depths that no cell trains on.
"""

import json
from collections.abc import Iterable
from typing import NamedTuple

import matplotlib
import numpy as np

from experiments import cell, grid
from experiments.command import Command, flatten, parse, to_dict
from experiments.further_tests import FURTHER, Probe, RetrievalConfig, run_further_tests
from experiments.grid import Cell
from experiments.report import precision
from mamba3_jax.tasks import MQAR_SETTINGS, get_task, induction_heads, needle
from mamba3_jax.tasks.word_problem import GROUPS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

Key = tuple[str, str, int]  # model, task of the grid, width

NAMES = {
    "mamba3": "Mamba-3",
    "mamba3-mimo": "Mamba-3, MIMO",
    "mamba3-conv": "Mamba-3, convolution",
    "mamba2": "Mamba-2",
    "gated_deltanet": "Gated DeltaNet",
    "attention": "attention, RoPE",
    "attention-nope": "attention, no positions",
}
STYLES = {
    "mamba3": dict(color="black", linestyle="-", marker="o"),
    "mamba3-mimo": dict(color="black", linestyle="--", marker="s"),
    "mamba3-conv": dict(color="black", linestyle=":", marker="P"),
    "mamba2": dict(color="0.6", linestyle="-.", marker="^"),
    "gated_deltanet": dict(color="0.35", linestyle="-", marker="v"),
    "attention": dict(color="0.35", linestyle="--", marker="D"),
    "attention-nope": dict(color="0.35", linestyle=":", marker="x"),
}
NOT_RUN, NOT_EVALUATED = "not run", "not evaluated"
# Length and pairs of each setting: as in figure 2 of arXiv:2312.04927, and with noise.
MQAR = {f"mqar_{pairs}_zeros": (length, pairs) for length, pairs in MQAR_SETTINGS}
MQAR_NOISE = {f"mqar_{pairs}": (length, pairs) for length, pairs in MQAR_SETTINGS}
ALL_MQAR = MQAR | MQAR_NOISE


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    command = parse("retrieval", RetrievalConfig, argv, cells=True)
    cell.use_all_cores()
    grid.check_only(command, command.config)
    status = grid.run(command, command.config)
    if not status:
        status = run_further_tests(command)
    write_report(command)
    return status


class Results(NamedTuple):
    """What is done of a grid: its cells, the summary of each, and all scores of each, by the test's name."""

    config: RetrievalConfig
    cells: dict[Key, Cell]
    summaries: dict[Key, dict]
    scores: dict[Key, dict[str, dict]]

    @classmethod
    def read(cls, command: Command[RetrievalConfig]) -> "Results":
        places = {place[:3]: place for place in grid.cells(command.config, command.smoke)}
        summaries, scores = grid.summaries(command), {}
        for key, summary in summaries.items():
            task, file = get_task(summary["task"]), command.results_dir / places[key].name / FURTHER
            own = summary["curve"] | {length: score for length, score in summary["test"].items() if length.isdigit()}
            own = {Probe(task, int(length)).name: score for length, score in own.items()}
            scores[key] = own | (json.loads(file.read_text()) if file.exists() else {})
        return cls(command.config, places, summaries, scores)

    def of(self, *tasks: str) -> list[Key]:
        """The cells of some tasks, done or not."""
        return [key for key, place in self.cells.items() if place.config.task in tasks]

    def done(self, *tasks: str) -> bool:
        """Whether a cell of some tasks is."""
        return any(key in self.summaries for key in self.of(*tasks))

    def score(self, key: Key, *tests: Probe) -> dict | None:
        """The mean accuracy and the number of rows of some tests; None if one of them is not done."""
        found = self.scores[key] if key in self.scores else {}
        if any(test.name not in found for test in tests):
            return None
        scores = [found[test.name] for test in tests]
        return dict(accuracy=np.mean([s["accuracy"] for s in scores]), rows=sum(s["rows"] for s in scores))

    def shown(self, key: Key, *tests: Probe) -> str:
        """The same in percent, or why there is nothing."""
        if score := self.score(key, *tests):
            return f"{100 * score['accuracy']:.1f}"
        longest = self.config.longest
        return NOT_EVALUATED if key[0] in longest and tests[0].length > longest[key[0]] else NOT_RUN


# What the sources train with, as options of experiments/cell.py, and in words what no option says.
MQAR_SOURCE = {
    "model.n_layers": 2,
    "model.mlp_width": 0,
    "model.n_heads": 1,
    "model.dtype": "float32",
    "supervision": "final",
    "curriculum.exact": True,
    "learning_rates": [1e-4, 4.6e-4, 2.2e-3, 1e-2],
    "optimizer.weight_decay": 0.1,
    "test_rows": 3000,
    "stop_accuracy": 0.99,
}
MQAR_SOURCE_BY_LENGTH = {
    64: {"batch_size": 512, "max_steps": 12_500},
    128: {"batch_size": 512, "max_steps": 12_500},
    256: {"batch_size": 256, "max_steps": 25_000},
    512: {"batch_size": 128, "max_steps": 50_000},
}
SOURCES: dict[str, dict] = {
    **{
        task: MQAR_SOURCE | {"curriculum.lengths": [length]} | MQAR_SOURCE_BY_LENGTH[length]
        for task, (length, _) in ALL_MQAR.items()
    },
    "selective_copying": {
        "model.n_layers": 2,
        "model.d_model": 64,
        "curriculum.lengths": [4112],
        "curriculum.exact": True,
        "learning_rates": [1e-4],
        "optimizer.schedule": "constant",
        "batch_size": 64,
        "max_steps": 400_000,
    },
    "induction_heads": {
        "model.n_layers": 2,
        "curriculum.lengths": [256],
        "curriculum.exact": True,
        "optimizer.schedule": "constant",
        "batch_size": 8,
        "max_steps": 204_800,
    },
}
IN_WORDS = (
    "MQAR (arXiv:2312.04927, figure 2, and its code): rows are drawn anew at every step instead of 64 passes over "
    "100,000 rows; attention has RoPE and no dropout, where the source has learned positions and dropout 0.1; the best "
    "rate, seed and step are selected by validation rows that are not the test's. Noise is that code's default, and "
    "zeros are what the figure's configs have.",
    "Selective copying and induction heads (arXiv:2312.00752, appendix E.1, whose code is unpublished): all models are "
    "as wide as Mamba-3 here; the markers that ask for the copies are those of state-spaces/s4.",
    "Needle in a haystack: tokens stand for the test's sentences, and rows of any length up to the longest are trained "
    "on, with the needle at a uniform depth. There is no published setting to match.",
    "Word problems (groups after arXiv:2404.08819): n ~ U{3..longest} tokens, every prefix's product is asked for in "
    "training and the whole's in tests, each block has an MLP, and the length grows in stages. There is no published "
    "setting of these models to match.",
    "Mamba-3 starts with step sizes up to 1 on word problems (`model.dt_max`), where the others keep their own start.",
    "States: every layer of Mamba-3, Mamba-2 and Gated DeltaNet holds expand * d_model * d_state numbers; MIMO has the "
    "same state and more parameters. Mamba-2 and Gated DeltaNet have their short convolution, Mamba-3 none but where "
    "its name says so.",
)


def deviations(results: Results) -> list[str]:
    """Every setting that differs from its source's, with the tasks that it holds for."""
    holders: dict[str, list[str]] = {}
    for place in results.cells.values():
        if place.config.task in SOURCES:
            ours = flatten(to_dict(place.config))
            for key, theirs in SOURCES[place.config.task].items():
                if ours[key] != theirs:
                    holders.setdefault(f"`{key}` is {ours[key]}; the source has {theirs}", []).append(place.task)
    return [f"{text} ({', '.join(_unique(tasks))})" for text, tasks in holders.items()]


def write_report(command: Command[RetrievalConfig]) -> None:
    """report.md and its figures, of the cells that are done."""
    results = Results.read(command)
    if not results.summaries:
        return
    for name, (plot, tasks) in FIGURES.items():
        if results.done(*tasks):
            figure = plot(results)
            figure.savefig(command.results_dir / name, dpi=130, metadata={"Software": None})
            plt.close(figure)
    (command.results_dir / "report.md").write_text(render(command, results))
    print(f"report: {command.results_dir / 'report.md'}")


def render(command: Command[RetrievalConfig], results: Results) -> str:
    """The tables, the figures, what was selected, and what deviates from the sources."""
    done = results.summaries.values()
    lines = [
        "# Recall from the context, and word problems",
        "",
        f"    {command.line}",
        "",
        "Accuracy in percent on unseen rows, over the whole vocabulary. In every cell the learning rate and the step",
        "that are best by validation are tested, once.",
        *_tasks_section(results, "MQAR", MQAR_TEXT, "mqar.png", _mqar_table, *MQAR),
        *_tasks_section(results, "MQAR with noise", NOISE_TEXT, None, _mqar_table, *MQAR_NOISE),
        *_tasks_section(results, "Selective copying", COPYING_TEXT, None, _length_table, "selective_copying"),
        *_tasks_section(
            results, "Induction heads", INDUCTION_TEXT, "induction_heads.png", _length_table, "induction_heads"
        ),
        *_tasks_section(results, "Needle in a haystack", NEEDLE_TEXT, "needle.png", _length_table, "needle"),
        *_tasks_section(results, "Word problems", WORD_TEXT, None, _word_table, *GROUPS),
        *_section("The cells", "What validation selected, and its test.", None, _cells_table(results)),
        *_section("Deviations from the sources", "", None, [f"- {x}" for x in (*deviations(results), *IN_WORDS)]),
        "",
        f"{len(done)} of {len(results.cells)} cells are done, in {grid.training_time(done)}; {_precisions(results)}.",
        "",
    ]
    return "\n".join(lines)


def _precisions(results: Results) -> str:
    """In what the tasks that are done computed."""
    tasks: dict[str, list[str]] = {}
    for key in results.summaries:
        config = results.cells[key].config
        tasks.setdefault(precision(config.model.dtype), []).append(config.task)
    return "; ".join(f"{text}: {', '.join(_unique(names))}" for text, names in tasks.items())


def _chance(*tasks: str) -> str:
    return ", ".join(f"{100 * get_task(task).chance:.3g}%" for task in tasks)


MQAR_TEXT = (
    "Multi-query associative recall against the width of the model, in rows of so many tokens and pairs; a guess among "
    f"all values scores {_chance('mqar_4')}, and one among the row's own 100% / pairs."
)
NOISE_TEXT = "The same with random tokens where the rows above have zeros, and half their batches but for 64 pairs."
COPYING_TEXT = (
    "Sixteen data tokens scattered in noise, asked for in order at the end, by the length of the row; a guess scores "
    f"{_chance('selective_copying')}."
)
INDUCTION_TEXT = (
    "What followed the special token the first time, by the length of the row; a guess scores "
    f"{_chance('induction_heads')}. Long rows are few, as the last line of the table says."
)
NEEDLE_TEXT = (
    "The value of a key, told once somewhere in a haystack, by the length of the row: the mean over the depths, which "
    f"the figure shows one by one. A guess scores {_chance('needle')}."
)
WORD_TEXT = (
    "The product of a sequence of elements of a group, by the length of the row. Z60 is commutative; S3 is not, but is "
    "solvable; S5 is not even that. The rotations of Mamba-3 commute, so that one layer can hold the state of Z60 but "
    "not that of S3 or S5, and in theory no number of layers suffices for S5 at all lengths (arXiv:2404.08819). A "
    f"guess scores {_chance('S3', 'S5', 'Z60')} in S3, S5 and Z60."
)


def _section(title: str, text: str, figure: str | None, body: list[str]) -> list[str]:
    parts = [[f"## {title}"], [text] if text else [], [f"![{title}]({figure})"] if figure else [], body]
    return [line for part in parts if part for line in ("", *part)]


def _tasks_section(results: Results, title: str, text: str, figure: str | None, table, *tasks: str) -> list[str]:
    """A section of some tasks, which a report that has none of their cells does not show in full."""
    if not results.done(*tasks):
        return _section(title, text, None, [f"{NOT_RUN[0].upper()}{NOT_RUN[1:]}."])
    return _section(title, text, figure, table(results, *tasks))


def _table(heads: list, rows: list[list]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (heads, ["---"] * len(heads), *rows)]


def _name(model: str) -> str:
    return NAMES[model] if model in NAMES else model


def _unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _setting(task: str) -> str:
    return "{} tokens, {} pairs".format(*ALL_MQAR[task])


def _mqar_table(results: Results, *settings: str) -> list[str]:
    models = _unique((model, d) for model, _, d in results.of(*settings))
    tests = {task: Probe(get_task(task), ALL_MQAR[task][0]) for task in settings}
    rows = [[_name(m), d, *(results.shown((m, task, d), test) for task, test in tests.items())] for m, d in models]
    return _table(["model", "d_model", *map(_setting, settings)], rows)


def _tests(results: Results, task: str) -> dict[int, list[Probe]]:
    """What a task is tested on, by length."""
    config, keys = results.config, results.of(task)
    if task == "induction_heads":
        return {length: [Probe(induction_heads(), length)] for length in config.induction_lengths}
    if task == "needle":
        return {n: [Probe(needle(depth), n) for depth in config.needle_depths] for n in config.needle_lengths}
    cells = [results.cells[key].config for key in keys]
    lengths = sorted({length for one in cells for length in (*one.exact_lengths, *one.curve_lengths)})
    return {length: [Probe(get_task(task), length)] for length in lengths}


def _trained(results: Results, keys: list[Key]) -> int:
    """The longest rows that some cells train on."""
    return max(results.cells[key].config.curriculum.lengths[-1] for key in keys)


def _length_table(results: Results, task: str) -> list[str]:
    keys, tests = results.of(task), _tests(results, task)
    trained = _trained(results, keys)
    rows = [[_name(key[0]), *(results.shown(key, *tests[length]) for length in tests)] for key in keys]
    counts = [{score["rows"] for key in keys if (score := results.score(key, *tests[length]))} for length in tests]
    rows.append(["test rows", *(", ".join(map(str, sorted(count))) or "-" for count in counts)])
    return _table(["model", *(f"{length} (trained)" if length == trained else length for length in tests)], rows)


def _word_table(results: Results, *groups: str) -> list[str]:
    """A row per model and depth, a column per group and length."""
    keys = results.of(*groups)
    cells = {(k[0], results.cells[k].config.model.n_layers, results.cells[k].config.task): k for k in keys}
    there = _unique(group for _, _, group in cells)
    columns = [(group, length, test) for group in there for length, test in _tests(results, group).items()]
    trained = _trained(results, keys)
    heads = [f"{group}, {length}{' (trained)' if length == trained else ''}" for group, length, _ in columns]
    rows = [
        [_name(m), n, *(results.shown(cells[m, n, g], *t) if (m, n, g) in cells else NOT_RUN for g, _, t in columns)]
        for m, n in sorted(_unique(cell[:2] for cell in cells), key=lambda row: row[1])
    ]
    return _table(["model", "layers", *heads], rows)


def _cells_table(results: Results) -> list[str]:
    heads = ["cell", "learning rate", "step", "of steps", "test, %", "standard error", "test rows", "training, s"]
    rows = []
    for key, summary in results.summaries.items():
        run, score = summary["selected"], summary["test"][summary["headline"]]
        error = 100 * np.sqrt(score["accuracy"] * (1 - score["accuracy"]) / score["rows"])
        rows.append([
            results.cells[key].name, f"{run['learning_rate']:g}", run["best_step"], summary["steps"],
            f"{100 * score['accuracy']:.1f}", f"{error:.1f}", score["rows"], f"{summary['seconds']:.0f}",
        ])  # fmt: skip
    return _table(heads, rows)


def plot_mqar(results: Results) -> plt.Figure:
    """Accuracy against width, a panel per setting and a line per model, as in figure 2 of arXiv:2312.04927."""
    figure, axes = plt.subplots(1, len(MQAR), figsize=(12, 3.2), layout="constrained", sharey=True)
    for axis, task in zip(axes, MQAR):
        keys, test = results.of(task), Probe(get_task(task), MQAR[task][0])
        for model in _unique(key[0] for key in keys):
            points = {d: score for m, _, d in keys if m == model and (score := results.score((m, task, d), test))}
            _line(axis, model, points)
        widths = sorted({key[2] for key in keys})
        axis.set_xscale("log", base=2)
        axis.set_xticks(widths, widths)
        axis.minorticks_off()
        axis.set(xlabel="model width d_model, channels", title=_setting(task), ylim=(-4, 104))
        if widths:
            axis.set_xlim(widths[0] / 1.2, widths[-1] * 1.2)
    axes[0].set_ylabel("accuracy, %")
    _legend(figure, axes)
    return figure


def plot_induction(results: Results) -> plt.Figure:
    """Accuracy against the length of the row, with the trained length marked."""
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    keys, tests = results.of("induction_heads"), _tests(results, "induction_heads")
    for key in keys:
        _line(axis, key[0], {length: s for length, test in tests.items() if (s := results.score(key, *test))})
    if keys:
        axis.axvline(_trained(results, keys), color="0.8", linewidth=5, zorder=0, label="trained length")
    axis.axhline(100 * induction_heads().chance, color="0.8", linewidth=1, label="a guess")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="row length, tokens", ylabel="accuracy, %", ylim=(-4, 104))
    _legend(figure, [axis])
    return figure


def plot_needle(results: Results) -> plt.Figure:
    """Accuracy at each length and depth, a panel per model."""
    keys, config = results.of("needle"), results.config
    figure, axes = plt.subplots(
        2, max(1, -(-len(keys) // 2)), figsize=(12, 5.6), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(keys) :]:
        axis.set_axis_off()
    image = None
    for axis, key in zip(axes.flat, keys):
        scores = [
            [results.score(key, Probe(needle(depth), length)) for length in config.needle_lengths]
            for depth in config.needle_depths
        ]
        percent = np.array([[np.nan if s is None else 100 * s["accuracy"] for s in row] for row in scores])
        image = axis.imshow(percent, cmap="gray", vmin=0, vmax=100, aspect="auto")
        axis.patch.set(hatch="////", edgecolor="0.6")  # what shows where nothing was measured
        for (y, x), value in np.ndenumerate(percent):
            if not np.isnan(value):
                color = "white" if value < 50 else "black"
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
        axis.set_xticks(range(len(config.needle_lengths)), config.needle_lengths, rotation=45)
        axis.set_yticks(range(len(config.needle_depths)), [f"{depth:g}" for depth in config.needle_depths])
        axis.set_title(_name(key[0]), fontsize=9)
    figure.supxlabel("row length, tokens", fontsize=10)
    figure.supylabel("depth of the needle, 0 first, 1 last", fontsize=10)
    if image is not None:
        trained = _trained(results, keys)
        figure.colorbar(image, ax=axes, label=f"accuracy, % (trained on up to {trained} tokens; hatched: not run)")
    return figure


# And of which tasks.
FIGURES = {
    "mqar.png": (plot_mqar, tuple(MQAR)),
    "induction_heads.png": (plot_induction, ("induction_heads",)),
    "needle.png": (plot_needle, ("needle",)),
}


def _line(axis: plt.Axes, model: str, scores: dict[int, dict]) -> None:
    if not scores:
        return  # nor a line in the legend
    style = STYLES[model] if model in STYLES else {}
    values = [100 * scores[x]["accuracy"] for x in sorted(scores)]
    axis.plot(sorted(scores), values, label=_name(model), markersize=5, markerfacecolor="none", **style)


def _legend(figure: plt.Figure, axes: Iterable[plt.Axes]) -> None:
    """One legend for all panels, below them."""
    lines = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
    columns = max(1, min(len(lines), int(figure.get_figwidth() / 1.8)))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, fontsize=8)
