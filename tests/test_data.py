"""Token shards and batches: what was written is read or refused, rows are packed whole, there is one stream."""

import dataclasses
import json
import pickle
import subprocess
import sys
import zlib

import numpy as np
import pytest

from mamba3_jax.data import pipeline
from mamba3_jax.data.packing import Packing
from mamba3_jax.data.pipeline import DataConfig, batches, open_data
from mamba3_jax.data.shards import Manifest, Shard, ShardWriter, read_manifest, write_manifest


def write(folder, splits, vocab_size, shard_tokens=1 << 20):
    """Data with these documents in its splits."""
    folder.mkdir()
    manifest, entries = Manifest(vocab_size, "bytes", None, None, {}), {}
    for split, documents in splits.items():
        writer = ShardWriter(folder, split, manifest, shard_tokens)
        for document in documents:
            writer.add(document, "test")
        writer.close()
        entries[split] = writer.entries
    write_manifest(folder, dataclasses.replace(manifest, splits=entries))
    return folder


def numbered(lengths):
    """Documents whose tokens are 1, 2, 3, ... through all of them, so that each is known again; 0 is padding."""
    return np.split(np.arange(1, sum(lengths) + 1), np.cumsum(lengths)[:-1])


def random_lengths(rng, count, scale):
    return (rng.lognormal(np.log(scale), 1.0, count).astype(int) + 1).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of train, and a validation split."""
    lengths = random_lengths(np.random.default_rng(0), 150, 20)
    documents = numbered(lengths)
    path = tmp_path_factory.mktemp("data") / "numbered"
    return write(path, dict(train=documents[:130], validation=documents[130:]), sum(lengths) + 1, sum(lengths) // 3)


def config(folder, **changes):
    return DataConfig(**(dict(path=str(folder), context=32, batch_size=4) | changes))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for batch, other in zip(got, expected):
        for name, a, b in zip(batch._fields, batch, other):
            np.testing.assert_array_equal(a, b, err_msg=name)


# Files


@pytest.mark.parametrize("vocab_size, dtype", [(256, "uint16"), (1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_documents_are_read_as_they_were_written(tmp_path, vocab_size, dtype):
    """In shards of whole documents, some of several blocks and some within one."""
    rng = np.random.default_rng(vocab_size)
    documents = [rng.integers(0, vocab_size, n) for n in [1, 70_000, 5, 40_000, 3, 1000]]
    documents[0][:] = vocab_size - 1
    path = write(tmp_path / "data", dict(train=documents), vocab_size, 50_000)
    manifest = read_manifest(path)
    assert manifest.dtype == dtype and [e.documents for e in manifest.splits["train"]] == [2, 4]
    shards = [Shard(path, entry, manifest) for entry in manifest.splits["train"]]
    found = [s.read(*s.offsets[i : i + 2].tolist()) for s in shards for i in range(len(s.offsets) - 1)]
    for got, expected in zip(found, documents, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_every_damaged_byte_is_noticed_and_its_file_named(tmp_path):
    """Each byte of each file, before any batch."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 300, n) for n in (40, 20, 30)]
    path = write(tmp_path / "data", dict(train=documents[:2], validation=documents[2:]), 300)
    files = sorted(path.iterdir())
    assert len(files) == 5
    for file in files:
        intact = file.read_bytes()
        for at in range(len(intact)):
            damaged = bytearray(intact)
            damaged[at] ^= 1 << rng.integers(8)
            file.write_bytes(damaged)
            with pytest.raises(ValueError) as error:
                open_data(config(path))
            assert file.name in str(error.value) and "\n" not in str(error.value)
        file.write_bytes(intact)
    open_data(config(path))


@pytest.mark.parametrize("suffix", [".tokens", ".index", ".yaml"])
@pytest.mark.parametrize("change", ["missing", "shorter", "longer"])
def test_missing_and_cut_files_are_named(tmp_path, suffix, change):
    path = write(tmp_path / "data", dict(train=numbered([40, 20])), 100)
    (file,) = path.glob(f"*{suffix}")
    intact = file.read_bytes()
    file.unlink()
    if change != "missing":
        file.write_bytes(intact[:-1] if change == "shorter" else intact + b"\0")
    with pytest.raises(ValueError, match=f"{file.name}: got "):
        open_data(config(path))


