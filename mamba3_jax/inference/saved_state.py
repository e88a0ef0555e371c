"""A generation state in a file: a conversation goes on without its tokens, in another process or on another machine.

The file is numpy's npz without pickles: `header`, a JSON text that names the model, and the state's arrays. bfloat16,
which numpy's format does not have, is stored as its bits. Only the model that made a state can continue it, so the
header holds its configuration and a checksum over all of its parameters.
"""

import hashlib
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt

from mamba3_jax.files import whole_file
from mamba3_jax.inference.decoding import SEEDS, GenerationState
from mamba3_jax.models import LM

FORMAT = "mamba3 generation state, version 1"


def save_state(path: Path, model: LM, state: GenerationState) -> None:
    """Writes the file, whole or not at all.

    Args:
        path: of the file; an existing one is replaced.
        model: whose state it is.
        state: what a generation returned.

    Raises:
        ValueError: the file cannot be written.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.cache)]
    header = dict(format=FORMAT, model=fingerprint(model), seed=state.seed, dtypes=[str(a.dtype) for a in leaves])
    arrays = dict(
        header=np.array(json.dumps(header)),
        pending=np.asarray(state.pending),
        position=np.asarray(state.position),
        seen=np.packbits(np.asarray(state.seen), axis=1),
    )
    arrays |= {f"cache_{i}": a.view(np.uint16) if a.dtype == jnp.bfloat16 else a for i, a in enumerate(leaves)}
    try:
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise ValueError(f"state: got {path} ({error.strerror}); allowed: a file that can be written") from None


def load_state(path: Path, model: LM) -> GenerationState:
    """Reads a file that `save_state` wrote.

    Raises:
        ValueError: one line that names the file, which is not there, truncated, changed, something else, or of another
            model.
    """
    try:
        # Opened here, because numpy leaves a file open that turns out to be broken.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
            if any(member.compress_type != zipfile.ZIP_STORED for member in members.zip.infolist()):
                raise ValueError("with compressed arrays, which may be of any size")
            header = json.loads(str(members["header"]))
            _check_header(header, model)
            arrays = {name: members[name] for name in members.files if name != "header"}
        return _state(header, arrays, model)
    # A changed file can make any part of the reading fail.
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"state: got {path} ({reason:.300}); allowed: a saved state of this model, whole") from None


def _check_header(header: dict, model: LM) -> None:
    if header["format"] != FORMAT:
        raise ValueError(f"of format {header['format']!r}")
    here = fingerprint(model)
    if header["model"] != here:
        other = "config" if header["model"]["config"] != here["config"] else "parameters"
        raise ValueError(f"of a model with another {other}")
    if type(header["seed"]) is not int or not 0 <= header["seed"] < SEEDS:
        raise ValueError(f"seed {header['seed']!r}, which is not from 0 to {SEEDS - 1}")


def _state(header: dict, arrays: dict[str, np.ndarray], model: LM) -> GenerationState:
    """The state, whose every array is as the model's empty cache has it for as many rows and slots."""
    v, (b,) = model.config.vocab_size, arrays["pending"].shape
    # Attention's slots are the axis that follows the capacity: axis 1 of its keys and values.
    expected, structure = jax.tree.flatten(jax.eval_shape(lambda: model.empty_cache(b, capacity=0)))
    one_slot = jax.tree.leaves(jax.eval_shape(lambda: model.empty_cache(b, capacity=1)))
    slotted = [a.shape != c.shape for a, c in zip(expected, one_slot)]
    if b < 1 or len(header["dtypes"]) != len(expected):
        raise ValueError(f"of {b} rows and {len(header['dtypes'])} arrays")
    leaves = [arrays[f"cache_{i}"].view(jnp.dtype(dtype)) for i, dtype in enumerate(header["dtypes"])]
    slots = {leaf.shape[1] for leaf, has_slots in zip(leaves, slotted) if has_slots}
    if len(slots) > 1:
        raise ValueError(f"with {slots} slots in different layers")
    m = max(slots, default=0)
    for i, (leaf, empty) in enumerate(zip(leaves, expected)):
        shape = (b, m, *empty.shape[2:]) if slotted[i] else empty.shape
        _check(f"cache_{i}", leaf, shape, [empty.dtype, jnp.bfloat16] if empty.dtype == jnp.float32 else [empty.dtype])
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            _check_range(f"cache_{i}", leaf, m)
        elif not np.all(np.isfinite(leaf)):
            raise ValueError(f"cache_{i} with numbers that are not finite")
    for name, last in (("pending", v - 1), ("position", np.iinfo(np.int32).max)):
        _check(name, arrays[name], (b,), [jnp.int32])
        _check_range(name, arrays[name], last)
    _check("seen", arrays["seen"], (b, -(-v // 8)), [jnp.uint8])
    return GenerationState(
        cache=jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves]),
        pending=jnp.asarray(arrays["pending"]),
        seen=jnp.asarray(np.unpackbits(arrays["seen"], axis=1, count=v).astype(bool)),
        position=jnp.asarray(arrays["position"]),
        seed=header["seed"],
    )


def _check(name: str, a: np.ndarray, shape: tuple[int, ...], dtypes: list) -> None:
    if a.shape != shape or a.dtype not in dtypes:
        raise ValueError(f"{name} of {a.dtype} {a.shape}; the model has {jnp.dtype(dtypes[0])} {shape}")


def _check_range(name: str, a: np.ndarray, last: int) -> None:
    if not np.all((a >= 0) & (a <= last)):
        raise ValueError(f"{name} from {a.min()} to {a.max()}; the model has 0 to {last}")


def fingerprint(model: LM) -> dict[str, str]:
    """The configuration, and a checksum of the parameters' names, shapes, dtypes and bits.

    The same on every device: the parts are sums of integers, whose order does not matter. One pass over the parameters.
    """
    parameters = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    described = [(jax.tree_util.keystr(path), str(a.dtype), a.shape) for path, a in parameters]
    sums = jax.device_get([_checksum(a) for _, a in parameters])
    digest = hashlib.sha256(repr([described, [int(s) for s in sums]]).encode())
    return dict(config=repr(model.config), parameters=digest.hexdigest())


@jax.jit
def _checksum(a: Array) -> UInt[Array, ""]:
    """The sum, modulo 2^32, of the entries' bits, each times an odd number of its own; any one change changes it."""
    bits = jax.lax.bitcast_convert_type(a, {2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]).ravel()
    return jnp.sum(bits.astype(jnp.uint32) * (2 * jnp.arange(a.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)
