"""How fast whole models read and write text on this accelerator, against the bytes that a step has to move.

    mamba3 experiment generation_latency [--models '[mamba3-siso-1.5b]'] [--only PATTERN] [--measure false] [--smoke]

Random weights of the published shapes, bfloat16 matrices as released, through the same `inference` functions that
`mamba3 generate` calls: compiled prefill in pieces, and the decode loop on the device, greedy. One row per cell:

    decode           ms per step of a batch, the median over slices of 32 steps as they arrive on the host, so that
                     whatever the host costs is in it; after 1 token, and for one row after up to 100,000
    prefill          seconds until the state after t tokens is there
    prefill+decode   seconds for t tokens in and t tokens out: with prefill, table 7 of arXiv:2603.15569

The bound of a decode step is the time to read the weights once, and to read and write the states, at the bandwidth of a
copy measured in the same run. Rows go to metrics.jsonl as they are measured; those of the same device, jax, XLA_FLAGS
and code (mamba3_jax and pallas) are not measured again, and the report shows those of older code that a run leaves out.
A results directory holds metrics.jsonl, summary.json, report.md and generation.png.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx

from experiments import kernel_latency, measured
from experiments.command import parse
from mamba3_jax.command import results_folder
from mamba3_jax.inference import GenerationState, Sampling, Stream, generate, prefill
from mamba3_jax.layers import Mamba3Config
from mamba3_jax.models import LM, PRESETS, LMConfig, abstract_model, preset

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

CODE = ("mamba3_jax", "pallas")
SLICE = 32
GREEDY = Sampling(temperature=0.0)
# Not a published size: for the smoke test, where the layers of the real ones would not fit.
TINY = "tiny"
# Table 7, one H100, batch 128: seconds of prefill, and of prefill and decode, by tokens t.
PAPER = {
    ("siso", 2048): (2.02, 17.57),
    ("siso", 16384): (16.22, 140.61),
    ("mimo", 2048): (2.42, 18.96),
    ("mimo", 16384): (19.44, 151.81),
}
PAPER_LLAMA = {2048: (1.08, 20.37), 16384: (12.17, 976.50)}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        models: names of published sizes.
        batches: rows of a decode step.
        state_dtypes: of the SSM states of the largest batch; the others have float32.
        positions: tokens that a single row has read before its decode steps are timed.
        prefill_lengths: tokens of a single row's prefill.
        table_7_batch, table_7_lengths: rows, and tokens in and out.
        slices: slices of 32 steps that a decode row's median is taken over.
        repeats: prefills that a prefill row's median is taken over, after one that does not count.
        measure: False only writes the report.
    """

    models: tuple[str, ...] = ("mamba3-siso-1.5b", "mamba3-mimo-1.5b")
    batches: tuple[int, ...] = (1, 8, 32, 128)
    state_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    positions: tuple[int, ...] = (1, 1_000, 10_000, 100_000)
    prefill_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)
    table_7_batch: int = 128
    table_7_lengths: tuple[int, ...] = (2048,)
    slices: int = 8
    repeats: int = 3
    measure: bool = True

    def __post_init__(self):
        for name in self.models:
            if name not in (*PRESETS, TINY):
                raise ValueError(f"models: got {name!r}; allowed: {', '.join(PRESETS)}")
        for name in ("models", "batches", "state_dtypes"):
            if not getattr(self, name):
                raise ValueError(f"{name}: got []; allowed: at least one")
        for name in ("batches", "positions", "prefill_lengths", "table_7_lengths"):
            if any(size < 1 for size in getattr(self, name)):
                raise ValueError(f"{name}: got {list(getattr(self, name))}; allowed: positive integers")
        for name in ("table_7_batch", "slices", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        if bad := [dtype for dtype in self.state_dtypes if dtype not in ("float32", "bfloat16")]:
            raise ValueError(f"state_dtypes: got {bad[0]!r}; allowed: float32, bfloat16")

    @property
    def settings(self) -> dict:
        """What a row depends on beside its cell."""
        return dict(slices=self.slices, repeats=self.repeats)


SMOKE = dict(
    models=(TINY,), batches=(1, 2), positions=(1, 20), prefill_lengths=(20,), table_7_batch=2, table_7_lengths=(20,),
    slices=1, repeats=1,
)  # fmt: skip


class Cell(NamedTuple):
    """One row of the results: t is the tokens that are read, of prefill+decode also those that are written."""

    what: str
    model: str
    b: int
    t: int
    state_dtype: str = "float32"

    @property
    def name(self) -> str:
        """What --only matches."""
        return f"{self.what},{self.model},b={self.b} t={self.t},state {self.state_dtype}"


def cells(config: Config) -> Iterator[Cell]:
    """All cells, each once, a model's side by side."""
    for model in config.models:
        found = [Cell("decode", model, b, 1) for b in config.batches]
        found += [Cell("decode", model, max(config.batches), 1, dtype) for dtype in config.state_dtypes]
        found += [Cell("decode", model, 1, t) for t in config.positions]
        found += [Cell("prefill", model, 1, t) for t in config.prefill_lengths]
        for t in config.table_7_lengths:
            found += [Cell(what, model, config.table_7_batch, t) for what in ("prefill", "prefill+decode")]
        yield from dict.fromkeys(found)


def model_config(name: str) -> LMConfig:
    """Of a published size, or the smoke test's."""
    if name == TINY:
        return LMConfig(Mamba3Config(d_model=32, d_state=16, head_dim=16), n_layers=2, vocab_size=256, mlp_width=64)
    return preset(name)


@functools.lru_cache(maxsize=1)
def random_model(name: str) -> LM:
    """Its matrices in bfloat16 if it computes in bfloat16, as released; the rest in float32."""
    config = model_config(name)
    dtype = jnp.dtype(config.dtype)

    def draw():
        state = nnx.state(LM(config, rngs=nnx.Rngs(params=jax.random.key(0, impl="rbg"))), nnx.Param)
        return jax.tree.map(lambda a: a.astype(dtype) if a.ndim == 2 and "float32" != config.dtype else a, state)

    return nnx.merge(nnx.graphdef(abstract_model(config)), jax.jit(draw)())


def measure(cell: Cell, config: Config) -> dict:
    """A cell's figures: ms of a decode step and the bytes that it moves, or seconds."""
    model = random_model(cell.model)
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (cell.b, cell.t))
    match cell.what:
        case "decode":
            state = _wait(prefill(model, prompts))
            ms, first = _decode_ms(model, state, cell.state_dtype, config.slices)
            return dict(ms=ms, first_slice_s=first, **step_bytes(model, cell))
        case "prefill":
            _seconds(lambda: prefill(model, prompts))
            return dict(s=statistics.median(_seconds(lambda: prefill(model, prompts)) for _ in range(config.repeats)))
        case "prefill+decode":
            run = functools.partial(generate, model, prompts, sampling=GREEDY)
            run(max_new_tokens=2 * SLICE)
            return dict(s=_seconds(lambda: run(max_new_tokens=cell.t).state))


