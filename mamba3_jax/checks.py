"""One-line errors for arguments: the name, what came, what is allowed."""

from collections.abc import Sequence

import jax.numpy as jnp


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
