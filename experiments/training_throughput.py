"""How fast whole models train on this accelerator, against what it can do, and whether its bfloat16 learns as well.

    mamba3 experiment training_throughput [--peer DIR] [--only PATTERN] [--measure false] [--smoke]

The step is that of `mamba3 train` (forward, backward, clipping, AdamW, float32 master weights, chunked loss), in
bfloat16, on random tokens, one document a row. One row per cell, of four parts:

    widths      Mamba-3 SISO and MIMO, Mamba-2 and a Transformer of one width, with as many parameters to 1%
    peer        the shape of mamba3-1p3b of jax-linear-attention 0.1.0: 48 mixers without MLPs, 16 rows of 4096 tokens
    lengths     tokens/s as rows grow, of as many tokens in all
    precision   the losses of one model, seed and data: bfloat16 by the kernels, float32 by the chunked form, and a
                control, float32 in chunks of another size: how far rounding alone takes two runs from each other

tokens/s are of the median of `steps` steps, each waited for, after two that do not count; MFU is of the FLOPs that the
model needs (training/flops.py). Of the ways to fit a step into memory (`plans`) the fastest that fits is taken and
named. DIR holds the peer's package, which is timed first, in a process of its own, since two do not share a GPU:

    uv pip install --no-deps --target build/jla jax-linear-attention==0.1.0 equinox==0.13.8

Rows go to metrics.jsonl as they are measured (the peer's to peers.jsonl); those of the same device, jax, XLA_FLAGS,
settings and code (mamba3_jax and pallas) are not measured again, and the report shows those of older code that this run
leaves out. A results directory holds these, summary.json, report.md and training.png.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments import measured, training_peer
from experiments.command import parse
from experiments.training_programs import MODELS, TINY, Cell, losses, measure, prepare
from experiments.training_report import figure_of, plot, render
from mamba3_jax.command import fail, results_folder
from mamba3_jax.command import parse as parse_options
from mamba3_jax.models.presets import SIZES
from mamba3_jax.training.config import TrainConfig

CODE = ("mamba3_jax", "pallas")
PEERS = "peers.jsonl"
# Cells whose steps are compiled at once; nothing is timed meanwhile.
GROUP = 5
# Options of the mixer in the part "precision": bfloat16 as it comes on a device, the rest in float32. The control's
# chunks are of a size that no backend takes by default.
PRECISIONS = {
    "bfloat16": dict(implementation=None),
    "float32": dict(implementation="chunked"),
    "control": dict(implementation="chunked", chunk_size=32),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        size: the published size whose widths the models have.
        models: of the part "widths": "siso", "mimo", "mamba2", "transformer".
        n_layers: their blocks; None is all that the size has.
        rows, context: of their steps.
        peer_layers, peer_rows, peer_context: of the part "peer".
        lengths: tokens of a row of the part "lengths".
        length_layers, length_tokens: its blocks, and tokens of a step.
        steps: that a median is taken over.
        precision: the training configuration whose losses are compared.
        precision_steps, precision_layers: its steps, and its blocks; None is what it says.
        peer: folder with the package jax-linear-attention 0.1.0, or None.
        measure: False only writes the report.
    """

    size: str = "1.5b"
    models: tuple[str, ...] = MODELS
    n_layers: int | None = None
    rows: int = 16
    context: int = 2048
    peer_layers: int = 48
    peer_rows: int = 16
    peer_context: int = 4096
    lengths: tuple[int, ...] = (2048, 8192, 32768, 65536)
    length_layers: int = 4
    length_tokens: int = 65536
    steps: int = 6
    precision: str = "configs/lm/precision.yaml"
    precision_steps: int = 500
    precision_layers: int | None = None
    peer: str | None = None
    measure: bool = True

    def __post_init__(self):
        if self.size not in (*SIZES, TINY):
            raise ValueError(f"size: got {self.size!r}; allowed: {', '.join(SIZES)}")
        if bad := [name for name in self.models if name not in MODELS]:
            raise ValueError(f"models: got {bad[0]!r}; allowed: {', '.join(MODELS)}")
        names = ("rows", "context", "peer_layers", "peer_rows", "peer_context", "length_layers", "length_tokens")
        optional = [name for name in ("n_layers", "precision_layers") if getattr(self, name) is not None]
        for name in (*names, "steps", "precision_steps", *optional):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        for t in self.lengths:
            if t < 1 or self.length_tokens % t:
                raise ValueError(f"lengths: got {t}; allowed: divisors of length_tokens={self.length_tokens}")

    @property
    def settings(self) -> dict:
        """What a row depends on beside its cell."""
        return dict(steps=self.steps, precision=self.precision, precision_steps=self.precision_steps)


SMOKE = dict(
    size=TINY, models=("mimo", "mamba2", "transformer"), n_layers=1, rows=2, context=16, peer_layers=1, peer_rows=2,
    peer_context=16, lengths=(32,), length_layers=1, length_tokens=32, steps=1, precision_steps=3, precision_layers=1,
)  # fmt: skip