def _decode_ms(model: LM, state: GenerationState, state_dtype: str, slices: int) -> tuple[float, float]:
    """Median ms of a step, and seconds of the first slice, compilation included."""
    tokens = SLICE * (slices + 1)
    stream = Stream(
        model, max_new_tokens=tokens, sampling=GREEDY, state=state, state_dtype=state_dtype, slice_tokens=SLICE
    )
    began = time.perf_counter()
    arrivals = [time.perf_counter() for _ in stream]
    return 1e3 * statistics.median(np.diff(arrivals)) / SLICE, arrivals[0] - began


def step_bytes(model: LM, cell: Cell) -> dict[str, int]:
    """Bytes that a decode step must move: every weight read once, every state read and written."""
    weights = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model, nnx.Param)))
    if not model.config.tie_embeddings:
        weights -= model.embedding[...].nbytes
    cache = jax.eval_shape(lambda: model.empty_cache(cell.b))
    size = jnp.dtype(cell.state_dtype).itemsize
    # Angles stay float32.
    states = sum(4 * s.ssm.angle.size + size * sum(a.size for a in s.ssm[1:]) for s in cache)
    return dict(weight_bytes=weights, state_bytes=states)


def _wait(state: GenerationState) -> GenerationState:
    jax.block_until_ready((state.cache, state.pending))
    return state


