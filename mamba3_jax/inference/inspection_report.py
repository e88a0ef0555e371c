"""What `mamba3 inspect` shows: tables and a figure."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mamba3_jax.inference.inspection import LayerDynamics
from mamba3_jax.inference.reports import table

HALF_LIFE = "half-life, tokens"
TURN = "turn per token, radians"


def report(summary: dict) -> str:
    """report.md."""
    lines = [f"# {summary['model']}", "", f"    {summary['command']}", "", "## Parameters", ""]
    lines += [_parameters(summary["parameters"]), "", "## State of one sequence", "", _states(summary["state"])]
    if summary["layers"] is not None:
        lines += [
            "", "## Layers", "", f"Measured on {summary['text']}. A dash is what a kind of layer does not have.", "",
            _layers(summary["layers"]), "",
            "Half-life: ln 2 / (|A| dt). Turn: |omega dt| modulo a full turn, at most pi; a half turn flips a pair's "
            "sign. Percentiles are over heads (and pairs) and tokens. lambda: mean weight of the current token.", "",
            "![half-life and turn of every layer](layers.png)",
        ]  # fmt: skip
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    return "\n".join([*lines, "", f"{summary['seconds']:.1f} s on {summary['device']}; {versions}.", ""])


def plot(layers: Sequence[LayerDynamics]) -> Figure:
    """A dot for each head's median half-life and each pair's median turn; a bar from the 5th percentile to the 95th."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _dots(left, layers, "half_life", "a head (median of tokens)")
    left.set(ylabel=HALF_LIFE)
    left.set_title("how long a head remembers")
    _dots(right, layers, "turn", "a head and pair (median of tokens)")
    right.set(ylabel=TURN)
    right.set_title("how far the state turns")
    if any(layer.turn for layer in layers):
        for angle, name, line in ((np.pi, "half a turn", "-"), (np.pi / 2, "a quarter", "--")):
            right.axhline(angle, color="0.4", linestyle=line, linewidth=1, label=name, zorder=0)
    for axis in (left, right):
        axis.set_xlabel("layer, from 1")
        axis.set_xlim(0.4, len(layers) + 0.6)
        axis.set_xticks(range(1, len(layers) + 1, max(1, len(layers) // 12)))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    return figure


def _dots(axis: Axes, layers: Sequence[LayerDynamics], name: str, label: str) -> None:
    measured = [(i, getattr(layer, name)) for i, layer in enumerate(layers, 1) if getattr(layer, name) is not None]
    if not measured:
        axis.text(0.5, 0.5, "no layer has one", ha="center", va="center", transform=axis.transAxes)
        return
    # Zeros, of RoPE's slowest pairs say, have no place on a logarithmic axis.
    axis.set_yscale("log", nonpositive="mask")
    without = [(i, layer.kind) for i, layer in enumerate(layers, 1) if getattr(layer, name) is None]
    for i, kind in without:
        axis.text(
            i, 0.5, kind, rotation=90, ha="center", va="center", color="0.4", transform=axis.get_xaxis_transform()
        )
    for i, spread in measured:
        first = i == measured[0][0]
        axis.plot([i, i], [spread.low, spread.high], color="0.75", linewidth=9, solid_capstyle="butt", zorder=1,
                  label="5% to 95%" if first else None)  # fmt: skip
        jitter = np.linspace(-0.22, 0.22, len(spread.by_head))
        axis.plot(i + jitter, spread.by_head, ".", color="0.25", markersize=3, zorder=2, label=label if first else None)
        axis.plot([i - 0.3, i + 0.3], [spread.median] * 2, color="black", linewidth=2, zorder=3,
                  label="median" if first else None)  # fmt: skip


def _parameters(rows: list[dict]) -> str:
    total, size = (sum(row[name] for row in rows) for name in ("parameters", "bytes"))
    body = [
        (row["name"], "x".join(map(str, row["shape"])), row["count"], f"{row['parameters']:,}",
         f"{100 * row['parameters'] / total:.2f}", row["dtype"], f"{row['bytes']:,}")
        for row in rows
    ]  # fmt: skip
    body.append(("all", "", sum(row["count"] for row in rows), f"{total:,}", "100.00", "", f"{size:,}"))
    return table(("name", "shape", "arrays", "parameters", "share, %", "dtype", "bytes"), body)


def _states(rows: list[dict]) -> str:
    body = [(row["kind"], row["layers"], f"{row['bytes']:,}", f"{row['bytes_per_token']:,}") for row in rows]
    totals = [f"{sum(row[name] for row in rows):,}" for name in ("bytes", "bytes_per_token")]
    body.append(("all", sum(row["layers"] for row in rows), *totals))
    return table(("mixer", "layers", "bytes", "bytes more per token"), body)


def _layers(layers: list[dict]) -> str:
    body = []
    for i, layer in enumerate(layers, 1):
        cells = [f"{i} {layer['kind']}"]
        for name, form in (("half_life", ".3g"), ("turn", ".3g")):
            spread = layer[name]
            cells += ["-"] * 3 if spread is None else [format(spread[p], form) for p in ("low", "median", "high")]
        above, lam = layer["above_quarter"], layer["lam"]
        cells += ["-" if above is None else f"{100 * above:.2f}", "-" if lam is None else f"{lam:.3f}"]
        body.append(cells)
    head = ["layer", f"{HALF_LIFE}: 5%", "50%", "95%", f"{TURN}: 5%", "50%", "95%", "above pi/2, %", "lambda"]
    return table(head, body)
