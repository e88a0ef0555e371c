"""Language modelling on bytes, with the text that ships with Python: the topics of its `help()`, half a megabyte.

Ids: the bytes; 0 pads, a byte that the text does not have. A row is a uniformly drawn window of n bytes of a split, and
each position asks for the byte that follows it.

The splits are made of whole topics, each split's in alphabetical order. Many topics are also printed as parts of others
(`while` is a section of `compound`), so topics that share a paragraph form a family, and families stay together: cut in
the alphabet, validation and test would hold pages of the training text. From the largest to the smallest, each family
goes to the split that lacks the most bytes to its share of 90, 5 and 5 %. The text changes between versions of Python;
compare losses within one.

Source: `pydoc_data.topics` of the Python standard library, which is made from the language reference.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, UInt8

from mamba3_jax.checks import check_choice
from mamba3_jax.tasks.task import Batch, Task, uniform_integers

PAD = 0
BYTES = 256
SHARES = {"train": 0.90, "validation": 0.05, "test": 0.05}
SHARED_CHARACTERS = 100  # a paragraph of fewer may well stand in two topics that have nothing else in common


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics  # half a megabyte, for those who ask for it

    return topics


def _paragraphs(text: str) -> set[str]:
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return {paragraph for paragraph in paragraphs if len(paragraph) >= SHARED_CHARACTERS}


def _families() -> list[list[str]]:
    """The names of the topics, those that share a paragraph together, directly or through others."""
    families: list[tuple[list[str], set[str]]] = []
    for name, text in sorted(_topics().items()):
        names, paragraphs, others = [name], _paragraphs(text), []
        for family in families:
            if paragraphs.isdisjoint(family[1]):
                others.append(family)
            else:
                names, paragraphs = names + family[0], paragraphs | family[1]
        families = [*others, (names, paragraphs)]
    return [sorted(names) for names, _ in families]


@cache
def topics_of_splits() -> dict[str, tuple[str, ...]]:
    """The names of the topics of each split."""
    size = {name: len(text.encode()) for name, text in _topics().items()}
    lacking = {split: share * sum(size.values()) for split, share in SHARES.items()}
    names: dict[str, list[str]] = {split: [] for split in SHARES}
    families = sorted((-sum(size[name] for name in family), family) for family in _families())
    for negative_size, family in families:
        split = max(lacking, key=lacking.__getitem__)
        lacking[split] += negative_size
        names[split] += family
    return {split: tuple(sorted(names[split])) for split in SHARES}


@cache
def text_of(split: str) -> UInt8[np.ndarray, " bytes"]:
    """The bytes of a split, UTF-8; raises ValueError for one that is none."""
    check_choice("split", split, tuple(SHARES))
    topics = _topics()
    return np.frombuffer("".join(topics[name] for name in topics_of_splits()[split]).encode(), np.uint8)


def _row(
    key: PRNGKeyArray, n: Int[Array, ""], size: int, split: str
) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
    text = text_of(split)
    if size >= text.size:
        raise ValueError(f"size: got {size} with the {split} split; allowed: at most {text.size - 1}")
    start = uniform_integers(jax.random.bits(key, (), jnp.uint32), text.size - n)
    window = jnp.asarray(text).at[start + jnp.arange(size + 1)].get(mode="clip").astype(jnp.int32)
    inside = jnp.arange(size) < n
    return jnp.where(inside, window[:-1], PAD), jnp.where(inside, window[1:], PAD)


@cache
def pydoc_bytes(split: str) -> Task:
    """Windows of one split; that of "train" is evaluated on the whole of the others.

    Raises:
        ValueError: for a split that is none; and `sample`, for rows longer than its text.
    """
    check_choice("split", split, tuple(SHARES))
    return Task(
        name=f"pydoc_bytes_{split}",
        symbols=tuple(repr(bytes([byte]))[2:-1] for byte in range(BYTES)),
        pad_id=PAD,
        chance=1 / BYTES,
        min_length=1,
        lengths="all",
        every=True,
        row=partial(_row, split=split),
        scored="all",
        answers=None,
        held_out=windows if split == "train" else None,
    )


def windows(split: str, length: int) -> Batch:
    """A whole split as rows of `length` bytes that do not overlap, the last one padded: b = ceil((bytes - 1) / length).

    Every byte but the first is asked for exactly once, so that the mean loss over `mask` is that of the split, with a
    context of at most `length` bytes.

    Raises:
        ValueError: for a length below 1 or a split that is none.
    """
    if length < 1:
        raise ValueError(f"length: got {length}; allowed: a positive integer")
    text = text_of(split)
    rows = -(-(text.size - 1) // length)

    def lay_out(ids):
        return jnp.asarray(np.pad(ids, (0, rows * length - ids.size)).reshape(rows, length), jnp.int32)

    tokens, labels = lay_out(text[:-1]), lay_out(text[1:])
    asked = labels != PAD
    return Batch(tokens, labels, asked, asked)
