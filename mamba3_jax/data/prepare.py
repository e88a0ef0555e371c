"""`mamba3 prepare-data SOURCE [SOURCE ...] --destination DIR`: text to token shards, for `mamba3 train`.

    mamba3 prepare-data notes/ book.txt web.jsonl.gz --destination data/mine --tokenizer bpe:4096
    mamba3 prepare-data hf:HuggingFaceFW/fineweb-edu:sample-10BT --destination data/edu --tokenizer tokenizer.json
    mamba3 prepare-data pydoc --destination data/pydoc

The sources are read once (twice for a tokenizer that is trained on the spot), and memory does not grow with them, only
with the longest document. Nothing is at the destination unless everything is.
"""

import dataclasses
import itertools
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Integer
from rich.console import Console

from mamba3_jax.command import fail, parse
from mamba3_jax.data.corpus import TRAIN, VALIDATION, Corpus, Document, split_of
from mamba3_jax.data.shards import BYTES_TOKENIZER, Manifest, ShardWriter, write_manifest
from mamba3_jax.data.tokenizer import BYTES, ByteTokenizer, JsonTokenizer, Tokenizer
from mamba3_jax.files import whole_directory
from mamba3_jax.models.checkpoint import TOKENIZER

BPE = "bpe:"
END_OF_TEXT = "<|endoftext|>"
# Text that a tokenizer is trained on at most; more changes its merges little.
BPE_CHARACTERS = 1 << 30
DOCUMENTS_AT_A_TIME = 256
# A batch of documents ends early at so many characters, so that long ones do not pile up.
CHARACTERS_AT_A_TIME = 1 << 22
SECONDS_BETWEEN_LINES = 30


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to read, and how to write it.

    Attributes:
        sources: text files (one document each), .jsonl, .jsonl.gz and .parquet files, folders of such, hf:NAME or
            hf:NAME:SUBSET for a Hugging Face data set (its split "train"), or pydoc for Python's help topics.
        destination: a new path, or an empty folder.
        tokenizer: "bytes", a tokenizer.json, or "bpe:SIZE" for a byte-level BPE of SIZE entries, trained on the
            documents of "train".
        end_of_document: text of the token to put after each document, such as <|endoftext|>, which bpe:SIZE always
            has; None is no token.
        field: of .jsonl, .parquet and data sets, the one that holds the text.
        extensions: of text files.
        validation_share: of the documents, chosen by a hash of their text.
    """

    sources: tuple[str, ...]
    destination: Path
    tokenizer: str = BYTES_TOKENIZER
    end_of_document: str | None = None
    field: str = "text"
    extensions: tuple[str, ...] = (".txt", ".md", ".rst", ".py")
    validation_share: float = 0.01

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources: got none; allowed: at least one")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share: got {self.validation_share}; allowed: from 0 to below 1")
        for extension in self.extensions:
            if not extension.startswith("."):
                raise ValueError(f"extensions: got {extension!r}; allowed: such as '.txt'")
        size = self.tokenizer.removeprefix(BPE)
        if size != self.tokenizer and not (size.isdecimal() and int(size) > BYTES):
            raise ValueError(f"tokenizer: got {self.tokenizer!r}; allowed: {BPE}SIZE with a size above {BYTES}")
        destination = self.destination
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise ValueError(f"destination: got {destination}, which holds other files; allowed: a new path")


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    sources = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    options = argv[len(sources) :]
    config = parse(
        "prepare-data", PrepareConfig, [*([f"--sources={json.dumps(sources)}"] if sources else []), *options]
    )
    try:
        prepare(config)
    except (ValueError, OSError) as error:
        fail(" ".join(str(error).split()))
    return 0


def prepare(config: PrepareConfig) -> Manifest:
    """Reads, tokenises and writes; prints progress and a summary.

    Raises:
        ValueError: what cannot be read, named by file and line; no documents; a tokenizer that does not fit. One line.
    """
    began = time.perf_counter()
    corpus = Corpus(config.sources, config.field, config.extensions)
    with whole_directory(config.destination) as folder:
        tokenizer, encode = _tokenizer(config, corpus, folder)
        manifest = _manifest(config, tokenizer, folder)
        seen = _Seen(began)
        writers = _write_shards(config, corpus, encode, folder, manifest, seen)
        _check_train(config, writers)
        splits = {split: writer.entries for split, writer in sorted(writers.items())}
        manifest = dataclasses.replace(manifest, splits=splits)
        write_manifest(folder, manifest)
    seen.summarise(config, manifest)
    return manifest


# From texts to their ids.
Encode = Callable[[list[str]], list[Integer[np.ndarray, " _"]]]


def _tokenizer(config: PrepareConfig, corpus: Corpus, folder: Path) -> tuple[Tokenizer, Encode]:
    """The tokenizer, whose tokenizer.json is in the folder unless tokens are bytes."""
    if config.tokenizer == BYTES_TOKENIZER:
        return ByteTokenizer(), lambda texts: [np.frombuffer(text.encode(), np.uint8) for text in texts]
    path = folder / TOKENIZER
    if config.tokenizer.startswith(BPE):
        _train_bpe(config, corpus, path)
    else:
        try:
            path.write_bytes(Path(config.tokenizer).read_bytes())
        except OSError as error:
            allowed = f"{BYTES_TOKENIZER}, a tokenizer.json, or {BPE}SIZE"
            raise ValueError(f"tokenizer: got {config.tokenizer} ({error.strerror}); allowed: {allowed}") from None
        JsonTokenizer(Path(config.tokenizer))  # for an error that names the user's file
    tokenizer = JsonTokenizer(path)
    from tokenizers import Tokenizer as Library  # there, or JsonTokenizer had complained

    library = Library.from_file(str(path))
    # A file may say how to cut and pad, which is for other uses.
    library.no_truncation()
    library.no_padding()

    def encode(texts: list[str]) -> list[Integer[np.ndarray, " _"]]:
        # On all cores.
        return [np.array(found.ids, np.int64) for found in library.encode_batch_fast(texts, add_special_tokens=False)]

    return tokenizer, encode


def _train_bpe(config: PrepareConfig, corpus: Corpus, path: Path) -> None:
    """A byte-level BPE of the documents of "train"."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ModuleNotFoundError:
        raise ValueError(
            f"tokenizer: got {config.tokenizer}, which needs tokenizers; run: uv sync --extra text"
        ) from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(config.tokenizer.removeprefix(BPE)),
        special_tokens=[config.end_of_document or END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in corpus if split_of(document, config.validation_share) == TRAIN)
    with Console(stderr=True).status(f"training a BPE of {trainer.vocab_size} entries"):
        tokenizer.train_from_iterator(_at_most(texts, BPE_CHARACTERS), trainer)
    tokenizer.save(str(path))


