"""From token shards, or the built-in corpus, to batches of packed documents.

A row holds `context` tokens of one or more documents, each a segment (see packing.py); the target of a token is the
next one of its document, also where a long document was cut. In an epoch of "train" every token of every kept document
comes once. Rows are drawn in another order in each epoch; other splits are read once, in one order, and their last
batch is filled with empty rows.

What batch number i holds depends on the data, the split, the seed, context, batch_size and long_documents, and on
nothing else: a process reads the rows of each batch that its devices need, and the state of an iterator is the number
of batches that it gave. It is therefore the same on every process, and continues the stream with any number of them,
and of workers.

The order, its distribution and the workers are grain's.
"""

import dataclasses
import functools
import logging
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from absl import flags
from jaxtyping import Bool, Int, Integer

from mamba3_jax.checks import check_choice
from mamba3_jax.data.packing import Packing
from mamba3_jax.data.shards import BYTES_TOKENIZER, MANIFEST, MemoryShard, Shard, read_manifest
from mamba3_jax.data.tokenizer import BYTES
from mamba3_jax.models.checkpoint import TOKENIZER
from mamba3_jax.tasks.pydoc_bytes import topics_of_splits

_log = logging.getLogger(__name__)
TRAIN = "train"
BUILT_IN = "the built-in corpus"
# Tokens of data up to this size are checked when it is opened, which takes about a second; see shards.py.
CHECKED_WHEN_OPENED = 1 << 30
LongDocuments = Literal["split", "drop", "error"]


