"""One of the processes that tests/test_distributed_training.py starts; see there for what they do.

    python tests/distributed_worker.py FOLDER CASE...
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from mamba3_jax.data.pipeline import DataConfig, TokenBatch
from mamba3_jax.distributed import processes
from mamba3_jax.distributed.mesh import MeshConfig, make_mesh
from mamba3_jax.layers import AttentionConfig, Mamba3Config
from mamba3_jax.models import LM, LMConfig
from mamba3_jax.training import train_command
from mamba3_jax.training.loop import Run
from mamba3_jax.training.optimizer import PretrainingOptimizerConfig
from mamba3_jax.training.state import Placement, init_state
from mamba3_jax.training.step import StepConfig, compile_train_step

STEPS, ROWS, CONTEXT = 20, 8, 32
MIXER = Mamba3Config(d_model=16, d_state=8, head_dim=8)
SISO = LMConfig(MIXER, n_layers=1, vocab_size=64)
MIMO = LMConfig(
    dataclasses.replace(MIXER, mimo_rank=2), n_layers=1, vocab_size=63, mlp_width=128, tie_embeddings=False
)
HYBRID = LMConfig(
    MIXER, n_layers=2, vocab_size=64, attention=AttentionConfig(d_model=16, n_heads=4), attention_layers=(1,)
)
OPTIMIZER = PretrainingOptimizerConfig(warmup_steps=2, peak_learning_rate=1e-2)
OPTIONS = [
    "--model.mamba3.d_model=16", "--model.mamba3.d_state=8", "--model.mamba3.head_dim=8", "--model.dtype=float32",
    "--model.n_layers=1", f"--data.context={CONTEXT}", f"--data.batch_size={ROWS}", f"--steps={STEPS}",
    "--log_every=1", "--eval_batches=2", "--optimizer.warmup_steps=2", "--optimizer.peak_learning_rate=1e-2",
]  # fmt: skip
BEFORE, AFTER = "--mesh.data=4 --mesh.tensor=2".split(), "--mesh.fsdp=2 --mesh.tensor=2 --mesh.sequence=2".split()
CASES = {
    "data": (SISO, MeshConfig(data=-1)),
    "data_mimo": (MIMO, MeshConfig(data=-1)),
    "fsdp": (SISO, MeshConfig(fsdp=-1)),
    "fsdp_mimo": (MIMO, MeshConfig(fsdp=-1)),
    "tensor": (SISO, MeshConfig(data=2, tensor=4)),
    "tensor_mimo": (MIMO, MeshConfig(data=2, tensor=4)),
    "sequence_mimo": (MIMO, MeshConfig(sequence=-1)),
    "sequence": (SISO, MeshConfig(data=4, sequence=2)),
    "fsdp_tensor_sequence_mimo": (MIMO, MeshConfig(fsdp=2, tensor=2, sequence=2)),
    "fsdp_tensor_sequence_hybrid": (HYBRID, MeshConfig(fsdp=2, tensor=2, sequence=2)),
    "slice_tensor_sequence": (SISO, MeshConfig(slices=2, tensor=2, sequence=2)),
}
STOPPED_BY, STOPPED_AT = 2, 7


def rows_of(model: LMConfig, step: int) -> TokenBatch:
    """Random tokens in documents that end anywhere, and their successors, some of which do not count."""
    rng, shape = np.random.default_rng(step), (ROWS, CONTEXT)
    tokens = rng.integers(0, model.vocab_size, shape, dtype=np.int32)
    segments = np.cumsum(rng.random(shape) < 0.1, axis=1, dtype=np.int32)
    mask = rng.random(shape) < np.linspace(0.3, 0.9, ROWS)[:, None]
    return TokenBatch(tokens, (tokens + 1) % model.vocab_size, segments, mask)


def drawn(model: LMConfig) -> nnx.State:
    """Parameters that nothing has to be compiled for."""
    rng = np.random.default_rng(0)
    abstract = nnx.state(nnx.eval_shape(lambda: LM(model, rngs=nnx.Rngs(0))), nnx.Param)
    return jax.tree.map(lambda p: 0.3 * rng.standard_normal(p.shape, np.float32), abstract)


def curve(model: LMConfig, mesh_config: MeshConfig) -> list[float]:
    """The loss of each of the first steps."""
    mesh = make_mesh(mesh_config)
    place = Placement(DataConfig(context=CONTEXT, batch_size=ROWS), mesh)
    step = compile_train_step(StepConfig(model, OPTIMIZER, STEPS), mesh)
    state, losses = init_state(model, OPTIMIZER, mesh, seed=0, parameters=drawn(model)), []
    for i in range(STEPS):
        state, metrics = step(state, place(jax.tree.map(lambda a: a[place.rows], rows_of(model, i))))
        losses.append(float(metrics.loss))
    return losses


def train(run_dir: Path, *options: str) -> int:
    """The exit status of `mamba3 train`."""
    return train_command.main([f"--run_dir={run_dir}", *OPTIONS, *options])


def interrupt_once(process: int, step: int) -> None:
    """From now on one process gets a SIGTERM when it has done so many steps."""
    advance = Run.advance

    def interrupted(run: Run) -> str | None:
        line = advance(run)
        if run.step == step and jax.process_index() == process:
            os.kill(os.getpid(), signal.SIGTERM)
        return line

    Run.advance = interrupted


def main(folder: Path, *names: str) -> None:
    processes.initialize()
    written: dict = dict(curves={name: curve(*CASES[name]) for name in names})
    interrupt_once(STOPPED_BY, STOPPED_AT)
    written["statuses"] = [train(folder / "run", *BEFORE)]
    if processes.is_first():
        written["kept"] = sorted(path.name for path in (folder / "run").iterdir())
    written["statuses"].append(train(folder / "run", *AFTER))
    (folder / f"process_{jax.process_index()}.json").write_text(json.dumps(written))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
