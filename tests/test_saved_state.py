"""A state in a file: what it resumes, and what it refuses."""

import functools
import io
import json
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba3_jax.inference import Sampling, generate, load_state, save_state
from mamba3_jax.inference.saved_state import fingerprint
from mamba3_jax.models import LM
from test_generate import CONFIGS, DRAWN, PROMPTS, N, build, drawn
from test_layers import assert_names


@functools.cache
def short(name: str):
    return generate(build(name), [[1, 2, 3]], max_new_tokens=2).state


@pytest.mark.parametrize("name", ["siso", "hybrid"])
def test_a_saved_state_resumes_token_for_token(name, tmp_path):
    """In a model that was built anew: what one call draws in one go, with the seed of the file."""
    path = tmp_path / "state.npz"
    save_state(path, build(name), drawn(name).state)
    model = nnx.clone(build(name))
    expected = generate(model, PROMPTS, max_new_tokens=2 * N, sampling=DRAWN, seed=5)
    got = generate(model, state=load_state(path, model), max_new_tokens=N, sampling=DRAWN)
    assert [a + b for a, b in zip(drawn(name).tokens, got.tokens)] == expected.tokens
    assert [file.name for file in tmp_path.iterdir()] == ["state.npz"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["siso", "mimo", "hybrid", "gdn"])
def test_a_file_holds_the_state_bit_by_bit(name, dtype, tmp_path):
    path = tmp_path / "state.npz"
    state = generate(build(name), [[1, 2, 3]], max_new_tokens=2, state_dtype=dtype).state
    save_state(path, build(name), state)
    loaded = load_state(path, build(name))
    assert loaded.seed == state.seed
    fields = ("cache", "pending", "seen", "position")
    for a, b in zip(*(jax.tree.leaves([getattr(s, f) for f in fields]) for s in (loaded, state)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_the_fingerprint_is_of_every_bit():
    model = nnx.clone(build("siso"))
    before = fingerprint(model)
    assert before == fingerprint(build("siso"))
    weight = np.array(model.blocks[1].mixer.in_proj.kernel[...])
    bits = weight.view(np.uint32)
    seen = {before["parameters"]}
    for at, flip in (((0, 0), 1), ((31, 7), 2**31), ((5, 5), 2**22)):
        bits[at] ^= flip
        model.blocks[1].mixer.in_proj.kernel[...] = jnp.asarray(weight)
        seen.add(fingerprint(model)["parameters"])
    weight[[0, 1]] = weight[[1, 0]]
    model.blocks[1].mixer.in_proj.kernel[...] = jnp.asarray(weight)
    seen.add(fingerprint(model)["parameters"])
    assert len(seen) == 5


def refused(path, model, reason: str) -> None:
    with pytest.raises(ValueError) as error:
        load_state(path, model)
    assert_names(str(error.value), "state", f"got {path} (", "a saved state of this model, whole")
    assert reason in str(error.value)


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "state.npz"
    save_state(path, build("siso"), short("siso"))
    refused(path, LM(CONFIGS["siso"], rngs=nnx.Rngs(1)), "of a model with another parameters")
    refused(path, build("mimo"), "of a model with another config")


def test_a_truncated_or_changed_file_is_refused(tmp_path):
    """Cut anywhere, or with one bit flipped in an array's bytes."""
    path = tmp_path / "state.npz"
    save_state(path, build("siso"), short("siso"))
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, build("siso"), "")
    at = whole.index(np.asarray(short("siso").cache[1].ssm.ssm).tobytes())
    for offset in (0, 1000):
        changed = bytearray(whole)
        changed[at + offset] ^= 1
        path.write_bytes(changed)
        refused(path, build("siso"), "Bad CRC-32")


def test_foreign_files_are_refused_and_no_pickle_is_read(tmp_path):
    path = tmp_path / "state.npz"
    refused(path, build("siso"), "No such file")
    refused(tmp_path, build("siso"), "Is a directory")
    for content in (b"text", pickle.dumps({"header": 1})):
        path.write_bytes(content)
        refused(path, build("siso"), "")
    np.save(tmp_path / "array.npy", np.zeros(3))
    refused(tmp_path / "array.npy", build("siso"), "")
    np.savez(path, other=np.zeros(3))
    refused(path, build("siso"), "header")
    np.savez(path, header=np.array([{"format": 1}], dtype=object))
    refused(path, build("siso"), "Object arrays cannot be loaded")
    np.savez(path, header=np.array('{"format": "mamba3 generation state, version 9"}'))
    refused(path, build("siso"), "version 9")


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "state.npz"
    save_state(path, build("siso"), short("siso"))
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"some bytes")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ValueError) as error:
        save_state(path, build("siso"), short("siso"))
    assert_names(str(error.value), "state", f"got {path} (No space left on device)", "a file that can be written")
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["state.npz"]