def test_large_data_is_checked_before_its_first_use(tmp_path, monkeypatch):
    """Opening does not read the tokens; the damaged block, the second, is named with its documents; others are read."""
    monkeypatch.setattr(pipeline, "CHECKED_WHEN_OPENED", 0)
    path = write(tmp_path / "data", dict(train=numbered([30_000, 1000, 5000, 40_000])), 80_000)
    (file,) = path.glob("*.tokens")
    raw = bytearray(file.read_bytes())
    raw[1 << 17] ^= 1  # token 32768, in the third block of 16384
    file.write_bytes(raw)
    split = open_data(config(path, context=1000)).splits["train"]
    refused = []
    for row in range(split.rows):
        try:
            split.read(np.array([row]))
        except ValueError as error:
            refused.append(str(error))
    place = r"train-00000.tokens: got a wrong checksum in bytes 131072 to 196607 (documents 2 to 3); allowed: "
    assert 10 < len(refused) < 20 and all(place in message for message in refused)


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    """When it is written; and when it is opened, of files that others wrote."""
    with pytest.raises(ValueError, match="^test: got token id 100; allowed: 0 to 99$"):
        write(tmp_path / "a", dict(train=[np.array([3, 100])]), 100)
    with pytest.raises(ValueError, match="^test: got token id -1; allowed: 0 to 99$"):
        write(tmp_path / "b", dict(train=[np.array([3, -1])]), 100)
    path = write(tmp_path / "c", dict(train=[np.array([3, 4]), np.array([99])]), 100)
    write_manifest(path, dataclasses.replace(read_manifest(path), vocab_size=50))
    with pytest.raises(
        ValueError, match=r"train-00000.tokens: got token id 99 in .*\(documents 0 to 1\); allowed: 0 to 49$"
    ):
        open_data(config(path))


def test_a_shard_travels_to_another_process_without_its_tokens(folder):
    manifest = read_manifest(folder)
    shard = Shard(folder, manifest.splits["train"][0], manifest)
    shard.check()
    tokens = int(shard.offsets[-1])
    raw = pickle.dumps(shard)
    assert len(raw) < 8 * len(shard.offsets) + 2000
    np.testing.assert_array_equal(pickle.loads(raw).read(0, tokens), shard.read(0, tokens))


# Packing