def _at_most(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def _write_shards(
    config: PrepareConfig, corpus: Corpus, encode: Encode, folder: Path, manifest: Manifest, seen: "_Seen"
) -> dict[str, ShardWriter]:
    """Every document that is not empty, by split."""
    writers: dict[str, ShardWriter] = {}
    console = Console(stderr=True)
    with console.status("reading") as status:
        for batch in _batched(corpus):
            for document, ids in zip(batch, encode([document.text for document in batch])):
                split = split_of(document, config.validation_share)
                if ids.size and manifest.end_of_document is not None:
                    ids = np.append(ids, manifest.end_of_document)
                seen.add(split, document, ids.size)
                if not ids.size:
                    continue
                if split not in writers:
                    writers[split] = ShardWriter(folder, split, manifest)
                writers[split].add(ids, document.where)
            status.update(seen.line())
            if not console.is_terminal and seen.line_is_due():
                print(seen.line(), flush=True)
    for writer in writers.values():
        writer.close()
    return writers


def _manifest(config: PrepareConfig, tokenizer: Tokenizer, folder: Path) -> Manifest:
    """All but the splits."""
    end = None
    if config.end_of_document is not None:
        ids = tokenizer.encode(config.end_of_document)
        if len(ids) != 1:
            raise ValueError(
                f"end_of_document: got {config.end_of_document!r}, {len(ids)} tokens; allowed: one of the tokenizer's"
            )
        end = ids[0]
    if config.tokenizer == BYTES_TOKENIZER:
        return Manifest(tokenizer.vocab_size, BYTES_TOKENIZER, None, end, {})
    return Manifest(tokenizer.vocab_size, TOKENIZER, zlib.crc32((folder / TOKENIZER).read_bytes()), end, {})


def _check_train(config: PrepareConfig, writers: dict[str, ShardWriter]) -> None:
    if not writers:
        raise ValueError(f"sources: got no text in {', '.join(config.sources)}; allowed: at least one document")
    if TRAIN not in writers:
        raise ValueError(
            f"validation_share: got {config.validation_share}, which leaves no document for {TRAIN}; allowed: less"
        )


def _batched(corpus: Corpus) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in corpus:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == DOCUMENTS_AT_A_TIME or characters >= CHARACTERS_AT_A_TIME:
            yield batch
            batch, characters = [], 0
    yield batch


class _Seen:
    """What was read so far, and for a user to see."""

    def __init__(self, began: float):
        self._began, self._shown = began, began
        self._characters, self._empty = 0, 0
        self._longest: Counter[str] = Counter()
        self._tokens, self._documents = 0, 0

    def add(self, split: str, document: Document, tokens: int) -> None:
        self._characters += len(document.text)
        self._tokens += tokens
        self._documents += 1
        self._empty += tokens == 0
        self._longest[split] = max(self._longest[split], tokens)

    def line(self) -> str:
        rate = self._tokens / (time.perf_counter() - self._began)
        return f"{self._documents:,} documents, {self._tokens:,} tokens, {rate:,.0f} tokens/s"

    def line_is_due(self) -> bool:
        """Not too often, for a log."""
        now = time.perf_counter()
        due = now - self._shown > SECONDS_BETWEEN_LINES
        if due:
            self._shown = now
        return due

    def summarise(self, config: PrepareConfig, manifest: Manifest) -> None:
        for split, entries in manifest.splits.items():
            documents, tokens = (sum(getattr(e, name) for e in entries) for name in ("documents", "tokens"))
            print(
                f"{split}: {documents:,} documents, {tokens:,} tokens, the longest {self._longest[split]:,}; "
                f"{len(entries)} shards"
            )
        if VALIDATION not in manifest.splits:
            told = f"validation_share={config.validation_share} of {self._documents:,} documents"
            print(f"{VALIDATION}: none, by {told}; a run on these data will tell no perplexity")
        if self._empty:
            print(f"left out: {self._empty:,} empty documents")
        print(f"vocab_size: {manifest.vocab_size}, {self._characters / self._tokens:.2f} characters per token")
        seconds = time.perf_counter() - self._began
        print(f"wrote {config.destination} in {seconds:.1f} s, {self._tokens / seconds:,.0f} tokens/s")
