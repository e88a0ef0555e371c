"""The TPU kernels compiled for every generation on a machine without one, and what they move beside others.

    mamba3 experiment tpu_compile [--peer DIR] [--only PATTERN] [--measure false] [--smoke]

One row per cell: forward, forward + backward with respect to every input, and a decode step of one layer at the
published shapes, SISO and MIMO, compiled whole (not only lowered) by libtpu for one device of each generation. A row
has the VMEM of each kernel, and the program's arguments, outputs, temporaries and bytes over HBM, the last counted by
experiments/tpu_hlo.py in the optimised HLO, the same way for the chunked form in XLA and for mamba3-siso-tpu, a clone
of which --peer names. Rows "schedule" have the bundles that the compiler schedules for one step of each kernel: cycles
of the core, were nothing to wait for memory.

Rows go to metrics.jsonl as they are made; those of the same jax, libtpu and code (decode steps and sequences each have
their own) are not made again. The status is 1 if a program does not compile, or if one of the kernels' copies or
transposes an array as large as x, or moves more than half the bytes of another's.
"""

import dataclasses
import fnmatch
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax

from experiments import tpu_programs
from experiments.command import parse
from experiments.kernel_programs import Shape
from experiments.tpu_programs import TOPOLOGIES, compile_for
from mamba3_jax.command import fail, results_folder
from pallas.tpu import cost_model
from pallas.tpu.chips import CHIPS, chip_of
from pallas.tpu.cost_model import Sizes

