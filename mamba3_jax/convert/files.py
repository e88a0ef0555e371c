"""A checkpoint's tensors in a directory: one .safetensors or .bin file, or published shards with an index."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mamba3_jax.convert.safetensors import read_safetensors, without_repetition, write_safetensors
from mamba3_jax.convert.torch_file import read_torch, write_torch

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
READERS: dict[str, Callable] = {SAFETENSORS: read_safetensors, TORCH: read_torch}
WRITERS: dict[str, Callable] = {SAFETENSORS: write_safetensors, TORCH: write_torch}


class Stored(NamedTuple):
    """A tensor and the file it is in, for messages."""

    tensor: np.ndarray
    file: Path


def read_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of the directory by name, memory-mapped; .safetensors goes before .bin.

    Raises:
        ValueError: no such file, or a damaged one; one line that names the file.
    """
    for name, read in READERS.items():
        file, index = directory / name, directory / f"{name}.index.json"
        if file.is_file():
            return {key: Stored(tensor, file) for key, tensor in read(file).items()}
        if index.is_file():
            return _read_shards(index, read)
    names = ", ".join(f"{name} or {name}.index.json" for name in READERS)
    raise ValueError(f"{directory}: got no tensors; allowed: a directory with {names}")


def read_json(file: Path) -> dict:
    """A JSON object without a name that comes twice.

    Raises:
        ValueError: anything else, in one line that names the file.
    """
    try:
        value = json.loads(file.read_text(), object_pairs_hook=without_repetition)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: got no readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: got a JSON {type(value).__name__}; allowed: an object")
    return value


def _read_shards(index: Path, read: Callable) -> dict[str, Stored]:
    """The shards that the index names, which hold its tensors and no others."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{index}: got no weight_map; needs one of tensors' names to files' names")
    stored = {}
    for place in sorted(set(places.values())):
        shard = index.parent / place
        if Path(place).name != place or not shard.is_file():
            raise ValueError(f"{index}: got shard {place!r}; allowed: a file beside the index")
        for name, tensor in read(shard).items():
            if places.get(name) != place:
                raise ValueError(f"{shard}: {name}: got an extra tensor; the index has it in {places.get(name)}")
            stored[name] = Stored(tensor, shard)
    for name in places.keys() - stored.keys():
        raise ValueError(f"{index.parent / places[name]}: {name}: got no such tensor; the index has it there")
    return stored
