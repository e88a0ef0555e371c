"""Training on a mesh of 8 devices of 4 processes is training on one device, along every axis.

The processes are started once, and do everything in sequence: some steps on meshes of distributed_worker.py, then a run
of `mamba3 train` that SIGTERM to one of them ends, then the same run on another mesh, to its end.
"""

import dataclasses
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import distributed_worker as worker
from mamba3_jax.data.pipeline import DataConfig
from mamba3_jax.distributed import processes
from mamba3_jax.distributed.mesh import MeshConfig, make_mesh
from mamba3_jax.distributed.rules import parameter_axes, parameter_shardings
from mamba3_jax.layers import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, Mamba3Config
from mamba3_jax.models import LMConfig, abstract_model
from mamba3_jax.models.checkpoint import load_model
from mamba3_jax.training.state import check_divides

PROCESSES, DEVICES = 4, 2
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the processes left."""
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ) | {
        "PYTHONPATH": ":".join(sys.path),
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(PROCESSES),
    }
    command = [sys.executable, str(ROOT / "tests/distributed_worker.py"), str(folder), *worker.CASES]
    started = []
    for i in range(PROCESSES):
        with (folder / f"log_{i}").open("w") as log:
            own = environment | {"JAX_PROCESS_ID": str(i)}
            started.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    try:
        statuses = [process.wait(timeout=1200) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert statuses == [0] * PROCESSES, (folder / f"log_{np.argmax(np.abs(statuses))}").read_text()[-2000:]
    return folder


@pytest.fixture(scope="module")
def written(folder):
    """What each process wrote."""
    return [json.loads((folder / f"process_{i}.json").read_text()) for i in range(PROCESSES)]


@functools.cache
def curve_of_one_device(model: LMConfig) -> list[float]:
    return worker.curve(model, MeshConfig())


@pytest.mark.parametrize("name", worker.CASES)
def test_every_mesh_gives_the_loss_curve_of_one_device(name, written):
    """Rows of several documents, float32; the same numbers on every process."""
    expected = curve_of_one_device(worker.CASES[name][0])
    np.testing.assert_allclose(written[0]["curves"][name], expected, rtol=0, atol=1e-5)
    assert all(one["curves"] == written[0]["curves"] for one in written)
    assert expected[-1] < expected[0] - 0.1


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_moves_to_another_mesh_writes_what_one_device_writes(folder, written, tmp_path, capsys):
    """Stopped by a SIGTERM to one process, at the same step on all; the whole run's metrics, validation and weights."""
    assert [one["statuses"] for one in written] == [[130, 0]] * PROCESSES
    assert written[0]["kept"] == ["checkpoints", "config.yaml", "metrics.jsonl", "timing.jsonl"]
    assert worker.train(tmp_path / "run") == 0
    got, expected = metrics(folder / "run"), metrics(tmp_path / "run")
    assert [record["step"] for record in got] == [record["step"] for record in expected]
    for ours, theirs in zip(got, expected):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            rtol = 0 if name in ("loss", "validation_loss") else 1e-5
            np.testing.assert_allclose(value, theirs[name], rtol=rtol, atol=1e-5, err_msg=name)
    weights = [nnx.to_pure_dict(nnx.state(load_model(path / "run"), nnx.Param)) for path in (folder, tmp_path)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), *weights)


@pytest.mark.skipif("MAMBA3_SLOW" not in os.environ, reason="ten seconds of compilation; MAMBA3_SLOW=1 runs it")
def test_a_checkpoint_of_four_processes_continues_in_one(folder, written, tmp_path):
    """On one device, from the step at which they stopped."""
    path = tmp_path / "run"
    shutil.copytree(folder / "run", path)
    shutil.rmtree(path / "model")
    shutil.rmtree(path / f"checkpoints/{worker.STEPS}")
    assert worker.train(path) == 0
    got, expected = metrics(path), metrics(folder / "run")
    np.testing.assert_allclose([r["loss"] for r in got], [r["loss"] for r in expected], rtol=0, atol=1e-5)


# What a mesh is, in this process, which has 4 devices


MODELS = [
    LMConfig(
        Mamba3Config(d_model=32, d_state=16, head_dim=16, mimo_rank=2), 1, 256, mlp_width=64, tie_embeddings=False
    ),
    LMConfig(Mamba2Config(d_model=32, d_state=16, head_dim=16), 1, 256),
    LMConfig(GatedDeltaNetConfig(d_model=32, d_state=16, head_dim=16), 1, 256),
    LMConfig(AttentionConfig(32, n_heads=2), 1, 256),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model.mixer).__name__)
