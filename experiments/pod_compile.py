"""Memory per chip and compile time of the published 1.5B models' training step on TPU pods, without a TPU.

    mamba3 experiment pod_compile [--only PATTERN] [--measure false] [--smoke]

Each row is a `mamba3 compile` in a process of its own. A results directory holds summary.json and report.md; rows that
`--only` leaves out stay as an earlier run of this command left them. Needs the extra `tpu`.
"""

import dataclasses
import fnmatch
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from experiments.command import parse
from mamba3_jax.command import fail, results_folder
from mamba3_jax.distributed.compile_step import Memory

SISO, MIMO = (f"configs/lm/mamba3-{kind}-1.5b.yaml" for kind in ("siso", "mimo"))
# Half a million tokens are 256 rows of 2048, one for each of 256 devices; 512 devices share them by their heads. The
# state in 16 parts is small enough, and parts of 128 rows are summed as parts, those of 8 rows in 256 are not.
SQUARE = ("--mesh.data=16", "--mesh.fsdp=16")
BY_HEADS = (*SQUARE, "--mesh.tensor=2")
LONG = (
    *("--data.context=65536", "--data.batch_size=8", "--loss_chunk=65536"),
    *("--mesh.fsdp=8", "--mesh.sequence=64"),
)
TWICE = (*SQUARE, "--mesh.slices=2", "--data.batch_size=512")
TINY = (
    *("--model.mamba3.d_model=128", "--model.mamba3.d_state=32", "--model.n_layers=1", "--model.mlp_width=128"),
    *("--model.vocab_size=512", "--data.context=128", "--data.batch_size=4"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Nothing to choose but the rows, with --only.

    Attributes:
        measure: False only writes the report.
    """

    measure: bool = True


@dataclasses.dataclass(frozen=True)
class Row:
    """One step: the model's name in the table, its config, the pod, and what is said beside the config."""

    model: str
    config: str
    topology: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return ",".join([self.model, self.topology, *(option.strip("-") for option in self.options)])

    @property
    def argv(self) -> list[str]:
        """After `mamba3`."""
        return ["compile", "--config", self.config, "--topology", self.topology, *self.options]


ROWS = (
    Row("SISO", SISO, "v5e:16x16", SQUARE),
    Row("SISO", SISO, "v6e:16x16", SQUARE),
    Row("SISO", SISO, "v5p:8x8x8", BY_HEADS),
    Row("MIMO", MIMO, "v5e:16x16", SQUARE),
    Row("MIMO", MIMO, "v6e:16x16", SQUARE),
    Row("MIMO", MIMO, "v5p:8x8x8", BY_HEADS),
    Row("SISO", SISO, "v5p:8x8x8", LONG),
    Row("SISO", SISO, "v5e:16x16", TWICE),
)
SMOKE = (Row("SISO", SISO, "v5e:2x2", TINY),)


def main(argv: list[str]) -> int:
    """The command; returns the exit status, 1 if a step does not fit."""
    command = parse("pod_compile", Config, argv, cells=True)
    rows = SMOKE if command.smoke else [row for row in ROWS if fnmatch.fnmatch(row.name, command.only)]
    if command.smoke and importlib.util.find_spec("libtpu") is None:
        print("pod_compile: nothing to compile with; the extra tpu has it")
        return 0
    if not rows:
        fail(f"only: got {command.only!r}; allowed: a pattern of {', '.join(row.name for row in ROWS)}")
    folder = results_folder(command.results_dir)
    path = folder / "summary.json"
    if not command.config.measure:
        if not path.exists():
            fail(f"measure: got false without {path}; allowed: true, or a results_dir of an earlier run")
        return _report(folder, json.loads(path.read_text()))
    found = {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for row in rows:
        found[row.name] = measure(row)
        order = [other.name for other in (*ROWS, *SMOKE)]
        kept = [found[name] for name in order if name in found]
        summary = dict(command=command.line, jax=version("jax"), libtpu=version("libtpu"), cores=_cores(), rows=kept)
        path.write_text(json.dumps(summary, indent=2) + "\n")
        _report(folder, summary)
    return int(any(found[row.name]["refusal"] is not None for row in rows))


def _report(folder: Path, summary: dict) -> int:
    """Writes it; returns the exit status."""
    (folder / "report.md").write_text(render(summary))
    print(f"report: {folder / 'report.md'}")
    return 0


def measure(row: Row) -> dict:
    """The report's numbers, from a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        summary = Path(scratch) / "summary.json"
        line = [sys.executable, "-m", "mamba3_jax.cli", *row.argv, "--summary", str(summary)]
        status = subprocess.run(line).returncode
        if status not in (0, 1):
            raise SystemExit(status)
        numbers = json.loads(summary.read_text())
    return dict(name=row.name, model=row.model, command=shlex.join(["mamba3", *row.argv])) | numbers


def render(summary: dict) -> str:
    """The table, and the command of each row."""
    lines = [
        "# The training step of the 1.5B models, compiled for TPU pods",
        "",
        f"    {summary['command']}",
        "",
        f"Compiled on {summary['cores']} CPU cores, jax {summary['jax']}, libtpu {summary['libtpu']}; nothing ran.",
        "GiB of one device. Reserved is what the compiler sets aside, of what a program may have there: arguments,",
        "outputs that do not take their place, temporaries and the program; the peak is the part of it that is live at",
        "once, by the compiler's schedule. The floor of a step is its arithmetic at the chips' best rate: no step can",
        "be faster, and none has been timed.",
        "",
        "| model | devices | mesh | rows x tokens | arguments | temporaries | reserved | peak | floor | compiled in |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(line_of, summary["rows"]),
        "",
        "Collectives of one device and step, times and GiB:",
        "",
        *(f"- {row['model']}, {row['topology']}, {_mesh(row)}: {_collectives(row)}" for row in summary["rows"]),
        "",
        "The commands, and the operator that was compiled:",
        "",
        *(f"- `{row['command']}`: {'; '.join(row['implementations'])}" for row in summary["rows"]),
        "",
    ]
    return "\n".join(lines)


def line_of(row: dict) -> str:
    """A row of the table."""
    hbm, memory = row["hbm_bytes"], row["memory"]
    sizes = ["-", "-", f"does not fit into {_gib(hbm)}", "-"]
    if memory is not None:
        reserved = f"{_gib(Memory(**memory).reserved)} of {_gib(hbm)}"
        sizes = [_gib(memory["arguments"]), _gib(memory["temporaries"]), reserved, _gib(memory["peak"])]
    slices = row["mesh"]["slice"]
    pod = f"{slices} x {row['topology']}" if slices > 1 else row["topology"]
    cells = [
        row["model"], pod, _mesh(row), f"{row['batch_size']} x {row['context']}", *sizes,
        f"{1e3 * row['floor']:.3g} ms", f"{row['lowering'] + row['compiling']:.0f} s",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _mesh(row: dict) -> str:
    return " ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1)


def _collectives(row: dict) -> str:
    moved = [f"{c['count']} {kind} {_gib(c['bytes'])}" for kind, c in row["collectives"].items()]
    return ", ".join(moved) or "none"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
