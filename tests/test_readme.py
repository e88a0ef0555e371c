"""The README keeps its word: its snippets run, and what it names exists."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mamba3_jax import bench_command

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_every_snippet_runs(snippet):
    exec(compile(snippet, "README.md", "exec"), {})


def test_there_are_snippets_of_the_operator_and_of_the_layer():
    assert "ssm(" in "".join(SNIPPETS) and "Mamba3(" in "".join(SNIPPETS)


def test_every_path_in_the_tree_and_in_the_commands_exists():
    tree = README.split("```text\n")[1].split("```")[0]
    folder, named = "", []
    for line in tree.splitlines():
        name = line.split()[0]
        folder = name if not line.startswith(" ") else folder
        named.append(name if not line.startswith(" ") else folder + name)
    named += re.findall(r"--config (\S+\.yaml)", README) + re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_results_in_the_table_are_the_committed_ones():
    """Each row of the results table shows the headline figure of the committed report that it links."""
    rows = re.findall(r"\| (-?[\d.]+) \| \[.*?\]\((results/[^)]+/report.md)\)", README)
    assert rows
    for figure, report in rows:
        assert f" {figure} +- " in _committed(report), report


def test_table_5b_is_the_committed_one():
    """Row by row the paper's three columns and the one that comes to the paper's figure; the rest in words."""
    text = " ".join(README.split())
    report = _tables(_committed("results/table_5b/report.md"))
    committed = {cells[0]: cells[1:] for cells in report if len(cells) == 8 and cells[1].endswith(")")}
    ours = {cells[0]: cells[1:] for cells in _tables(README) if cells[0] in committed and cells[1].endswith(")")}
    assert ours == {name: [*cells[:3], cells[4]] for name, cells in committed.items()}
    narrow, decayed, every, both = committed["Mamba-3"][3:]
    name = "results/table_5b/mamba3,modular_arithmetic_brackets,{}d=64/summary.json"
    variants = ("", "head_dim=16,", "head_dim=16,weight_decay=0.1,")
    cells = [json.loads(_committed(name.format(own))) for own in variants]
    pair = "{:.2f} and {:.2f}"
    wide, small, decaying = [pair.format(*(cell["test"][n]["scaled"] for n in ("160", "256"))) for cell in cells]
    assert f"eight rates up to 0.01, {wide}; " in text and small.endswith(f" {narrow}")
    assert f"rates up to 0.0027, {small}; " in text and f"from 0.0014 to 0.01, {decaying}, by the largest alone" in text
    at_256 = {run["learning_rate"]: run["validation"]["256"]["accuracy"] for run in cells[2]["runs"]}
    assert max(at_256, key=at_256.get) == max(at_256) == 0.01 and sorted(at_256.values())[-2] < 0.2 + 0.02 * 0.8
    last = [_at_the_end(name.format(own), "160") for own in variants[1:]]
    assert "0.0014 has {:.1f} without decay and {:.1f} with".format(*(one[0.0014] for one in last)) in text
    assert "0.0027 has {:.1f} and {:.1f}.".format(*(one[0.0027] for one in last)) in text
    assert f"comes to {decayed} with heads of 16 and a decay of 0.1" in text
    assert f"heads of 64 get to {every} at 256 and heads of 16 to {both}. " in text
    done = int(re.search(r"(\d+) cells, in", _committed("results/table_5b/report.md"))[1])
    beyond = sum("brackets, " in cells[1] for cells in report if len(cells) > 7)
    assert f"'s 30 cells {done - beyond} have been run to their end" in text


def _at_the_end(name: str, length: str) -> dict[float, float]:
    """Scaled validation accuracy of mod 5 after all steps, in percent, by learning rate; `name` is of a summary."""
    lines = _committed(name.replace("summary.json", "metrics.jsonl")).splitlines()
    *_, last = [line for line in map(json.loads, lines) if "validation" in line]
    rates = [run["learning_rate"] for run in json.loads(_committed(name))["runs"]]
    return {rate: 125 * (accuracy - 0.2) for rate, accuracy in zip(rates, last["validation"][length]["accuracy"])}


def test_what_is_said_of_retrieval_is_what_the_report_says():
    report, text = _committed("results/retrieval/report.md"), " ".join(README.split())
    done, of = re.search(r"(\d+) of (\d+) cells are done", report).groups()
    assert f"{done} of {of} cells have been run" in text
    steps = {cells[0]: cells[3] for cells in _tables(report) if cells[0].endswith("d=64")}
    with_and_without = steps["mamba3-conv,mqar_4_zeros,d=64"], steps["mamba3,mqar_4_zeros,d=64"]
    assert "4 pairs after {} steps with the convolution and after {} without".format(*with_and_without) in text
    zeros, noise = (section.split("\n## ")[0] for section in re.split(r"## MQAR.*\n", report)[1:])
    widths: dict[str, list[list[str]]] = {}
    for name, width, *scores in _tables(zeros):
        if width.isdigit():
            widths.setdefault(name, []).append(["-" if score == "not run" else score for score in scores])
    shown = {name: [" / ".join(column) for column in zip(*rows)] for name, rows in widths.items()}
    shown = {name: columns for name, columns in shown.items() if re.search(r"\d", "".join(columns))}
    assert {cells[0]: cells[1:] for cells in _tables(README) if cells[0] in shown and "/" in cells[1]} == shown
    missing = sum(row.count("-") for rows in widths.values() for row in rows)
    assert f"{missing} of the {sum(len(row) for rows in widths.values() for row in rows)} cells of MQAR" in text
    noisy = {name: scores for name, _, *scores in _tables(noise)}
    said = [", ".join(noisy[name]) for name in ("Mamba-3", "Mamba-2", "attention, RoPE")]
    assert "Mamba-3 then has {}%, Mamba-2 {} and attention {}".format(*said) in text
    trained = [_by_length(report, title) for title in ("Selective copying", "Induction heads", "Needle in a haystack")]
    lengths = ("256", "512", "1024"), ("256", "64", "1024"), ("256", "1024", "4096")
    rows = _tables(README.split("| | copying, 256 |")[1].split("\n\n")[0])
    ours = {cells[0]: cells[1:] for cells in rows if cells[0] in trained[0]}
    assert list(ours) == ["Mamba-3", "Mamba-2", "attention, RoPE", "attention, no positions"]
    assert ours == {name: [by[name][n] for by, of in zip(trained, lengths) for n in of] for name in ours}
    assert f"no model tells it to more than {max((by['4096'] for by in trained[1].values()), key=_number)}%" in text
    words = {(cells[0], cells[1]): cells[2:] for cells in _tables(report) if cells[1:2] in (["1"], ["4"], ["layers"])}
    heads = words["model", "layers"]
    models = ("Gated DeltaNet", "Mamba-3", "Mamba-3, MIMO", "Mamba-2")
    s3 = [f"{words[name, '1'][heads.index('S3, 16')]}%" for name in models]
    assert "multiplies {} rightly, and Mamba-3 {}, MIMO {} and Mamba-2 {}".format(*s3) in text
    z60 = [words[name, "1"][heads.index("Z60, 16")] for name in ("Mamba-3", "Mamba-3, MIMO")]
    assert "than {}% for Mamba-3, and {} for MIMO".format(*z60) in text
    deep = {name: dict(zip(heads, words[name, "4"])) for name in ("Mamba-3", "attention, RoPE", "Mamba-2")}
    of = {group: [[scores[f"{group}, {n}"] for n in ("16", "32 (trained)", "64")] for scores in deep.values()]
          for group in ("S3", "Z60")}  # fmt: skip
    assert "Mamba-3 multiplies {}% of 16 elements rightly, {} of 32 and {} of 64".format(*of["S3"][0]) in text
    assert "attention {}, {} and no more".format(*of["S3"][1]) in text
    assert "Mamba-2 {}, {} and no more".format(*of["S3"][2]) in text
    assert "Mamba-2 has {}, {} and {}%".format(*of["Z60"][2]) in text
    assert "Mamba-3 has {}, {} and {}%, attention {}, {} and {}.".format(*of["Z60"][0], *of["Z60"][1]) in text


def _by_length(report: str, title: str) -> dict[str, dict[str, str]]:
    """Of each model the scores by the length of the row, from a section of the report."""
    (_, *lengths), *rows = _tables(report.split(f"## {title}\n")[1].split("\n## ")[0])
    lengths = [length.split()[0] for length in lengths]
    return {name: dict(zip(lengths, scores)) for name, *scores in rows if name not in ("---", "test rows")}


def _number(score: str) -> float:
    return float(score) if score[0].isdigit() else 0.0


def test_what_a_sweep_gains_is_what_the_report_says():
    rows = json.loads(_committed("results/sweep_throughput/summary.json"))["rows"]
    found = {(row["task"], row["length"]): row["ratio"] for row in rows if (row["d_model"], row["runs"]) == (64, 8)}
    text, gain = " ".join(README.split()), {key: f"{ratio:.2f}" for key, ratio in found.items()}
    assert f"so go {gain['parity', 40]} and {gain['parity', 160]} times as fast as 8 times one run" in text
    assert f"and {gain['modular_arithmetic', 40]} and {gain['modular_arithmetic', 160]} times as fast for mod 5" in text
    assert f"a single run gets {100 / max(found.values()):.0f} to {100 / min(found.values()):.0f}%." in text


def test_discretization_is_the_committed_one():
    """Of each lambda the perplexities of table 8's columns but the last, and the scores of the synthetic tasks."""
    report = {cells[0]: cells[1:] for cells in _tables(_committed("results/discretization/report.md"))}
    names = {"trapezoid, lambda from the data": "trapezoid", "lambda = 1/2": "half", "exponential-Euler": "euler"}
    ours = {cells[0]: cells[1:] for cells in _tables(README) if cells[0] in names}
    assert ours == {name: report[name][:3] + report[variant] for name, variant in names.items()}


