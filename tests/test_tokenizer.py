"""Text to ids and back, streams that show whole characters only, and tokenizers that do not fit."""

import importlib.util
import itertools
import sys

import numpy as np
import pytest

from mamba3_jax.data import ByteTokenizer, JsonTokenizer, TextStream, check_vocabulary, load_tokenizer
from mamba3_jax.layers import Mamba3Config
from mamba3_jax.models import LMConfig
from test_layers import assert_names

TEXT = "naïve 🙂🙃 — 東京\n\tÅ"
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="needs the tokenizers library (extra text)"
)


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    """A byte-level BPE like the released models', with merges, a special token and a hole in its ids."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"aa": 300, "aaa": 301}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "a"), ("aa", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(params=["bytes", pytest.param("json", marks=needs_library)])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else JsonTokenizer(request.getfixturevalue("json_file"))


def test_decode_inverts_encode(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and 0 <= min(ids) and max(ids) < tokenizer.vocab_size


def test_a_text_in_two_pieces_is_the_text(tokenizer):
    """Nothing is put around a text."""
    assert tokenizer.encode(TEXT) + tokenizer.encode(TEXT) == tokenizer.encode(TEXT + TEXT)
    assert tokenizer.encode("") == []


@needs_library
def test_json_uses_merges_and_knows_special_tokens_in_the_text(json_file):
    tokenizer = JsonTokenizer(json_file)
    assert tokenizer.encode("aaab")[0] == 301
    # Of the file's 259 entries the largest id is what an embedding must hold.
    special = tokenizer.encode("<|end|>")
    assert len(special) == 1 and tokenizer.vocab_size == max(302, special[0] + 1)
    assert tokenizer.decode(tokenizer.encode("a<|end|>b")) == "a<|end|>b"


@pytest.mark.parametrize("template, prefix", [("<s> $A", ["<s>"]), ("<s> [x] $A [x]", ["<s>", "[x]"]), ("$A [x]", [])])
@needs_library
def test_json_says_what_its_file_puts_before_a_text_and_puts_nothing(template, prefix, json_file, tmp_path):
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(json_file))
    library.add_special_tokens(["<s>", "[x]"])
    ids = {mark: library.token_to_id(mark) for mark in ("<s>", "[x]")}
    library.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=[*ids.items()])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.prefix == tuple(ids[mark] for mark in prefix)
    assert tokenizer.encode("b") == JsonTokenizer(json_file).encode("b")


@needs_library
@pytest.mark.parametrize(
    "added, end",
    [
        (["</s>"], "</s>"),
        (["</s>", "<|endoftext|>"], "<|endoftext|>"),
        (["<|endoftext|>", "<|end_of_text|>"], "<|end_of_text|>"),
        (["<|done|>"], None),
    ],
)
def test_json_knows_the_mark_of_an_end(added, end, json_file, tmp_path):
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(json_file))
    library.add_special_tokens(added)
    library.save(str(tmp_path / "tokenizer.json"))
    found = JsonTokenizer(tmp_path / "tokenizer.json").end
    assert found == (None if end is None else library.token_to_id(end))


def test_bytes_have_no_marks():
    assert ByteTokenizer().prefix == () and ByteTokenizer().end is None


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stream_shows_whole_characters_as_soon_as_they_are_there(tokenizer, size):
    """Over a text longer than the window, a few tokens at a time."""
    text, stream, shown = TEXT * 20, TextStream(tokenizer), ""
    ids = tokenizer.encode(text)
    for count, batch in enumerate(itertools.batched(ids, size), 1):
        shown += stream.feed(list(batch))
        complete = tokenizer.decode(ids[: count * size]).rstrip("\ufffd")
        assert shown == complete == text[: len(shown)]
    assert stream.finish() == "" and shown == text


def test_a_stream_of_any_bytes_is_the_text_of_all():
    """Random bytes, which are mostly not UTF-8; every chunking gives what one decoding gives."""
    rng = np.random.default_rng(0)
    for size in (1, 3, 10):
        ids = rng.integers(0, 256, 1000).tolist()
        stream = TextStream(ByteTokenizer())
        shown = "".join(stream.feed(list(batch)) for batch in itertools.batched(ids, size)) + stream.finish()
        assert shown == ByteTokenizer().decode(ids)


def test_half_a_character_at_the_end_is_shown_at_the_end():
    stream = TextStream(ByteTokenizer())
    assert stream.feed("a🙂".encode()[:-1]) == "a" and stream.finish() == "\ufffd"


def test_ids_beyond_the_bytes_are_no_text():
    assert ByteTokenizer().decode([97, 256, 300, 98]) == "a\ufffd\ufffdb"


@needs_library
def test_a_directory_has_its_tokenizer_or_bytes(json_file, tmp_path):
    assert isinstance(load_tokenizer(json_file.parent), JsonTokenizer)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


@needs_library
@pytest.mark.parametrize("content", ["", "{}", "[1, 2"])
def test_a_broken_file_is_one_line(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        load_tokenizer(tmp_path)
    assert_names(str(error.value), "tokenizer", f"got {path}", "a tokenizer.json")


def test_a_missing_library_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError) as error:
        JsonTokenizer(tmp_path / "tokenizer.json")
    assert str(error.value).endswith("run: uv sync --extra text") and "\n" not in str(error.value)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    """Also where the embedding's padding would hold them."""
    mixer = Mamba3Config(d_model=16, d_state=8, head_dim=8)
    check_vocabulary(ByteTokenizer(), LMConfig(mixer, n_layers=1, vocab_size=256), tmp_path)
    with pytest.raises(ValueError) as error:
        check_vocabulary(ByteTokenizer(), LMConfig(mixer, n_layers=1, vocab_size=255), tmp_path)
    assert_names(str(error.value), "tokenizer", f"got 256 ids for the model in {tmp_path}", "its vocab_size 255")
