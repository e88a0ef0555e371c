"""Table 5b of arXiv:2603.15569, whole: which models keep a state that they were asked to keep?

    mamba3 experiment table_5b --config configs/state_tracking/table_5b.yaml

Mamba-3, its rotation replaced or left out, Mamba-2 and Gated DeltaNet, on parity and on arithmetic modulo 5 without and
with brackets. Each cell is a sweep over learning rates; of all widths and rates the best by validation is tested.
Four more columns, which the paper has not, have brackets with heads of 16, without and with weight decay, and, asked
for the running value at every digit, with heads of 64 and of 16.
"""

import matplotlib

from experiments import cell, grid
from experiments.command import Command, parse
from experiments.grid import GridConfig
from experiments.report import PAIRS, seeds_text
from experiments.state_tracking import deviations
from mamba3_jax.tasks import get_task, scaled_accuracy

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

# Scaled accuracy at length 256, percent.
PAPER = {
    ("mamba3", "parity"): 100.00,
    ("mamba3", "modular_arithmetic"): 98.51,
    ("mamba3", "modular_arithmetic_brackets"): 87.75,
    ("mamba3-rope", "parity"): 1.56,
    ("mamba3-rope", "modular_arithmetic"): 20.70,
    ("mamba3-rope", "modular_arithmetic_brackets"): 2.62,
    ("mamba3-none", "parity"): 2.27,
    ("mamba3-none", "modular_arithmetic"): 1.49,
    ("mamba3-none", "modular_arithmetic_brackets"): 0.72,
    ("mamba2", "parity"): 0.90,
    ("mamba2", "modular_arithmetic"): 47.81,
    ("mamba2", "modular_arithmetic_brackets"): 0.88,
    ("gated_deltanet", "parity"): 100.00,
    ("gated_deltanet", "modular_arithmetic"): 99.25,
    ("gated_deltanet", "modular_arithmetic_brackets"): 93.50,
}
NAMES = {
    "mamba3": "Mamba-3",
    "mamba3-rope": "Mamba-3, standard RoPE",
    "mamba3-none": "Mamba-3, no RoPE",
    "mamba2": "Mamba-2",
    "gated_deltanet": "Gated DeltaNet, eigenvalues in [-1, 1]",
}
TASK_NAMES = {
    "parity": "parity",
    "modular_arithmetic": "mod 5, no brackets",
    "modular_arithmetic_brackets": "mod 5, brackets",
    "modular_arithmetic_brackets,head_dim=16": "mod 5, brackets, heads of 16",
    "modular_arithmetic_brackets,head_dim=16,weight_decay=0.1": "mod 5, brackets, heads of 16, weight decay 0.1",
    "modular_arithmetic_brackets,every": "mod 5, brackets, asked at every digit",
    "modular_arithmetic_brackets,every,head_dim=16": "mod 5, brackets, asked at every digit, heads of 16",
}


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    command = parse("table_5b", GridConfig, argv, cells=True)
    cell.use_all_cores()
    grid.check_only(command, command.config)
    status = grid.run(command, command.config, deviations=deviations)
    write_report(command)
    return status


def write_report(command: Command[GridConfig]) -> None:
    """report.md and table.png, of the cells that are done."""
    done = grid.summaries(command)
    if not done:
        return
    command.results_dir.mkdir(parents=True, exist_ok=True)
    (command.results_dir / "report.md").write_text(render(command, done))
    plot(command, done)
    print(f"report: {command.results_dir / 'report.md'}")


