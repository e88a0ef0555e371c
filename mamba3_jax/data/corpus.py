"""Where documents come from: text files, .jsonl, .jsonl.gz, .parquet, folders, Hugging Face data sets, `pydoc`.

Sources are read one after the other and folders in the order of their paths, a document at a time. Everything that can
be wrong with a source before it is read is looked at when the corpus is made.
"""

import gzip
import hashlib
import importlib.util
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mamba3_jax.tasks.pydoc_bytes import topics_of_splits

PYDOC = "pydoc"
HUGGING_FACE = "hf:"
JSONL, JSONL_GZ, PARQUET = ".jsonl", ".jsonl.gz", ".parquet"
TRAIN, VALIDATION = "train", "validation"
ROWS_AT_A_TIME = 256


class Document(NamedTuple):
    """A text, its place for messages, and its split if the source has splits."""

    text: str
    where: str
    split: str | None = None


class Corpus:
    """The documents of some sources; every iteration reads them again.

    Args:
        sources: files, folders, "hf:NAME" or "hf:NAME:SUBSET", "pydoc".
        field: of .jsonl, .parquet and data sets, the one that holds the text.
        extensions: files that are one document each; a folder's files with others are left out.

    Attributes:
        readers: each source's, in the order of reading.

    Raises:
        ValueError: a source is missing, of an unknown kind, there twice, or needs a library that is not; one line. And
            while iterating, what cannot be read, with its file and line.
    """

    def __init__(self, sources: Sequence[str], field: str, extensions: Sequence[str]):
        self._field, self._extensions = field, tuple(extensions)
        self._known = (*self._extensions, JSONL, JSONL_GZ, PARQUET)
        self.readers: list[Callable[[], Iterator[Document]]] = []
        files: list[Path] = []
        for i, source in enumerate(sources):
            if source in sources[:i]:
                raise ValueError(f"sources: got {source} twice; allowed: each source once")
            if source == PYDOC:
                self.readers.append(_pydoc)
            elif source.startswith(HUGGING_FACE):
                _needs("datasets", source)
                self.readers.append(lambda name=source: _data_set(name, field))
            else:
                found = self._files(Path(source))
                files += found
                self.readers += [lambda file=file: self._read(file) for file in found]
        _check_files(files)

    def __iter__(self) -> Iterator[Document]:
        for read in self.readers:
            yield from read()

    def _files(self, path: Path) -> list[Path]:
        known = ", ".join(self._known)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.name.endswith(self._known) and p.is_file())
            if not files:
                raise ValueError(f"sources: got {path}, a folder without such files; allowed: {known}")
            return files
        if not path.is_file():
            raise ValueError(f"sources: got {path}; allowed: a file, a folder, {HUGGING_FACE}NAME, {PYDOC}")
        if not path.name.endswith(self._known):
            raise ValueError(f"sources: got {path}; allowed: {known}, or another --extensions")
        return [path]

    def _read(self, file: Path) -> Iterator[Document]:
        try:
            if file.name.endswith(PARQUET):
                yield from _parquet(file, self._field)
            elif file.name.endswith((JSONL, JSONL_GZ)):
                with gzip.open(file) if file.name.endswith(JSONL_GZ) else file.open("rb") as lines:
                    yield from _json_lines(lines, file, self._field)
            else:
                yield Document(_text(file.read_bytes(), str(file)), str(file))
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise ValueError(f"{file}: got a file that cannot be read ({reason}); allowed: a whole one") from None


def split_of(document: Document, validation_share: float) -> str:
    """The source's, or by a hash of the text: the same text is always in the same split."""
    if document.split is not None:
        return document.split
    digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
    return VALIDATION if int.from_bytes(digest) < validation_share * 2**64 else TRAIN


def _check_files(files: list[Path]) -> None:
    """No file twice, also not once as it is and once compressed, and all can be opened."""
    seen: dict[Path, Path] = {}
    for file in files:
        resolved = file.resolve()
        name = resolved.with_name(resolved.name.removesuffix(".gz"))
        if name in seen:
            raise ValueError(f"sources: got {file} and {seen[name]}, the same documents twice; allowed: each file once")
        seen[name] = file
        if file.name.endswith(PARQUET):
            _needs("pyarrow", str(file))
        try:
            file.open("rb").close()
        except OSError as error:
            raise ValueError(
                f"{file}: got no file that can be read ({error.strerror}); allowed: one that can"
            ) from None


def _needs(library: str, source: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise ValueError(f"sources: got {source}, which needs {library}; run: uv sync --extra data")


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: got byte {error.start}, which is not UTF-8; allowed: UTF-8") from None


def _document(record: object, field: str, where: str, split: str | None = None) -> Document:
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        got = f"the fields {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise ValueError(f"{where}: got {got}; allowed: an object with a text in {field!r}, or another --field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: got half a surrogate pair at character {error.start}; allowed: Unicode") from None
    return Document(text, where, split)


def _json_lines(lines: Iterable[bytes], file: Path, field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        where = f"{file}: line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(_text(line, where))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: got no JSON ({error}); allowed: an object in each line") from None
        yield _document(record, field, where)


def _parquet(file: Path, field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if field not in names:
                allowed = f"a column {field!r}, or another --field"
                raise ValueError(f"{file}: got the columns {', '.join(names)}; allowed: {allowed}")
            row = 0
            for batch in table.iter_batches(ROWS_AT_A_TIME, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield _document({field: text}, field, f"{file}: row {row}")
                    row += 1
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: got a file that cannot be read ({reason}); allowed: a whole one") from None


def _data_set(source: str, field: str) -> Iterator[Document]:
    """The split "train" of a data set, as it arrives."""
    import datasets

    name, _, subset = source.removeprefix(HUGGING_FACE).partition(":")
    for number in itertools.count():
        try:
            if not number:
                records = iter(datasets.load_dataset(name, subset or None, split="train", streaming=True))
            record = next(records, None)
        except Exception as error:  # the library raises the network's errors, and many of its own, as they come
            reason = " ".join(str(error).split())
            allowed = f"{HUGGING_FACE}NAME or {HUGGING_FACE}NAME:SUBSET"
            raise ValueError(f"sources: got {source}, record {number} ({reason}); allowed: {allowed}") from None
        if record is None:
            return
        yield _document(record, field, f"{source}: record {number}")


def _pydoc() -> Iterator[Document]:
    """Python's help topics, in the splits of tasks/pydoc_bytes.py, which keep topics that share text together."""
    from pydoc_data.topics import topics

    for split, names in topics_of_splits().items():
        for name in names:
            yield Document(topics[name], f"{PYDOC}: {name}", split)