def cells(config: Config) -> Iterator[Cell]:
    """All cells; the model of "precision" is its configuration's."""
    layers = config.n_layers or (SIZES[config.size].n_layers if config.size in SIZES else 1)
    for model in config.models:
        yield Cell("widths", model, config.size, layers, config.rows, config.context)
    yield Cell("peer", "siso", config.size, config.peer_layers, config.peer_rows, config.peer_context)
    for t in config.lengths:
        yield Cell("lengths", "siso", config.size, config.length_layers, config.length_tokens // t, t)
    training = precision(config, "float32")
    shape = (training.model.n_layers, training.data.batch_size, training.data.context)
    for name in PRECISIONS:
        yield Cell("precision", name, Path(config.precision).stem, *shape)


def precision(config: Config, name: str) -> TrainConfig:
    """The training configuration of one of PRECISIONS."""
    path = measured.ROOT / config.precision
    training = parse_options("train", TrainConfig, [f"--config={path}", f"--steps={config.precision_steps}"])
    if training.model.mamba3 is None:
        fail(f"precision: got {config.precision}, without model.mamba3; allowed: a configuration of Mamba-3")
    mixer = dataclasses.replace(training.model.mamba3, **PRECISIONS[name])
    dtype = "bfloat16" if name == "bfloat16" else "float32"
    layers = config.precision_layers or training.model.n_layers
    model = dataclasses.replace(training.model, mamba3=mixer, dtype=dtype, n_layers=layers)
    return dataclasses.replace(training, model=model)


def main(argv: list[str]) -> int:
    """The command; returns the exit status, 1 if a cell failed."""
    command = parse("training_throughput", Config, argv, cells=True)
    if command.smoke:
        command = dataclasses.replace(command, config=dataclasses.replace(command.config, **SMOKE))
    config, folder = command.config, results_folder(command.results_dir)
    # Before JAX takes its share of the device, which by default is three quarters.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    chosen = measured.choose(list(cells(config)), command.only) if config.measure else []
    if config.peer is not None and any(cell.part == "peer" for cell in chosen):
        _measure_peer(config, folder)
    stored = measured.read(folder)
    same = measured.identity(config, CODE) if config.measure else measured.newest_identity(stored, folder)
    rows = measured.comparable(stored, same)
    left = [cell for cell in chosen if not measured.stands(rows.get(cell.name), same)]
    for row in _measure_all(left, config):
        rows[row["name"]] = row | same
        measured.add(folder, row | same)
        print(f"{row['name']}: {figure_of(row)}", flush=True)
    asked = dict(device=same["device"], asked=_asked(config))
    peers = [row for row in measured.read(folder, PEERS) if {key: row[key] for key in asked} == asked]
    summary = dict(command=command.line, **same, rows=list(rows.values()), peers=peers[-1:])
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "report.md").write_text(render(summary, list(cells(config))))
    plot(summary).savefig(folder / "training.png", dpi=120)
    print(f"report: {folder / 'report.md'}")
    return int(any("reason" in row for row in rows.values()))


def _measure_all(chosen: list[Cell], config: Config) -> Iterator[dict]:
    """The row of each cell. Steps are compiled in groups; those of "precision" one by one, each with its own data."""
    timed = [cell for cell in chosen if cell.part != "precision"]
    with concurrent.futures.ThreadPoolExecutor(GROUP) as pool:
        for group in itertools.batched(timed, GROUP):
            waiting = {cell: pool.submit(prepare, cell) for cell in group}
            concurrent.futures.wait(waiting.values())
            for cell in group:
                yield _row(cell, lambda: measure(cell, waiting.pop(cell).result(), config.steps))
    for cell in chosen:
        if cell.part == "precision":
            yield _row(cell, lambda: losses(precision(config, cell.model)))


def _row(cell: Cell, figures: Callable[[], dict]) -> dict:
    """With a reason in place of figures if there are none: one model that fails must not cost the others' rows."""
    row = dict(name=cell.name, **cell._asdict())
    try:
        return row | figures()
    except Exception as error:  # whatever the compiler or the device says
        return row | dict(reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _measure_peer(config: Config, folder: Path) -> None:
    """Adds the peer's row to peers.jsonl, unless it has one of this device, these settings and this program."""
    path = Path(config.peer)
    if not (path / "jla").is_dir():
        fail(f"peer: got {path}, which holds no jla; allowed: the folder that --target named")
    program, asked = Path(training_peer.__file__), _asked(config)
    same = dict(asked=asked, code=hashlib.sha256(program.read_bytes()).hexdigest()[:12])
    known = [row for row in measured.read(folder, PEERS) if {key: row[key] for key in same} == same]
    devices = [row["device"] for row in known if "reason" not in row]
    # -P: the folder of the program is not to be searched for packages.
    line = [sys.executable, "-P", str(program), str(path.resolve()), json.dumps(asked), json.dumps(devices)]
    run = subprocess.run(line, capture_output=True, text=True, check=False)
    if run.returncode:
        fail(f"peer: got {path}, which failed: {(run.stderr.strip().splitlines() or ['without a word'])[-1]}")
    if row := json.loads(run.stdout.splitlines()[-1]):
        measured.add(folder, row | same, PEERS)
        told = row.get("reason") or f"{row['tokens'] / row['s']:,.0f} tokens/s"
        print(f"{row['peer']}, {row['preset']}: {told}", flush=True)


def _asked(config: Config) -> dict:
    """What the peer is to train."""
    preset = "tiny-mamba3" if config.size == TINY else training_peer.PRESET
    return dict(preset=preset, b=config.peer_rows, t=config.peer_context, steps=config.steps)
