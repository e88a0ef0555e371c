"""TPU pods by name, whose devices programs can be compiled for on a machine that has none.

    "v5e:16x16", "v5p:8x8x8": a generation, and its chips along each axis of one slice

libtpu, a package of the registry, has the compilers of all generations. The two cores of a chip are one device on v4
and v5p, and two on tpu7x.
"""

import importlib.util
import math
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies


class Generation(NamedTuple):
    """Of TPUs, from https://cloud.google.com/tpu/docs: axes of a slice, and chips of the largest one."""

    axes: int
    chips: int


GENERATIONS = {
    "v4": Generation(3, 4096),
    "v5e": Generation(2, 256),
    "v5p": Generation(3, 8960),
    "v6e": Generation(2, 256),
    "tpu7x": Generation(3, 9216),
}


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a topology: they can be put into a mesh and compiled for, not run on.

    Args:
        name: of one slice, as in the module's docstring.
        slices: how many such slices a data-center network joins.

    Raises:
        ValueError: the name is of no slice that there is, or libtpu is not installed. One line.
    """
    _check(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"topology: got {name!r}, whose compiler libtpu is not installed; allowed: with the extra tpu, "
            "pip install 'mamba3-jax-pallas[tpu]' or uv sync --extra tpu"
        )
    # Otherwise libtpu takes the cores of a v4 for devices, which programs on v4 never do.
    options = dict(chip_config_name="megacore") if name.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(name, "tpu", num_slices=slices, **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"topology: got {name!r} ({reason}); allowed: {_allowed()}") from error


def _check(name: str) -> None:
    """Some names that no slice has end libtpu, and the process with it."""
    kind, _, sizes = name.partition(":")
    generation = GENERATIONS.get(kind)
    axes = [int(size) for size in sizes.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) else []
    if generation is None or len(axes) != generation.axes or math.prod(axes) > generation.chips:
        raise ValueError(f"topology: got {name!r}; allowed: {_allowed()}")


def _allowed() -> str:
    letters = "AxBxC"
    kinds = [f"{kind}:{letters[: 2 * g.axes - 1]} of up to {g.chips} chips" for kind, g in GENERATIONS.items()]
    return f"{', '.join(kinds)}, such as v5e:16x16 or v5p:8x8x8"
