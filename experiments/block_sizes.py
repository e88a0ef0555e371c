"""How the GPU kernels' times depend on how they cut their work: what the tables of pallas/triton are decided by.

    mamba3 experiment block_sizes [--only PATTERN] [--measure false] [--smoke]

From the defaults of this GPU one number at a time takes other values (`SEQUENCES`, `STEPS`): forward and forward +
backward of SISO and MIMO, and decode steps with both dtypes of the state. A cut that does not compile, or that the
kernels refuse, has its reason in place of a time. What wins goes by hand into `default_block_sizes` of
pallas/triton/block_sizes.py and decode.py, with a line of what was measured in TUNING.md beside them or in decode.py.

Cells are timed as experiments/kernel_latency.py times them. Rows go to metrics.jsonl as they are measured; those of the
same device, jax, XLA_FLAGS, settings and code (mamba3_jax/ops and pallas) are not measured again. A results directory
holds metrics.jsonl, summary.json and report.md.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import threading
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import jax

from experiments import kernel_latency, measured
from experiments.command import parse
from experiments.kernel_latency import CODE, GROUP, Missing, Prepared
from experiments.kernel_programs import PASSES, Cell, Shape
from mamba3_jax.command import fail, results_folder
from mamba3_jax.ops import triton as sequences
from pallas.triton import block_sizes
from pallas.triton import decode as steps

SEQUENCES = dict(
    rows=(16, 32, 64, 128), num_warps=(2, 4, 8), serial_stages=(1, 2, 3, 4), stages=(1, 2, 3), heads=(4, 8, 16, 32),
    turning_slab=(32, 64), programs=(128, 256, 512),
)  # fmt: skip
STEPS = dict(block_p=(8, 16, 32, 64), num_warps=(1, 2, 4, 8))
FORMS = {"siso": "SISO", "mimo": "MIMO"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        shape: of the forward and backward passes; its h, p, n and g are those of the decode steps.
        dtype: of x, B, C, z and y.
        mimo_rank: rank of MIMO.
        decode_batch: rows of a decode step.
        state_dtypes: of its state.
        measure: False only writes the report.
    """

    shape: str = "b=8 t=2048 h=64"
    dtype: str = "bfloat16"
    mimo_rank: int = 4
    decode_batch: int = 128
    state_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    measure: bool = True

    def __post_init__(self):
        self.timing  # noqa: B018  (raises for a bad value)

    @property
    def timing(self) -> kernel_latency.Config:
        """How cells are timed."""
        return kernel_latency.Config(
            shapes=(self.shape,), dtype=self.dtype, mimo_rank=self.mimo_rank, decode_batch=self.decode_batch,
            state_dtypes=self.state_dtypes,
        )  # fmt: skip

    @property
    def settings(self) -> dict:
        """What a row depends on beside its cell."""
        return {name: self.timing.settings[name] for name in ("batch_ms", "repeats", "decode_steps")}


SMOKE = dict(shape="b=1 t=32 h=2 p=16 n=32", mimo_rank=2, decode_batch=2, state_dtypes=("float32",))


class Cut(NamedTuple):
    """A cell, the one number that is not the default's, and all of them."""

    cell: Cell
    changed: str
    blocks: block_sizes.BlockSizes | steps.BlockSizes

    @property
    def name(self) -> str:
        """What --only matches."""
        return f"{self.cell.name},{self.changed}"


def cuts(config: Config) -> Iterator[Cut]:
    """All of them, the default of each cell first."""
    shape = Shape.parse(config.shape)
    step = shape._replace(b=config.decode_batch, t=1)
    for form, r in (("siso", 1), ("mimo", config.mimo_rank)):
        capability = getattr(jax.local_devices()[0], "compute_capability", "9.0")
        default = block_sizes.default_block_sizes(r, shape.p, shape.n, config.dtype, capability)
        for blocks, what in itertools.product(_around(default, SEQUENCES), PASSES):
            if blocks.rows % r == 0:
                yield Cut(Cell(what, form, "triton", shape, config.dtype, r), _changed(blocks, default), blocks)
        default = steps.default_block_sizes(shape.p, shape.n, r)
        for blocks, dtype in itertools.product(_around(default, STEPS), config.state_dtypes):
            if blocks.block_p <= shape.p:
                cell = Cell("decode", form, "triton", step, config.dtype, r, dtype)
                yield Cut(cell, _changed(blocks, default), blocks)


def _around[Blocks](default: Blocks, candidates: dict[str, tuple[int, ...]]) -> list[Blocks]:
    """The default, and all that differ from it in one number."""
    others = [{field: value} for field, values in candidates.items() for value in values]
    return list(dict.fromkeys([default, *(dataclasses.replace(default, **other) for other in others)]))