def test_bytes_of_the_tpu_kernels_are_the_committed_ones():
    report = _committed("results/tpu_compile/report.md")
    names = {"Pallas TPU kernels": "ours, Pallas", "chunked XLA": "ours, chunked XLA"}
    for ours in (*names, "mamba3-siso-tpu"):
        name = names.get(ours, ours)
        forward, both, temporaries = re.search(rf"\| {ours} \| ([\d.]+) \| ([\d.]+) \| (\d+) \|", README).groups()
        row = rf"\| v5e \| b=8 t=2048 h=64 .*? \| {{}} \| {name} \| {{}} \| [\d.]+ \| {{}} \|"
        assert re.search(row.format("forward", forward, r"\d+"), report)
        assert re.search(row.format(r"forward \+ backward", both, temporaries), report)


def test_predictions_of_the_tpu_kernels_are_the_cost_models():
    rows = bench_command.rows(bench_command.Config())
    forward, both = (1e3 * sum(p.seconds for *_, p in rows[name]) for name in ("forward", "forward + backward"))
    assert f"{forward:.1f} ms forward and {both:.1f} ms forward and backward at b=8 t=8192 h=32" in README


def test_steps_for_pods_are_the_committed_ones():
    rows = re.findall(r"^\| [SM]I[SM]O \| v\w+:.*$", README, re.MULTILINE)
    assert rows and set(rows) <= set(_committed("results/pod_compile/report.md").splitlines())


