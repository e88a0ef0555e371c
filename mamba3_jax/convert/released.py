"""Released checkpoints in and out: the one table of names and layouts between the official modules' tensors and ours.

Matrices are (out, in) there and (in, out) here. The order of channels within them is the same: [z, x, B, C, dt, A,
trap, angle] of in_proj, B and C by rank, group and state; [q, k, v] of attention, by head; [value, gate] of fc1. Rows
of the embedding beyond the vocabulary are padding on both sides.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from mamba3_jax.convert.files import TORCH, WRITERS, Stored, read_json, read_tensors
from mamba3_jax.convert.released_config import RELEASED_ACTIVATION, config_from_released, config_to_released
from mamba3_jax.layers.mamba3 import AActivation
from mamba3_jax.models import LMConfig, abstract_model

CONFIG = "config.json"
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"
LAYER = re.compile(r"backbone\.layers\.(\d+)\.")
DTYPES = ("float32", "bfloat16")

Array = np.ndarray | jax.Array
Shaped = Array | jax.ShapeDtypeStruct
ParameterPath = tuple[str | int, ...]


class Layout(NamedTuple):
    """How an array of ours lies in the official tensor, and back. Both are views where numpy can make one."""

    to_official: Callable[[Array], Array]
    from_official: Callable[[Array, tuple[int, ...]], Array]  # with our shape


SAME = Layout(lambda a: a, lambda a, shape: a)
TRANSPOSED = Layout(lambda a: a.T, lambda a, shape: a.T)
FLAT = Layout(lambda a: a.reshape(-1), lambda a, shape: a.reshape(shape))
# (taps, channels), the newest first; (channels, 1, taps), the newest last.
TAPS = Layout(lambda a: a[::-1].T[:, None], lambda a, shape: a[:, 0].T[::-1])


class Place(NamedTuple):
    """Where an official tensor is in our module."""

    path: ParameterPath
    layout: Layout


MIXER = {name: Place((name,), SAME) for name in ("dt_bias", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")} | {
    "in_proj.weight": Place(("in_proj", "kernel"), TRANSPOSED),
    "B_norm.weight": Place(("B_norm", "weight"), SAME),
    "C_norm.weight": Place(("C_norm", "weight"), SAME),
    "norm.weight": Place(("norm_weight",), FLAT),
    "out_proj.weight": Place(("out_proj", "kernel"), TRANSPOSED),
}
ATTENTION = {
    "in_proj.weight": Place(("qkv_proj", "kernel"), TRANSPOSED),
    "in_proj.bias": Place(("qkv_proj", "bias"), SAME),
    "conv1d.weight": Place(("conv", "weight"), TAPS),
    "conv1d.bias": Place(("conv", "bias"), SAME),
    "out_proj.weight": Place(("out_proj", "kernel"), TRANSPOSED),
    "out_proj.bias": Place(("out_proj", "bias"), SAME),
}
BLOCK = {
    "norm.weight": Place(("norm", "weight"), SAME),
    "norm2.weight": Place(("norm2", "weight"), SAME),
    "mlp.fc1.weight": Place(("mlp", "fc1", "kernel"), TRANSPOSED),
    "mlp.fc2.weight": Place(("mlp", "fc2", "kernel"), TRANSPOSED),
}
MODEL = {
    EMBEDDING: Place(("embedding",), SAME),
    "backbone.norm_f.weight": Place(("norm", "weight"), SAME),
    HEAD: Place(("head",), SAME),
}


def model_places(config: LMConfig) -> dict[str, Place]:
    """The table for a whole model. It names all that a model may have; which of them one has is the model's to say."""
    places = dict(MODEL)
    for i in range(config.n_layers):
        mixer = ATTENTION if i in config.attention_layers else MIXER
        block = BLOCK | {f"mixer.{name}": Place(("mixer", *path), layout) for name, (path, layout) in mixer.items()}
        places |= {
            f"backbone.layers.{i}.{name}": Place(("blocks", i, *path), layout) for name, (path, layout) in block.items()
        }
    return places


def parameters_of(module: nnx.Module | nnx.State) -> dict[ParameterPath, Shaped]:
    """The parameters of a module or of its state, or their shapes, by path."""
    state = module if isinstance(module, nnx.State) else nnx.state(module, nnx.Param)
    return flatten_dict(nnx.to_pure_dict(state))


def to_official(ours: Mapping[ParameterPath, Array], places: Mapping[str, Place]) -> dict[str, Array]:
    """Arrays by path (parameters or their gradients) as official tensors by name.

    Raises:
        ValueError: an array that has no official name.
    """
    official = {name: layout.to_official(ours[path]) for name, (path, layout) in places.items() if path in ours}
    nameless = set(ours) - {path for path, _ in places.values()}
    if nameless:
        names = sorted(".".join(map(str, path)) for path in nameless)
        raise ValueError(f"{names[0]}: got a parameter that the released format has no name for")
    return official


