"""Our modules with the parameters of the golden files; the names and layouts are those of mamba3_jax.convert."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from mamba3_jax.convert import read_released
from mamba3_jax.convert.files import Stored
from mamba3_jax.convert.released import MIXER, from_official, model_places, parameters_of, to_official
from mamba3_jax.convert.released_config import config_from_released
from mamba3_jax.layers import Mamba3
from mamba3_jax.models import LM, abstract_model


def load_mixer(arrays: dict[str, np.ndarray], meta: dict, dtype) -> Mamba3:
    """The module of a golden file, computing in `dtype`, in chunks as long as the file's."""
    source = Path("meta")
    options = json.loads(str(arrays["config"]))
    fields = dict(d_model=options.pop("d_model"), ssm_cfg=dict(layer="Mamba3", **options))
    config = config_from_released(fields, source, a_activation=meta["A_activation"], dtype="float32").mixer
    config = dataclasses.replace(config, chunk_size=options["chunk_size"])
    mixer = nnx.eval_shape(lambda: Mamba3(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    official = {
        name.removeprefix("param."): Stored(a, source) for name, a in arrays.items() if name.startswith("param.")
    }
    return _filled(mixer, unflatten_dict(from_official(official, MIXER, parameters_of(mixer))), dtype)


def load_lm(folder: Path) -> LM:
    """The float32 model of a checkpoint folder; all were written with the default activation."""
    released = read_released(folder, dtype="float32")
    return _filled(abstract_model(released.config), released.parameters, jnp.float32)


def mixer_gradients(gradients: nnx.State) -> dict[str, np.ndarray]:
    """Of a mixer's parameters, in official names and layouts."""
    return to_official(parameters_of(gradients), MIXER)


def lm_gradients(gradients: nnx.State, model: LM) -> dict[str, np.ndarray]:
    """Of a language model's parameters, in official names and layouts."""
    return to_official(parameters_of(gradients), model_places(model.config))


def _filled(module, parameters: dict, dtype):
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, jax.tree.map(lambda a: jnp.asarray(a, dtype), parameters))
    return nnx.merge(graph, state)
