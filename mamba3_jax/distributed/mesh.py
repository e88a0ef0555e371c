"""The mesh: devices along five axes.

    slice     copies of the model that a data-center network joins (TPU pods: slices; DCN)
    data      copies of the model: rows of the batch are cut, every parameter is whole
    fsdp      rows are cut, and so are parameters and optimizer, which are gathered layer by layer
    tensor    heads, MLP channels and vocabulary are cut
    sequence  time is cut; the state passes from device to device

Which array is cut along which of them is in rules.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

# Fastest links last: neighbours along tensor and sequence talk in every layer.
AXES = ("slice", "data", "fsdp", "tensor", "sequence")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis; one axis may be -1, which takes the devices that the others leave.

    Attributes:
        slices, data, fsdp, tensor, sequence: see the module's docstring.
    """

    slices: int = 1
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{name}: got {size}; allowed: a positive number of devices, or -1 for the rest")
        rest = [name for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ValueError(f"mesh.{rest[1]}: got -1, as mesh.{rest[0]}; allowed: one -1")

    def shape(self, devices: int) -> tuple[int, ...]:
        """Devices along each of `AXES`, on so many.

        Raises:
            ValueError: they cannot be divided so.
        """
        sizes = dataclasses.astuple(self)
        fixed = math.prod(size for size in sizes if size != -1)
        if devices % fixed:
            raise ValueError(f"mesh: got {self.text}, {fixed} devices; allowed: a divisor of the {devices} devices")
        return tuple(devices // fixed if size == -1 else size for size in sizes)

    @property
    def text(self) -> str:
        """The axes that cut something, as "data=4 x tensor=2"."""
        axes = [f"{name}={size}" for name, size in dataclasses.asdict(self).items() if size != 1]
        return " x ".join(axes) or "data=1"


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh, neighbours along its last axes close to each other.

    Args:
        config: its shape.
        devices: those of this machine or cluster (None), or of a topology. A mesh of fewer takes the first ones, if
            all are this process's.

    Raises:
        ValueError: the shape does not divide the devices, or leaves some of another process's idle, or its slices are
            not those of the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = config.shape(len(devices))
    used = math.prod(shape)
    types = (AxisType.Auto,) * len(AXES)
    if used < len(devices):
        if len({device.process_index for device in devices}) > 1:
            raise ValueError(
                f"mesh: got {config.text}, {used} devices; allowed: all {len(devices)} devices of the processes"
            )
        return Mesh(np.asarray(devices[:used]).reshape(shape), AXES, axis_types=types)
    # XLA gives each host of CPUs or GPUs an index of its own, though any axis may cross hosts.
    slices = len({getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices})
    if slices > 1 and shape[0] != slices:
        raise ValueError(f"mesh.slices: got {shape[0]}; allowed: {slices}, as many as the devices have")
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]), (slices, 1, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=types)


def under[**Inputs, Output](mesh: Mesh, function: Callable[Inputs, Output]) -> Callable[Inputs, Output]:
    """The function, traced with the mesh as the ambient one, which `constrain` and the operator look for."""

    @functools.wraps(function)
    def traced(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Output:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced
