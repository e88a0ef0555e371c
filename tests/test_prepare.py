"""`mamba3 prepare-data`: every format gives the same documents, each in its split, and nothing is half written."""

import gzip
import importlib.util
import json
import os
import tracemalloc

import numpy as np
import pytest

from mamba3_jax.data import ByteTokenizer, JsonTokenizer
from mamba3_jax.data.prepare import PrepareConfig, main, prepare
from mamba3_jax.data.shards import Shard, read_manifest

TEXTS = ["one\n", "naïve 🙂 — 東京\n", "", "three " * 500, "one\n", "\x00 a zero", *(f"text {i}" for i in range(40))]


def needs(library):
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"needs {library}")


def write_text(folder):
    for i, text in enumerate(TEXTS):
        file = folder / f"{i // 10}" / f"{i:03d}{('.txt', '.md')[i % 2]}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text.encode())
    (folder / "picture.png").write_bytes(b"\xff")
    return folder


def write_jsonl(folder, field="text"):
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(TEXTS)))
    return file


def write_jsonl_gz(folder):
    file = folder / "texts.jsonl.gz"
    file.write_bytes(gzip.compress("\n\n".join(json.dumps(dict(text=text)) for text in TEXTS).encode()))
    return file


def write_parquet(folder):
    import pyarrow
    import pyarrow.parquet

    file = folder / "texts.parquet"
    pyarrow.parquet.write_table(pyarrow.table(dict(id=list(range(len(TEXTS))), text=TEXTS)), file, row_group_size=7)
    return file


def write_data_set(folder):
    folder = folder / "data_set"
    folder.mkdir()
    write_jsonl(folder)
    return f"hf:{folder}"


FORMATS = [
    write_text,
    write_jsonl,
    write_jsonl_gz,
    pytest.param(write_parquet, marks=needs("pyarrow")),
    pytest.param(write_data_set, marks=needs("datasets")),
]


def run(*sources, destination, **options):
    return prepare(PrepareConfig(tuple(map(str, sources)), destination, **options))


def documents(folder, split):
    """The ids of each document."""
    manifest = read_manifest(folder)
    shards = [Shard(folder, entry, manifest) for entry in manifest.splits[split]]
    return [s.read(*s.offsets[i : i + 2].tolist()).tolist() for s in shards for i in range(len(s.offsets) - 1)]