def test_sampling_may_change_between_the_halves(tmp_path):
    """The file holds the text so far, not how it was drawn: greedy goes on greedily from a drawn text."""
    path = tmp_path / "state.npz"
    save_state(path, build("siso"), drawn("siso").state)
    talks = [prompt + tokens for prompt, tokens in zip(PROMPTS, drawn("siso").tokens)]
    greedy = Sampling(temperature=0, repetition_penalty=1.2)
    got = generate(build("siso"), state=load_state(path, build("siso")), max_new_tokens=4, sampling=greedy)
    assert got.tokens == generate(build("siso"), talks, max_new_tokens=4, sampling=greedy).tokens


def tampered(path, fields=None, savez=np.savez, **arrays):
    """The file with other arrays, or fields of its header, under sums that fit them."""
    with np.load(path) as members:
        old = dict(members)
    header = json.loads(str(old["header"])) | (fields or {})
    savez(path, **old | dict(header=np.array(json.dumps(header))) | arrays)


@pytest.mark.parametrize("header, arrays, reason", [
    ({}, dict(pending=np.array([10**6], np.int32)), "pending from 1000000 to 1000000"),
    ({}, dict(pending=np.array([-1], np.int32)), "pending from -1"),
    ({}, dict(pending=np.array([3.0], np.float32)), "pending of float32 (1,)"),
    ({}, dict(pending=np.array([3, 3], np.int32)), "the model has"),
    ({}, dict(pending=np.zeros(0, np.int32)), "of 0 rows"),
    ({}, dict(position=np.array([-1], np.int32)), "position from -1"),
    ({}, dict(position=np.array([[5]], np.int32)), "position of int32 (1, 1)"),
    ({}, dict(seen=np.zeros((1, 1), np.uint8)), "seen of uint8 (1, 1)"),
    (dict(seed=None), {}, "seed None"),
    (dict(seed=2**31), {}, "seed 2147483648"),
    (dict(seed=-1), {}, "seed -1"),
    (dict(dtypes=[]), {}, "of 1 rows and 0 arrays"),
    (dict(model=3), {}, ""),
    ({}, dict(header=np.array("[" * 100_000)), "recursion"),
    ({}, dict(header=np.array("[]")), ""),
])  # fmt: skip
def test_a_tampered_file_is_refused_in_one_line(header, arrays, reason, tmp_path):
    path = tmp_path / "state.npz"
    save_state(path, build("siso"), short("siso"))
    tampered(path, header, **arrays)
    refused(path, build("siso"), reason)


def test_a_cache_of_other_numbers_is_refused(tmp_path):
    path = tmp_path / "state.npz"
    for name, change, reason in (
        ("siso", lambda a: np.full_like(a, np.nan), "cache_1 with numbers that are not finite"),
        ("siso", lambda a: np.concatenate([a, a]), "cache_1 of float32"),
        ("siso", lambda a: a.astype(np.float64), ""),
        ("siso", lambda a: a[:, :-1], "cache_1 of float32"),
    ):
        save_state(path, build(name), short(name))
        with np.load(path) as members:
            other = change(members["cache_1"])
        tampered(path, cache_1=other)
        refused(path, build(name), reason)


def test_attention_positions_beyond_the_slots_are_refused(tmp_path):
    path = tmp_path / "state.npz"
    save_state(path, build("hybrid"), short("hybrid"))
    leaves = jax.tree.leaves(short("hybrid").cache)
    at = next(i for i, leaf in enumerate(leaves) if leaf.dtype == jnp.int32)
    tampered(path, **{f"cache_{at}": np.full_like(leaves[at], 10**6)})
    refused(path, build("hybrid"), f"cache_{at} from 1000000")


def test_a_compressed_or_endless_array_is_refused_unread(tmp_path):
    path = tmp_path / "state.npz"
    save_state(path, build("siso"), short("siso"))
    whole = path.read_bytes()
    tampered(path, savez=np.savez_compressed)
    refused(path, build("siso"), "compressed arrays")
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="<f4", fortran_order=False, shape=(10**15,)))
    with zipfile.ZipFile(path, "w") as new:
        for name, data in (records | {"cache_0.npy": header.getvalue()}).items():
            new.writestr(name, data)
    refused(path, build("siso"), "")
