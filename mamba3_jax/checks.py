"""One-line errors for arguments: the name, what came, what is allowed."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; allowed: {', '.join(map(repr, allowed))}")


def check_rank(name: str, value, letters: str) -> tuple[int, ...]:
    """The shape of an array that has as many axes as there are letters."""
    shape = getattr(value, "shape", None)
    if shape is None:
        raise TypeError(f"{name}: got {type(value).__name__}; allowed: an array of shape ({letters})")
    if len(shape) != len(letters.split()):
        raise ValueError(f"{name}: got rank {len(shape)}, shape {shape}; allowed: shape ({letters})")
    return shape


def check_array(name: str, value, letters: str, sizes: dict[str, int], kind=jnp.floating) -> None:
    """An array of the kind, whose axes have the sizes of their letters."""
    shape = check_rank(name, value, letters)
    expected = tuple(sizes[letter] for letter in letters.split())
    if shape != expected:
        raise ValueError(f"{name}: got shape {shape}; allowed: ({letters}) = {expected}")
    if not jnp.issubdtype(value.dtype, kind):
        raise TypeError(f"{name}: got dtype {value.dtype}; allowed: a {kind.__name__} dtype")


def check_ids(name: str, ids: Sequence[int] | np.ndarray, vocab_size: int, where: str = "") -> np.ndarray:
    """A text's token ids as an int64 array (t); `where` says in an error which of several texts it is."""
    try:
        array = np.asarray(ids)
    except ValueError:  # lists of different lengths
        array = np.asarray(ids, object)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name}: got {array.dtype} of shape {array.shape}{where}; allowed: integers of shape (t,)")
    wrong = np.flatnonzero((array < 0) | (array >= vocab_size))
    if wrong.size:
        raise ValueError(f"{name}: got id {array[wrong[0]]}{where} at token {wrong[0]}; allowed: 0 to {vocab_size - 1}")
    return array.astype(np.int64)


def check_shapes(what: str, got: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Arrays by name that must be a model's: the first that is missing, new or of another shape is an error."""
    for name in sorted(expected.keys() | got.keys()):
        if name not in got:
            raise ValueError(f"{what}: got no {name}; allowed: every array of the config's model")
        if name not in expected:
            raise ValueError(f"{what}: got {name}; allowed: the arrays of the config's model, which has no such one")
        if got[name] != expected[name]:
            raise ValueError(f"{what}: got {name} of shape {got[name]}; allowed: {expected[name]}")


def check_segment_ids(segment_ids, sizes: dict[str, int]) -> None:
    """Ids (b, t) of packed documents, or None; that they never decrease is checked where they are concrete."""
    if segment_ids is None:
        return
    check_array("segment_ids", segment_ids, "b t", sizes, kind=jnp.integer)
    if not isinstance(segment_ids, jax.core.Tracer) and np.any(np.diff(np.asarray(segment_ids), axis=1) < 0):
        row, at = np.argwhere(np.diff(np.asarray(segment_ids), axis=1) < 0)[0]
        raise ValueError(
            f"segment_ids: got a smaller id after a larger one in row {row} at token {at + 1}; "
            "allowed: ids that never decrease along t"
        )
