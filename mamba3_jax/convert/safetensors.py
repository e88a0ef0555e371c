"""The .safetensors file: eight bytes of header length, a JSON header, then the tensors back to back, little-endian.

The format's own rules are checked before a tensor is handed out: every byte of the data belongs to exactly one tensor.
https://github.com/huggingface/safetensors
"""

import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# The format's own limit: a longer header is an attack or not a safetensors file.
MAX_HEADER_BYTES = 100_000_000
ALIGNMENT = 8


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors by name, read-only and memory-mapped: nothing is copied until it is used.

    Raises:
        ValueError: a file that breaks the format, in one line that names the file, and the tensor where there is one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path}: got a header of {length} bytes in a file of {size}; the file is truncated")
        header = _header(path, file.read(length))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + length
    arrays, spans = {}, []
    for name, entry in header.items():
        dtype, shape, first, last = _entry(path, name, entry)
        spans.append((first, last, name))
        if start + last > size:
            raise ValueError(f"{path}: {name}: got {size - start} bytes of data; needs {last}: the file is truncated")
        flat = np.frombuffer(mapped, dtype, count=math.prod(shape), offset=start + first)
        arrays[name] = flat.reshape(shape)
    _check_cover(path, spans, size - start)
    return arrays


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the tensors one after the other, larger dtypes first so that each one is aligned."""
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        tensor = tensors[name]
        header[name] = dict(dtype=kinds[tensor.dtype], shape=list(tensor.shape), data_offsets=[at, at + tensor.nbytes])
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def _header(path: Path, text: bytes) -> dict:
    try:
        header = json.loads(text, object_pairs_hook=without_repetition)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got a header that is not JSON with distinct names ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: got a header that is no JSON object; this is not a safetensors file")
    header.pop("__metadata__", None)
    return header


def without_repetition(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON; raises ValueError if a name comes twice, of which a reader would take either."""
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} comes twice")
    return dict(pairs)


def _entry(path: Path, name: str, entry: object) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """A tensor's dtype, shape and place, which fit each other."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: {name}: got header {entry!r:.80}; needs dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{path}: {name}: got dtype {kind!r:.80}; allowed: {', '.join(DTYPES)}")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ValueError(f"{path}: {name}: got shape {shape!r:.80} at {offsets!r:.80}; allowed: integers >= 0")
    first, last = offsets
    needed = math.prod(shape) * DTYPES[kind].itemsize
    if last - first != needed:
        raise ValueError(f"{path}: {name}: got {last - first} bytes; shape {tuple(shape)} of {kind} needs {needed}")
    return DTYPES[kind], tuple(shape), first, last


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_cover(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """No two tensors share a byte and no byte belongs to none."""
    at = 0
    for first, last, name in sorted(spans):
        if first != at:
            found = "overlaps the tensor before it" if first < at else f"leaves {first - at} bytes before it unused"
            raise ValueError(f"{path}: {name}: got a place that {found}")
        at = last
    if at != size:
        raise ValueError(f"{path}: got {size} bytes of data; the header names {at}")
