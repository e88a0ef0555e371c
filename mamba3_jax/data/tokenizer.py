"""From text to token ids and back: bytes, or any tokenizer.json.

No tokenizer here puts special tokens around a text, so that a text in two pieces has no mark in its middle. Whoever
wants one writes it into the text: "<|begin_of_text|>Once upon a time".
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from mamba3_jax.models import LMConfig
from mamba3_jax.models.checkpoint import TOKENIZER

BYTES = 256
REPLACEMENT = "\ufffd"
# Replacement characters at the end of a text that more tokens may turn into one character: UTF-8 has up to 4 bytes.
UNFINISHED = 3
# A stream decodes its last tokens again with every new one: at most so many, of which it keeps some as context, because
# what a token looks like may depend on the one before.
WINDOW, CONTEXT = 64, 16
# What documents end with in the tokenizers of published models; the first of them that is one token is taken.
END_MARKS = ("<|end_of_text|>", "<|endoftext|>", "</s>")


@runtime_checkable
class Tokenizer(Protocol):
    """What the library asks of a tokenizer.

    Attributes:
        vocab_size: ids are from 0 to vocab_size - 1.
        prefix: ids that the tokenizer's own file puts before a text, and `encode` does not.
        end: the id of the mark that documents end with; None if there is none.
    """

    vocab_size: int
    prefix: tuple[int, ...]
    end: int | None

    def encode(self, text: str) -> list[int]:
        """The text's ids, without special tokens around it."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""


class ByteTokenizer:
    """A token is a byte of the text's UTF-8."""

    vocab_size = BYTES
    prefix = ()
    end = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text; an id of a model's larger vocabulary is a byte that no UTF-8 has."""
        return bytes(min(i, BYTES - 1) for i in ids).decode(errors="replace")


class JsonTokenizer:
    """A tokenizer.json, through the `tokenizers` library (the extra `text`).

    Args:
        path: the file.

    Raises:
        ValueError: one line, for a file that cannot be read or a library that is not there.
    """

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise ValueError(f"tokenizer: got {path}, which needs the tokenizers library; run: uv sync --extra text")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            reason = " ".join(str(error).split())
            raise ValueError(f"tokenizer: got {path} ({reason}); allowed: a tokenizer.json") from None
        # Not the number of entries: files with unused ids in between exist.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        # Any text would do: what the file's post-processor adds is marked as special, and what comes first is a prefix.
        processed = self._tokenizer.encode("a")
        added = itertools.takewhile(lambda pair: pair[1], zip(processed.ids, processed.special_tokens_mask))
        self.prefix = tuple(id for id, _ in added)
        self.end = single_token(self.encode, END_MARKS)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens included; ids that the file does not know are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class TextStream:
    """Text from tokens that arrive a few at a time; the pieces joined are the text of all of them.

    A character whose bytes are not all there is held back, so that no half of one is ever shown.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def feed(self, ids: Sequence[int]) -> str:
        """What the new tokens add, as far as it is certain."""
        self._ids.extend(ids)
        text = self._tokenizer.decode(self._ids)
        certain = len(text)
        while certain > max(len(text) - UNFINISHED, self._shown) and text[certain - 1] == REPLACEMENT:
            certain -= 1
        new = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if certain == len(text) and len(self._ids) > WINDOW:
            self._ids = self._ids[-CONTEXT:]
            self._shown = len(self._tokenizer.decode(self._ids))
        return new

    def finish(self) -> str:
        """What was held back; the tokens ended there."""
        rest = self._tokenizer.decode(self._ids)[self._shown :]
        self._ids, self._shown = [], 0
        return rest


def single_token(encode: Callable[[str], list[int]], marks: Sequence[str]) -> int | None:
    """The id of the first of the marks that is one token."""
    found = (ids[0] for ids in map(encode, marks) if len(ids) == 1)
    return next(found, None)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory: its tokenizer.json, or bytes if it has none.

    Raises:
        ValueError: as `JsonTokenizer`.
    """
    path = directory / TOKENIZER
    return JsonTokenizer(path) if path.exists() else ByteTokenizer()


def check_vocabulary(tokenizer: Tokenizer, config: LMConfig, path: Path) -> None:
    """Raises ValueError, naming `path`, for a tokenizer whose ids the model's embedding does not have."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer: got {tokenizer.vocab_size} ids for the model in {path}; "
            f"allowed: at most its vocab_size {config.vocab_size}"
        )
