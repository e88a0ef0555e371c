"""Reads prompts of different lengths into a cache, exactly, in pieces of few different sizes.

A piece is one call of the model on (b, size) tokens; rows that have no tokens for it keep their state. A padded row is
exact only where the padding can be another document, which is before a row's first token: then the padding is on the
left, with a segment id of its own. So a prompt without a past begins with one padded piece, of a size that is a power
of two, and goes on in whole ones; a prompt that continues a state begins with whole pieces and ends in small ones.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from mamba3_jax.models import LM, Cache, LMConfig, abstract_model

Prompt = Sequence[int] | Int[np.ndarray, " _"]

# What continues a state is read in pieces of these sizes after the whole ones: at most 31 + 63 calls for 2047 tokens.
SMALL_PIECES = (64, 1)
# The first piece of a new prompt is no smaller, so that short prompts of all lengths share a program.
FIRST_PIECE = 16


class Piece(NamedTuple):
    """One call of the model.

    Attributes:
        tokens: padded with 0.
        segment_ids: 0 for padding and 1 for the prompt; None where nothing is padded.
        rows: which rows it is for, the others keep their state; None, for `read`, is all of them.
    """

    tokens: Int[np.ndarray, "b t"]
    segment_ids: Int[np.ndarray, "b t"] | None
    rows: Bool[np.ndarray, " b"] | None


def pieces(prompts: Sequence[Prompt], size: int, continues: bool) -> Iterator[Piece]:
    """The calls that read the prompts, which may be empty.

    Args:
        prompts: token ids of every row.
        size: tokens of a whole piece.
        continues: whether the rows have a state already.
    """
    prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
    if not continues:
        firsts = [len(prompt) % size for prompt in prompts]
        if any(firsts):
            width = min(max(1 << (max(firsts) - 1).bit_length(), FIRST_PIECE), size)
            yield _padded([prompt[:first] for prompt, first in zip(prompts, firsts)], width)
        prompts = [prompt[first:] for prompt, first in zip(prompts, firsts)]
    for width in [size] + [small for small in SMALL_PIECES if small < size]:
        while any(len(prompt) >= width for prompt in prompts):
            rows = np.array([len(prompt) >= width for prompt in prompts])
            tokens = [prompt[:width] if row else np.zeros(width, np.int32) for prompt, row in zip(prompts, rows)]
            yield Piece(np.stack(tokens), None, rows)
            prompts = [prompt[width:] if row else prompt for prompt, row in zip(prompts, rows)]


def _padded(prompts: list[Int[np.ndarray, " _"]], width: int) -> Piece:
    tokens, ids = (np.zeros((len(prompts), width), np.int32) for _ in range(2))
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        ids[row, width - len(prompt) :] = 1
    return Piece(tokens, ids, ids.any(axis=1))


def split(model: LM) -> tuple[LMConfig, dict]:
    """What `merge` takes. Compiled functions take these two: a model's `nnx.GraphDef` is slow to hash at every call."""
    return model.config, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def merge(config: LMConfig, parameters: dict) -> LM:
    """The model again."""
    return nnx.merge(nnx.graphdef(abstract_model(config)), parameters)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def read(config: LMConfig, parameters: dict, cache: Cache, piece: Piece) -> Cache:
    """The cache after a piece, in the same buffers. The head is not computed."""
    _, new = merge(config, parameters).hidden(piece.tokens, cache, piece.segment_ids)
    return keep(piece.rows, new, cache)


def keep(rows: Bool[Array, " b"] | None, new: Cache, old: Cache) -> Cache:
    """The new state of the rows that are marked (None: of all), the old state of the others, in the old dtypes."""

    def choose(new, old):
        if rows is None:
            return new.astype(old.dtype)
        return jnp.where(jnp.expand_dims(rows, range(1, old.ndim)), new.astype(old.dtype), old)

    return jax.tree.map(choose, new, old)
