"""A model directory: the checkpoint of a model alone, to generate from, evaluate, inspect or start from.

    model.yaml        the LMConfig
    parameters/       every parameter by its dotted name (orbax), in the dtype that it was given in
    tokenizer.json    the tokenizer, if the model has one that is not bytes

It is written whole or not at all. A run directory keeps the model that it selected as `model/`.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import yaml
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from mamba3_jax.layers import AttentionConfig
from mamba3_jax.layers.mixers import MIXERS
from mamba3_jax.models.lm import LM, LMConfig

CONFIG = "model.yaml"
PARAMETERS = "parameters"
TOKENIZER = "tokenizer.json"
# Of a run directory.
MODEL = "model"


def save_model(path: Path, config: LMConfig, parameters: dict, tokenizer: Path | None = None) -> None:
    """Writes a model directory.

    Args:
        path: a new path, or an empty directory.
        config: the model's.
        parameters: nested as `nnx.to_pure_dict(nnx.state(model, nnx.Param))`, of numpy or JAX arrays.
        tokenizer: a tokenizer.json to keep with it.

    Raises:
        ValueError: `path` holds something already, or the parameters are not those of the config.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"path: got {path}, which holds other files; allowed: a new path")
    arrays = _dotted(parameters)
    _check_parameters(path, _dotted(_abstract_parameters(config)), arrays)
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        (unfinished / CONFIG).write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))
        if tokenizer is not None:
            shutil.copyfile(tokenizer, unfinished / TOKENIZER)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((unfinished / PARAMETERS).absolute(), arrays)
        unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load_model(path: Path, dtype: str | None = None) -> LM:
    """The model of a model directory, or of a run directory that holds one.

    Args:
        path: the directory.
        dtype: of the matrix products, "float32" or "bfloat16"; None is the config's. "float32" also makes every
            parameter float32; else each keeps the dtype that it is stored in.

    Raises:
        ValueError: a file is missing or broken, or a parameter is not the config's; with the file and the parameter.
    """
    directory = model_directory(path)
    config = read_config(directory)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    folder = directory / PARAMETERS
    abstract = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    arrays = _restore(folder, _dotted(nnx.to_pure_dict(state)), jnp.float32 if dtype == "float32" else None)
    nnx.replace_by_pure_dict(state, _nested(arrays))
    return nnx.merge(graph, state)


def model_directory(path: Path) -> Path:
    """`path` if it is a model directory, or the one inside it if it is a run directory.

    Raises:
        ValueError: neither.
    """
    for candidate in (path, path / MODEL):
        if (candidate / CONFIG).is_file():
            return candidate
    raise ValueError(f"model: got {path}, without {CONFIG} and without {MODEL}/{CONFIG}; allowed: a model's directory")


def read_config(path: Path) -> LMConfig:
    """The configuration in a model directory.

    Raises:
        ValueError: it is missing, broken, or has a field that the configuration has not.
    """
    file = model_directory(path) / CONFIG
    try:
        return config_from_dict(yaml.safe_load(file.read_text()))
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file}: got a broken configuration ({_first_line(error)}); allowed: an LMConfig") from error


def config_to_dict(config: LMConfig) -> dict[str, Any]:
    """As plain YAML values; the mixer's says of which type it is."""
    values = dataclasses.asdict(config)
    values["mixer"] = {"type": type(config.mixer).__name__} | values["mixer"]
    return values | {"attention_layers": list(config.attention_layers)}


def config_from_dict(values: dict[str, Any]) -> LMConfig:
    """The inverse of `config_to_dict`.

    Raises:
        ValueError, TypeError, KeyError: an unknown or missing field, or a value that is not allowed.
    """
    mixers = {kind.__name__: kind for kind in MIXERS}
    mixer = dict(values["mixer"])
    kind = mixer.pop("type")
    if kind not in mixers:
        raise ValueError(f"mixer.type: got {kind!r}; allowed: {', '.join(mixers)}")
    attention = values["attention"]
    built = dict(
        mixer=_build(mixers[kind], mixer, "mixer."),
        attention=None if attention is None else _build(AttentionConfig, attention, "attention."),
        attention_layers=tuple(values["attention_layers"]),
    )
    return _build(LMConfig, values | built, "")


def _build(config_class: type, values: dict[str, Any], prefix: str):
    known = [field.name for field in dataclasses.fields(config_class)]
    for name in values:
        if name not in known:
            raise ValueError(f"{prefix}{name}: got a field that is not known; allowed: {', '.join(known)}")
    return config_class(**values)


def _abstract_parameters(config: LMConfig) -> dict:
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))), nnx.Param))


def _restore(folder: Path, expected: dict[str, jax.ShapeDtypeStruct], dtype) -> dict[str, jax.Array]:
    """The arrays of a checkpoint, which are the expected ones but for their dtype."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = dict(checkpointer.metadata(folder.absolute()).item_metadata.tree)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise _unreadable(folder, error) from error
        _check_parameters(folder, expected, stored)
        wanted = {n: jax.ShapeDtypeStruct(a.shape, dtype or a.dtype, sharding=device) for n, a in stored.items()}
        try:
            return checkpointer.restore(folder.absolute(), wanted)
        # Which error a broken file ends in is the storage library's own affair.
        except Exception as error:
            raise _unreadable(folder, error) from error


def _check_parameters(path: Path, expected: dict[str, Any], got: dict[str, Any]) -> None:
    for name in sorted(expected.keys() | got.keys()):
        if name not in got:
            raise ValueError(f"{path}: got no {name}; allowed: every parameter of the config")
        if name not in expected:
            raise ValueError(f"{path}: got {name}; allowed: the parameters of the config, which has no such one")
        if tuple(got[name].shape) != tuple(expected[name].shape):
            raise ValueError(f"{path}: got {name} of shape {tuple(got[name].shape)}; allowed: {expected[name].shape}")


def _dotted(parameters: dict) -> dict[str, Any]:
    return {".".join(map(str, path)): value for path, value in flatten_dict(parameters).items()}


def _nested(arrays: dict[str, Any]) -> dict:
    """The inverse: list indices are numbers again."""
    paths = {tuple(int(part) if part.isdigit() else part for part in name.split(".")): a for name, a in arrays.items()}
    return unflatten_dict(paths)


def _unreadable(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"{folder}: got files that cannot be read ({_first_line(error)}); allowed: whole ones")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
