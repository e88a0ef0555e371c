"""What experiments/training_throughput.py leaves behind: four tables and a figure."""

import matplotlib
import numpy as np

from experiments.training_peer import NAME, REPORTED
from experiments.training_programs import Cell
from mamba3_jax.training.flops import peak_flops

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

MODELS = {"siso": "Mamba-3 SISO", "mimo": "Mamba-3 MIMO, rank 4", "mamba2": "Mamba-2", "transformer": "Transformer"}
IMPLEMENTATIONS = {"triton": "Pallas Triton", "chunked": "XLA, chunked", "xla": "XLA, softmax"}
# Steps that losses are averaged over before they are compared, and fewer, to see what that hides.
WINDOW, NARROW = 20, 10


def figure_of(row: dict) -> str:
    """One row, for people."""
    if "reason" in row:
        return row["reason"]
    if row["part"] == "precision":
        return f"loss {row['losses'][-1]:.4f} after {len(row['losses'])} steps"
    compiled = f"{row['peak_bytes'] / 1e9:.1f} GB, compiled in {row['compile_s']:.0f} s"
    return f"{row['s']:.3f} s per step, {row['tokens'] / row['s']:,.0f} tokens/s, {compiled}"


def render(summary: dict, wanted: list[Cell]) -> str:
    """The tables, with every wanted cell, measured or not."""
    rows = {row["name"]: row for row in summary["rows"]}
    lines = [
        "# Training whole models",
        "",
        f"    {summary['command']}",
        "",
        f"On one {summary['device']}, jax {summary['jax']}; medians of {summary['settings']['steps']} steps in",
        "bfloat16 with AdamW and float32 master weights, on random tokens. MFU is of the FLOPs that the model needs,",
        f"and of {_peak_text(summary)}. A step's rows go through the model so many at once; for the",
        'backward pass the activations are "kept", or computed "again" block by block.',
        f"Hash of the code: {', '.join(sorted({row['code'] for row in summary['rows']}))} (summary.json says whose).",
    ]
    parts = {part: [cell for cell in wanted if cell.part == part] for part in ("widths", "peer", "lengths")}
    lines += ["", "## Models of one width", "", *HEAD]
    lines += [_line(cell, rows.get(cell.name), summary) for cell in parts["widths"]]
    lines += _peer(parts["peer"], rows, summary)
    lines += _lengths(parts["lengths"], rows)
    lines += _precision(rows)
    return "\n".join([*lines, ""])


HEAD = [
    "| model | operator | layers | parameters | step | at once | activations | s per step | tokens/s | TFLOP/s | MFU |"
    " memory, GB | compile, s |",
    "|" + " --- |" * 13,
]


def _line(cell: Cell, row: dict | None, summary: dict) -> str:
    named = f"| {MODELS[cell.model]} | "
    step = f"{cell.b} x {cell.t}"
    if row is None or "reason" in row:
        told = "not run" if row is None else row["reason"]
        return f"{named}- | {cell.n_layers} | - | {step} | {told} |" + " - |" * 7
    speed = row["tokens"] / row["s"]
    return named + (
        f"{IMPLEMENTATIONS[row['implementation']]} | {cell.n_layers} | {row['parameters'] / 1e9:.3g}B | {step} | "
        f"{row['rows_at_once']} | {'kept' if row['remat'] == 'none' else 'again'} | {row['s']:.3f} | {speed:,.0f} | "
        f"{speed * row['flops'] / 1e12:.3g} | {_mfu(speed, row, summary)} | {row['peak_bytes'] / 1e9:.1f} | "
        f"{row['compile_s']:.0f} |"
    )


def _peer(cells: list[Cell], rows: dict[str, dict], summary: dict) -> list[str]:
    """Ours of the peer's shape, the peer in the same run, and what it reports."""
    lines = [
        "",
        f"## The shape of {NAME}'s mamba3-1p3b",
        "",
        "48 mixers of the same width without MLPs, over a vocabulary of 128,256 with a head of its own.",
        "",
        *HEAD,
        *(_line(cell, rows.get(cell.name), summary) for cell in cells),
    ]
    reported = f"{NAME} reports {REPORTED[0]:,} tokens/s on one H100, {100 * REPORTED[1]:.1f}% MFU as it counts FLOPs."
    peer = summary["peers"][0] if summary["peers"] else None
    if peer is None:
        return [*lines, "", f"{reported} It was not timed in this run (--peer)."]
    if "reason" in peer:
        return [*lines, "", f"{reported} Here it gave no time: {peer['reason']}"]
    speed = peer["tokens"] / peer["s"]
    kept = "activations kept" if peer["remat"] == "none" else "activations computed again"
    timed = (
        f"Timed here (jax {peer['jax']}), the fastest of {len(peer['tried'])} ways took {peer['s']:.3f} s for "
        f"{peer['tokens']:,} tokens ({peer['rows_at_once']} rows at once, {kept}): {speed:,.0f} tokens/s"
    )
    ours = next((rows[cell.name] for cell in cells if "s" in rows.get(cell.name, {})), None)
    if ours is not None:
        times = ours["tokens"] / ours["s"] / speed
        timed += f", {_mfu(speed, ours, summary)} MFU by our count; ours is {times:.2f} times as fast"
    return [*lines, "", f"{reported} {timed}."]


