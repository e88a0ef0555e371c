"""What experiments/kernel_latency.py leaves behind: tables, two of them as 6 and 7 of the paper, and a figure."""

import collections
import json
from pathlib import Path

import matplotlib

from experiments import kernel_profile
from experiments.kernel_programs import DECODE_STEPS, PASSES, Shape
from mamba3_jax.command import fail

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

MODELS = {"siso": "Mamba-3 SISO", "mimo": "Mamba-3 MIMO", "mamba2": "Mamba-2", "attention": "attention"}
IMPLEMENTATIONS = {"chunked": "XLA, chunked", "recurrent": "XLA, recurrent", "xla": "XLA", "cudnn": "cuDNN",
                   "triton": "Pallas Triton", "tpu": "Pallas TPU"}  # fmt: skip
WHAT = {"forward": "forward", "forward_backward": "forward + backward", "decode": "decode step",
        "prefill": "prefill", "prefill_decode": "prefill + decode"}  # fmt: skip
# Table 6 of the paper: ms on an H100 in bfloat16, by d_state.
PAPER_DECODE = {"mamba2": {64: 0.127, 128: 0.203}, "siso": {64: 0.110, 128: 0.156}, "mimo": {64: 0.137, 128: 0.179}}
# Table 7: seconds of the whole 1.5B model, prefill and prefill + decode, by tokens.
PAPER_PREFILL = {"siso": {2048: (2.02, 17.57), 16384: (16.22, 140.61)},
                 "mimo": {2048: (2.42, 18.96), 16384: (19.44, 151.81)}}  # fmt: skip
PEER_KEYS = ("peer", "model", "what", "shape", "dtype")
# Of the figure's lines, by implementation: told apart without colour.
STYLES = {
    ("siso", "chunked"): dict(color="0.45", marker="s", linestyle="--"),
    ("siso", "triton"): dict(color="black", marker="o", linestyle="-"),
    ("siso", "tpu"): dict(color="black", marker="D", linestyle="-"),
    ("attention", "xla"): dict(color="0.65", marker="^", linestyle="-.", markerfacecolor="white"),
    ("attention", "cudnn"): dict(color="0.25", marker="v", linestyle=":", markerfacecolor="white"),
}


def read_peers(path: str | None) -> list[dict] | None:
    """Rows of other packages; one line and status 2 if the file is not as kernel_latency.py's docstring says."""
    if path is None:
        return None
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    except (OSError, ValueError) as error:
        fail(f"peers: got {path} ({' '.join(str(error).split())}); allowed: a file of JSON lines")
    rows = [{k: v for k, v in row.items() if v is not None} if isinstance(row, dict) else row for row in rows]
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in PEER_KEYS):
            fail(f"peers: got the line {json.dumps(row)[:80]}; allowed: one with {', '.join(PEER_KEYS)} as text")
        if row["model"] not in MODELS or row["what"] not in WHAT:
            fail(f"peers: got {row['model']}, {row['what']}; allowed: one of {', '.join(MODELS)}; of {', '.join(WHAT)}")
        if not isinstance(row.get("ms"), int | float) and not isinstance(row.get("reason"), str):
            fail(f"peers: got the line {json.dumps(row)[:80]}; allowed: one with ms, or a reason why there is none")
    return rows


def render(summary: dict) -> str:
    """report.md."""
    rows, settings = summary["rows"], summary["settings"]
    ceilings = _ceilings(rows)
    lines = [
        "# Kernel latency",
        "",
        f"    {summary['command']}",
        "",
        f"On {summary['device']}, jax {summary['jax']}, XLA_FLAGS '{summary['flags']}'; "
        f"medians over batches of at least {settings['batch_ms']:g} ms, "
        "random inputs, warm-up excluded. GB/s are of the fewest bytes that the operation must move, TFLOP/s of the "
        "fewest operations that define it (`fewest_bytes` and `flops` in experiments/kernel_programs.py). In brackets "
        "the fraction of what the device was measured to do:",
        "",
        f"- negation of {settings['copy_mib']} MiB of bfloat16: {_rate(ceilings['copy'], 'GB/s')}",
        f"- bfloat16 matrix product of size {settings['matmul_size']}: {_rate(ceilings['matmul'], 'TFLOP/s')}",
        "",
        "Memory is the compiler's count of arguments, outputs and temporaries. Mamba-2 has neither gate nor biases. "
        "Attention has h heads of size p, the width of x; a Transformer layer as wide as a Mamba layer with expand 2 "
        "has half as many.",
    ]
    earlier = [row for row in rows if row["code"] != summary["code"] and "ms" in row and row["model"] in MODELS]
    if earlier:
        forms = dict.fromkeys(_form(row["model"], row["implementation"], rows) for row in earlier)
        lines += ["", f"Code: {summary['code']}; measured with earlier code: {'; '.join(forms)}."]
    lines += _passes(rows, ceilings, summary["shapes"]) + _kernels(rows)
    lines += _decode(rows, ceilings) + _prefill(rows) + _accuracy(rows)
    if summary["peers"] is not None:
        lines += _peers(rows, summary["peers"])
    lines += _lengths(rows, summary["shapes"][0])
    reasons = [f"- {row['name']}: {row['reason']}" for row in rows if "reason" in row]
    reasons += [f"- {_peer_name(row)}: {row['reason']}" for row in summary["peers"] or () if "reason" in row]
    kinds = collections.Counter(tuple(name.split(",")[:3]) for name in summary["left"])
    reasons += [f"- {', '.join(kind)}: {count} not run" for kind, count in kinds.items()]
    if reasons:
        lines += ["## Not measured", "", *reasons, ""]
    return "\n".join(lines)


