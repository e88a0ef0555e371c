"""Programs of one layer's operator, compiled for TPUs that are not there. x, z and y as the projections write them."""

import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.kernel_programs import Shape, apply, arrays
from experiments.tpu_hlo import Program
from mamba3_jax.distributed.compile_command import ENVIRONMENT
from mamba3_jax.distributed.topology import topology_devices
from mamba3_jax.ops import SSMState, ssm_step
from mamba3_jax.ops.decode import decode
from pallas.tpu.block_sizes import BlockSizes, default_block_sizes
from pallas.tpu.chips import CHIPS, Chip
from pallas.tpu.cost_model import Sizes

# The smallest slice of each generation.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
LONG = ("x", "z", "dy")


def libtpu_missing() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed (the extra tpu)"
    return None


def device(chip: str) -> jax.Device:
    """One device that can be compiled for, not run on."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return topology_devices(TOPOLOGIES[chip])[0]


class Compiled(NamedTuple):
    """Of one program, in bytes: what memory_analysis says, what crosses HBM (tpu_hlo.py), the VMEM of each kernel.

    `moves` are copies and transpositions of arrays as large as x.
    """

    compile_seconds: float
    arguments: int
    outputs: int
    temporaries: int
    hbm_bytes: int
    vmem: dict[str, int]
    moves: list[str]


def compile_for(chip: str, function: Callable, arguments: tuple, large: int, donate: tuple[int, ...] = ()) -> Compiled:
    """Compiles `function` of arrays with these shapes; `large` numbers are as many as x has."""
    mesh = Mesh(np.array([device(chip)]), ("device",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda u: jax.ShapeDtypeStruct(u.shape, u.dtype, sharding=whole), arguments)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = jax.jit(function, donate_argnums=donate, out_shardings=whole).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    program = Program.parse(text)
    return Compiled(
        round(seconds, 1),
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        program.bytes(),
        vmem_of_kernels(text),
        program.moves(large),
    )


def vmem_of_kernels(text: str) -> dict[str, int]:
    """By the kernels' names, from the optimised HLO."""
    found = {}
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            name = re.search(r"%([\w.\-]+) = ", line)[1]
            ours = re.search(r"ssm_tpu_[a-z]+", name)
            used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
            found[ours[0] if ours else name] = int(used[1]) if used else 0
    return found


def sequences(implementation: str, what: str, shape: Shape, r: int) -> tuple[Callable, tuple]:
    """(function, shapes of its arguments): "forward" or "forward_backward" of ours."""
    model = "siso" if r == 1 else "mimo"
    shapes = jax.eval_shape(lambda: arrays(model, shape, r, "bfloat16"))

    def forward(a):
        heads = {name: u.reshape(shapes[name].shape) for name, u in a.items()}
        return apply(model, implementation, heads)[0].reshape(*shapes["dy"].shape[:2], -1)

    return _passes(forward, _merged(shapes), what)


def peer(folder: str, chip: str, what: str, shape: Shape) -> tuple[Callable, tuple]:
    """The same of the package mamba3-siso-tpu, a clone of which lies in `folder`."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from mamba3_pallas.siso import siso_segment

    b, t, h, p, n, _ = shape
    shapes = jax.eval_shape(lambda: arrays("siso", shape, 1, "bfloat16"))
    shapes |= dict(dt_bias=jax.ShapeDtypeStruct((h,), jnp.float32))

    def forward(a):
        x, z = (a[name].reshape(b, t, h, p).transpose(0, 2, 1, 3) for name in ("x", "z"))
        q, k = (a[name].reshape(b, t, n) for name in ("C", "B"))
        q_bias, k_bias = (a[f"{name}_bias"].reshape(h, n) for name in ("C", "B"))
        omega = a["omega"].reshape(b, t, -1)
        kind = CHIPS[chip].device_kinds[0]
        scalars = (a["dt"], a["A"], a["lam"], omega, a["dt_bias"])
        out = siso_segment(q, k, x, *scalars, q_bias, k_bias, d_skip=a["D"], z=z, device_kind=kind)
        return out.y.transpose(0, 2, 1, 3).reshape(b, t, h * p).astype(jnp.bfloat16)

    return _passes(forward, _merged(shapes), what)


def step(kernel: str, shape: Shape, r: int) -> tuple[Callable, tuple]:
    """A decode step and its arguments, the state last."""
    model = "siso" if r == 1 else "mimo"
    b, _, h, p, n, _ = shape
    shapes = jax.eval_shape(lambda: arrays(model, shape._replace(t=1), r, "bfloat16"))
    shapes.pop("dy")
    per_token = ("x", "B", "C", "dt", "A", "lam", "omega", "z")
    token = {k: jax.ShapeDtypeStruct((b, *u.shape[2:]), u.dtype) if k in per_token else u for k, u in shapes.items()}
    state = SSMState(*(jax.ShapeDtypeStruct(u, jnp.float32) for u in SSMState.shapes(b, h, p, n, r, n // 4)))

    def function(a, state):
        if kernel == "tpu":
            return decode(**a, state=state, kernel=kernel)
        return ssm_step(**a, state=state, implementation=kernel)

    return function, (token, state)


def block_sizes(chip: Chip, sizes: Sizes) -> BlockSizes:
    """Of the kernels, in bfloat16."""
    shape = {name: getattr(sizes, name) for name in "thpngrs"}
    return default_block_sizes(shape, jnp.bfloat16, chip.device_kinds[0])


def _merged(shapes: dict) -> dict:
    """x, z and dy as (b, t, h p)."""
    return {
        name: jax.ShapeDtypeStruct((*u.shape[:2], u.shape[2] * u.shape[3]), u.dtype) if name in LONG else u
        for name, u in shapes.items()
    }


def _passes(forward: Callable, shapes: dict, what: str) -> tuple[Callable, tuple]:
    dy = shapes.pop("dy")
    if what == "forward":
        return forward, (shapes,)

    def forward_backward(a, dy):
        y, pull = jax.vjp(forward, a)
        return y, pull(dy)[0]

    return forward_backward, (shapes, dy)


def schedule(chip: str, what: str, r: int) -> dict[str, int]:
    """Bundles that the compiler schedules for one step of each kernel, from its dump: cycles, were nothing to wait.

    Run in a process of its own, because the compiler reads where to dump once: `python -m experiments.tpu_programs`.
    """
    folder = Path(os.environ["MAMBA3_DUMP"])
    shape = Shape(b=1, t=512, h=16)
    function, arguments = step("tpu", shape, r) if what == "decode" else sequences("tpu", what, shape, r)
    compile_for(chip, function, arguments, large=2**62)
    found = {}
    for path in sorted(folder.glob("*ssm_tpu_*final_bundles.txt")):
        if "schedule" not in path.name:
            # A line of a bundle has a mark for every loop around it: the grid, and in a decode step one over rows.
            # The compiler for v4 makes no marks; there all bundles count, those before and after the loops as well.
            loops = re.findall(r"^ *(?:0x[0-9a-f]+)?[^>{:]*:[^>{]*(>*) *\{", path.read_text(), re.MULTILINE)
            innermost = [marks for marks in loops if len(marks) >= (2 if what == "decode" else 1)] or loops
            found[re.search(r"ssm_tpu_[a-z]+", path.name)[0]] = len(innermost)
    return found


if __name__ == "__main__":
    print(json.dumps(schedule(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