def from_official(
    stored: Mapping[str, Stored], places: Mapping[str, Place], shapes: Mapping[ParameterPath, Shaped]
) -> dict[ParameterPath, np.ndarray]:
    """Official tensors as our arrays by path, views of them.

    Args:
        stored: the tensors, all that `shapes` needs and no others.
        places: the table.
        shapes: our arrays, or their shapes, by path; nothing else is read from them.

    Raises:
        ValueError: a missing or an extra tensor, or one of a wrong shape or dtype; one line that names file and tensor.
    """
    expected = {name: place for name, place in places.items() if place.path in shapes}
    file = next((entry.file for entry in stored.values()), None)
    for name in [*expected, *stored]:
        if name not in stored:
            raise ValueError(f"{file}: {name}: got no such tensor; the config needs it")
        if name not in expected:
            raise ValueError(f"{stored[name].file}: {name}: got an extra tensor; the config has no place for it")
    ours = {}
    for name, (path, layout) in expected.items():
        tensor, file = stored[name]
        shape = tuple(shapes[path].shape)
        needed = layout.to_official(np.broadcast_to(np.int8(0), shape)).shape
        if tensor.shape != needed:
            raise ValueError(f"{file}: {name}: got shape {tensor.shape}; the config needs {needed}")
        if tensor.dtype.name not in DTYPES:
            raise ValueError(f"{file}: {name}: got dtype {tensor.dtype}; allowed: {', '.join(DTYPES)}")
        ours[path] = layout.from_official(tensor, shape)
    return ours


class Released(NamedTuple):
    """A checkpoint as ours: what `models.save_model` takes."""

    config: LMConfig
    parameters: dict
    tensors: int


def read_released(
    directory: Path, *, a_activation: AActivation = RELEASED_ACTIVATION, dtype: str | None = None
) -> Released:
    """Reads a directory with config.json and tensors, which stay on disk (memory-mapped) until they are used.

    Args:
        directory: as published, or as `write_released` leaves it.
        a_activation: which one the model was trained with; `released_config` says why the default is what it is.
        dtype: of the computation; None is the embedding's.

    Raises:
        ValueError: anything wrong with the files, before any of them is converted; one line that names file and tensor.
    """
    fields = read_json(directory / CONFIG)
    stored = read_tensors(directory)
    if EMBEDDING not in stored:
        raise ValueError(f"{directory}: {EMBEDDING}: got no such tensor; every model has one")
    if dtype is None:
        dtype = "bfloat16" if stored[EMBEDDING].tensor.dtype == jnp.bfloat16 else "float32"
    config = config_from_released(fields, directory / CONFIG, a_activation=a_activation, dtype=dtype)
    tensors = len(stored)
    if config.tie_embeddings and HEAD in stored:
        head = stored.pop(HEAD)
        if not _same_bytes(head.tensor, stored[EMBEDDING].tensor):
            raise ValueError(f"{head.file}: {HEAD}: got other values than {EMBEDDING}; the config ties them")
    _check_layers(config, stored, directory / CONFIG)
    try:
        shapes = parameters_of(abstract_model(config))
    except (OverflowError, TypeError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{directory / CONFIG}: got sizes of which no arrays can be ({reason:.200})") from None
    ours = from_official(stored, model_places(config), shapes)
    return Released(config, unflatten_dict(ours), tensors)


def write_released(directory: Path, config: LMConfig, parameters: dict, *, form: str) -> int:
    """Writes config.json and the tensors, in their dtypes, into a directory that exists; returns how many tensors.

    Args:
        directory: where to.
        config: the model's.
        parameters: nested, as `nnx.to_pure_dict` makes it.
        form: "pytorch_model.bin" (which the official code reads, the tied head included) or "model.safetensors".

    Raises:
        ValueError: a model that the format cannot describe; nothing is written.
    """
    fields = config_to_released(config)
    official = to_official(flatten_dict(parameters), model_places(config))
    official = {name: np.asarray(a) for name, a in official.items()}
    if config.tie_embeddings and form == TORCH:
        official[HEAD] = official[EMBEDDING]
    WRITERS[form](directory / form, official)
    (directory / CONFIG).write_text(json.dumps(fields, indent=4) + "\n")
    return len(official)


def _check_layers(config: LMConfig, stored: Mapping[str, Stored], file: Path) -> None:
    """No more layers than there are tensors for, before anything is built for each of them."""
    found = {match.group(1) for name in stored if (match := LAYER.match(name))}
    if config.n_layers > len(found):
        raise ValueError(f"{file}: n_layer: got {config.n_layers}; the tensors are of {len(found)} layers")


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors have the same bits; at once for two names of one storage."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if (a.ctypes.data, a.strides) == (b.ctypes.data, b.strides):
        return True
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return np.array_equal(a.view(bits), b.view(bits))
