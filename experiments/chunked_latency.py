"""How fast the chunked form is on this machine: time, temporary memory, and the cost per token as rows grow.

    mamba3 experiment chunked_latency [--peer DIR] [--chunk_sizes '[32,64,128]']

DIR holds another package to time in the same run, in a process of its own, because it has the same import name:

    uv pip install --no-deps --target build/peer mamba3-jax==1.0.1

Every figure is the median of `repeats` calls on random float32 inputs; memory is the compiler's temp_size_in_bytes. A
results directory holds summary.json and report.md.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.command import Command, parse
from mamba3_jax.command import fail, results_folder

COLUMNS = ("forward_ms", "forward_backward_ms", "forward_temp_mb", "forward_backward_temp_mb")
# Of the rows whose cost per token is compared.
HEADS = 4
# Two float32 forms of one function differ by rounding only.
SAME_FUNCTION = 1e-4


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        peer: folder with the package mamba3-jax 1.0.1, or None.
        chunk_sizes: chunk sizes to try beside the default.
        b, t, h, p, n: the shape that is timed, beside the peer if there is one.
        lengths: rows whose cost per token is compared, of 4 heads.
        repeats: calls per figure.
    """

    peer: str | None = None
    chunk_sizes: tuple[int, ...] = ()
    b: int = 2
    t: int = 2048
    h: int = 8
    p: int = 64
    n: int = 64
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    repeats: int = 15

    def __post_init__(self):
        for name in ("b", "t", "h", "p", "n", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")

    @property
    def shape(self) -> dict[str, int]:
        return dict(b=self.b, t=self.t, h=self.h, p=self.p, n=self.n)


def inputs(b: int, t: int, h: int, p: int, n: int) -> dict[str, jax.Array]:
    """Random inputs of one layer: both packages' operators start from these."""
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    return dict(
        x=normal(b, t, h, p), z=normal(b, t, h, p), B=normal(b, t, 1, n), C=normal(b, t, 1, n),
        dt=jax.nn.softplus(normal(b, t, h) - 3), A=-jax.nn.softplus(normal(b, t, h)),
        lam=jax.nn.sigmoid(normal(b, t, h)), angle=normal(b, t, n // 4), dy=normal(b, t, h, p),
    )  # fmt: skip


def ours(chunk_size: int | None = None):
    """(arrays) -> y by `ops.ssm`."""
    from mamba3_jax.ops import angular_velocity, ssm

    def run(a):
        h, n = a["x"].shape[2], a["B"].shape[-1]
        ones = jnp.ones((h, 1, n))
        return ssm(
            a["x"], a["B"][:, :, None], a["C"][:, :, None], a["dt"], a["A"], a["lam"],
            angular_velocity(a["angle"])[:, :, None], B_bias=ones, C_bias=ones, D=jnp.ones(h), z=a["z"],
            implementation="chunked", chunk_size=chunk_size,
        )[0]  # fmt: skip

    return run


def peers():
    """(arrays) -> y by mamba3-jax 1.0.1, composed as its mixer composes it, chunk 64 (its default)."""
    from mamba3_jax import modeling

    def run(a):
        (b, t, h, _), n = a["x"].shape, a["B"].shape[-1]
        angles = jnp.broadcast_to(a["angle"][:, :, None], (b, t, h, n // 4))
        angles = modeling.cumulative_angles(angles, a["dt"])
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        B, C = (jnp.repeat(a[name], h, 2) + 1 for name in ("B", "C"))
        k, q = (modeling.apply_rope_pairwise(u, cos, sin) for u in (B, C))
        gamma, carry = a["dt"] * a["lam"], a["dt"] * (1 - a["lam"])
        scale = gamma + jnp.pad(carry[:, 1:], ((0, 0), (0, 1), (0, 0)))
        diagonal = gamma * jnp.sum(B * C, -1)
        y, _ = modeling.ssd_forward(a["x"], q, k, a["dt"] * a["A"], scale, diagonal, jnp.ones(h), 64)
        return y * jax.nn.silu(a["z"])

    return run


def measure(run, arrays: dict[str, jax.Array], repeats: int) -> dict[str, float]:
    """Milliseconds and megabytes of forward, and of forward + backward with respect to every input."""

    def loss(arrays):
        return jnp.sum(run(arrays) * arrays["dy"])

    result = {}
    for name, function in (("forward", run), ("forward_backward", jax.grad(loss))):
        compiled = jax.jit(function).lower(arrays).compile()
        jax.block_until_ready(compiled(arrays))
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            jax.block_until_ready(compiled(arrays))
            times.append(time.perf_counter() - began)
        result[f"{name}_ms"] = 1e3 * statistics.median(times)
        result[f"{name}_temp_mb"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return result


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    command = parse("chunked_latency", Config, argv)
    config, folder = command.config, results_folder(command.results_dir)
    forms = {"chunked": measure(ours(), inputs(**config.shape), config.repeats)}
    for size in config.chunk_sizes:
        forms[f"chunked, chunk {size}"] = measure(ours(size), inputs(**config.shape), config.repeats)
    if config.peer is not None:
        forms["mamba3-jax 1.0.1"] = _measure_peer(Path(config.peer), config)
    per_token = {}
    for t in config.lengths:
        figures = measure(ours(), inputs(1, t, HEADS, 64, 64), config.repeats)
        per_token[t] = {k: 1e6 * v / (HEADS * t) for k, v in figures.items() if k.endswith("_ms")}
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()}), {os.cpu_count()} cores"
    summary = dict(command=command.line, device=device, jax=jax.__version__, forms=forms, per_token_ns=per_token)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "report.md").write_text(render(command, summary))
    print((folder / "report.md").read_text())
    return 0


def render(command: Command[Config], summary: dict) -> str:
    """report.md."""
    config, ours = command.config, summary["forms"]["chunked"]
    shape = " ".join(f"{name}={size}" for name, size in config.shape.items())
    lines = [
        "# The chunked form",
        "",
        f"    {summary['command']}",
        "",
        f"float32, {shape}, on {summary['device']}, jax {summary['jax']}; medians of {config.repeats} calls on random "
        "inputs. In brackets how many times the chunked form's own figure it is.",
        "",
        "| | forward, ms | forward + backward, ms | temporaries of forward, MB | of both, MB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, figures in summary["forms"].items():
        times = "" if name == "chunked" else " ({:.2f}x)"
        cells = [f"{figures[key]:.1f}{times.format(figures[key] / ours[key])}" for key in COLUMNS]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    lines += [
        "",
        f"Cost per token and head as rows grow, b=1 h={HEADS} p=64 n=64:",
        "",
        "| row, tokens | forward, ns | forward + backward, ns |",
        "| --- | --- | --- |",
    ]
    for t, figures in summary["per_token_ns"].items():
        lines.append(f"| {t} | {figures['forward_ms']:.0f} | {figures['forward_backward_ms']:.0f} |")
    return "\n".join([*lines, ""])


def _measure_peer(folder: Path, config: Config) -> dict[str, float]:
    if not (folder / "mamba3_jax").is_dir():
        fail(f"peer: got {folder}, which holds no mamba3_jax; allowed: the folder that --target named")
    code = (
        f"import sys, json; sys.path[:0] = [{str(folder.resolve())!r}, {str(Path(__file__).parent.parent)!r}]\n"
        "import mamba3_jax.modeling, numpy\n"
        "from experiments import chunked_latency as c\n"
        f"arrays = c.inputs(**{config.shape})\n"
        "numpy.save(sys.argv[1], c.jax.jit(c.peers())(arrays))\n"
        f"print(json.dumps(c.measure(c.peers(), arrays, {config.repeats})))"
    )
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "y.npy"
        run = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True, check=False)
        if run.returncode:
            fail(f"peer: got {folder}, which failed: {run.stderr.strip().splitlines()[-1]}")
        theirs, mine = np.load(saved), np.asarray(jax.jit(ours())(inputs(**config.shape)))
    difference = np.max(np.abs(theirs - mine)) / np.max(np.abs(mine))
    print(f"both compute the same function: largest difference {difference:.1e} of the largest output")
    if difference > SAME_FUNCTION:
        fail(f"peer: got outputs that differ by {difference:.1e}; allowed: {SAME_FUNCTION:.0e}")
    return json.loads(run.stdout.splitlines()[-1])