class TokenBatch(NamedTuple):
    """Rows of packed documents.

    Attributes:
        tokens: ids; 0 behind a row's last document.
        targets: the token that follows in the same document; 0 where there is none.
        segment_ids: 0, 1, 2, ... for the documents of a row, and one more for the padding behind them.
        mask: where there is a target.
    """

    tokens: Int[np.ndarray, "b t"]
    targets: Int[np.ndarray, "b t"]
    segment_ids: Int[np.ndarray, "b t"]
    mask: Bool[np.ndarray, "b t"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to read, and in which form.

    Attributes:
        path: folder that `mamba3 prepare-data` wrote; None is the built-in corpus, Python's help topics as bytes.
        context: tokens of a row.
        batch_size: rows of a step, over all processes.
        workers: processes that read ahead; 0 reads when a batch is asked for.
        long_documents: of a document longer than the context: "split" puts its parts into rows of their own, "drop"
            leaves it out, "error" refuses the data.
    """

    path: str | None = None
    context: int = 256
    batch_size: int = 16
    workers: int = 0
    long_documents: LongDocuments = "split"

    def __post_init__(self):
        for name in ("context", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        if self.workers < 0:
            raise ValueError(f"workers: got {self.workers}; allowed: 0 or more")
        check_choice("long_documents", self.long_documents, ("split", "drop", "error"))


class Split:
    """The documents of one split, packed.

    Attributes:
        documents, tokens: how many are kept.
        rows: of an epoch.
        dropped: documents that were longer than the context, and left out.
    """

    def __init__(self, name: str, shards: list[Shard] | list[MemoryShard], config: DataConfig):
        self._shards, self._context = shards, config.context
        sizes = [int(shard.offsets[-1]) for shard in shards]
        # Where each shard begins in the split.
        self._begins = np.cumsum([0, *sizes])
        offsets = [shard.offsets[:-1] + begin for shard, begin in zip(shards, self._begins)]
        offsets = np.concatenate([*offsets, self._begins[-1:]])
        lengths = np.diff(offsets)
        kept = np.ones(lengths.size, bool) if config.long_documents == "split" else lengths <= config.context
        if config.long_documents == "error" and not kept.all():
            self._refuse(lengths, int(np.argmin(kept)))
        self._packing = Packing(offsets, kept, config.context)
        self.documents, self.tokens = int(kept.sum()), int(lengths[kept].sum())
        self.rows, self.dropped = self._packing.rows, int((~kept).sum())
        if self.dropped:
            _log.warning(
                "%s: dropped %d of %d documents, longer than the context of %d tokens",
                name, self.dropped, lengths.size, config.context,
            )  # fmt: skip
        if not self.documents:
            raise ValueError(
                f"long_documents: got drop, which leaves nothing of the {self.dropped} documents of {name}; "
                f"allowed: split, or a context above {config.context}"
            )

    def read(self, rows: Int[np.ndarray, " b"]) -> TokenBatch:
        """The rows with these numbers; those behind the last one are empty.

        Raises:
            ValueError: as `Shard.read`.
        """
        shape = len(rows), self._context
        tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
        mask = np.zeros(shape, bool)
        for i, row in enumerate(rows.tolist()):
            at = 0
            pieces = self._packing.pieces(row) if row < self.rows else []
            for segment, (start, stop, goes_on) in enumerate(pieces):
                ids = self._tokens(start, stop + goes_on)
                end, targeted = at + stop - start, at + ids.size - 1
                tokens[i, at:end] = ids[: stop - start]
                targets[i, at:targeted] = ids[1:]
                mask[i, at:targeted] = True
                segments[i, at:end] = segment
                at = end
            segments[i, at:] = len(pieces)
        return TokenBatch(tokens, targets, segments, mask)

    def _tokens(self, start: int, stop: int) -> Integer[np.ndarray, " n"]:
        shard = int(np.searchsorted(self._begins, start, "right")) - 1
        begin = int(self._begins[shard])
        return self._shards[shard].read(start - begin, stop - begin)

    def _refuse(self, lengths: Int[np.ndarray, " documents"], document: int) -> None:
        length, at = lengths[document], document
        for shard in self._shards:
            if at < len(shard.offsets) - 1:
                break
            at -= len(shard.offsets) - 1
        raise ValueError(
            f"{shard.where(at)}: got {length} tokens; allowed: at most the context, {self._context}, "
            "unless long_documents is split or drop"
        )


@dataclasses.dataclass(frozen=True)
class Data:
    """Opened and checked data.

    Attributes:
        config: what it was opened with.
        vocab_size: every id is below it.
        tokenizer_path: the tokenizer.json; None if tokens are bytes.
        splits: by name; "train" is one of them.
        checksum: of all of it, to tell other data from this.
    """

    config: DataConfig
    vocab_size: int
    tokenizer_path: Path | None
    splits: dict[str, Split]
    checksum: str


def open_data(config: DataConfig) -> Data:
    """Opens the data, with everything checked that shards.py says.

    Raises:
        ValueError: a file is missing or damaged, an id is outside the vocabulary, there is no "train" split, or a
            document is too long; one line that names the file.
    """
    if config.path is None:
        shards, checksum = _built_in()
        splits = {split: Split(split, [shard], config) for split, shard in shards.items()}
        return Data(config, BYTES, None, splits, checksum)
    folder = Path(config.path)
    manifest = read_manifest(folder)
    if not manifest.splits.get(TRAIN):
        raise ValueError(f"{folder / MANIFEST}: got no documents of {TRAIN}; allowed: at least one")
    shards = {
        split: [Shard(folder, entry, manifest) for entry in entries] for split, entries in manifest.splits.items()
    }
    tokens = sum(entry.tokens for entries in manifest.splits.values() for entry in entries)
    if tokens * manifest.dtype.itemsize <= CHECKED_WHEN_OPENED:
        for shard in (shard for found in shards.values() for shard in found):
            shard.check()
    splits = {split: Split(split, found, config) for split, found in shards.items()}
    tokenizer = None if manifest.tokenizer == BYTES_TOKENIZER else folder / TOKENIZER
    checksum = zlib.crc32((folder / MANIFEST).read_bytes())
    return Data(config, manifest.vocab_size, tokenizer, splits, f"{checksum:08x}")


class BatchIterator(Iterator[TokenBatch]):
    """Some or all rows of each batch; see `batches`."""

    def __init__(self, dataset: grain.MapDataset, stream: dict[str, Any], workers: int):
        self._dataset, self._stream, self._workers = dataset, stream, workers
        self._given = 0
        # Empty, or grain's iterator.
        self._iterator: list[grain.DatasetIterator] = []

    def __next__(self) -> TokenBatch:
        if not self._iterator:
            self._start()
        batch = next(self._iterator[0])
        self._given += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """What continues with the next batch, for JSON; the same on every process."""
        return dict(batches=self._given, stream=self._stream)

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `get_state` was called, with this iterator's processes and workers.

        Raises:
            ValueError: the state is of another stream.
        """
        for name, value in self._stream.items():
            if state["stream"][name] != value:
                raise ValueError(
                    f"state: got one of a stream with {name} {state['stream'][name]!r}; allowed: {value!r}, as here"
                )
        self.close()
        self._given = state["batches"]

    def close(self) -> None:
        """Ends the workers; the end of the iterator, or of the program, does so too."""
        _close(self._iterator)

    def _start(self) -> None:
        rest = self._dataset.slice(slice(self._given, None))
        # No threads that read ahead: that is what workers are for.
        dataset = rest.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        if self._workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's workers look at one, and this program need not be absl's
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        self._iterator = [iter(dataset)]
        # grain's own end of an iterator fails when the program's end got there first.
        weakref.finalize(self, _close, self._iterator)


def _close(iterator: list[grain.DatasetIterator]) -> None:
    """Ends what is in the list, if there is something, and takes it out."""
    while iterator:
        iterator.pop().close()


def batches(data: Data, split: str, *, seed: int, rows: Int[np.ndarray, " mine"] | None = None) -> BatchIterator:
    """Batches of a split: without end for "train", once through for the others.

    Args:
        data: from `open_data`.
        split: one of data.splits.
        seed: of the order of "train", from 0 to 2^32 - 1.
        rows: which rows of each batch to give, from 0 to batch_size - 1; None is all of them.

    Raises:
        ValueError: no such split, or seed. And `__next__`, as `Shard.read`.
    """
    config = data.config
    check_choice("split", split, tuple(data.splits))
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed: got {seed}; allowed: 0 to {(1 << 32) - 1}")
    packed = data.splits[split]
    if split == TRAIN:
        order = grain.MapDataset.range(packed.rows).seed(seed).shuffle().repeat(None)
    else:
        order = grain.MapDataset.range(-(-packed.rows // config.batch_size) * config.batch_size)
    mine = np.arange(config.batch_size) if rows is None else rows
    # There is no remainder; without saying so, the length of an endless stream overflows.
    dataset = order.batch(config.batch_size, drop_remainder=True).map(lambda batch: packed.read(batch[mine]))
    stream = dict(data=data.checksum, split=split, seed=seed)
    stream |= {name: getattr(config, name) for name in ("context", "batch_size", "long_documents")}
    return BatchIterator(dataset, stream, config.workers)


@functools.cache
def _built_in() -> tuple[dict[str, MemoryShard], str]:
    """A document for each topic, by split, and the checksum of all."""
    from pydoc_data.topics import topics

    shards, checksum = {}, 0
    for split, names in topics_of_splits().items():
        documents = [topics[name].encode() for name in names]
        checksum = zlib.crc32(b"".join(documents), checksum)
        shards[split] = MemoryShard([np.frombuffer(text, np.uint8) for text in documents], f"{BUILT_IN}, {split}")
    return shards, f"{checksum:08x}"
