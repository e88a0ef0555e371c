"""Is the trapezoid one order better than exponential-Euler? Section 3.1 of arXiv:2603.15569, measured on the library.

    mamba3 experiment local_error

Fits the slopes of log error against log dt, of exponential-Euler, the trapezoid and learned lambdas. How an error is
measured is in experiments/orders.py. A results directory holds summary.json, order.png and report.md.
"""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from experiments.command import Command, parse
from experiments.orders import (
    FIXED,
    FREE,
    LEARNED_ORDER,
    LINEAR,
    NUMBER,
    QUANTITIES,
    SCHEMES,
    STEP,
    SYSTEMS,
    Config,
    Learned,
    learn,
    measure,
    slope,
    theory,
)
from mamba3_jax.command import results_folder

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    command = parse("local_error", Config, argv)
    directory = results_folder(command.results_dir)
    summary = run(command)
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(directory / "order.png", command.config, summary)
    (directory / "report.md").write_text(render(command, summary))
    print(headline(summary))
    print(f"report: {directory / 'report.md'}, figure: {directory / 'order.png'}")
    return 0


def run(command: Command[Config]) -> dict:
    """All figures of the report, as plain values."""
    config, began = command.config, time.perf_counter()
    learned = {}
    with jax.enable_x64(True):
        fixed = {
            name: {label: measure(config, system, scheme) for label, scheme in SCHEMES.items()}
            for name, system in SYSTEMS.items()
        }
        keys = jax.vmap(jax.random.key)(jnp.asarray(config.seeds))
        for kind, modulation in (("constant A", 0.0), ("varying A", config.modulation)):
            print(f"training lambda on {config.systems} random systems of {kind} ...", flush=True)
            results = jax.vmap(lambda key: learn(key, config, modulation))(keys)
            learned[kind] = {label: _plain(config, results[label]) for label in (*FIXED, *LEARNED_ORDER)}
    return dict(
        command=command.line,
        dts=config.dts,
        fixed=fixed,
        learned=learned,
        seconds=round(time.perf_counter() - began, 1),
        device=f"{jax.devices()[0].device_kind} ({jax.default_backend()}), {platform.machine()}",
        versions={name: version(name) for name in ("jax", "optax", "numpy")},
    )


def _plain(config: Config, result: Learned) -> dict:
    """Slopes and weights of every seed, the rest as medians over the seeds."""
    medians = {name: np.median(getattr(result, name), axis=0).tolist() for name in ("error", "lam", "distance")}
    slopes = [slope(config.dts, error) for error in result.error]
    return dict(slopes=slopes, weights=result.weights.tolist(), **medians)