def render(command: Command[GridConfig], done: dict[tuple[str, str, int], dict]) -> str:
    """The table beside the paper's, how each cell was selected, and what deviates from the protocol."""
    config = command.config
    lines = [
        "# State tracking: table 5b of arXiv:2603.15569",
        "",
        f"    {command.line}",
        "",
        "Scaled accuracy in percent (0 is a guess, 100 is perfect) on unseen rows of exactly 256 tokens, ours and in",
        "brackets the paper's. The test of the width, learning rate, seed and step that are best by validation; with a",
        "star, of one width where another was not run; a dash where none is planned.",
        "",
        "| model | " + " | ".join(_task_name(task) for task in config.tasks) + " |",
        "| --- |" + " --- |" * len(config.tasks),
    ]
    chosen = {(m, t): best for m in config.models for t in config.tasks if (best := _best(done, m, t))}
    there = {(model, task) for model, task, _ in config.places}
    for model in config.models:
        cells = []
        for task in config.tasks:
            ours = "not run" if (model, task) in there else "-"
            if (model, task) in chosen:
                whole = all(place in done for place in config.places if place[:2] == (model, task))
                ours = f"{_score(chosen[model, task])['scaled']:.2f}{'' if whole else '*'}"
            paper = PAPER.get((model, task))
            cells.append(ours if paper is None else f"{ours} ({paper:.2f})")
        lines.append("| " + " | ".join([NAMES.get(model, model), *cells]) + " |")
    lines += [
        "",
        "![accuracy against length](table.png)",
        "",
        "## The cells",
        "",
        "Width, learning rate, seed and step were selected by validation at length 256.",
        "",
        "| model | task | width | learning rate | seed | step | test, scaled % | standard error | test rows | "
        "rows of 40-256 | longest rows trained | other widths, validation | seeds |",
        "|" + " --- |" * 13,
    ]
    for (model, task), summary in chosen.items():
        run, score, mixed = summary["selected"], _score(summary), summary["test"].get("40-256")
        others = [f"{d}: {100 * _validation(other):.2f}" for (m, t, d), other in done.items()
                  if (m, t) == (model, task) and d != summary["d_model"]]  # fmt: skip
        seeds = seeds_text(summary) if len(summary["seeds"]) > 1 else "1"
        cells = (
            NAMES.get(model, model), _task_name(task), summary["d_model"], f"{run['learning_rate']:g}", run["seed"],
            run["best_step"], f"{score['scaled']:.2f}", f"{score['standard_error']:.2f}", score["rows"],
            "-" if mixed is None else f"{mixed['scaled']:.2f}", run["max_length"], ", ".join(others) or "-", seeds,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", *_cost(command, done), ""]
    lines += ["## Deviations from the protocol (the paper's appendix D)", ""]
    lines += [*_deviations(done), *_unreached(command, done), "", PAIRS]
    lines += ["", f"{len(done)} cells, in {grid.training_time(done.values())}.", ""]
    return "\n".join(lines)


def _cost(command: Command[GridConfig], done: dict[tuple[str, str, int], dict]) -> list[str]:
    """What the rows of the paper's table took, which has all widths of its three tasks."""
    lines = [
        "## Training time of the paper's rows",
        "",
        "Of the cells in the paper's columns: each cell's own time, also where several shared a device.",
        "",
        "| model | cells done | minutes | on |",
        "| --- | --- | --- | --- |",
    ]
    for model in command.config.models:
        planned = [place for place in command.config.places if place[:2] in PAPER and place[0] == model]
        ran = [done[place] for place in planned if place in done]
        minutes = sum(summary["seconds"] for summary in ran) / 60
        devices = " / ".join(sorted({summary["device"] for summary in ran})) or "-"
        lines.append(f"| {NAMES.get(model, model)} | {len(ran)} of {len(planned)} | {minutes:.1f} | {devices} |")
    return lines


def _deviations(done: dict[tuple[str, str, int], dict]) -> list[str]:
    """Each deviation once, with the cells that it holds for."""
    holders: dict[str, list[str]] = {}
    for (model, task, d), summary in done.items():
        for text in summary["deviations"]:
            holders.setdefault(text, []).append(f"{model},{task},d={d}")
    everyone = [f"{model},{task},d={d}" for model, task, d in done]
    lines = []
    for text, names in holders.items():
        others = [name for name in everyone if name not in names]
        where = ", ".join(names)
        if len(others) < len(names):
            where = "all cells" + (f" but {', '.join(others)}" if others else "")
        lines.append(f"- {text} ({where})")
    return lines


def _unreached(command: Command[GridConfig], done: dict[tuple[str, str, int], dict]) -> list[str]:
    """The cells whose stages take so long that a run without progress ends before the last one."""
    holders: dict[int, list[str]] = {}
    for place in grid.cells(command.config, command.smoke):
        lengths, each = place.config.curriculum.lengths, place.config.curriculum.stage_steps
        last = (place.config.max_steps - 1) // each
        if place[:3] in done and last < len(lengths) - 1:
            holders.setdefault(lengths[last], []).append(place.name)
    return [
        f"- a run that meets no gate ends in the stage of {length} tokens, before the last one, which such a run "
        f"reaches in the protocol ({', '.join(names)})"
        for length, names in sorted(holders.items())
    ]


def _best(done: dict, model: str, task: str) -> dict | None:
    """The summary of the width that validated best."""
    widths = [d for m, t, d in done if (m, t) == (model, task)]
    if not widths:
        return None
    d = max(widths, key=lambda d: _validation(done[model, task, d]))
    return done[model, task, d] | {"d_model": d}


def _validation(summary: dict) -> float:
    """Scaled validation accuracy of the selected run, a fraction."""
    best = summary["selected"]["validation"].get(summary["headline"])
    return -1.0 if best is None else scaled_accuracy(best["accuracy"], get_task(summary["task"]).chance)


def _task_name(task: str) -> str:
    return TASK_NAMES.get(task, task)


def _score(summary: dict) -> dict:
    return summary["test"][summary["headline"]]


STYLES = {
    "mamba3": dict(color="black", linestyle="-", marker="o"),
    "mamba3-rope": dict(color="0.35", linestyle="--", marker="s"),
    "mamba3-none": dict(color="0.35", linestyle=":", marker="D"),
    "mamba2": dict(color="0.6", linestyle="-.", marker="^"),
    "gated_deltanet": dict(color="0.6", linestyle="-", marker="v"),
}


def plot(command: Command[GridConfig], done: dict[tuple[str, str, int], dict]) -> None:
    """table.png: accuracy against length, a panel per task and a line per model."""
    config = command.config
    columns = min(3, len(config.tasks))
    rows = -(-len(config.tasks) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.2 * rows + 0.6), layout="constrained", sharey=True, squeeze=False
    )
    for axis in axes.flat[len(config.tasks) :]:
        axis.set_axis_off()
    for axis, task in zip(axes.flat, config.tasks):
        trained = 0
        for model in config.models:
            summary = _best(done, model, task)
            if summary is None:
                continue
            measured = summary["curve"] | {k: v for k, v in summary["test"].items() if k.isdigit()}
            lengths = sorted(map(int, measured))
            values = [measured[str(length)]["scaled"] for length in lengths]
            axis.plot(lengths, values, label=NAMES.get(model, model), markersize=4, **STYLES.get(model, {}))
            trained = max(trained, summary["selected"]["max_length"])
        if trained:
            axis.axvspan(0, trained, color="0.9")
        else:
            axis.text(0.5, 0.5, "not run", ha="center", va="center", transform=axis.transAxes)
        axis.axhline(0, color="0.4", linestyle=":", linewidth=1)
        axis.set(xlabel="row length, tokens", ylim=(-15, 107))
        axis.set_title(f"{_task_name(task)}\n(grey: up to the longest rows trained)")
        axis.title.set_fontsize(9)
    for axis in axes[:, 0]:
        axis.set_ylabel("scaled accuracy, %")
    lines = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(lines.values(), lines.keys(), fontsize=8, loc="outside lower center", ncols=columns)
    figure.savefig(command.results_dir / "table.png", dpi=130, metadata={"Software": None})
    plt.close(figure)