def _passes(rows: list[dict], ceilings: dict, shapes: list[str]) -> list[str]:
    """One layer's operator: a table for each shape."""
    rows = [row for row in rows if row["what"] in PASSES]
    lines = ["", "## Forward and backward passes", ""]
    for shape in shapes:
        lines += [
            f"{shape}:",
            "",
            "| |" + "".join(f" {WHAT[what]}, ms | GB/s | TFLOP/s | memory, GB |" for what in PASSES),
            "|" + " --- |" * (1 + 4 * len(PASSES)),
        ]
        without_state = shape.split(" n=")[0]
        found = _of(rows, shape=shape) + _of(rows, shape=without_state)
        for model, implementation in dict.fromkeys((row["model"], row["implementation"]) for row in found):
            cells = [_form(model, implementation, found)]
            for what in PASSES:
                [*row] = _of(found, model=model, implementation=implementation, what=what)
                cells += _figures(row[0], ceilings) if row else [""] * 4
            lines.append(_line(cells))
        lines.append("")
    return lines[:-1]


def _kernels(rows: list[dict]) -> list[str]:
    """Which kernels the passes spend their time in; empty where no profiler saw them."""
    rows = [row for row in rows if "kernels" in row]
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row["kernels"]))
    lines = [
        "",
        "## By kernel",
        "",
        "Milliseconds of one call and in brackets how often it launches the kernel, by the profiler, means of "
        f"{kernel_profile.CALLS} calls that were not timed; {kernel_profile.XLA} is all that is not a kernel of ours.",
        "",
        "| pass | shape | |" + "".join(f" {name} |" for name in names),
        "|" + " --- |" * (3 + len(names)),
    ]
    for row in rows:
        spent = ["{:.3f} ({:g})".format(*row["kernels"][name]) if name in row["kernels"] else "" for name in names]
        form = _form(row["model"], row["implementation"], rows)
        lines.append(_line([WHAT[row["what"]], row["shape"], form, *spent]))
    return lines


def _figures(row: dict, ceilings: dict) -> list[str]:
    """ms, GB/s, TFLOP/s and GB."""
    if "ms" not in row:
        return ["-"] * 4
    rates = _rates(row)
    return [
        f"{row['ms']:.3g}",
        *(f"{rate:.3g} ({_fraction(rate, ceiling)})" for rate, ceiling in zip(rates, ceilings.values())),
        f"{row['peak_bytes'] / 1e9:.2f}",
    ]


def _decode(rows: list[dict], ceilings: dict) -> list[str]:
    rows = _of(rows, what="decode")
    if not rows:
        return []
    places = sorted({(Shape.parse(row["shape"]).n, row["state_dtype"]) for row in rows}, reverse=True)
    places.sort(key=lambda place: place[1], reverse=True)
    sizes = sorted({n for n, _ in places})
    lines = [
        "",
        "## A decode step (table 6)",
        "",
        f"Milliseconds, {rows[0]['shape'].split(' n=')[0]}, tokens in {rows[0]['dtype']}, and the fraction of the copy "
        f"bandwidth; the state is overwritten, and {DECODE_STEPS} steps on different tokens are one program. The "
        "paper's are of an H100 and its table's bfloat16.",
        "",
        "| |" + "".join(f" {dtype} state, n={n} |" for n, dtype in places) + "".join(f" paper, n={n} |" for n in sizes),
        "|" + " --- |" * (1 + len(places) + len(sizes)),
    ]
    for model, implementation in dict.fromkeys((row["model"], row["implementation"]) for row in rows):
        cells = [_form(model, implementation, rows)]
        for n, dtype in places:
            found = [row for row in _of(rows, model=model, implementation=implementation, state_dtype=dtype)
                     if Shape.parse(row["shape"]).n == n and "ms" in row]  # fmt: skip
            cells += [f"{row['ms']:.3f} ({_fraction(_rates(row)[0], ceilings['copy'])})" for row in found] or ["-"]
        cells += [str(PAPER_DECODE[model].get(n, "-")) for n in sizes]
        lines.append(_line(cells))
    return lines


