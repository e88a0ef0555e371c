"""How fast the operator is on this accelerator, how far from what the device can do, and how exact.

    mamba3 experiment kernel_latency [--only PATTERN] [--peers FILE] [--measure false] [--smoke]

One row per cell (what, model, implementation, shape): forward, forward + backward with respect to every input, a decode
step as in table 6 of arXiv:2603.15569, prefill and prefill + decode as in its table 7, of Mamba-3 (SISO and MIMO) with
every implementation of this backend, Mamba-2's operator in XLA, and causal attention over arrays of the same width h p.
Times are medians over batches of calls that are enqueued together and waited for once, on random inputs, after calls
that do not count; decode steps are timed several to a program, since one takes as long as a call. GB/s are of the
fewest bytes and TFLOP/s of the fewest operations that the mathematics needs (`fewest_bytes`, `flops`), so that an
implementation that moves or computes more is seen to be slower, not busier. Of a forward and backward pass on a GPU the
profiler says, in calls that are not timed, which kernel takes how long.

Rows go to metrics.jsonl as they are measured. Those of the same device, jax, XLA_FLAGS, settings and code (the files of
mamba3_jax/ops and pallas) are not measured again, so that a run can be cut into slices with --only; those of other code
stay in the report, which says so, until they are. --measure false writes the report of the newest rows as they are.
FILE has JSON lines of other packages, timed by their own processes on the same device: peer, model, what, shape, dtype
and ms, or a reason instead of ms; `how` may say how it was timed. A results directory holds metrics.jsonl,
summary.json, latency.png and report.md.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import kernel_profile, kernel_report, measured
from experiments.command import parse
from experiments.kernel_programs import (
    DECODE_STEPS,
    PASSES,
    Cell,
    Shape,
    arrays,
    cells,
    counts,
    forward_backward,
    program,
    size,
)
from experiments.sweep import memory_available
from mamba3_jax.command import results_folder

CODE = ("mamba3_jax/ops", "pallas")
# Cells whose programs are compiled at once, on as many threads; nothing is timed meanwhile.
GROUP = 8
# A cell is timed for about this long at most, in batches of at most so many calls.
CELL_SECONDS = 2.0
MAX_CALLS = 200


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        shapes: of the forward and backward passes; the first one's h, p, n and g are those of the other parts.
        lengths: tokens t of the figure's single row, b=1.
        mimo_rank: rank of MIMO.
        dtype: of x, B, C, z, y and attention; the rest is float32.
        decode_batch: rows of a decode step and of a prefill, as in tables 6 and 7.
        decode_n: state sizes n of a decode step.
        state_dtypes: of the state of a decode step.
        prefill_lengths: tokens t of a prefill, and of the steps that follow it.
        oracle_tokens: most tokens of the slices whose errors are measured.
        copy_mib, matmul_size: sizes of the two measurements of what the device can do.
        batch_ms: shortest batch of calls that is timed.
        repeats: batches, fewer where they take over 2 s.
        peers: a file of other packages' rows, or None.
        measure: False only writes the report.
    """

    shapes: tuple[str, ...] = ("b=8 t=2048 h=64", "b=1 t=65536 h=64", "b=16 t=2048 h=32", "b=8 t=2048 h=64 n=64")
    lengths: tuple[int, ...] = (512, 2048, 8192, 32768, 131072, 262144)
    mimo_rank: int = 4
    dtype: str = "bfloat16"
    decode_batch: int = 128
    decode_n: tuple[int, ...] = (64, 128)
    state_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    prefill_lengths: tuple[int, ...] = (2048,)
    oracle_tokens: int = 4096
    copy_mib: int = 1024
    matmul_size: int = 8192
    batch_ms: float = 20.0
    repeats: int = 10
    peers: str | None = None
    measure: bool = True

    def __post_init__(self):
        if not self.shapes:
            raise ValueError("shapes: got []; allowed: at least one")
        for text in self.shapes:
            Shape.parse(text)
        for name in ("lengths", "decode_n", "prefill_lengths"):
            if any(size < 1 for size in getattr(self, name)):
                raise ValueError(f"{name}: got {list(getattr(self, name))}; allowed: positive integers")
        if any(n % 4 for n in self.decode_n):
            raise ValueError(f"decode_n: got {list(self.decode_n)}; allowed: multiples of 4")
        for name in ("mimo_rank", "decode_batch", "oracle_tokens", "copy_mib", "matmul_size", "batch_ms", "repeats"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive number")
        for name, dtypes in (("dtype", (self.dtype,)), ("state_dtypes", self.state_dtypes)):
            if bad := [dtype for dtype in dtypes if dtype not in ("float32", "bfloat16")]:
                raise ValueError(f"{name}: got {bad[0]!r}; allowed: float32, bfloat16")

    @property
    def settings(self) -> dict:
        """What a row depends on beside its cell."""
        names = ("dtype", "mimo_rank", "oracle_tokens", "copy_mib", "matmul_size", "batch_ms", "repeats")
        return {name: getattr(self, name) for name in names} | dict(decode_steps=DECODE_STEPS)


SMOKE = dict(
    shapes=("b=1 t=32 h=2 p=8 n=8",), lengths=(), mimo_rank=2, decode_batch=2, decode_n=(8,),
    state_dtypes=("bfloat16",), prefill_lengths=(8,), oracle_tokens=16, copy_mib=1, matmul_size=64, batch_ms=0.1,
    repeats=2,
)  # fmt: skip


class Prepared(NamedTuple):
    """A compiled cell, the maker of its inputs, the bytes of its arguments, outputs and temporaries, and how often a
    call does what is timed."""

    cell: Cell
    run: jax.stages.Compiled
    make: jax.stages.Compiled
    peak: int
    times: int


class Missing(NamedTuple):
    """A cell without figures: it cannot be measured here, or it failed and is tried again by the next run."""

    cell: Cell
    reason: str
    failed: bool = False


def prepare(cell: Cell, config: Config) -> Prepared | Missing | None:
    """Compiles a cell, if it is one that is timed."""
    if cell.what == "accuracy":
        return None
    try:
        function, arguments, donated, times = program(cell, config)
        shapes = jax.eval_shape(arguments)
        # XLA's attention holds all scores; without this it would compile for long what cannot run.
        scores = 4 * cell.shape.b * cell.shape.h * cell.shape.t**2 if cell[1:3] == ("attention", "xla") else 0
        if (least := size(shapes) + scores) > memory_available():
            return _too_large(cell, least)
        run = jax.jit(function, donate_argnums=donated).lower(*shapes).compile()
        m = run.memory_analysis()
        peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
        if peak > memory_available():
            return _too_large(cell, peak)
        return Prepared(cell, run, jax.jit(arguments).lower().compile(), peak, times)
    except Exception as error:  # a kernel that does not compile must not cost the rows after it
        return _missing(cell, error)


def measure(cell: Cell, prepared: Prepared | None, config: Config) -> dict | Missing:
    """A cell's figures: ms, calls, bytes, flops, peak_bytes and perhaps `kernels`; of accuracy: errors by array."""
    try:
        if prepared is None:
            return dict(errors=errors(cell))
        ms, calls = _time(prepared, config)
        spent = _kernels(prepared)
    except Exception as error:  # as above
        return _missing(cell, error)
    needed, operations = counts(cell, config)
    figures = dict(ms=ms, calls=calls, bytes=needed, flops=operations, peak_bytes=prepared.peak)
    return figures | (dict(kernels=spent) if spent else {})


def _time(prepared: Prepared, config: Config) -> tuple[float, int]:
    """Median ms of what is timed, and how many calls were."""
    arguments = prepared.make()
    decode = prepared.cell.what == "decode"

    def batch(calls: int) -> float:
        nonlocal arguments
        began = time.perf_counter()
        for _ in range(calls):
            out = prepared.run(*arguments)
            if decode:  # its state was donated
                arguments = (arguments[0], out[1])
        jax.block_until_ready(out)
        return 1e3 * (time.perf_counter() - began) / calls

    batch(1)
    once = batch(1)
    calls = math.ceil(min(config.batch_ms / once, MAX_CALLS))
    repeats = min(config.repeats, int(1e3 * CELL_SECONDS / (calls * once)))
    if repeats < 2:
        return once / prepared.times, 1
    return statistics.median(batch(calls) for _ in range(repeats)) / prepared.times, calls * repeats


def _kernels(prepared: Prepared) -> dict[str, tuple[float, float]]:
    """ms and launches by kernel, of the passes whose kernels are ours."""
    if prepared.cell.what not in PASSES or prepared.cell.implementation != "triton":
        return {}
    arguments = prepared.make()
    return kernel_profile.kernels(lambda: prepared.run(*arguments))


def errors(cell: Cell) -> dict[str, float]:
    """Relative Frobenius errors of y and of every gradient against the recurrence in float64 on the same inputs."""
    a = _inputs(cell.model, cell.shape, cell.r, cell.dtype)
    got = jax.jit(functools.partial(gradients, cell.model, cell.implementation))(a)
    want = _exact(cell._replace(implementation="recurrent"))
    return {name: _relative_error(got[name], want[name]) for name in want}


def gradients(model: str, implementation: str, a: dict) -> dict[str, jax.Array]:
    """y, and dx, dB and so on, of the inputs `a` with their dy."""
    dy = a["dy"]
    y, grads = forward_backward(model, implementation, {name: u for name, u in a.items() if name != "dy"}, dy)
    return dict(y=y) | {f"d{name}": u for name, u in grads.items()}


@functools.lru_cache(maxsize=1)
def _inputs(*of) -> dict[str, jax.Array]:
    return jax.jit(lambda: arrays(*of))()


@functools.lru_cache(maxsize=1)
def _exact(cell: Cell) -> dict[str, np.ndarray]:
    a = _inputs(cell.model, cell.shape, cell.r, cell.dtype)
    a = {name: np.asarray(u).astype(np.float64) for name, u in a.items()}
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(functools.partial(gradients, cell.model, cell.implementation))(a))