ROOT = Path(__file__).resolve().parent.parent
COUNTED = ("experiments/tpu_programs.py", "experiments/tpu_hlo.py")
OPERATOR = tuple(f"mamba3_jax/ops/{name}.py" for name in ("chunked", "discretization", "inputs", "output", "rotation"))
KERNELS = tuple(f"pallas/tpu/{name}.py" for name in ("operands", "tiles", "forward", "backward", "vjp", "block_sizes"))
DECODE = ("mamba3_jax/ops/decode.py", "mamba3_jax/ops/discretization.py", "pallas/step.py")
# What a row depends on: by its implementation, or of a decode step.
CODE = {
    "peer": COUNTED,
    "chunked": COUNTED + OPERATOR,
    "tpu": COUNTED + ("mamba3_jax/ops/tpu.py", "mamba3_jax/ops/prepass.py") + KERNELS,
    "decode": COUNTED + DECODE + ("pallas/tpu/decode.py", "pallas/tpu/tiles.py"),
}
WHAT = {"forward": "forward", "forward_backward": "forward + backward", "decode": "decode step"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile.

    Attributes:
        chips: generations of the kernels' rows.
        shapes: of one layer; by default those of the published models, 1.5B first.
        mimo_rank: rank of MIMO.
        decode_b: rows of a decode step.
        compared: generations for which the chunked form and the peer are compiled too, at the first shape.
        peer: the folder of a clone of mamba3-siso-tpu, or None.
        schedules: whether the compiler's schedules are read, in processes of their own.
        measure: False only writes the report.
    """

    chips: tuple[str, ...] = tuple(TOPOLOGIES)
    shapes: tuple[str, ...] = ("b=8 t=2048 h=64", "b=8 t=2048 h=48", "b=8 t=2048 h=32", "b=8 t=2048 h=24")
    mimo_rank: int = 4
    decode_b: int = 128
    compared: tuple[str, ...] = ("v5e",)
    peer: str | None = None
    schedules: bool = True
    measure: bool = True

    def __post_init__(self):
        for chip in (*self.chips, *self.compared):
            chip_of(chip)
        if not self.shapes:
            raise ValueError("shapes: got []; allowed: at least one")
        for text in self.shapes:
            Shape.parse(text)
        if self.mimo_rank < 1 or self.decode_b < 1:
            raise ValueError(f"mimo_rank, decode_b: got {self.mimo_rank}, {self.decode_b}; allowed: positive integers")
        if self.peer is not None and not (Path(self.peer) / "mamba3_pallas").is_dir():
            raise ValueError(f"peer: got {self.peer}; allowed: a clone of mamba3-siso-tpu, with mamba3_pallas/ in it")


SMOKE = dict(chips=("v5e",), shapes=("b=1 t=256 h=16",), decode_b=1, mimo_rank=2, compared=(), schedules=False)


class Cell(NamedTuple):
    """One row. `implementation` is "tpu", "chunked" or "peer"; of a schedule, `what` begins with "schedule"."""

    chip: str
    what: str
    implementation: str
    shape: Shape
    r: int = 1

    @property
    def name(self) -> str:
        """What --only matches."""
        return f"{self.chip},{self.what},{self.implementation},{self.shape},r={self.r}"


def cells(config: Config) -> list[Cell]:
    """All cells: what is compared first, then generation by generation."""
    shapes = [Shape.parse(text) for text in config.shapes]
    found = []
    others = ("chunked", *(["peer"] if config.peer else []))
    for chip, implementation, what in itertools.product(config.compared, others, ("forward", "forward_backward")):
        found.append(Cell(chip, what, implementation, shapes[0]))
    for shape, chip, what, r in itertools.product(shapes, config.chips, WHAT, (1, config.mimo_rank)):
        of = shape._replace(b=config.decode_b, t=1) if what == "decode" else shape
        found.append(Cell(chip, what, "tpu", of, r))
    if config.schedules:
        for chip, what, r in itertools.product(config.chips, ("forward_backward", "decode"), (1, config.mimo_rank)):
            found.append(Cell(chip, f"schedule {what}", "tpu", shapes[0], r))
    return found


def measure(cell: Cell, config: Config) -> dict:
    """A cell's figures, or a reason why there are none."""
    try:
        if cell.what.startswith("schedule"):
            return dict(bundles=_schedule(cell))
        large = cell.shape.b * cell.shape.t * cell.shape.h * cell.shape.p
        if cell.what == "decode":
            function, arguments = tpu_programs.step(cell.implementation, cell.shape, cell.r)
            return compile_for(cell.chip, function, arguments, large * cell.shape.n, donate=(1,))._asdict()
        if cell.implementation == "peer":
            program = tpu_programs.peer(config.peer, cell.chip, cell.what, cell.shape)
        else:
            program = tpu_programs.sequences(cell.implementation, cell.what, cell.shape, cell.r)
        return compile_for(cell.chip, *program, large)._asdict()
    except Exception as error:  # a program that does not compile must not cost the rows after it
        return dict(reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _schedule(cell: Cell) -> dict[str, int]:
    """In a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | dict(MAMBA3_DUMP=folder, LIBTPU_INIT_ARGS=flags, JAX_PLATFORMS="cpu")
        command = [sys.executable, "-m", "experiments.tpu_programs", cell.chip, cell.what.split()[1], str(cell.r)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def identity(what: str, implementation: str) -> dict:
    """What must be the same for a row to stand."""
    code = hashlib.sha256()
    for name in CODE["decode" if what.endswith("decode") else implementation]:
        code.update((ROOT / name).read_bytes())
    return dict(jax=jax.__version__, libtpu=importlib.metadata.version("libtpu"), code=code.hexdigest()[:12])


def failures(rows: list[dict]) -> list[str]:
    """What should not be: programs that do not compile, kernels whose program moves an array as large as x, or more
    than half the bytes of another's."""
    found = []
    for row in rows:
        if "reason" in row and row["implementation"] != "peer":
            found.append(f"{row['name']}: {row['reason']}")
        elif row["implementation"] == "tpu" and row.get("moves"):
            found.append(f"{row['name']}: moves an array as large as x: {', '.join(row['moves'])}")
        found += [
            f"{row['name']}: moves {row['hbm_bytes'] / 1e9:.2f} GB, more than half of the "
            f"{theirs['hbm_bytes'] / 1e9:.2f} of {theirs['implementation']}"
            for theirs in _beside(row, rows)
            if 2 * row["hbm_bytes"] > theirs["hbm_bytes"]
        ]
    return found


def _beside(row: dict, rows: list[dict]) -> list[dict]:
    """What others move in the same pass of SISO, where `row` is ours."""
    if row["implementation"] != "tpu" or row["r"] != 1 or "hbm_bytes" not in row:
        return []
    same = [other for other in rows if all(other[name] == row[name] for name in ("chip", "what", "shape"))]
    return [other for other in same if other["implementation"] != "tpu" and "hbm_bytes" in other]


def render(summary: dict) -> str:
    """report.md."""
    rows = summary["rows"]
    lines = [
        "# TPU kernels, compiled",
        "",
        f"    {summary['command']}",
        "",
        f"By libtpu {summary['libtpu']} with jax {summary['jax']} on a machine without a TPU: nothing here was run, "
        "and times are predictions. One layer in bfloat16, p=64 n=128 g=1, rope fraction 0.5, for one device.",
    ]
    for text in (_comparison(rows), _predictions(rows), _kernels(rows)):
        lines += ["", *text]
    if found := failures(rows):
        lines += ["", "## What failed", "", *(f"- {line}" for line in found)]
    return "\n".join([*lines, ""])


def _comparison(rows: list[dict]) -> list[str]:
    names = {"tpu": "ours, Pallas", "chunked": "ours, chunked XLA", "peer": "mamba3-siso-tpu"}
    lines = [
        "## Bytes beside others",
        "",
        "Bytes over HBM are counted in the optimised HLO, instruction by instruction (experiments/tpu_hlo.py); moves "
        "are copies and transpositions of arrays as large as x, b t h p numbers.",
        "",
        "| chip | shape | pass | | HBM, GB | times ours | temporaries, MB | moves |",
        "|" + " --- |" * 8,
    ]
    others = [row for row in rows if row["implementation"] != "tpu"]
    for key in dict.fromkeys((row["chip"], row["shape"], row["what"]) for row in others):
        of = [row for row in rows if (row["chip"], row["shape"], row["what"]) == key and row["r"] == 1]
        ours = next((row for row in of if row["implementation"] == "tpu" and "hbm_bytes" in row), None)
        for row in sorted(of, key=lambda row: list(names).index(row["implementation"])):
            cells = [key[0], key[1], WHAT[key[2]], names[row["implementation"]]]
            if "reason" in row:
                cells += [row["reason"], "", "", ""]
            else:
                times = f"{row['hbm_bytes'] / ours['hbm_bytes']:.2f}" if ours else "-"
                cells += [f"{row['hbm_bytes'] / 1e9:.2f}", times, f"{row['temporaries'] / 1e6:.0f}", len(row["moves"])]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _predictions(rows: list[dict]) -> list[str]:
    lines = [
        "## Predicted times",
        "",
        "By schedule: bundles of one step (the parts of a step that run once per chunk or row count every time) times "
        "steps, over clock and cores. By the cost model: `mamba3 bench --cost_model tpu`, which also says what binds. "
        "Both are of the kernels alone, and neither was measured.",
        "",
        "| chip | | kernel | bundles per step | by schedule, ms | HBM, ms | cost model, ms | binds |",
        "|" + " --- |" * 8,
    ]
    for row in rows:
        for kernel, bundles in row.get("bundles", {}).items():
            what = kernel.removeprefix("ssm_tpu_")
            seconds, prediction = predicted(row, what, bundles)
            form = "SISO" if row["r"] == 1 else f"MIMO r={row['r']}"
            cells = [row["chip"], form, what, bundles, f"{1e3 * seconds:.2f}", f"{1e3 * prediction.units['HBM']:.2f}"]
            cells += [f"{1e3 * prediction.seconds:.2f}", prediction.binds]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def predicted(row: dict, what: str, bundles: int) -> tuple[float, cost_model.Prediction]:
    """Seconds of a kernel at the first shape (a decode step of 128 rows): by schedule, and by the cost model."""
    chip, shape = chip_of(row["chip"]), Shape.parse(row["shape"])
    sizes = Sizes(shape.b, shape.t, shape.h, shape.p, shape.n, shape.g, row["r"], shape.n // 4)
    if what == "decode":
        sizes = sizes._replace(b=128)
        work, steps = cost_model.decode(sizes, chip), sizes.b * sizes.h / 8
    else:
        blocks = tpu_programs.block_sizes(chip, sizes)
        function = {"forward": cost_model.forward, "backward": cost_model.backward}[what]
        work = function(sizes, chip, blocks.chunk)
        steps = sizes.b * sizes.t / blocks.chunk * sizes.h * sizes.p / 128 / blocks.blocks
    return steps * bundles / (chip.clock * min(chip.cores, sizes.b)), cost_model.predict(work, what, sizes, chip)


def _kernels(rows: list[dict]) -> list[str]:
    lines = [
        "## Every program",
        "",
        "| chip | shape | | pass | VMEM of the kernels, MiB (of the core's) | arguments | temporaries | HBM, GB | s |",
        "|" + " --- |" * 9,
    ]
    for row in rows:
        if row["implementation"] != "tpu" or "vmem" not in row:
            continue
        core = CHIPS[row["chip"]].vmem_bytes / 2**20
        vmem = ", ".join(f"{k.removeprefix('ssm_tpu_')} {v / 2**20:.1f}" for k, v in row["vmem"].items())
        form = "SISO" if row["r"] == 1 else f"MIMO r={row['r']}"
        megabytes = [f"{row[name] / 1e6:.0f} MB" for name in ("arguments", "temporaries")]
        cells = [row["chip"], row["shape"], form, WHAT[row["what"]], f"{vmem} ({core:.0f})", *megabytes]
        cells += [f"{row['hbm_bytes'] / 1e9:.2f}", f"{row['compile_seconds']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main(argv: list[str]) -> int:
    """The command; returns the exit status, 1 if `failures` found any."""
    command = parse("tpu_compile", Config, argv, cells=True)
    if command.smoke:
        command = dataclasses.replace(command, config=dataclasses.replace(command.config, **SMOKE))
    config, folder = command.config, results_folder(command.results_dir)
    if reason := tpu_programs.libtpu_missing():
        print(f"tpu_compile: nothing was compiled, because {reason}")
        return 0 if command.smoke else 1
    # Where no backend runs yet: libtpu is to compile, not to look for a TPU.
    jax.config.update("jax_platforms", "cpu")
    path = folder / "metrics.jsonl"
    stored = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = {row["name"]: row for row in stored}
    wanted = cells(config)
    if config.measure:
        same = functools.cache(identity)
        rows = {
            name: row for name, row in rows.items() if same(row["what"], row["implementation"]).items() <= row.items()
        }
        chosen = [cell for cell in wanted if fnmatch.fnmatch(cell.name, command.only)]
        if not chosen:
            fail(f"only: got {command.only!r}, which matches no cell; allowed: a pattern of {wanted[-1].name!r}")
        with path.open("a") as file:
            for cell in chosen:
                if cell.name in rows and "reason" not in rows[cell.name]:
                    continue
                row = dict(name=cell.name, **cell._asdict()) | dict(shape=str(cell.shape))
                row |= measure(cell, config) | same(cell.what, cell.implementation)
                rows[cell.name] = row
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(f"{cell.name}: {row.get('reason', 'compiled')}", flush=True)
    shown = [rows[cell.name] for cell in wanted if cell.name in rows]
    if not shown:
        fail(f"measure: got false with no rows in {path}; allowed: true, or a results_dir with rows")
    versions = {name: shown[-1][name] for name in ("jax", "libtpu")}
    summary = dict(command=command.line, **versions, rows=shown)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "report.md").write_text(render(summary))
    print(f"report: {folder / 'report.md'}")
    return int(bool(failures(shown)))