def _prefill(rows: list[dict]) -> list[str]:
    rows = [row for row in rows if row["what"] in ("prefill", "prefill_decode")]
    if not rows:
        return []
    lengths = sorted({Shape.parse(row["shape"]).t for row in rows})
    lines = [
        "",
        "## Prefill, and prefill + decode (table 7)",
        "",
        f"Seconds of one layer's operator at {rows[0]['shape'].replace(f't={lengths[0]} ', '')}: t tokens at once, "
        "then t decode steps inside one program, the state in float32. The paper's are of the whole 1.5B model, 24 "
        "layers with their projections and MLPs: not to be compared, and here for the ratio of SISO to MIMO only.",
        "",
        "| |" + "".join(f" prefill, t={t} | prefill + decode | paper, prefill | paper, both |" for t in lengths),
        "|" + " --- |" * (1 + 4 * len(lengths)),
    ]
    for model, implementation in dict.fromkeys((row["model"], row["implementation"]) for row in rows):
        cells = [_form(model, implementation, rows)]
        for t in lengths:
            for what in ("prefill", "prefill_decode"):
                found = [row for row in _of(rows, model=model, implementation=implementation, what=what)
                         if Shape.parse(row["shape"]).t == t and "ms" in row]  # fmt: skip
                cells += [f"{row['ms'] / 1e3:.3g}" for row in found] or ["-"]
            cells += [str(seconds) for seconds in PAPER_PREFILL[model].get(t, ("-", "-"))]
        lines.append(_line(cells))
    return lines


def _accuracy(rows: list[dict]) -> list[str]:
    rows = [row for row in rows if row["what"] == "accuracy" and "errors" in row]
    if not rows:
        return []
    names = list(max((row["errors"] for row in rows), key=len))
    lines = [
        "",
        "## Accuracy",
        "",
        "Relative Frobenius errors of the output and of every gradient, against the recurrence in float64 on the same "
        f"{rows[0]['dtype']} inputs: slices with b=1 and h=2 of the shapes above, of at most as many tokens as shown.",
        "",
        "| slice | |" + "".join(f" {name} |" for name in names),
        "|" + " --- |" * (2 + len(names)),
    ]
    for row in rows:
        errors = [f"{row['errors'][name]:.1e}" if name in row["errors"] else "" for name in names]
        lines.append(_line([row["shape"], _form(row["model"], row["implementation"], rows), *errors]))
    return lines


def _peers(rows: list[dict], peers: list[dict]) -> list[str]:
    """Other packages' times beside ours, and how many times our fastest they take."""
    names = list(dict.fromkeys(peer["peer"] for peer in peers if "ms" in peer))
    key = lambda row: (row["model"], row["shape"], row["what"], row["dtype"], row.get("state_dtype", "float32"))  # noqa: E731
    lines = [
        "",
        "## Beside other packages",
        "",
        "Milliseconds on the same device, each package timed by its own process; in brackets how many times the "
        "time of our fastest implementation it takes. Memory is the compiler's count for ours and packages in JAX, and "
        "what PyTorch had allocated at most for the others.",
        "",
        "| | shape | |" + "".join(f" {name} |" for name in ("ours", *names)),
        "|" + " --- |" * (4 + len(names)),
    ]
    for place in dict.fromkeys(key(peer) for peer in peers if "ms" in peer):
        ours = [row for row in rows if key(row) == place and "ms" in row]
        fastest = min(ours, key=lambda row: row["ms"], default=None)
        model, shape, what, _, state = place
        label = WHAT[what] + (f", {state} state" if what == "decode" else "")
        best = "-"
        if fastest:
            best = f"{fastest['ms']:.3g} ({IMPLEMENTATIONS[fastest['implementation']]})"
            best += f", {fastest['peak_bytes'] / 1e9:.2f} GB" if what != "decode" else ""
        cells = [MODELS[model], shape, label, best]
        for name in names:
            found = [peer for peer in peers if peer["peer"] == name and key(peer) == place and "ms" in peer]
            cells += [_peer_figures(peer, fastest) for peer in found[-1:]] or ["-"]
        lines.append(_line(cells))
    how = dict.fromkeys(f"- {peer['peer']}: {peer['how']}" for peer in peers if "how" in peer)
    return lines + (["", *how] if how else [])