@pytest.mark.parametrize("long_documents", ["split", "drop"])
@pytest.mark.parametrize("context", [1, 2, 7, 32, 1000])
def test_rows_hold_every_token_of_every_kept_document_once(tmp_path, context, long_documents):
    """No target crosses documents, every token but a document's first is a target, and segments are documents."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        # Lengths at the edges too: 1, a row, one more, several rows.
        lengths = random_lengths(rng, rng.integers(1, 80), rng.integers(2, 60))
        lengths += [1, context, context + 1, 3 * context, 3 * context + 1]
        rng.shuffle(lengths)
        documents = numbered(lengths)
        path = write(tmp_path / str(seed), dict(train=documents), sum(lengths) + 1, sum(lengths) // 4)
        split = open_data(config(path, context=context, long_documents=long_documents)).splits["train"]
        tokens, targets, segments, mask = split.read(np.arange(split.rows))
        kept = [d for d in documents if long_documents == "split" or d.size <= context]
        assert (split.documents, split.dropped) == (len(kept), len(documents) - len(kept))
        assert split.tokens == sum(d.size for d in kept)
        np.testing.assert_array_equal(np.sort(tokens[tokens > 0]), np.concatenate(kept))
        expected = np.concatenate([d[1:] for d in kept])
        np.testing.assert_array_equal(np.sort(targets[mask]), expected)
        np.testing.assert_array_equal(targets[mask], tokens[mask] + 1)
        assert not targets[~mask].any() and not tokens[segments == segments.max(1, keepdims=True) + 1].any()
        of = np.repeat(np.arange(len(lengths)), lengths)
        for row, ids in zip(tokens, segments):
            steps = np.diff(ids)
            assert ids[0] == 0 and set(steps.tolist()) <= {0, 1}
            document = np.where(row > 0, of[row - 1], -1)
            np.testing.assert_array_equal(steps == 1, np.diff(document) != 0)
            assert not row[np.argmin(row > 0) :].any() or row.all()


@pytest.mark.parametrize("context", [64, 512])
def test_no_two_rows_would_fit_into_one(context):
    """Little padding: of documents that fit, below 1 % here."""
    lengths = np.minimum(random_lengths(np.random.default_rng(1), 5000, 40), context)
    packing = Packing(np.append(0, np.cumsum(lengths)), np.ones(lengths.size, bool), context)
    used = np.sort([sum(p.stop - p.start for p in packing.pieces(row)) for row in range(packing.rows)])
    assert used.sum() == lengths.sum() and used.max() <= context < used[0] + used[1]
    assert lengths.sum() / (packing.rows * context) > 0.99


def test_a_long_document_is_an_error_if_asked(tmp_path):
    """With its file, and its number in that file."""
    path = write(tmp_path / "data", dict(train=numbered([3, 10, 4, 50, 9])), 100, shard_tokens=10)
    message = "train-00001.tokens: document 1: got 50 tokens; allowed: at most the context, 49, unless long_documents"
    with pytest.raises(ValueError, match=message):
        open_data(config(path, context=49, long_documents="error"))
    assert open_data(config(path, context=50, long_documents="error")).splits["train"].documents == 5


def test_dropped_documents_are_logged(tmp_path, caplog):
    path = write(tmp_path / "data", dict(train=numbered([3, 10, 4, 50, 9])), 100)
    open_data(config(path, context=9, long_documents="drop"))
    assert caplog.messages == ["train: dropped 2 of 5 documents, longer than the context of 9 tokens"]


def test_nothing_left_is_an_error(tmp_path):
    path = write(tmp_path / "data", dict(train=numbered([40, 20])), 100)
    with pytest.raises(
        ValueError, match="^long_documents: got drop, which leaves nothing of the 2 documents of train; "
    ):
        open_data(config(path, context=10, long_documents="drop"))
    path = write(tmp_path / "other", dict(validation=numbered([40, 20])), 100)
    with pytest.raises(ValueError, match="data.yaml: got no documents of train; allowed: at least one"):
        open_data(config(path))


# The stream


def test_an_epoch_is_every_row_once_in_an_order_of_its_own(folder):
    data = open_data(config(folder, batch_size=1))
    rows = data.splits["train"].rows
    stored = data.splits["train"].read(np.arange(rows)).tokens.tolist()
    stream = batches(data, "train", seed=3)
    epochs = [[batch.tokens[0].tolist() for batch in take(stream, rows)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(stored)
    assert epochs[0] != epochs[1] and epochs[0] != stored


def test_the_seed_is_the_order(folder):
    data = open_data(config(folder))
    first = take(batches(data, "train", seed=0), 10)
    assert_same(take(batches(open_data(config(folder)), "train", seed=0), 10), first)
    assert not np.array_equal(next(batches(data, "train", seed=1)).tokens, first[0].tokens)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_rows_of_all_processes_are_the_batch_of_one(folder, split, processes):
    """In their order, over several epochs."""
    data = open_data(config(folder))
    count = 3 * data.splits["train"].rows // 4 if split == "train" else len(list(batches(data, split, seed=0)))
    expected = take(batches(data, split, seed=0), count)
    rows = np.split(np.arange(4), processes)
    streams = [batches(data, split, seed=0, rows=mine) for mine in rows]
    parts = [take(stream, count) for stream in streams]
    assert all(batch.tokens.shape == (4 // processes, 32) for part in parts for batch in part)
    assert_same([type(batch[0])(*map(np.concatenate, zip(*batch))) for batch in zip(*parts)], expected)


def test_validation_is_read_once_and_filled_with_empty_rows(folder):
    data = open_data(config(folder))
    split = data.splits["validation"]
    assert split.rows % 4, "the last batch has to be filled"
    for _ in range(2):
        found = list(batches(data, "validation", seed=7))
        rows = [np.concatenate(arrays) for arrays in zip(*found)]
        assert len(rows[0]) == -(-split.rows // 4) * 4
        for got, expected in zip(rows, split.read(np.arange(split.rows)), strict=True):
            np.testing.assert_array_equal(got[: split.rows], expected)
            assert not got[split.rows :].any()


@pytest.mark.parametrize("long_documents", ["split", "drop"])
def test_a_state_continues_with_the_next_batch_at_any_point(folder, long_documents):
    """Twenty points, through JSON, in an iterator that is new or was elsewhere, and with other processes."""
    rng = np.random.default_rng(5)
    data = open_data(config(folder, long_documents=long_documents))
    stream = batches(data, "train", seed=2)
    states, expected = [], []
    for _ in range(60):
        states.append(json.dumps(stream.get_state()))
        expected.append(next(stream))
    used = batches(data, "train", seed=2)
    halves = [batches(data, "train", seed=2, rows=rows) for rows in np.split(np.arange(4), 2)]
    for at in rng.choice(58, 20, replace=False).tolist():
        new = batches(open_data(config(folder, long_documents=long_documents)), "train", seed=2)
        for iterator in (new, used, *halves):
            iterator.set_state(json.loads(states[at]))
        assert_same(take(new, 2), expected[at : at + 2])
        assert_same(take(used, 2), expected[at : at + 2])
        got = [next(half).tokens for half in halves]
        np.testing.assert_array_equal(np.concatenate(got), expected[at].tokens)
        assert halves[0].get_state() == halves[1].get_state() == json.loads(states[at + 1])


CONTINUE = """
import json, sys, zlib
from mamba3_jax.data.pipeline import DataConfig, batches, open_data