def test_decode_times_are_the_committed_ones():
    """ms per step, and times its bound."""
    committed = _tables(_committed("results/generation_latency/report.md"))
    found = {
        tuple(c[:4]): f"{float(c[4]):.2f} ({c[8]})" for c in committed if len(c) == 9 and c[0].startswith("mamba3")
    }
    batches = [("1", "float32"), ("8", "float32"), ("32", "float32"), ("128", "float32"), ("128", "bfloat16")]
    rows = {cells[0].split()[0].strip(","): cells[1:] for cells in _tables(README) if len(cells) == 6}
    for name in ("SISO", "MIMO"):
        assert rows[name] == [found[f"mamba3-{name.lower()}-1.5b", b, "1", dtype] for b, dtype in batches]


GPU_COLUMNS = dict(
    triton=("triton",),
    chunked=("chunked",),
    official=("mamba_ssm (Triton)", "mamba_ssm (TileLang)"),
    linear=("jax-linear-attention 0.1.0",),
)


@pytest.mark.parametrize(
    "table, rows, folder, columns, missing",
    [
        (1, 9, "kernel_latency", tuple(GPU_COLUMNS), "-"),
        (2, 11, "kernel_latency_h200", ("triton", "official"), "not run"),
    ],
)
def test_times_of_the_gpu_kernels_are_the_committed_ones(table, rows, folder, columns, missing):
    summary = json.loads(_committed(f"results/{folder}/summary.json"))
    figures = {}
    for row in summary["rows"] + summary["peers"]:
        if "ms" in row:
            memory = row.get("peak_bytes") or 2**20 * row.get("peak_mib", 0)
            shown = f"; {memory / 1e9:.2f}" if memory and row["what"] != "decode" else ""
            state = row.get("state_dtype") if row["what"] == "decode" else None
            place = row["what"], row["model"], row["shape"], state
            by = row.get("implementation") or row["peer"]
            assert by not in figures.setdefault(place, {}), (by, place)
            figures[place][by] = f"{row['ms']:.3g}{shown}"
    whats = {"forward": "forward", "forward + backward": "forward_backward", "decode step": "decode"}
    found = 0
    for name, *cells in _tables(README.split("| ms; memory, GB |")[table].split("\n\n")[0]):
        what, *options = name.split(", ")
        if what not in whats:
            continue
        sizes = dict(b=8, t=2048, h=64, p=64, n=128, g=1) | (dict(b=128, t=1) if what == "decode step" else {})
        sizes |= dict(re.findall(r"\b([btn])=(\d+)", name))
        state = next((option.split()[0] for option in options if option.endswith(" state")), None)
        model = "mimo" if "MIMO r=4" in options else "siso"
        place = whats[what], model, " ".join(f"{letter}={size}" for letter, size in sizes.items()), state
        of_columns = (GPU_COLUMNS[column] for column in columns)
        ours = [next((figures[place][by] for by in names if by in figures[place]), missing) for names in of_columns]
        assert cells == ours, name
        found += 1
    assert found == rows