def _seconds(run) -> float:
    began = time.perf_counter()
    _wait(run())
    return time.perf_counter() - began


def copy_bandwidth() -> float:
    """Bytes per second of the copy that kernel_latency measures."""
    config = kernel_latency.Config()
    cell = next(c for c in kernel_latency.cells(config, jax.default_backend()) if c.model == "copy")
    row = kernel_latency.measure(cell, kernel_latency.prepare(cell, config), config)
    return 1e3 * row["bytes"] / row["ms"]


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    command = parse("generation_latency", Config, argv, cells=True)
    if command.smoke:
        command = dataclasses.replace(command, config=dataclasses.replace(command.config, **SMOKE))
    config, folder = command.config, results_folder(command.results_dir)
    rows = measured.read(folder)
    if config.measure:
        chosen = measured.choose(list(cells(config)), command.only)
        same = measured.identity(config, CODE)
        rows = measured.comparable(rows, same)
        bandwidth = None
        for cell in chosen:
            if measured.stands(rows.get(cell.name), same):
                continue
            bandwidth = bandwidth or copy_bandwidth()
            figures = dict(**measure(cell, config), copy_bytes_per_s=bandwidth)
            row = dict(name=cell.name, **cell._asdict(), **figures, **same)
            rows[cell.name] = row
            measured.add(folder, row)
            print(f"{cell.name}: {_figure(row)}", flush=True)
    else:
        rows = measured.comparable(rows, measured.newest_identity(rows, folder))
    rows = list(rows.values())
    summary = dict(command=command.line, rows=rows)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "report.md").write_text(render(summary, list(cells(config))))
    plot(rows).savefig(folder / "generation.png", dpi=120)
    print(f"report: {folder / 'report.md'}")
    return 0


def bound_ms(row: dict) -> float:
    """The least time of a decode step: its bytes at the bandwidth of a copy."""
    return 1e3 * (row["weight_bytes"] + 2 * row["state_bytes"]) / row["copy_bytes_per_s"]


def _figure(row: dict) -> str:
    if "s" in row:
        return f"{row['s']:.3g} s"
    return f"{row['ms']:.3g} ms per step, {row['ms'] / bound_ms(row):.2f}x its bound"


def render(summary: dict, wanted: list[Cell]) -> str:
    """The tables, with every wanted cell, measured or not."""
    rows = {row["name"]: row for row in summary["rows"]}
    wanted = list(dict.fromkeys([*wanted, *(Cell(*(row[key] for key in Cell._fields)) for row in summary["rows"])]))
    first = summary["rows"][0]
    lines = [
        "# Reading and writing text: whole models",
        "",
        f"    {summary['command']}",
        "",
        f"Random weights of the published shapes, bfloat16 matrices, on one {first['device']}, jax {first['jax']}; a",
        f"copy moves {first['copy_bytes_per_s'] / 1e9:.0f} GB/s. Greedy, the loop on the device; the host fetches 32",
        f"tokens at once. Hash of {' and '.join(CODE)}: {', '.join(sorted({row['code'] for row in summary['rows']}))}.",
        "",
        "## Decode",
        "",
        "The bound is the time to read the weights and to read and write the states at the bandwidth of a copy.",
        "",
        "| model | rows | tokens before | state | ms per step | tokens/s | GB/s | bound, ms | times the bound |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_decode_line(cell, rows.get(cell.name)) for cell in wanted if cell.what == "decode"),
        "",
        "## Prefill of one row",
        "",
        "Seconds from the prompt on the host until the state is there; the head is left to the first step.",
        "",
        "| model | tokens | seconds | tokens/s |",
        "| --- | --- | --- | --- |",
    ]
    for cell in wanted:
        if cell.what == "prefill" and cell.b == 1:
            s = rows[cell.name]["s"] if cell.name in rows else None
            lines.append(f"| {cell.model} | {cell.t} | " + (f"{s:.3f} | {cell.t / s:.0f} |" if s else "not run | - |"))
    lines += _table_7(rows, wanted)
    return "\n".join([*lines, "", "![ms per decode step](generation.png)", ""])