if __name__ == "__main__":
    options, state = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    stream = batches(open_data(DataConfig(**options)), "train", seed=4)
    stream.set_state(state)
    print([zlib.crc32(b"".join(array.tobytes() for array in next(stream))) for _ in range(5)], stream.get_state())
"""


def test_another_process_with_workers_continues_the_stream(folder, tmp_path):
    """Two workers there, none here; and nothing is left to complain when the program ends."""
    here = config(folder)
    stream = batches(open_data(here), "train", seed=4)
    take(stream, 7)
    state = stream.get_state()
    expected = [zlib.crc32(b"".join(array.tobytes() for array in batch)) for batch in take(stream, 5)]
    script = tmp_path / "continue.py"
    script.write_text(CONTINUE)
    options = dataclasses.asdict(dataclasses.replace(here, workers=2))
    found = subprocess.run(
        [sys.executable, str(script), json.dumps(options), json.dumps(state)],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.strip() == f"{expected} {stream.get_state()}"


def test_a_state_of_another_stream_is_refused(folder):
    state = batches(open_data(config(folder)), "train", seed=0).get_state()
    for changes, seed, match in [
        ({}, 1, "state: got one of a stream with seed 0; allowed: 1, as here"),
        (dict(context=16), 0, "state: got one of a stream with context 32; allowed: 16, as here"),
        (dict(path=None), 0, "state: got one of a stream with data '"),
    ]:
        with pytest.raises(ValueError, match=match):
            batches(open_data(config(folder, **changes)), "train", seed=seed).set_state(state)


def test_the_built_in_corpus_is_the_text_of_its_task():
    from mamba3_jax.tasks.pydoc_bytes import text_of

    data = open_data(DataConfig())
    assert (data.vocab_size, data.tokenizer_path, list(data.splits)) == (256, None, ["train", "validation", "test"])
    for name, split in data.splits.items():
        tokens, _, _, mask = split.read(np.arange(split.rows))
        text = text_of(name)
        assert split.tokens == text.size and mask.sum() == text.size - split.documents
        np.testing.assert_array_equal(
            np.bincount(tokens.ravel(), minlength=256)[1:], np.bincount(text, minlength=256)[1:]
        )


# Arguments


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(context=0), "context: got 0; allowed: a positive integer"),
        (dict(batch_size=-1), "batch_size: got -1; allowed: a positive integer"),
        (dict(workers=-1), "workers: got -1; allowed: 0 or more"),
    ],
)
def test_a_bad_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        DataConfig(**changes)


@pytest.mark.parametrize(
    "split, options, message",
    [
        ("eval", {}, "split: got 'eval'; allowed: 'train', 'validation'"),
        ("train", dict(seed=-1), "seed: got -1; allowed: 0 to 4294967295"),
    ],
)
def test_bad_arguments_of_batches_are_refused(folder, split, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        batches(open_data(config(folder)), split, **(dict(seed=0) | options))