def test_what_is_said_of_the_gpu_kernels_is_what_was_measured():
    """How much longer the official kernels take, what part of a copy's rate decode steps reach, and the errors."""
    folder, text = "results/kernel_latency_h200", " ".join(README.split())
    summary = json.loads(_committed(f"{folder}/summary.json"))
    rows = {(row["what"], row["model"], row["shape"], row["state_dtype"]): row for row in summary["rows"]}
    ratios = [
        f"{peer['ms'] / rows[peer['what'], peer['model'], peer['shape'], 'float32']['ms']:.2f}"
        for peer in summary["peers"]
    ]
    assert "forward pass takes {} times as long, with its backward pass {} times".format(*ratios) in text
    copy = next(row for row in summary["rows"] if row["model"] == "copy")
    rate = copy["bytes"] / copy["ms"]
    steps = {key[1:]: row for key, row in rows.items() if key[0] == "decode"}
    parts = {key: f"{100 * row['bytes'] / row['ms'] / rate:.0f}" for key, row in steps.items()}
    shape = "b=128 t=1 h=64 p=64 n={} g=1".format
    mimo = [parts["mimo", shape(n), dtype] for dtype in ("float32", "bfloat16") for n in (128, 64)]
    assert "reaches {}% (n=64: {}%) with float32 states, {}% ({}%) with bfloat16 ones".format(*mimo) in text
    siso = sorted(int(part) for (model, *_), part in parts.items() if model == "siso")
    assert f"bfloat16 states ({siso[0]}%)" in text and siso[1] >= 99
    lines = map(json.loads, _committed(f"{folder}/metrics.jsonl").splitlines())
    errors: dict[str, float] = {}
    for row in lines:
        errors[row["dtype"]] = max([errors.get(row["dtype"], 0.0), *row.get("errors", {}).values()])
    assert 0.008 < errors["bfloat16"] < 0.0081 and "were within 0.0081 of that recurrence" in text
    assert errors["float32"] < 6e-7 and "found at most 6e-7" in text


def test_rates_and_seconds_of_generation_are_the_committed_ones():
    """Of a row's steps, of a prompt to three digits, and of table 7."""
    rows = json.loads(_committed("results/generation_latency/summary.json"))["rows"]
    by_name = {row["name"].removesuffix(",state float32"): row for row in rows}
    rates, seconds = {}, {}
    for kind in ("siso", "mimo"):
        prompt = 65536 / by_name[f"prefill,mamba3-{kind}-1.5b,b=1 t=65536"]["s"]
        rates[kind] = f"{float(format(prompt, '.3g')):,.0f}"
        table_7 = (by_name[f"{what},mamba3-{kind}-1.5b,b=128 t=2048"] for what in ("prefill", "prefill+decode"))
        seconds[kind] = " and ".join(f"{row['s']:.2f}" for row in table_7)
    step = 1e3 / by_name["decode,mamba3-siso-1.5b,b=1 t=1"]["ms"]
    text = " ".join(README.split())
    assert f"as after one: {step:.0f} tokens/s, SISO." in text
    assert f"read at {rates['siso']} tokens/s by SISO and {rates['mimo']} by MIMO." in text
    assert f"take {seconds['siso']} s for SISO" in text and f", and {seconds['mimo']} s for MIMO" in text


def test_training_rates_are_the_committed_ones():
    """Model, operator, tokens/s, MFU, memory."""
    committed = [c for c in _tables(_committed("results/training_throughput/report.md")) if len(c) == 13]
    found = [[c[0], c[1], c[8], c[10], c[11]] for c in committed if c[4] == "16 x 2048"]
    names = ("Mamba-3 SISO", "Mamba-3 MIMO, rank 4", "Mamba-2", "Transformer")
    rows = [cells for cells in _tables(README) if len(cells) == 5 and cells[0] in names and cells[3].endswith("%")]
    assert rows == found and len(rows) == 4


def _tables(text: str) -> list[list[str]]:
    """The cells of every row of every table."""
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:2] == "| "]


def _committed(report: str) -> str:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, which knows the committed report from your own run's")
    committed = subprocess.run(["git", "show", f"HEAD:{report}"], cwd=ROOT, capture_output=True, text=True)
    assert committed.returncode == 0, committed.stderr
    return committed.stdout