def _changed(blocks, default) -> str:
    before = dataclasses.asdict(default)
    different = [f"{field}={value}" for field, value in dataclasses.asdict(blocks).items() if value != before[field]]
    return " ".join(different) or "default"


class Cutting(threading.local):
    """The block sizes that this thread's programs are traced with, in place of the defaults."""

    blocks = None

    def prepare(self, cut: Cut, config: Config) -> Prepared | Missing | None:
        self.blocks = cut.blocks
        return kernel_latency.prepare(cut.cell, config.timing)

    def default_block_sizes(self, *_):
        return self.blocks


def measure_all(chosen: list[Cut], config: Config) -> Iterator[tuple[Cut, dict | Missing]]:
    """The figures of each, in groups that are compiled together."""
    cutting = Cutting()
    replace = functools.partial(mock.patch.object, attribute="default_block_sizes", new=cutting.default_block_sizes)
    with replace(sequences), replace(steps), concurrent.futures.ThreadPoolExecutor(GROUP) as pool:
        for group in itertools.batched(chosen, GROUP):
            for cut, prepared in zip(group, list(pool.map(lambda cut: cutting.prepare(cut, config), group))):
                missing = isinstance(prepared, Missing)
                yield cut, prepared if missing else kernel_latency.measure(cut.cell, prepared, config.timing)


def main(argv: list[str]) -> int:
    """The command; returns the exit status, 0 also where some cuts do not compile, which is a finding."""
    command = parse("block_sizes", Config, argv, cells=True)
    if command.smoke:
        command = dataclasses.replace(command, config=dataclasses.replace(command.config, **SMOKE))
    config = command.config
    if config.measure and jax.default_backend() != "gpu" and not command.smoke:
        fail(f"block_sizes: got a machine with {jax.default_backend()} devices; allowed: an NVIDIA GPU")
    folder = results_folder(command.results_dir)
    stored, wanted = measured.read(folder), list(cuts(config))
    if config.measure:
        same = measured.identity(config, CODE)
        rows = measured.of_identity(stored, same)
        chosen = measured.choose(wanted, command.only)
        for cut, result in measure_all([cut for cut in chosen if cut.name not in rows], config):
            figures = dict(reason=result.reason) if isinstance(result, Missing) else result
            cell = cut.cell._asdict() | dict(shape=str(cut.cell.shape))
            rows[cut.name] = dict(name=cut.name, changed=cut.changed, **cell, **figures, **same)
            measured.add(folder, rows[cut.name])
            print(f"{cut.name}: {_figure(rows[cut.name])}", flush=True)
    else:
        same = measured.newest_identity(stored, folder)
        rows = measured.of_identity(stored, same)
    summary = dict(command=command.line, **same, rows=list(rows.values()))
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "report.md").write_text(render(summary))
    print(f"report: {folder / 'report.md'}")
    return 0


def render(summary: dict) -> str:
    """A table for the passes of each form, and one for its decode steps."""
    lines = [
        "# Block sizes of the GPU kernels",
        "",
        f"    {summary['command']}",
        "",
        f"On one {summary['device']}, jax {summary['jax']}, code {summary['code']}. ms, medians, and in brackets",
        "times the default's; each row differs from the default in one number.",
    ]
    for form, decode in itertools.product(FORMS, (False, True)):
        rows = [row for row in summary["rows"] if row["model"] == form and (row["what"] == "decode") == decode]
        if rows:
            lines += ["", f"## {_title(rows[0], decode)}", "", *_table(rows, decode)]
    return "\n".join([*lines, ""])


def _title(row: dict, decode: bool) -> str:
    form = FORMS[row["model"]] + ("" if row["r"] == 1 else f" r={row['r']}")
    return f"{form}{', a decode step' if decode else ''}: {row['shape']}, {row['dtype']}"


def _table(rows: list[dict], decode: bool) -> list[str]:
    key = "state_dtype" if decode else "what"
    columns, found = list(dict.fromkeys(row[key] for row in rows)), {(row["changed"], row[key]): row for row in rows}
    heads = [f"{column} state" if decode else column.replace("_", " + ") for column in columns]
    lines = ["| | " + " | ".join(heads) + " |", "|" + " --- |" * (1 + len(columns))]
    for changed in dict.fromkeys(row["changed"] for row in rows):
        cells = [_figure(found.get((changed, column)), found.get(("default", column))) for column in columns]
        lines.append(f"| {changed} | " + " | ".join(cells) + " |")
    return lines


def _figure(row: dict | None, default: dict | None = None) -> str:
    if row is None:
        return "not run"
    if "ms" not in row:
        return row["reason"]
    times = f" ({row['ms'] / default['ms']:.2f})" if default and "ms" in default else ""
    return f"{row['ms']:.3f}{times}"