def headline(summary: dict) -> str:
    """The result in one line."""
    integrals = {
        label: [by_scheme[label]["integral"]["slope"] for by_scheme in summary["fixed"].values()] for label in FIXED
    }
    shown = (f"{label} {_span(integrals[label])}" for label in FIXED)
    return f"order of the integral's local error: {', '.join(shown)}"


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def render(command: Command[Config], summary: dict) -> str:
    """report.md."""
    dts = summary["dts"]
    fitted = f"{dts[len(dts) // 2]:.3g} to {dts[-1]:.3g}"
    smallest = min(m["errors"][-1] for r in summary["fixed"].values() for s in r.values() for m in s.values())
    lines = [
        f"# Order of the local error: {command.results_dir.name}",
        "",
        f"    {summary['command']}",
        "",
        headline(summary)[0].upper() + headline(summary)[1:] + ".",
        "",
        "Slopes of log error against log dt, fitted for every row alike over the smaller half of the step sizes, "
        f"{fitted} units of time, where the next power of dt no longer bends them; the smallest error there is "
        f"{smallest:.0e}, far above float64's rounding. Errors are root mean squares over {command.config.starts} "
        "starting times. In brackets what theory says.",
    ]
    for quantity, title in QUANTITIES.items():
        lines += ["", f"## {title}", "", _row("system", *SCHEMES), _row(*["---"] * (1 + len(SCHEMES)))]
        for name, by_scheme in summary["fixed"].items():
            measured = (m[quantity] for m in by_scheme.values())
            lines.append(_row(name, *(f"{m['slope']:.2f} ({m['theory']})" for m in measured)))
    lines += ["", "![local error against step size, and the learned lambda](order.png)", "", *_render_learned(summary)]
    lines += [
        "",
        f"float64, {summary['seconds']:.0f} s on {summary['device']}; "
        + ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _render_learned(summary: dict) -> list[str]:
    dts, (constant, varying) = summary["dts"], summary["learned"].values()
    trapezoid = constant["trapezoid"]
    lines = [
        "## Learned lambda: the integral's local error on systems it was not trained on",
        "",
        _row("lambda", "slope, constant A", "slope, varying A", "as dt goes to 0",
             "error over the trapezoid's at smallest dt", "distance from 1/2 at largest and smallest dt"),
        _row(*["---"] * 6),
    ]  # fmt: skip
    for label, mine in constant.items():
        order = LEARNED_ORDER.get(label) or theory("integral", SCHEMES[label], False)
        ratio = mine["error"][-1] / trapezoid["error"][-1]
        lines.append(
            _row(label, _span(mine["slopes"]), _span(varying[label]["slopes"]), str(order), f"{ratio:.3g}",
                 f"{mine['distance'][0]:.1e}, {mine['distance'][-1]:.1e}")
        )  # fmt: skip
    return [
        *lines,
        "",
        "Slopes span the seeds; the last two columns are medians over them, for constant A. The token is a bias and "
        "|u| at both ends of the step, the step is dt A and dt |omega|.",
        "",
        _reading(dts, constant),
    ]


def _reading(dts: list[float], results: dict) -> str:
    """What the tables say, with their figures."""
    trapezoid, free, number, linear = (results[label] for label in ("trapezoid", FREE, NUMBER, LINEAR))
    gain = 100 * (1 - free["error"][-1] / trapezoid["error"][-1])
    return (
        "Reading. Where A varies, the trapezoid's integral keeps its third order but its step does not: exp(dt A) with "
        "A frozen at the step's end is wrong by O(dt^2) whatever lambda is, so globally it is of first order. With "
        "dt A the integral of A over the step both orders return, and a model that learns dt A is free to learn that. "
        "Squared error does ask for lambda = 1/2 + O(dt): trained at each dt by itself, lambda nears 1/2 with slope "
        f"{slope(dts, free['distance']):.2f}, and as sigmoid(w dt A + ...) it learns "
        f"w = {_span([weights[0] for weights in results[STEP]['weights']])}, where theory has 1/3, which is "
        f"lambda = 1/2 + dt A / 12. That keeps the order and takes {gain:.0f}% off the trapezoid's error. "
        "But nothing in lambda = sigmoid(w . token) ties it to 1/2 as dt shrinks. At the smallest dt, one number for "
        f"all dt is still {number['distance'][-1]:.1e} away, and the linear function with a bias "
        f"{linear['distance'][-1]:.1e}: both behave like third order at large dt and fall to second order below the dt "
        "where that distance outweighs dt |A| / 12. So lambda = 1/2 + O(dt) is what training on this error approaches, "
        "not what the parametrisation guarantees; fixing lambda = 1/2 does."
    )


def plot(path: Path, config: Config, summary: dict) -> None:
    """order.png: the integral's error of every lambda with slopes 2 and 3, and how far learned lambdas are from 1/2."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    dts, results = np.asarray(config.dts), summary["learned"]["constant A"]
    styles = {
        "exponential-Euler": dict(color="0.55", marker="s"),
        "lambda = 0.6": dict(color="0.55", marker="^"),
        "trapezoid": dict(color="black", marker="o"),
        NUMBER: dict(color="0.35", marker="v", linestyle="--", markerfacecolor="white"),
        LINEAR: dict(color="0.35", marker="D", linestyle="-.", markerfacecolor="white"),
        FREE: dict(color="black", marker="x", linestyle="none", markersize=8),
    }
    for label, style in styles.items():
        style = dict(markersize=5, linewidth=1.2) | style
        left.loglog(dts, results[label]["error"], label=label, **style)
        if label in LEARNED_ORDER:
            right.loglog(dts, results[label]["distance"], label=label, **style)
    for order, label, shift in ((2, "exponential-Euler", 3.0), (3, "trapezoid", 1 / 4)):
        reference = shift * results[label]["error"][-1] * (dts / dts[-1]) ** order
        left.loglog(dts, reference, color="0.7", linestyle=":", linewidth=1)
        left.annotate(f"slope {order}", (dts[len(dts) // 2], reference[len(dts) // 2]), fontsize=8, ha="center",
                      va="bottom" if order == 2 else "top")  # fmt: skip
    right.loglog(dts, dts / 12, color="0.7", linestyle=":", label="dt |A| / 12 at A = -1 (slope 1)")
    left.set(xlabel="step size dt, units of time", ylabel="local error of the integral (rms), units of h")
    left.set_title("random systems of constant A, held out")
    right.set(xlabel="step size dt, units of time", ylabel="|lambda - 1/2| (rms), no unit")
    right.set_title("distance of the learned lambda from 1/2")
    for axis in (left, right):
        axis.grid(color="0.92")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
