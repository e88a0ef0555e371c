"""Token shards: the ids of documents in memory-mapped files, with an index and checksums.

    data.yaml              vocabulary size, dtype, tokenizer, and the shards of each split with their sizes
    tokenizer.json         the tokenizer, if tokens are not bytes
    train-00000.tokens     ids of whole documents, one after the other, little-endian uint16 or uint32
    train-00000.index      where each document begins and the last one ends (int64, in tokens), then the CRC-32 of
                           each block of 64 KiB of the tokens (uint32)

Every byte is under a checksum: a block of tokens under the index's, the index and tokenizer.json under data.yaml's, and
data.yaml under its own last line. Opening checks all but the tokens. A pass over these would take minutes where they
are many, so only a small directory's are checked at once; of a large one's each block is checked before its first use,
once per process. Either way no token of a damaged block is ever given out.
"""

import dataclasses
import zlib
from array import array
from pathlib import Path

import numpy as np
import yaml
from jaxtyping import Int, Integer

from mamba3_jax.models.checkpoint import TOKENIZER

MANIFEST = "data.yaml"
TOKENS, INDEX = ".tokens", ".index"
FORMAT = 1
BYTES_TOKENIZER = "bytes"
# Small, because the first row that is read from a block pays for all of it.
BLOCK = 1 << 16
# A shard is closed at the first document that brings it here: a quarter of a gigabyte of uint16.
SHARD_TOKENS = 1 << 27
CHECKSUM_LINE = "crc32: "


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """A shard in data.yaml: its files' name without suffix, what it holds, and the CRC-32 of its index."""

    name: str
    documents: int
    tokens: int
    index_crc32: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What data.yaml says.

    Attributes:
        vocab_size: ids are from 0 to vocab_size - 1.
        tokenizer: "bytes", or "tokenizer.json" for the file beside it.
        tokenizer_crc32: of that file; None for bytes.
        end_of_document: the id after each document; None for none.
        splits: the shards of each split.
    """

    vocab_size: int
    tokenizer: str
    tokenizer_crc32: int | None
    end_of_document: int | None
    splits: dict[str, list[ShardEntry]]

    @property
    def dtype(self) -> np.dtype:
        """Of the ids in the files."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes the shards of one split; memory does not grow with them, save for a shard's index.

    Args:
        folder: where.
        split: the first word of the files' names.
        manifest: for the dtype and the vocabulary.
        shard_tokens: a shard is closed when it has so many.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest, shard_tokens: int = SHARD_TOKENS):
        self.entries: list[ShardEntry] = []
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype, self._vocab_size = manifest.dtype, manifest.vocab_size
        self._file = None

    def add(self, ids: Integer[np.ndarray, " n"], what: str) -> None:
        """Appends a document of at least one token; raises ValueError, naming `what`, for an id that is none."""
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            wrong = int(ids.max() if ids.min() >= 0 else ids.min())
            raise ValueError(f"{what}: got token id {wrong}; allowed: 0 to {self._vocab_size - 1}")
        if self._file is None:
            self._file = (self._folder / (self._name + TOKENS)).open("wb")
            self._offsets, self._checksums, self._pending = array("q", [0]), array("I"), bytearray()
        self._pending += ids.astype(self._dtype).tobytes()
        self._offsets.append(self._offsets[-1] + ids.size)
        self._write_blocks()
        if self._offsets[-1] >= self._shard_tokens:
            self.close()

    def close(self) -> None:
        """Ends the shard that is open."""
        if self._file is None:
            return
        if self._pending:
            self._write_block(bytes(self._pending))
        self._file.close()
        self._file = None
        index = np.array(self._offsets, "<i8").tobytes() + np.array(self._checksums, "<u4").tobytes()
        (self._folder / (self._name + INDEX)).write_bytes(index)
        entry = ShardEntry(self._name, len(self._offsets) - 1, self._offsets[-1], zlib.crc32(index))
        self.entries.append(entry)

    @property
    def _name(self) -> str:
        return f"{self._split}-{len(self.entries):05d}"

    def _write_blocks(self) -> None:
        whole = len(self._pending) // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            self._write_block(bytes(self._pending[start : start + BLOCK]))
        del self._pending[:whole]

    def _write_block(self, block: bytes) -> None:
        self._file.write(block)
        self._checksums.append(zlib.crc32(block))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes data.yaml, with the checksum of itself in its last line."""
    values = dict(format=FORMAT, dtype=manifest.dtype.name) | dataclasses.asdict(manifest)
    text = yaml.safe_dump(values, sort_keys=False)
    (folder / MANIFEST).write_text(f"{text}{CHECKSUM_LINE}{zlib.crc32(text.encode()):08x}\n")


def read_manifest(folder: Path) -> Manifest:
    """What data.yaml says, with the tokenizer checked.

    Raises:
        ValueError: a file is missing, damaged, or of another format; one line that names it.
    """
    file = folder / MANIFEST
    raw = _read(file, f"a folder that `mamba3 prepare-data` wrote, with {MANIFEST}")
    text, _, _ = raw.rpartition(CHECKSUM_LINE.encode())
    if raw != text + f"{CHECKSUM_LINE}{zlib.crc32(text):08x}\n".encode():
        raise _damaged(file)
    values = yaml.safe_load(text)
    if values["format"] != FORMAT:
        raise ValueError(f"{file}: got format {values['format']}; allowed: {FORMAT}")
    splits = {split: [ShardEntry(**entry) for entry in entries] for split, entries in values["splits"].items()}
    names = [field.name for field in dataclasses.fields(Manifest)]
    manifest = Manifest(**{name: values[name] for name in names} | dict(splits=splits))
    if manifest.tokenizer_crc32 is not None:
        tokenizer = folder / TOKENIZER
        if zlib.crc32(_read(tokenizer, f"the file that {MANIFEST} names")) != manifest.tokenizer_crc32:
            raise _damaged(tokenizer)
    return manifest


class Shard:
    """The documents of one shard; no token is given out before its block's checksum was right.

    Args:
        folder: where the files are.
        entry: the shard's entry in data.yaml.
        manifest: for the dtype and the vocabulary.

    Attributes:
        offsets: where each document begins and the last one ends, in tokens.

    Raises:
        ValueError: a file is missing, of another size, or its index is damaged; one line that names it.
    """

    offsets: Int[np.ndarray, " documents_and_end"]

    def __init__(self, folder: Path, entry: ShardEntry, manifest: Manifest):
        self._file = folder / (entry.name + TOKENS)
        self._dtype, self._vocab_size = manifest.dtype, manifest.vocab_size
        size = entry.tokens * self._dtype.itemsize
        blocks, head = -(-size // BLOCK), 8 * (entry.documents + 1)
        index_file = folder / (entry.name + INDEX)
        _check_size(self._file, size)
        _check_size(index_file, head + 4 * blocks)
        index = _read(index_file, f"the shards that {MANIFEST} names")
        if zlib.crc32(index) != entry.index_crc32:
            raise _damaged(index_file)
        self.offsets = np.frombuffer(index, "<i8", entry.documents + 1)
        self._checksums = np.frombuffer(index, "<u4", blocks, head)
        self._checked = np.zeros(blocks, bool)
        self._open()

    def read(self, start: int, stop: int) -> Integer[np.ndarray, " n"]:
        """The tokens of a range.

        Raises:
            ValueError: a block of it is damaged, or has an id that is none; with the file and the documents.
        """
        first, last = start * self._dtype.itemsize // BLOCK, (stop * self._dtype.itemsize - 1) // BLOCK
        if not self._checked[first : last + 1].all():
            for block in range(first, last + 1):
                self._check(block)
        return self._tokens[start:stop]

    def check(self) -> None:
        """Checks every block; raises as `read`."""
        self.read(0, int(self.offsets[-1]))

    def where(self, document: int) -> str:
        """A document's place, for messages."""
        return f"{self._file}: document {document}"

    def __getstate__(self):
        # Another process maps the file itself; pickled as it is, the map would travel as all of its tokens.
        return {name: value for name, value in vars(self).items() if name != "_tokens"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._open()

    def _open(self) -> None:
        # As a plain array, whose slices are cheaper.
        self._tokens = np.memmap(self._file, self._dtype, "r").view(np.ndarray)

    def _check(self, block: int) -> None:
        if self._checked[block]:
            return
        per_block = BLOCK // self._dtype.itemsize
        start = block * per_block
        tokens = self._tokens[start : start + per_block]
        bad_checksum = zlib.crc32(tokens) != self._checksums[block]
        if bad_checksum or tokens.max() >= self._vocab_size:
            ends = np.array([start, start + tokens.size - 1])
            first, last = np.searchsorted(self.offsets, ends, "right") - 1
            got = "a wrong checksum" if bad_checksum else f"token id {tokens.max()}"
            intact = "the bytes that were written; prepare the data again"
            allowed = intact if bad_checksum else f"0 to {self._vocab_size - 1}"
            place = f"bytes {block * BLOCK} to {block * BLOCK + tokens.nbytes - 1} (documents {first} to {last})"
            raise ValueError(f"{self._file}: got {got} in {place}; allowed: {allowed}")
        self._checked[block] = True


class MemoryShard:
    """Documents that are in memory; the same interface."""

    def __init__(self, documents: list[Integer[np.ndarray, " _"]], name: str):
        self.offsets = np.cumsum([0, *(document.size for document in documents)])
        self._tokens = np.concatenate(documents)
        self._name = name

    def read(self, start: int, stop: int) -> Integer[np.ndarray, " n"]:
        return self._tokens[start:stop]

    def where(self, document: int) -> str:
        return f"{self._name}: document {document}"


def _read(file: Path, allowed: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: got no file that can be read ({error.strerror}); allowed: {allowed}") from None


def _check_size(file: Path, expected: int) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise ValueError(
            f"{file}: got no file that can be read ({error.strerror}); allowed: the shards that {MANIFEST} names"
        ) from None
    if size != expected:
        raise ValueError(f"{file}: got {size} bytes; allowed: the {expected} that {MANIFEST} gives it")


def _damaged(file: Path) -> ValueError:
    return ValueError(f"{file}: got a wrong checksum; allowed: the file as it was written; prepare the data again")
