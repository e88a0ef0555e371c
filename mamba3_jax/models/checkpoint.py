"""A model directory: the checkpoint of a model alone, to generate from, evaluate, inspect or start from.

    model.yaml        the LMConfig
    parameters/       every parameter by its dotted name (orbax), in the dtype that it was given in
    checksums.json    the CRC-32 of every file of parameters/
    tokenizer.json    the tokenizer, if the model has one that is not bytes

It is written whole or not at all. A run directory keeps the model that it selected as `model/`.
"""

import dataclasses
import math
import shutil
import types
import typing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import yaml
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from mamba3_jax.checks import check_shapes
from mamba3_jax.checksums import CHECKSUMS, check_files, write_checksums
from mamba3_jax.files import check_new, whole_directory
from mamba3_jax.layers import AttentionConfig
from mamba3_jax.layers.mixers import MIXERS
from mamba3_jax.models.lm import LM, LMConfig, abstract_model

CONFIG = "model.yaml"
PARAMETERS = "parameters"
TOKENIZER = "tokenizer.json"
# Of a run directory.
MODEL = "model"
MAX_INTEGER = 2**31 - 1


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
    check_new("path", path)
    arrays = _dotted(parameters)
    _check_parameters(path, _dotted(_abstract_parameters(config)), arrays)
    with whole_directory(path) as unfinished:
        (unfinished / CONFIG).write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))
        if tokenizer is not None:
            shutil.copyfile(tokenizer, unfinished / TOKENIZER)
        with _checkpointer() as checkpointer:
            checkpointer.save((unfinished / PARAMETERS).absolute(), arrays)
        write_checksums(unfinished / CHECKSUMS, unfinished / PARAMETERS)


def load_model(path: Path, dtype: str | None = None) -> LM:
    """The model of a model directory, or of a run directory that holds one.

    Args:
        path: the directory.
        dtype: of the matrix products, "float32" or "bfloat16"; None is the config's. "float32" also makes every
            parameter float32; else each keeps the dtype that it is stored in.

    Raises:
        ValueError: a file is missing, broken or not as it was saved, or a parameter is not the config's; with the file
            and the parameter.
    """
    directory = model_directory(path)
    config = read_config(directory)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    check_files(directory / CHECKSUMS, directory / PARAMETERS)
    with _checkpointer() as checkpointer:
        folder = directory / PARAMETERS
        stored = dict(checkpointer.metadata(folder.absolute()).item_metadata.tree)
        layers = {name.split(".")[1] for name in stored if name.startswith("blocks.")}
        # Before anything is built for every layer.
        if config.n_layers > len(layers):
            raise ValueError(f"{directory / CONFIG}: n_layers: got {config.n_layers}; {folder} has {len(layers)}")
        try:
            graph, state = nnx.split(abstract_model(config))
        except (OverflowError, TypeError, ValueError, MemoryError) as error:
            raise ValueError(f"{directory / CONFIG}: got sizes that no model has ({_first_line(error)})") from error
        _check_parameters(folder, _dotted(nnx.to_pure_dict(state)), stored)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        cast = jnp.float32 if dtype == "float32" else None
        wanted = {name: jax.ShapeDtypeStruct(a.shape, cast or a.dtype, sharding=device) for name, a in stored.items()}
        arrays = checkpointer.restore(folder.absolute(), wanted)
    nnx.replace_by_pure_dict(state, _nested(arrays))
    return nnx.merge(graph, state)


def _checkpointer() -> ocp.StandardCheckpointer:
    """Which does not wait for other processes, of which perhaps none reads or writes the same."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(index, {index}, barrier_sync_key_prefix=f"alone_{index}")
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


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
    # A YAML parser and its values have many ways to fail.
    except Exception as error:
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
    for field in dataclasses.fields(config_class):
        if field.name in values and not _fits(values[field.name], field.type):
            got = values[field.name]
            shown = f"{got!r:.80}" if isinstance(got, bool | int | float | str) else type(got).__name__
            wanted = getattr(field.type, "__name__", str(field.type)).replace("typing.", "")
            raise ValueError(f"{prefix}{field.name}: got {shown}; allowed: {wanted}")
    return config_class(**values)


def _fits(value: object, annotation: Any) -> bool:
    """Whether a value is of a field's type; numbers are finite, integers below 2^31."""
    arguments = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case typing.Literal:
            return isinstance(value, str) and value in arguments
        case types.UnionType | typing.Union:
            return any(_fits(value, argument) for argument in arguments)
        case kind if kind is tuple:
            return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is annotation and (annotation is not int or abs(value) <= MAX_INTEGER)


def _abstract_parameters(config: LMConfig) -> dict:
    return nnx.to_pure_dict(nnx.state(abstract_model(config), nnx.Param))


def _check_parameters(path: Path, expected: dict[str, Any], got: dict[str, Any]) -> None:
    check_shapes(str(path), *({name: tuple(a.shape) for name, a in arrays.items()} for arrays in (got, expected)))


def _dotted(parameters: dict) -> dict[str, Any]:
    return {".".join(map(str, path)): value for path, value in flatten_dict(parameters).items()}


def _nested(arrays: dict[str, Any]) -> dict:
    """The inverse: list indices are numbers again."""
    paths = {tuple(int(part) if part.isdigit() else part for part in name.split(".")): a for name, a in arrays.items()}
    return unflatten_dict(paths)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
