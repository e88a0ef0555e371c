"""A progress bar with ETA on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Seconds between two plain lines.
LINE_EVERY = 10.0


@contextlib.contextmanager
def progress(total: int, start: int) -> Iterator[Callable[[int, dict[str, str]], None]]:
    """Yields `show(step, status)`, to be called as often as there is news."""
    console = Console()
    if not console.is_terminal:
        yield _plain(total, start)
        return
    columns = (
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(speed_estimate_period=120),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=total, completed=start, status="compiling ...")

        def show(step: int, status: dict[str, str]) -> None:
            bar.update(task, completed=step, status=_text(status))

        yield show


def _plain(total: int, start: int) -> Callable[[int, dict[str, str]], None]:
    began = last = time.monotonic()

    def show(step: int, status: dict[str, str]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_EVERY or step >= total:
            last = now
            eta = (now - began) / (step - start) * (total - step)
            print(f"step {step}/{total}  {_text(status)}  {now - began:.0f}s, ETA at most {eta:.0f}s", flush=True)

    return show


def _text(status: dict[str, str]) -> str:
    return "  ".join(f"{key} {value}" for key, value in status.items())
