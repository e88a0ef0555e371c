"""The cells of a grid side by side, each in a process of its own.

A small model leaves most of a GPU idle while its sweep compiles, validates or waits for the host; the processes share
each GPU in time. What they leave is what one process would have left, and is resumed in the same way.
"""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax

from experiments.command import Command
from mamba3_jax.command import INTERRUPTED, fail
from mamba3_jax.training.interrupts import interrupts

# Seconds between two looks at the processes.
POLL = 0.2
# Of a GPU's memory, what its processes share; each one's context takes some of the rest.
MEMORY = 0.9
# What a cell that did not fail has to say.
ENDS = {0: "done", INTERRUPTED: "interrupted, and saved"}
# Runs a cell in a process that is asked to stop, and so saves, if the one that started it is gone (on Linux).
CELL = """
import ctypes, runpy, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
runpy.run_module("mamba3_jax.cli", run_name="__main__")
"""


class _Running(NamedTuple):
    name: str
    gpu: str | None
    process: subprocess.Popen
    log: Path

    def result(self) -> str:
        """How a process that has ended did; what it printed is kept if it failed."""
        code = self.process.returncode
        if code in ENDS:
            self.log.unlink()
            return ENDS[code]
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        return f"{how}, see {self.log}"


def run_apart(command: Command, names: list[str]) -> int:
    """Runs those cells, `command.processes` at a time; returns the exit status, the first that is not 0.

    A cell that fails leaves the others alone. Ctrl-C and SIGTERM are handed on, so that every cell saves what it has.
    """
    gpus = _gpus(command.processes)
    environment = _share(math.ceil(command.processes / len(gpus)))
    command.results_dir.mkdir(parents=True, exist_ok=True)
    waiting, running, done, status, handed_on = list(names), [], 0, 0, False
    try:
        with interrupts() as stop:
            while waiting or running:
                if stop and not handed_on:
                    handed_on, waiting, status = True, [], status or INTERRUPTED
                    for cell in running:
                        # Not SIGTERM, which a scheduler may have sent to all: a second one would end a cell at once.
                        cell.process.send_signal(signal.SIGINT)
                while waiting and len(running) < command.processes:
                    running.append(_start(command, waiting.pop(0), _least_used(gpus, running), environment))
                    print(f"== {running[-1].name}: began", flush=True)
                for cell in [cell for cell in running if cell.process.poll() is not None]:
                    running.remove(cell)
                    done += cell.process.returncode == 0
                    print(f"== {cell.name}: {cell.result()}; {done} of {len(names)} cells done", flush=True)
                    status = status or cell.process.returncode
                time.sleep(POLL)
    finally:
        for cell in running:
            cell.process.kill()
            cell.process.wait()
    if handed_on:
        print(f"interrupted; the same command resumes {command.results_dir}")
    return status


def _start(command: Command, name: str, gpu: str | None, environment: dict[str, str]) -> _Running:
    options = shlex.split(command.line)[3:]  # without "uv run mamba3"
    if gpu is not None:
        environment = environment | {"CUDA_VISIBLE_DEVICES": gpu}
    path = command.results_dir / f"{name}.log"
    with path.open("w") as log:
        # A session of its own: Ctrl-C reaches this process alone, which hands it on.
        process = subprocess.Popen(
            [sys.executable, "-c", CELL, *options, "--only", name],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    return _Running(name, gpu, process, path)


def _gpus(processes: int) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES can be; [None] on a CPU."""
    # Before JAX starts: this process, which computes nothing, takes none of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    backend = jax.default_backend()
    if backend not in ("cpu", "gpu"):
        fail(f"processes: got {processes} on a machine with {backend} devices, which one process holds; allowed: 1")
    if backend == "cpu":
        return [None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(jax.local_device_count())]


def _share(processes: int) -> dict[str, str]:
    """The environment of each of so many processes on one GPU: a cell that does not fit its share says so."""
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{MEMORY / processes:.3f}"} | dict(os.environ)


def _least_used(gpus: list[str | None], running: list[_Running]) -> str | None:
    used = Counter(cell.gpu for cell in running)
    return min(gpus, key=lambda gpu: used[gpu])
