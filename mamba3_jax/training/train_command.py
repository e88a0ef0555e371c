"""`mamba3 train --config FILE --run_dir DIR`: pretrains a language model; the same command resumes it.

    mamba3 train --config configs/lm/tiny_cpu.yaml --run_dir runs/tiny          the built-in corpus, on a CPU in minutes
    mamba3 train --config configs/lm/tiny_cpu.yaml --run_dir runs/b --init_from runs/tiny    from those weights
    mamba3 generate runs/tiny --prompt "The for statement "
    mamba3 train --config FILE --mesh.data 4 --mesh.tensor 2                                 on eight devices

On several hosts see distributed/processes.py. A run may be resumed on another mesh.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from mamba3_jax.checks import check_shapes
from mamba3_jax.command import INTERRUPTED, fail, parse
from mamba3_jax.data.corpus import VALIDATION
from mamba3_jax.data.pipeline import Data, open_data
from mamba3_jax.distributed import processes
from mamba3_jax.distributed.mesh import make_mesh
from mamba3_jax.models import LMConfig, abstract_model
from mamba3_jax.models.checkpoint import config_to_dict, load_model, read_config
from mamba3_jax.training.config import TrainConfig, fixed
from mamba3_jax.training.loop import Run, TrainingStopped, train
from mamba3_jax.training.run_directory import CONFIG, RunDirectory, check_same_config, has_checkpoint
from mamba3_jax.training.state import abstract_batch, abstract_state, check_divides
from mamba3_jax.training.step import StepConfig, compile_evaluation
from mamba3_jax.training.tensorboard import check_installed

# Fields of a model that say how it is computed, where new weights begin and which are trained, or only shapes.
OF_A_RUN = (
    "dtype", "implementation", "chunk_size",
    "dt_min", "dt_max", "A_min", "A_max", "bc_bias_init", "bc_bias_trainable",
    "vocab_size", "vocab_multiple", "mlp_width",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    config = parse("train", TrainConfig, argv)
    try:
        processes.initialize(config.cluster)
        run = _open(config)
    except (ValueError, RuntimeError) as error:
        fail(" ".join(str(error).split()))
    except OSError as error:
        fail(f"run_dir: got {config.run_dir} ({error.strerror}); allowed: a folder that can be written")
    if (idle := jax.device_count() - run.mesh.size) and processes.is_first():
        print(f"mesh {config.mesh.text}: {idle} of {jax.device_count()} devices idle")
    if VALIDATION not in run.data.splits and processes.is_first():
        print(f"data.path={config.data.path}: no split {VALIDATION}, so this run will tell no perplexity")
    trained = "already finished, " if run.step == config.steps else ""
    try:
        train(run)
    except TrainingStopped as error:
        fail(str(error))
    except KeyboardInterrupt:
        print(f"interrupted; the same command resumes {config.run_dir} from its last checkpoint")
        return INTERRUPTED
    if processes.is_first():
        told = f"{trained}{config.steps} steps; mamba3 generate {config.run_dir} --prompt ... continues a text"
        print(f"{config.run_dir}: {told}")
    return 0


def _open(config: TrainConfig) -> Run:
    """Everything that can be wrong with the command is noticed here, before any step and before any file is written."""
    path = Path(config.run_dir)
    if (path / CONFIG).exists():
        check_same_config(path, config.text, "run_dir", fixed)
    if config.tensorboard:
        check_installed()
    data = open_data(config.data)
    model = config.model.lm(config.model.vocab_size or data.vocab_size)
    _check_vocabulary(data, model)
    mesh = make_mesh(config.mesh)
    check_divides(mesh, model, config.data, config.accumulation)
    _check_implementation(config, model, mesh)
    given = config.init_from is not None and not has_checkpoint(path)
    parameters = _initial(Path(config.init_from), model) if given else None
    return Run(config, mesh, data, RunDirectory(path, config.text, "run_dir", fixed), parameters)


def _check_vocabulary(data: Data, model: LMConfig) -> None:
    if data.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.vocab_size: got {model.vocab_size} for data whose token ids go up to {data.vocab_size - 1}; "
            f"allowed: at least {data.vocab_size}"
        )


def _check_implementation(config: TrainConfig, model: LMConfig, mesh: Mesh) -> None:
    """Raises NotImplementedError, as the operator does when it is traced, for one that was asked for and cannot be."""
    if any(getattr(mixer, "implementation", None) for mixer in model.mixers):
        evaluate = compile_evaluation(StepConfig.of(config, model), mesh)
        parameters = abstract_state(model, config.optimizer, mesh).parameters
        evaluate.eval_shape(parameters, abstract_batch(config.data, mesh))


def _initial(path: Path, model: LMConfig) -> nnx.State:
    """The weights of another model, which must compute what this one does, of the same arrays."""
    _check_same_model(path, read_config(path), model)
    parameters = nnx.state(load_model(path), nnx.Param)
    wanted = nnx.state(abstract_model(model), nnx.Param)
    check_shapes(f"init_from={path}", _shapes(parameters), _shapes(wanted))
    return jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), parameters)


def _check_same_model(path: Path, theirs: LMConfig, ours: LMConfig) -> None:
    """Raises ValueError, naming the first field of a model that its weights go with and that is another one here."""
    there, here = (flatten_dict(config_to_dict(config), sep=".") for config in (theirs, ours))
    for name in here | there:
        if name.rpartition(".")[2] not in OF_A_RUN and there.get(name) != here.get(name):
            raise ValueError(
                f"init_from: got {path}, a model whose {name} is {there.get(name)!r}; "
                f"allowed: {here.get(name)!r}, as in this run"
            )


def _shapes(parameters: nnx.State) -> dict[str, tuple[int, ...]]:
    return {".".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(parameters)}
