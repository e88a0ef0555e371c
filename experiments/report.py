"""What a sweep leaves behind: summary.json, a figure, and a report that names every deviation from a protocol."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Float, Int

from mamba3_jax.inference.reports import environment
from mamba3_jax.models import LM
from mamba3_jax.tasks import get_task, scaled_accuracy

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)


def summarize(
    command,
    training,
    chosen: list[int],
    test: dict[str, dict],
    rows: dict[str, int],
    curve: dict[int, dict],
    deviations: list[str] | None,
) -> dict:
    """All figures of the report, as plain values. Accuracies are fractions, `scaled` is in percent, losses in nats.

    Args:
        command: the parsed command line.
        training: the finished sweep.
        chosen: each seed's best run by validation.
        test: accuracy and loss of the chosen runs on each test set.
        rows: of each test set.
        curve: of the best of them at each further length.
        deviations: from a published protocol; None if there is none.
    """
    config = command.config
    chance = get_task(config.task).chance
    runs = [
        dict(learning_rate=rate, seed=seed, best_step=training.best_step[i], validation=training.best_validation[i],
             max_length=training.best_length[i], failed=i in training.last["failed"])
        for i, (rate, seed) in enumerate(config.pairs)
    ]  # fmt: skip
    selected = training.best_of(chosen)

    def score(accuracy: float, loss: float, rows: int) -> dict[str, float]:
        error = np.sqrt(accuracy * (1 - accuracy) / rows) / (1 - chance)
        scaled = scaled_accuracy(accuracy, chance)
        return dict(
            accuracy=accuracy, loss=loss, scaled=100 * scaled, standard_error=100 * float(error), rows=rows
        )

    def scores(values: dict, rows: int) -> list[dict[str, float]]:
        return [score(*pair, rows) for pair in zip(values["accuracy"], values["loss"])]

    tested = {name: scores(values, rows[name]) for name, values in test.items()}
    return dict(
        task=config.task,
        model=config.model.mixer,
        headline=config.headline,
        command=command.line,
        selected=runs[selected],
        test={name: values[chosen.index(selected)] for name, values in tested.items()},
        seeds=[
            dict(run=runs[i], test={name: values[k] for name, values in tested.items()}) for k, i in enumerate(chosen)
        ],
        curve={str(length): scores(values, config.validation_rows)[0] for length, values in curve.items()},
        runs=runs,
        deviations=deviations,
        steps=training.step,
        seconds=round(training.seconds, 1),
        **_environment(training.trained_on),
    )


def _environment(trained_on: list[dict]) -> dict:
    """The devices of the training, and of the test where it is made on others; and the versions that trained."""
    trained, here = "; then ".join(machine["device"] for machine in trained_on), environment()["device"]
    versions = {}
    for machine in trained_on:
        for name, version in machine["versions"].items():
            versions.setdefault(name, []).append(version)
    return dict(
        device=trained if trained_on[-1]["device"] == here else f"{trained}; its test on {here}",
        versions={name: ", then ".join(dict.fromkeys(each)) for name, each in versions.items()},
    )


def headline(summary: dict) -> str:
    """The result in one line."""
    length, cost = summary["headline"], f"{summary['steps']} steps and {summary['seconds']:.0f} s of training"
    score = summary["test"][length]
    return (
        f"{summary['task']}: {score['scaled']:.2f} +- {score['standard_error']:.2f} scaled accuracy at length {length} "
        f"({score['rows']} test rows), after {cost}"
    )


def render(command, summary: dict) -> str:
    """report.md."""
    config = command.config
    chance = get_task(config.task).chance
    chosen = summary["selected"]
    lines = [
        f"# {summary['task']}: {command.results_dir.name}",
        "",
        f"    {summary['command']}",
        "",
        headline(summary) + ".",
        f"Trained on rows of at most {chosen['max_length']} tokens, of a curriculum up to "
        f"{config.curriculum.lengths[-1]}; chance is {100 * chance:.3g}% accuracy, which is 0 scaled.",
        "",
        "| rows of length | scaled accuracy, % | standard error | accuracy, % | loss, nats | test rows |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, score in summary["test"].items():
        lines.append(
            f"| {name} | {score['scaled']:.2f} | {score['standard_error']:.2f} | {100 * score['accuracy']:.2f} "
            f"| {score['loss']:.4f} | {score['rows']} |"
        )
    lines += [
        "",
        f"Selected by validation at length {summary['headline']} (never by the test set): learning rate "
        f"{chosen['learning_rate']:g}, seed {chosen['seed']}, step {chosen['best_step']}.",
    ]
    if len(summary["seeds"]) > 1:
        lines += ["", f"Each seed's best run by validation, tested: {seeds_text(summary)}."]
    if len(summary["seeds"]) < config.n_seeds:
        lines += ["", f"{config.n_seeds - len(summary['seeds'])} seeds have no run that lived to its first validation."]
    lines += [
        "",
        "![accuracy against length, and the learned turn per token](accuracy.png)",
        "",
        "## All runs",
        "",
        f"| learning rate | seed | validation at {summary['headline']}, scaled % | at step | longest rows trained |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run in summary["runs"]:
        best = run["validation"].get(summary["headline"])
        shown = "-" if best is None else f"{100 * scaled_accuracy(best['accuracy'], chance):.2f}"
        shown += ", then failed (a loss or gradient that is not finite)" if run["failed"] else ""
        cells = (f"{run['learning_rate']:g}", run["seed"], shown, run["best_step"], run["max_length"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if summary["deviations"] is not None:
        lines += ["", "## Deviations from the protocol (the paper's appendix D)", ""]
        lines += [f"- {line}" for line in summary["deviations"]] or ["None."]
    if not config.curriculum.exact:
        lines += ["", PAIRS]
    lines += [
        "",
        f"Trained for {summary['steps']} steps of {config.batch_size} rows, {len(summary['runs'])} runs at once, in "
        f"{summary['seconds']:.0f} s on {summary['device']}; {precision(config.model.dtype)}; "
        + (", ".join(f"{name} {number}" for name, number in summary["versions"].items()) or "versions not recorded")
        + ".",
        "",
    ]
    return "\n".join(lines)


def precision(dtype: str) -> str:
    """How exactly a cell computed, by the dtype of its matrix products."""
    return "float32 with full matmul precision" if dtype == "float32" else f"matrix products in {dtype}"


# A property of the data stream that the protocol does not have, so it is said in every report.
PAIRS = (
    "Training rows come in pairs of lengths n and shortest + longest - n that share a padded row: every row's length "
    "is uniform, as in the protocol, and the two of a pair depend on each other."
)


def seeds_text(summary: dict) -> str:
    """Mean, standard deviation over seeds, and each seed's headline, scaled."""
    values = [seed["test"][summary["headline"]]["scaled"] for seed in summary["seeds"]]
    each = ", ".join(f"{value:.2f}" for value in values)
    return f"mean {np.mean(values):.2f}, standard deviation {np.std(values, ddof=1):.2f} ({each})"