def _decode_line(cell: Cell, row: dict | None) -> str:
    line = f"| {cell.model} | {cell.b} | {cell.t} | {cell.state_dtype} | "
    if row is None:
        return line + "not run | - | - | - | - |"
    moved = row["weight_bytes"] + 2 * row["state_bytes"]
    return line + (
        f"{row['ms']:.3f} | {1e3 * row['b'] / row['ms']:.0f} | {moved / row['ms'] / 1e6:.0f} | "
        f"{bound_ms(row):.3f} | {row['ms'] / bound_ms(row):.2f} |"
    )


def _table_7(rows: dict[str, dict], wanted: list[Cell]) -> list[str]:
    """As the paper's, whose H100 and software are its own."""
    lines = [
        "",
        "## As table 7 of the paper",
        "",
        "Seconds for t tokens in (prefill), and t in and t out (prefill + decode), ours and in brackets the paper's,",
        "which ran on an H100 of its own. The paper's Llama-3.2-1B on vLLM: "
        + ", ".join(f"{a} / {b} at {t} tokens" for t, (a, b) in PAPER_LLAMA.items())
        + ".",
        "",
        "| model | rows | tokens t | prefill | prefill + decode |",
        "| --- | --- | --- | --- | --- |",
    ]
    for cell in wanted:
        if cell.what == "prefill+decode":
            kind = "mimo" if "mimo" in cell.model else "siso"
            published = cell.model.endswith("1.5b") and cell.b == 128
            paper = PAPER.get((kind, cell.t), ("-", "-")) if published else ("-", "-")
            ours = [rows.get(cell._replace(what=what).name) for what in ("prefill", "prefill+decode")]
            told = [f"{'not run' if row is None else format(row['s'], '.2f')} ({p})" for row, p in zip(ours, paper)]
            lines.append(f"| {cell.model} | {cell.b} | {cell.t} | {told[0]} | {told[1]} |")
    return lines


def plot(rows: list[dict]) -> plt.Figure:
    """ms per decode step against the batch, beside the bound, and against the tokens before."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    decode = [row for row in rows if row["what"] == "decode" and row["state_dtype"] == "float32"]
    for i, model in enumerate(dict.fromkeys(row["model"] for row in decode)):
        style = dict(color=str(0.45 * i), marker="os^v"[i % 4])
        mine = sorted((row for row in decode if row["model"] == model), key=lambda row: (row["b"], row["t"]))
        batch = [row for row in mine if row["t"] == 1]
        left.plot([r["b"] for r in batch], [r["ms"] for r in batch], label=model, **style)
        left.plot([r["b"] for r in batch], [bound_ms(r) for r in batch], ls=":", label=f"{model}, bound", **style)
        single = [row for row in mine if row["b"] == 1]
        right.plot([r["t"] for r in single], [r["ms"] for r in single], label=model, **style)
    left.set(xlabel="rows", ylabel="ms per decode step", xscale="log", yscale="log", title="float32 states")
    right.set(xlabel="tokens before", ylabel="ms per decode step", xscale="log", title="one row")
    right.set_ylim(bottom=0, top=1.2 * max((row["ms"] for row in decode if row["b"] == 1), default=1))
    for axes in (left, right):
        if decode:
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return figure