def _relative_error(got, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got).astype(np.float64) - want) / np.linalg.norm(want))


def _too_large(cell: Cell, needed: int) -> Missing:
    return Missing(cell, f"needs {needed / 1e9:.0f} GB of the {memory_available() / 1e9:.0f} GB there")


def _missing(cell: Cell, error: Exception) -> Missing:
    reason = " ".join(str(error).split())[:200]
    if isinstance(error, NotImplementedError):
        return Missing(cell, f"not implemented: {reason}")
    return Missing(cell, f"failed: {type(error).__name__}: {reason}", failed=True)


def main(argv: list[str]) -> int:
    """The command; returns the exit status, 1 if a cell failed."""
    command = parse("kernel_latency", Config, argv, cells=True)
    if command.smoke:
        command = dataclasses.replace(command, config=dataclasses.replace(command.config, **SMOKE))
    config, folder = command.config, results_folder(command.results_dir)
    peers = kernel_report.read_peers(config.peers)
    stored = measured.read(folder)
    if config.measure:
        same = measured.identity(config, CODE)
        chosen = measured.choose(cells(config, jax.default_backend()), command.only)
        rows = measured.comparable(stored, same)
        left = [cell for cell in chosen if not _stands(rows.get(cell.name), same)]
        _measure_all(left, config, same, rows, folder)
    else:
        same = measured.newest_identity(stored, folder)
        rows = measured.comparable(stored, same)
    shapes = [str(Shape.parse(text)) for text in config.shapes]
    backend = same["device"].rpartition("(")[2].rstrip(")")
    left = [cell.name for cell in cells(config, backend) if cell.name not in rows]
    summary = dict(command=command.line, **same, shapes=shapes, rows=list(rows.values()), peers=peers, left=left)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "report.md").write_text(kernel_report.render(summary))
    kernel_report.plot(folder / "latency.png", summary)
    print(f"report: {folder / 'report.md'}")
    return int(any(row["failed"] for row in rows.values()))


def _stands(row: dict | None, same: dict) -> bool:
    """Whether a cell with this row need not be measured: there is nothing to measure of what the device cannot hold."""
    return row is not None and not row["failed"] and row["code"] == same["code"]


def _measure_all(chosen: list[Cell], config: Config, same: dict, rows: dict[str, dict], folder: Path) -> None:
    """Measures cells in groups that are compiled together; every row is written at once."""
    with concurrent.futures.ThreadPoolExecutor(GROUP) as pool:
        for group in itertools.batched(chosen, GROUP):
            for cell, prepared in zip(group, list(pool.map(lambda cell: prepare(cell, config), group))):
                result = prepared if isinstance(prepared, Missing) else measure(cell, prepared, config)
                figures = result if isinstance(result, dict) else dict(reason=result.reason)
                row = dict(name=cell.name, **cell._asdict(), failed=isinstance(result, Missing) and result.failed)
                row |= dict(shape=str(cell.shape or ""), **figures, **same)
                rows[cell.name] = row
                measured.add(folder, row)
                told = f"{figures['ms']:.4g} ms" if "ms" in figures else figures.get("reason", "measured")
                print(f"{cell.name}: {told}", flush=True)