def turns_by_token(model: LM, tokens: Int[Array, "b t"]) -> Float[Array, "layers vocab hs"]:
    """Mean turn dt * omega in radians that each token makes each head and pair take, layer by layer; NaN if unused."""
    x = model.embedding[...][tokens]
    one_hot = jax.nn.one_hot(tokens, model.config.vocab_size)
    seen = one_hot.sum((0, 1))[:, None]
    layers = []
    for block in model.blocks:
        u = block.norm(x)
        if model.config.mixer.rotation == "data_dependent":
            dynamics = block.mixer.dynamics(u)
            turn = (dynamics["dt"][..., None] * dynamics["omega"]).reshape(*tokens.shape, -1)
            layers.append(jnp.einsum("btv,bts->vs", one_hot, turn) / jnp.where(seen > 0, seen, jnp.nan))
        x, _ = block(x, None, None)
    return jnp.stack(layers) if layers else jnp.zeros((0, model.config.vocab_size, 0))


def plot(path: Path, summary: dict, turns: Float[Array, "layers vocab hs"] | None) -> None:
    """accuracy.png: accuracy against length with the training range shaded, and the learned turn per token."""
    figure, axes = plt.subplots(1, 1 if turns is None else 2, figsize=(11 if turns is not None else 6, 4.2),
                                layout="constrained", squeeze=False)  # fmt: skip
    left = axes[0, 0]
    measured = summary["curve"] | {name: score for name, score in summary["test"].items() if name.isdigit()}
    lengths = sorted(map(int, measured))
    scores = [measured[str(length)] for length in lengths]
    left.axvspan(0, summary["selected"]["max_length"], color="0.88", label="lengths trained on")
    left.axhline(0, color="0.4", linestyle=":", label="chance")
    left.errorbar(
        lengths, [s["scaled"] for s in scores], [2 * s["standard_error"] for s in scores],
        color="black", marker="o", markersize=4, capsize=2, label="best run by validation (2 standard errors)",
    )  # fmt: skip
    left.set(xlabel="row length, tokens", ylabel="scaled accuracy, %", xlim=(0, lengths[-1] * 1.02), ylim=(-15, 107))
    chosen = summary["selected"]
    left.set_title(f"{summary['task']}: learning rate {chosen['learning_rate']:g}, seed {chosen['seed']}")
    left.legend(loc="center left", fontsize=8)
    if turns is not None:
        _plot_turns(axes[0, 1], get_task(summary["task"]).symbols, np.asarray(turns))
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _plot_turns(axis, symbols: tuple[str, ...], turns: np.ndarray) -> None:
    """One mark per layer, head and pair: how far it turns at each token, modulo a full turn."""
    if not turns.size:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no data-dependent rotation", ha="center", va="center")
        return
    used = [i for i in range(turns.shape[1]) if np.isfinite(turns[:, i]).all()]
    for y in (0, 1):
        axis.axhline(y, color="0.8", linewidth=1)
    markers = "osD^v"
    for layer, by_token in enumerate(turns):
        shift = 0.25 * (layer - (len(turns) - 1) / 2)
        for x, token in enumerate(used):
            half_turns = (by_token[token] / np.pi + 0.5) % 2 - 0.5
            jitter = shift + np.linspace(-0.08, 0.08, len(half_turns))
            axis.plot(
                x + jitter, half_turns, markers[layer % len(markers)], markersize=5, markerfacecolor="none",
                color=str(0.5 * layer / max(1, len(turns) - 1)), label=f"layer {layer + 1}" if x == 0 else None,
            )  # fmt: skip
    # Where names would run into one another only every second, third, ... token's; the axis is some 45 letters wide.
    names = [symbols[i] for i in used]
    every = max(1, math.ceil(sum(1 + len(name) for name in names) / 45))
    axis.set_xticks(range(0, len(used), every), names[::every])
    axis.set(xlabel="token", ylabel="mean turn per token, half turns", ylim=(-0.55, 1.55))
    axis.set_title("learned rotation, one mark per head and pair")
    axis.legend(loc="center", fontsize=8)
