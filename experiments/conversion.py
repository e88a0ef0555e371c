"""Time and memory of converting a released checkpoint, there and back.

    mamba3 experiment conversion [--model mamba3-mimo-1.5b] [--smoke]

The checkpoint has the published shapes and random weights, bfloat16 matrices as released, made on the spot. Each
conversion is a `mamba3 convert` in a process of its own, whose wall time and peak resident memory the system reports;
what comes back is compared with what went in, bit for bit. A results directory holds summary.json and report.md. Needs
four times the checkpoint's size on disk while it runs.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.command import parse
from mamba3_jax.command import results_folder
from mamba3_jax.convert.files import read_tensors
from mamba3_jax.convert.released import write_released
from mamba3_jax.layers import Mamba3Config
from mamba3_jax.models import PRESETS, LMConfig, abstract_model, preset

FORMS = {"torch": "pytorch_model.bin", "safetensors": "model.safetensors"}
# Not a published size: for the smoke test.
TINY = "tiny"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to convert.

    Attributes:
        model: name of a published size.
        forms: file formats: "torch", "safetensors".
    """

    model: str = "mamba3-siso-1.5b"
    forms: tuple[str, ...] = ("torch", "safetensors")

    def __post_init__(self):
        if self.model not in (*PRESETS, TINY):
            raise ValueError(f"model: got {self.model!r}; allowed: {', '.join(PRESETS)}")
        if not self.forms or set(self.forms) - FORMS.keys():
            raise ValueError(f"forms: got {list(self.forms)!r}; allowed: {', '.join(FORMS)}, at least one")


def main(argv: list[str]) -> int:
    """The command; returns the exit status, 1 if what came back is not what went in."""
    command = parse("conversion", Config, argv, cells=True)
    config = dataclasses.replace(command.config, model=TINY) if command.smoke else command.config
    folder = results_folder(command.results_dir)
    rows = []
    for form in config.forms:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            rows += convert_there_and_back(config.model, form, Path(scratch))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    summary = dict(command=command.line, model=config.model, cores=cores, rows=rows)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "report.md").write_text(render(summary))
    print(f"report: {folder / 'report.md'}")
    return int(not all(row["same"] for row in rows))


def convert_there_and_back(model: str, form: str, scratch: Path) -> list[dict]:
    """Two rows, in and out: seconds, peak_bytes, and whether the tensors that came back are those that went in."""
    released, ours, back = scratch / "released", scratch / "ours", scratch / "back"
    released.mkdir()
    config = _config(model)
    write_released(released, config, random_parameters(config), form=FORMS[form])
    size = (released / FORMS[form]).stat().st_size
    into = _convert(released, ours)
    out = _convert(ours, back, f"--format={form}")
    before, after = (read_tensors(directory) for directory in (released, back))
    same = before.keys() == after.keys() and all(_same(before[name].tensor, after[name].tensor) for name in before)
    rows = [
        dict(what=what, form=form, file_bytes=size, seconds=seconds, peak_bytes=peak, same=same)
        for what, (seconds, peak) in (("import", into), ("export", out))
    ]
    for row in rows:
        print(f"{row['what']} {form}: {row['seconds']:.0f} s, {row['peak_bytes'] / 1e9:.1f} GB", flush=True)
    return rows


def random_parameters(config: LMConfig) -> dict:
    """Nested, as `write_released` takes them: bfloat16 matrices, the rest float32."""
    rng = np.random.default_rng(0)

    def draw(a):
        values = 0.02 * rng.standard_normal(a.shape, np.float32)
        return values.astype(jnp.bfloat16) if a.ndim == 2 else values

    state = nnx.state(abstract_model(config), nnx.Param)
    return nnx.to_pure_dict(nnx.map_state(lambda _, a: a.replace(draw(a)), state))


def render(summary: dict) -> str:
    """The table."""
    lines = [
        f"# Converting a released checkpoint: {summary['model']}",
        "",
        f"    {summary['command']}",
        "",
        f"Random weights, each conversion a process of its own, on {summary['cores']} CPU cores.",
        "",
        "| conversion | file | its size, GB | seconds | peak memory, GB | tensors there and back |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['what']} | {FORMS[row['form']]} | {row['file_bytes'] / 1e9:.2f} | {row['seconds']:.0f} | "
        f"{row['peak_bytes'] / 1e9:.1f} | {'the same bits' if row['same'] else 'DIFFERENT'} |"
        for row in summary["rows"]
    ]
    return "\n".join([*lines, ""])


def _config(model: str) -> LMConfig:
    if model != TINY:
        return preset(model)
    mixer = Mamba3Config(d_model=32, d_state=16, head_dim=16, a_activation="heavy_tail")
    return LMConfig(mixer, n_layers=2, vocab_size=256, mlp_width=64, dtype="bfloat16")


def _convert(source: Path, destination: Path, *options: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a conversion's process."""
    began = time.perf_counter()
    line = [sys.executable, "-m", "mamba3_jax.cli", "convert", str(source), str(destination), *options]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(line)} ended with status {os.waitstatus_to_exitcode(status)}")
    # Kilobytes on Linux, bytes on macOS.
    return time.perf_counter() - began, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
