"""What a run says of itself: the speed of an interval, its line, the progress bar, the plot of the loss."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from mamba3_jax.distributed.processes import is_first
from mamba3_jax.files import whole_file
from mamba3_jax.training.flops import peak_flops


class Clock:
    """Times the steps between two lines. The first step of a process, which compiles, is not counted.

    Args:
        tokens: of a step, over all processes.
        flops: of a token.
        devices: that share them.
    """

    def __init__(self, tokens: int, flops: int, devices: list[jax.Device]):
        self._tokens, self._flops, self._devices = tokens, flops, len(devices)
        self._peak = peak_flops(devices[0].device_kind)
        self.restart()

    def restart(self) -> None:
        """Begins an interval."""
        self._began, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def step(self) -> None:
        """One step was started."""
        self._steps += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What is inside waits for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Of the interval so far: seconds, tokens/s, TFLOP/s and MFU per device, share of the time waited for data.

        Empty before there was a step; without `mfu` on a device whose peak is not known.
        """
        if not self._steps:
            return {}
        seconds = time.perf_counter() - self._began
        speed = self._steps * self._tokens / seconds
        per_device = speed * self._flops / self._devices
        read = dict(
            seconds=seconds,
            tokens_per_second=speed,
            tokens_per_second_per_device=speed / self._devices,
            tflops_per_device=per_device / 1e12,
            data_wait=self._waited / seconds,
        )
        return read if self._peak is None else read | dict(mfu=per_device / self._peak)


def line_of(record: dict, timing: dict[str, float], steps: int) -> str:
    """One interval, for people."""
    parts = [f"step {record['step']}/{steps}"]
    if "loss" in record:
        parts += [
            f"loss {_number(record['loss'], '.4f')}",
            f"rate {record['learning_rate']:.2e}",
            f"gradient {_number(record['gradient_norm'], '.3f')}",
        ]
    if timing:
        parts.append(f"{timing['tokens_per_second']:,.0f} tokens/s")
        if timing["tokens_per_second_per_device"] < timing["tokens_per_second"]:
            parts.append(f"{timing['tokens_per_second_per_device']:,.0f} tokens/s/device")
        parts.append(f"{timing['tflops_per_device']:.3g} TFLOP/s/device")
        if "mfu" in timing:
            parts.append(f"MFU {100 * timing['mfu']:.1f}%")
        parts.append(f"data wait {100 * timing['data_wait']:.1f}%")
    if record.get("skipped"):
        parts.append(f"skipped {record['skipped']}")
    if "validation_loss" in record:
        perplexity = _number(record["validation_perplexity"], ".3f")
        parts.append(f"validation {_number(record['validation_loss'], '.4f')}, perplexity {perplexity}")
    return "  ".join(parts)


@contextlib.contextmanager
def progress(total: int, start: int) -> Iterator[Callable[[int, str | None], None]]:
    """Yields `show(step, line)`: lines as they come, above a bar with the time left if there is a terminal.

    Of several processes the first one shows them.
    """
    if not is_first():
        yield lambda step, line: None
        return
    console = Console()
    if not console.is_terminal:

        def show_line(step: int, line: str | None) -> None:
            if line is not None:
                print(line, flush=True)

        yield show_line
        return
    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(speed_estimate_period=120))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=total, completed=start)

        def show(step: int, line: str | None) -> None:
            bar.update(task, completed=step)
            if line is not None:
                bar.console.print(line, highlight=False)

        yield show


def plot_loss(records: list[dict], path: Path) -> None:
    """Training and validation loss against the step, whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if points:
            axes.plot(*zip(*points), style, markersize=3, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def finite(value: float) -> float | None:
    """As JSON can hold it."""
    return value if math.isfinite(value) else None


def _number(value: float | None, style: str) -> str:
    return "not finite" if value is None else format(value, style)
