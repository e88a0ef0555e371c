"""What a call of a program takes on a GPU, kernel by kernel, as JAX's profiler sees it."""

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

# Kernels of this name are ours; all others are XLA's.
OURS = re.compile(r"(ssm_\w*?)(__\d+)?$")
XLA = "XLA"
# Over so many the mean is taken.
CALLS = 5


def kernels(call: Callable) -> dict[str, tuple[float, float]]:
    """{kernel: (ms, launches)} of one call, the longest first; empty where the profiler sees no GPU.

    `call` starts the program and returns its outputs; it has run before.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(CALLS):
                out = call()
            jax.block_until_ready(out)
        profiles = [jax.profiler.ProfileData.from_file(str(file)) for file in Path(folder).rglob("*.xplane.pb")]
        return by_kernel((plane for profile in profiles for plane in profile.planes), CALLS)


def by_kernel(planes: Iterable, calls: int) -> dict[str, tuple[float, float]]:
    """The same of a profile's planes: every stream of a GPU is a line, and every launch an event on it."""
    found: dict[str, tuple[float, float]] = {}
    streams = (line for plane in planes if "/device:GPU" in plane.name for line in plane.lines)
    for event in (event for line in streams if line.name.startswith("Stream") for event in line.events):
        ours = OURS.match(event.name)
        name = ours[1] if ours else XLA
        ms, launches = found.get(name, (0.0, 0.0))
        found[name] = ms + event.duration_ns / 1e6 / calls, launches + 1 / calls
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))
