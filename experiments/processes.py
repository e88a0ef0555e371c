"""The cells of a grid side by side, each in a process of its own.

A small model leaves most of a GPU idle while its sweep compiles, validates or waits for the host; the processes share
each GPU in time. What they leave is what one process would have left, and is resumed in the same way.
"""

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import IO, NamedTuple

import jax

from experiments.command import Command
from mamba3_jax.command import INTERRUPTED, fail
from mamba3_jax.training.interrupts import interrupts

# Seconds between two looks at the processes.
POLL = 0.2


class _Running(NamedTuple):
    name: str
    gpu: str | None
    process: subprocess.Popen
    output: IO[str]

    def result(self) -> str:
        """ "done", or the last line of a cell that failed; the end of its output."""
        with self.output:
            self.output.seek(0)
            lines = [line for line in self.output if line.strip()]
        return "done" if self.process.returncode == 0 else lines[-1].rstrip() if lines else "no output"


def run_apart(command: Command, names: list[str]) -> int:
    """Runs those cells, `command.processes` at a time; returns the exit status, the first that is not 0.

    A cell that fails leaves the others alone. Ctrl-C and SIGTERM are handed on, so that every cell saves what it has.
    """
    gpus = _gpus(command.processes)
    waiting, running, status = list(names), [], 0
    with interrupts() as stop, _killed_at_last(running):
        while waiting or running:
            if stop and not status:
                status, waiting = INTERRUPTED, []
                for cell in running:
                    cell.process.terminate()
            while waiting and len(running) < command.processes:
                running.append(_start(command, waiting.pop(0), _least_used(gpus, running)))
            for cell in [cell for cell in running if cell.process.poll() is not None]:
                running.remove(cell)
                code = cell.process.returncode
                left = f"{len(waiting) + len(running)} of {len(names)} cells left"
                print(f"== {cell.name}: {cell.result()}; {left}", flush=True)
                status = status or code
            time.sleep(POLL)
    return status


def _start(command: Command, name: str, gpu: str | None) -> _Running:
    options = shlex.split(command.line)[3:]  # without "uv run mamba3"
    line = [sys.executable, "-m", "mamba3_jax.cli", *options, "--only", name]
    environment = dict(os.environ) if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    output = tempfile.TemporaryFile("w+", errors="replace")
    # A session of its own: Ctrl-C reaches this process alone, which hands it on.
    process = subprocess.Popen(line, env=environment, stdout=output, stderr=output, start_new_session=True)
    return _Running(name, gpu, process, output)


def _gpus(processes: int) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES can be; [None] on a CPU."""
    # Before JAX starts: of a GPU's memory no process, this one included, takes more than it needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    backend = jax.default_backend()
    if backend not in ("cpu", "gpu"):
        fail(f"processes: got {processes} on a machine with {backend} devices, which one process holds; allowed: 1")
    if backend == "cpu":
        return [None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(jax.local_device_count())]


def _least_used(gpus: list[str | None], running: list[_Running]) -> str | None:
    used = Counter(cell.gpu for cell in running)
    return min(gpus, key=lambda gpu: used[gpu])


@contextlib.contextmanager
def _killed_at_last(running: list[_Running]) -> Iterator[None]:
    """However it ends, nothing goes on without the process that started it."""
    try:
        yield
    finally:
        for cell in running:
            cell.process.kill()