def _lengths(cells: list[Cell], rows: dict[str, dict]) -> list[str]:
    """tokens/s, and how much they differ from those of the shortest rows."""
    lines = [
        "",
        "## Longer rows",
        "",
        f"Mamba-3 SISO, {cells[0].n_layers} layers, {cells[0].b * cells[0].t} tokens a step, all rows at once."
        if cells
        else "Not asked for.",
        "",
        "| tokens of a row | rows | tokens/s | of the shortest rows' |",
        "| --- | --- | --- | --- |",
    ]
    first = None
    for cell in cells:
        row = rows.get(cell.name, dict(reason="not run"))
        if "reason" in row:
            lines.append(f"| {cell.t} | {cell.b} | {row['reason']} | - |")
            continue
        speed = row["tokens"] / row["s"]
        first = first or speed
        lines.append(f"| {cell.t} | {cell.b} | {speed:,.0f} | {100 * speed / first:.1f}% |")
    return lines


def _precision(rows: dict[str, dict]) -> list[str]:
    heading = ["", "## Losses in bfloat16 and in float32", ""]
    found = _losses(rows.values())
    if not {"bfloat16", "float32"} <= found.keys():
        mine = [row for row in rows.values() if row["part"] == "precision"]
        return [*heading, *([f"{row['name']}: {figure_of(row)}" for row in mine] or ["Not run."])]
    low, high = found["bfloat16"], found["float32"]
    forms = [IMPLEMENTATIONS[row["implementation"]] for row in (low, high)]
    ends = [running_mean(row["losses"])[-1] for row in (low, high)]
    return [
        *heading,
        f"The model, data and seed of {high['size']}, {len(high['losses'])} steps of {high['tokens']} tokens: in",
        f"bfloat16 ({forms[0]}) and in float32 ({forms[1]}, full matmul precision); at the end",
        f"{ends[0]:.4f} against {ends[1]:.4f} nats. The control is float32 in chunks of another size: the same",
        "mathematics with other rounding, so that its difference is what rounding alone makes of such a run.",
        "",
        f"| against float32 | largest difference, means of {WINDOW} steps | at the end | largest, of {NARROW} steps |",
        "| --- | --- | --- | --- |",
        *(_difference(name, found, high) for name in ("bfloat16", "control")),
        "",
        "![losses, and tokens/s against the length of a row](training.png)",
    ]


def _difference(name: str, found: dict[str, dict], high: dict) -> str:
    """One row of the table of differences from float32's losses."""
    if name not in found:
        return f"| {name} | not run | - | - |"
    wide, narrow = (differences(found[name]["losses"], high["losses"], window) for window in (WINDOW, NARROW))
    return f"| {name} | {100 * max(wide):.2f}% | {100 * wide[-1]:.2f}% | {100 * max(narrow):.2f}% |"


def running_mean(losses: list[float], window: int = WINDOW) -> np.ndarray:
    """Of that many steps, or of all if there are fewer."""
    size = min(window, len(losses))
    return np.convolve(losses, np.ones(size) / size, mode="valid")


def differences(low: list[float], high: list[float], window: int = WINDOW) -> np.ndarray:
    """Of the running means, relative to the second's."""
    return np.abs(running_mean(low, window) / running_mean(high, window) - 1)


def plot(summary: dict) -> plt.Figure:
    """Losses in both precisions, their relative difference, and tokens/s against the length of a row."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    found = _losses(summary["rows"])
    if {"bfloat16", "float32"} <= found.keys():
        losses = {name: row["losses"] for name, row in found.items()}
        low, high = (running_mean(losses[name]) for name in ("bfloat16", "float32"))
        steps = np.arange(len(high)) + len(losses["float32"]) - len(high) + 1
        kernels = IMPLEMENTATIONS[found["bfloat16"]["implementation"]]
        left.plot(steps, high, color="0.6", linewidth=3, label="float32, chunked")
        left.plot(steps, low, color="black", linewidth=1, label=f"bfloat16, {kernels}")
        left.legend(fontsize=8)
        middle.plot(steps, 100 * differences(losses["bfloat16"], losses["float32"]), color="black", label="bfloat16")
        if "control" in losses:
            control = 100 * differences(losses["control"], losses["float32"])
            middle.plot(steps, control, color="0.5", linewidth=0.8, linestyle="--", label="float32, other chunks")
        middle.legend(fontsize=8)
    left.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps (nats)", title="training loss")
    middle.set(xlabel="step", ylabel="relative difference, %", title="against float32")
    middle.axhline(1, color="0.6", linestyle=":")
    # Room for the legend above the curves.
    middle.set_ylim(0, 1.25 * middle.get_ylim()[1])
    lengths = [row for row in summary["rows"] if row["part"] == "lengths" and "s" in row]
    points = sorted((row["t"], row["tokens"] / row["s"]) for row in lengths)
    if points:
        right.plot(*zip(*points), color="black", marker="o")
        right.set(xscale="log", ylim=(0, 1.15 * max(speed for _, speed in points)))
        right.set_xticks([t for t, _ in points], [f"{t:,}" for t, _ in points])
        right.minorticks_off()
    right.set(xlabel="tokens of a row", ylabel="tokens/s", title="as many tokens a step in all")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    return figure


def _losses(rows) -> dict[str, dict]:
    """The newest rows with losses, by their model: bfloat16, float32, control."""
    return {row["model"]: row for row in rows if row["part"] == "precision" and "losses" in row}


def _mfu(speed: float, row: dict, summary: dict) -> str:
    peak = peak_flops(_kind(summary))
    return "-" if peak is None else f"{100 * speed * row['flops'] / peak:.1f}%"


def _peak_text(summary: dict) -> str:
    peak = peak_flops(_kind(summary))
    return "a peak that is not known here" if peak is None else f"{peak / 1e12:.0f} TFLOP/s, the data sheet's"


def _kind(summary: dict) -> str:
    """Of the device, as JAX calls it."""
    return summary["device"].rpartition(" (")[0]