def _peer_figures(peer: dict, fastest: dict | None) -> str:
    times = f" ({peer['ms'] / fastest['ms']:.2f}x)" if fastest else ""
    memory = f", {peer['peak_mib'] * 2**20 / 1e9:.2f} GB" if peer.get("peak_mib") else ""
    return f"{peer['ms']:.3g}{times}{memory}"


def _lengths(rows: list[dict], shape: str) -> list[str]:
    """The figure's numbers: one row of growing length."""
    lines_of = {(what, form): _points(rows, shape, what, *form) for what in PASSES for form in STYLES}
    lines_of = {key: points for key, points in lines_of.items() if points}
    lines = ["", "## Against the length", "", "One row (b=1), milliseconds:", "", "![the same](latency.png)", ""]
    heads = [f"{MODELS[model]}, {IMPLEMENTATIONS[i]}, {WHAT[what]}" for what, (model, i) in lines_of]
    lines += ["| t |" + "".join(f" {head} |" for head in heads), "|" + " --- |" * (1 + len(heads))]
    for t in sorted({t for points in lines_of.values() for t in points}):
        lines.append(_line([str(t), *(f"{points[t]:.3g}" if t in points else "-" for points in lines_of.values())]))
    return [*lines, ""]


def plot(path: Path, summary: dict) -> None:
    """latency.png: ms against the tokens of one row, forward and forward + backward."""
    figure, axes = plt.subplots(1, len(PASSES), figsize=(11, 4.4), layout="constrained", sharey=True)
    shape = summary["shapes"][0]
    for axis, what in zip(axes, PASSES):
        for (model, implementation), style in STYLES.items():
            if points := _points(summary["rows"], shape, what, model, implementation):
                label = f"{MODELS[model]}, {IMPLEMENTATIONS[implementation]}"
                axis.loglog(*zip(*sorted(points.items())), label=label, markersize=5, linewidth=1.2, **style)
        axis.set(xlabel="tokens t of one row", title=f"{WHAT[what]}, b=1")
        axis.grid(color="0.9", linewidth=0.6)
    axes[0].set_ylabel("time per call, ms")
    if axes[0].lines:
        axes[0].legend(fontsize=8)
    figure.suptitle(f"{shape.split(maxsplit=2)[2]} on {summary['device']}", fontsize=10)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _points(rows: list[dict], shape: str, what: str, model: str, implementation: str) -> dict[int, float]:
    """ms by t of the rows with b=1 and otherwise the sizes of `shape`; attention has no n and g."""
    points = {}
    for row in _of(rows, what=what, model=model, implementation=implementation):
        b, t, *sizes = row["shape"].split()
        if "ms" in row and b == "b=1" and sizes == shape.split()[2 : 2 + len(sizes)]:
            points[int(t.removeprefix("t="))] = row["ms"]
    return points


def _ceilings(rows: list[dict]) -> dict[str, float | None]:
    """GB/s of the copy and TFLOP/s of the matrix product, None where they were not measured."""
    found = {row["model"]: _rates(row) for row in rows if row["what"] == "ceiling" and "ms" in row}
    return {name: found[name][i] if name in found else None for i, name in enumerate(("copy", "matmul"))}


def _rates(row: dict) -> tuple[float, float]:
    """GB/s and TFLOP/s."""
    return row["bytes"] / row["ms"] / 1e6, row["flops"] / row["ms"] / 1e9


def _rate(value: float | None, unit: str) -> str:
    return "not measured" if value is None else f"{value:.4g} {unit}"


def _fraction(rate: float, ceiling: float | None) -> str:
    return "-" if ceiling is None else f"{100 * rate / ceiling:.0f}%"


def _form(model: str, implementation: str, rows: list[dict]) -> str:
    rank = next(row["r"] for row in rows if row["model"] == model)
    return f"{MODELS[model]}{f' r={rank}' if model == 'mimo' else ''}, {IMPLEMENTATIONS[implementation]}"


def _of(rows: list[dict], **values) -> list[dict]:
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _peer_name(row: dict) -> str:
    return ",".join(row[key] for key in ("peer", "what", "model", "shape"))