def test_every_matrix_is_cut(model):
    """Along fsdp and tensor, or along fsdp: no device holds all of one."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    parameters = nnx.state(abstract_model(model), nnx.Param)
    shardings = parameter_shardings(mesh, parameters)
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(parameters), jax.tree.leaves(shardings)):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        assert len(parameter_axes(name)) in (0, leaf.ndim), name
        parts = leaf.size // np.prod(sharding.shard_shape(leaf.shape))
        if name.endswith(("kernel", "embedding", "head")):
            assert parts == (2 if any(part in name for part in ("xBC", "qkv", "rate")) else 4), name


def test_a_size_that_does_not_divide_is_cut_by_the_axes_that_do():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    names = ("in_proj", "kernel"), ("out_proj", "kernel")
    shapes = [{a: {b: jax.ShapeDtypeStruct(shape, np.float32)}} for (a, b), shape in zip(names, [(6, 5), (3, 4)])]
    specs = [jax.tree.leaves(parameter_shardings(mesh, shape))[0].spec for shape in shapes]
    assert specs == [jax.P(("fsdp",), None), jax.P(None, ("fsdp",))]


def test_the_axes_of_a_mesh_and_the_rest():
    shape = make_mesh(MeshConfig(data=-1, tensor=2)).shape
    assert dict(shape) == dict(slice=1, data=2, fsdp=1, tensor=2, sequence=1)
    assert make_mesh(MeshConfig()).size == 1


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of one."""

    id: int
    process_index: int
    slice_index: int
    platform: str
    device_kind: str = "stub"


def test_only_tpus_have_slices(monkeypatch):
    """Of CPUs and GPUs every host has an index, and any axis may cross hosts."""

    def two_hosts(platform):
        monkeypatch.setattr(jax, "devices", lambda: [Device(i, i // 2, i // 2, platform) for i in range(4)])
        return make_mesh(MeshConfig(fsdp=4))

    assert [device.id for device in two_hosts("gpu").devices.flat] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="mesh.slices: got 1; allowed: 2, as many as the devices have"):
        two_hosts("tpu")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(data=3), "mesh: got data=3, 3 devices; allowed: a divisor of the 4 devices"),
        (dict(data=-1, tensor=8), "mesh: got data=-1 x tensor=8, 8 devices; allowed: a divisor of the 4 devices"),
        (dict(data=-1, fsdp=-1), "mesh.fsdp: got -1, as mesh.data; allowed: one -1"),
        (dict(sequence=0), "mesh.sequence: got 0; allowed: a positive number of devices, or -1 for the rest"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(options, message):
    with pytest.raises(ValueError) as refused:
        make_mesh(MeshConfig(**options))
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "options, sizes, message",
    [
        (dict(data=4), dict(batch_size=6), "data.batch_size: got 6; allowed: a multiple of 8, "),
        (dict(sequence=4), dict(context=34), "mesh.sequence: got 4; allowed: a divisor of data.context=34"),
        (dict(tensor=4), dict(heads=2), "mesh.tensor: got 4; allowed: a divisor of the 2 heads"),
        (
            dict(tensor=4),
            dict(heads=12, ngroups=6),
            "mesh.tensor: got 4; allowed: a divisor or a multiple of ngroups=6",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_work_is_refused(options, sizes, message):
    heads, ngroups = sizes.pop("heads", 4), sizes.pop("ngroups", 1)
    model = LMConfig(Mamba3Config(d_model=16, expand=heads, head_dim=16, d_state=16, ngroups=ngroups), 1, 256)
    data = DataConfig(**(dict(batch_size=8, context=32) | sizes))
    with pytest.raises(ValueError) as refused:
        check_divides(make_mesh(MeshConfig(**options)), model, data, accumulation=2)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_a_mistake_with_a_mesh_is_one_line_before_any_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        worker.train(tmp_path / "run", "--mesh.data=3")
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err == "mesh: got data=3, 3 devices; allowed: a divisor of the 4 devices\n"


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(JAX_NUM_PROCESSES="2"), "JAX_COORDINATOR_ADDRESS: got nothing beside JAX_NUM_PROCESSES; allowed: all of"),
        (dict(JAX_COORDINATOR_ADDRESS="host0"), "JAX_COORDINATOR_ADDRESS: got 'host0'; allowed: host:port"),
        (dict(JAX_PROCESS_ID="first"), "JAX_PROCESS_ID: got 'first'; allowed: a number"),
        (dict(JAX_PROCESS_ID="2"), "JAX_PROCESS_ID: got 2; allowed: below JAX_NUM_PROCESSES, 2"),
    ],
)
def test_an_environment_of_several_processes_is_checked(given, message, monkeypatch):
    whole = dict(JAX_COORDINATOR_ADDRESS="localhost:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0")
    for name, value in (given if len(given) == 1 and "JAX_NUM_PROCESSES" in given else whole | given).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as refused:
        processes.initialize()
    assert str(refused.value).startswith(message)