def texts(folder, split="train"):
    tokenizer = JsonTokenizer(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else ByteTokenizer()
    return [tokenizer.decode(ids) for ids in documents(folder, split)]


KEPT = [text for text in TEXTS if text]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_its_documents_in_order(tmp_path, form, capsys, monkeypatch):
    """All but the empty one, which is counted."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "sources").mkdir()
    run(form(tmp_path / "sources"), destination=tmp_path / "data", validation_share=0.0)
    assert texts(tmp_path / "data") == KEPT
    out = capsys.readouterr().out
    assert f"train: {len(KEPT)} documents, " in out and "left out: 1 empty documents" in out
    assert f"validation: none, by validation_share=0.0 of {len(KEPT) + 1} documents" in out


def test_sources_are_read_one_after_the_other(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    second, first = write_jsonl(tmp_path / "a", field="body"), tmp_path / "b" / "0.jsonl"
    first.write_text('{"body": "first"}\n')
    run(first, second, destination=tmp_path / "data", validation_share=0.0, field="body")
    assert texts(tmp_path / "data") == ["first", *KEPT]


def test_pydoc_has_the_splits_of_its_task(tmp_path):
    from mamba3_jax.tasks.pydoc_bytes import text_of

    run("pydoc", destination=tmp_path / "data")
    for split in ("train", "validation", "test"):
        assert "".join(texts(tmp_path / "data", split)).encode() == text_of(split).tobytes()


@needs("tokenizers")
def test_a_bpe_is_trained_on_the_spot_and_used_again(tmp_path):
    """The same each time; of the size that was asked for; its file tokenises other text as any tokenizer.json."""
    source = tmp_path / "corpus"
    source.mkdir()
    for i in range(60):
        words = np.random.default_rng(i).choice(["alpha", "beta", "gamma", "delta", "épsilon"], 200)
        (source / f"{i:02d}.txt").write_text(" ".join(words))
    for name in ("first", "second"):
        run(source, destination=tmp_path / name, tokenizer="bpe:280", validation_share=0.2)
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("first", "second"))
    assert first == second
    manifest = read_manifest(tmp_path / "first")
    assert manifest.vocab_size == 280 and sorted(manifest.splits) == ["train", "validation"]
    found = texts(tmp_path / "first", "train") + texts(tmp_path / "first", "validation")
    assert sorted(found) == sorted(file.read_text() for file in source.iterdir())
    assert sum(map(len, documents(tmp_path / "first", "train"))) < 0.5 * sum(map(len, texts(tmp_path / "first")))
    (tmp_path / "sources").mkdir()
    tokenizer = str(tmp_path / "first" / "tokenizer.json")
    run(write_jsonl(tmp_path / "sources"), destination=tmp_path / "third", tokenizer=tokenizer, validation_share=0.0)
    assert texts(tmp_path / "third") == KEPT and (tmp_path / "third" / "tokenizer.json").read_bytes() == first


@pytest.mark.parametrize(
    "tokenizer, end", [("bytes", "\x00"), pytest.param("bpe:260", "<|end|>", marks=needs("tokenizers"))]
)
def test_documents_end_with_the_token_that_was_asked_for(tmp_path, tokenizer, end):
    source = write_jsonl(tmp_path)
    run(source, destination=tmp_path / "data", tokenizer=tokenizer, end_of_document=end, validation_share=0.0)
    assert texts(tmp_path / "data") == [text + end for text in KEPT]
    assert {ids[-1] for ids in documents(tmp_path / "data", "train")} == {
        read_manifest(tmp_path / "data").end_of_document
    }


def test_a_text_is_in_the_same_split_wherever_it_stands(tmp_path):
    """About as many as asked for, whatever else there is; a text that is there twice is in one split."""
    all_texts = [f"document {i}" for i in range(4000)]
    file, half = tmp_path / "all.jsonl", tmp_path / "half.jsonl"
    file.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in [*all_texts, *all_texts]))
    half.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in reversed(all_texts[::2])))
    run(file, destination=tmp_path / "a", validation_share=0.1)
    run(half, destination=tmp_path / "b", validation_share=0.1)
    a, b = (set(texts(tmp_path / name, "validation")) for name in "ab")
    assert b == a & set(all_texts[::2]) and a.isdisjoint(texts(tmp_path / "a", "train"))
    assert abs(len(a) - 400) < 5 * np.sqrt(4000 * 0.1 * 0.9)


def test_memory_does_not_grow_with_the_source(tmp_path):
    peaks = []
    for count in (1000, 8000):
        file = tmp_path / f"{count}.jsonl"
        file.write_text("".join(json.dumps(dict(text=f"{i} " * 500)) + "\n" for i in range(count)))
        tracemalloc.start()
        run(file, destination=tmp_path / f"data{count}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 16 MB more text, 8 bytes in the index for each document.
    assert peaks[1] - peaks[0] < 500_000


# What is refused


def bad_line(folder):
    file = write_jsonl(folder)
    file.write_text(file.read_text() + '{"text": "cut')
    return [file], f"{file}: line {len(TEXTS) + 1}: got no JSON ("


def other_field(folder):
    file = write_jsonl(folder, field="body")
    return [
        file
    ], f"{file}: line 1: got the fields id, body; allowed: an object with a text in 'text', or another --field"


def no_object(folder):
    file = folder / "a.jsonl"
    file.write_text("[1]\n")
    return [file], f"{file}: line 1: got a list; allowed: an object with a text in 'text'"


def half_a_pair(folder):
    file = folder / "a.jsonl"
    file.write_text('{"text": "ab\\ud800"}\n')
    return [file], f"{file}: line 1: got half a surrogate pair at character 2; allowed: Unicode"


def not_utf8(folder):
    file = folder / "a.txt"
    file.write_bytes(b"abc\xff")
    return [file], f"{file}: got byte 3, which is not UTF-8; allowed: UTF-8"


def cut_gz(folder):
    file = write_jsonl_gz(folder)
    file.write_bytes(file.read_bytes()[:-20])
    return [file], f"{file}: got a file that cannot be read (Compressed file ended"


def no_gz(folder):
    file = folder / "a.jsonl.gz"
    file.write_text("{}")
    return [file], f"{file}: got a file that cannot be read (Not a gzipped file"


def bad_parquet(folder):
    file = folder / "a.parquet"
    file.write_bytes(b"PAR1" * 10)
    return [file], f"{file}: got a file that cannot be read ("


def other_column(folder):
    file = write_parquet(folder)
    return [file, "--field", "body"], f"{file}: got the columns id, text; allowed: a column 'body', or another --field"


def no_data_set(folder):
    return [f"hf:{folder / 'nothing'}"], f"sources: got hf:{folder / 'nothing'}, record 0 ("


def missing(folder):
    return [folder / "a.txt"], f"sources: got {folder / 'a.txt'}; allowed: a file, a folder, hf:NAME, pydoc"


def unknown(folder):
    (folder / "a.docx").write_text("text")
    return [folder / "a.docx"], f"sources: got {folder / 'a.docx'}; allowed: .txt, .md, .rst, .py, .jsonl"


def unreadable(folder):
    (folder / "a.txt").write_text("text")
    (folder / "a.txt").chmod(0)
    return [folder / "a.txt"], f"{folder / 'a.txt'}: got no file that can be read (Permission denied); "


def no_known_file(folder):
    (folder / "a.docx").write_text("text")
    return [folder], f"sources: got {folder}, a folder without such files; allowed: .txt"


def twice(folder):
    file = write_jsonl(folder)
    return [folder, file], f"sources: got {file} and {file}, the same documents twice; allowed: each file once"


def twice_compressed(folder):
    first, second = write_jsonl(folder), write_jsonl_gz(folder)
    return [folder], f"sources: got {second} and {first}, the same documents twice; allowed: each file once"


def pydoc_twice(folder):
    return ["pydoc", "pydoc"], "sources: got pydoc twice; allowed: each source once"


def empty(folder):
    (folder / "a.txt").write_text("")
    return [folder], f"sources: got no text in {folder}; allowed: at least one document"


def all_validation(folder):
    (folder / "a.txt").write_text("text")
    return [
        folder,
        "--validation_share",
        "0.9999999999",
    ], "validation_share: got 0.9999999999, which leaves no document"


def no_sources(folder):
    return [], "the following arguments are required: sources"


def bad_share(folder):
    return ["pydoc", "--validation_share", "1"], "validation_share: got 1.0; allowed: from 0 to below 1"


def small_bpe(folder):
    return ["pydoc", "--tokenizer", "bpe:100"], "tokenizer: got 'bpe:100'; allowed: bpe:SIZE with a size above 256"


def no_tokenizer(folder):
    return ["pydoc", "--tokenizer", "bites"], "tokenizer: got bites (No such file or directory); allowed: bytes, a tok"


def broken_tokenizer(folder):
    (folder / "t.json").write_text("{}")
    return ["pydoc", "--tokenizer", folder / "t.json"], f"tokenizer: got {folder / 't.json'} ("


def two_tokens(folder):
    return ["pydoc", "--end_of_document", "ab"], "end_of_document: got 'ab', 2 tokens; allowed: one of the tokenizer's"


def bad_extension(folder):
    return ["pydoc", "--extensions", '["txt"]'], "extensions: got 'txt'; allowed: such as '.txt'"


BAD = [
    bad_line, other_field, no_object, half_a_pair, not_utf8, cut_gz, no_gz, missing, unknown, no_known_file, twice,
    twice_compressed, pydoc_twice, empty, all_validation, no_sources, bad_share, small_bpe, two_tokens, bad_extension,
    no_tokenizer,
    pytest.param(unreadable, marks=pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")),
    pytest.param(bad_parquet, marks=needs("pyarrow")),
    pytest.param(other_column, marks=needs("pyarrow")),
    pytest.param(no_data_set, marks=needs("datasets")),
    pytest.param(broken_tokenizer, marks=needs("tokenizers")),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, bad, capsys):
    """Also where documents had been read before."""
    source = tmp_path / "sources"
    source.mkdir()
    words, message = bad(source)
    with pytest.raises(SystemExit) as exit:
        main([*map(str, words), "--destination", str(tmp_path / "data")])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.startswith(message) and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


@pytest.mark.parametrize("library, words", [("pyarrow", ["a.parquet"]), ("datasets", ["hf:name"])])
def test_a_missing_library_is_named_with_its_extra(tmp_path, library, words, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(SystemExit):
        main([*words, "--destination", "data"])
    assert capsys.readouterr().err == f"sources: got {words[0]}, which needs {library}; run: uv sync --extra data\n"


def test_what_is_at_the_destination_is_left_alone(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("kept")
    with pytest.raises(SystemExit):
        main(["pydoc", "--destination", str(tmp_path / "data")])
    expected = f"destination: got {tmp_path / 'data'}, which holds other files; allowed: a new path\n"
    assert capsys.readouterr().err == expected
    assert [path.read_text() for path in (tmp_path / "data").iterdir()] == ["kept"]
