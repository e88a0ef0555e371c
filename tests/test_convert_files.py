"""Checkpoint files without torch: what torch wrote is read, what we write has its form, and nothing else gets in."""

import io
import json
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import golden_data as golden
from mamba3_jax.convert.files import SAFETENSORS, TORCH, WRITERS, read_tensors
from mamba3_jax.convert.safetensors import read_safetensors, write_safetensors
from mamba3_jax.convert.torch_file import read_torch, write_torch

OFFICIAL = golden.DIRECTORY / "lm_mimo_bf16" / TORCH
TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5).astype(ml_dtypes.bfloat16),
    "c": np.full((), 3.0),
    "d": np.arange(6, dtype=np.int64).reshape(1, 2, 3),
    "e": np.zeros((0, 3), np.float32),
    "f": np.array([True, False]),
}
READERS = {TORCH: read_torch, SAFETENSORS: read_safetensors}


def assert_equal_tensors(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, a in expected.items():
        assert (got[name].dtype, got[name].shape, got[name].tobytes()) == (a.dtype, a.shape, a.tobytes()), name


# Pickles by hand: what torch writes, and what an attacker might


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", kind: str = "FloatStorage", size: int = 12) -> bytes:
    return b"((" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cuda:0") + number(size) + b"tQ"


def tensor(name: str, shape: tuple, strides: tuple, offset: int = 0, **where) -> bytes:
    head = text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + storage(**where)
    return head + number(offset) + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"


def state_dict(*items: bytes) -> bytes:
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + b"".join(items) + b"u."


def write_archive(path: Path, pickled: bytes, records: dict[str, bytes] | None = None, **other: bytes) -> Path:
    records = {"0": np.arange(12, dtype=np.float32).tobytes()} if records is None else records
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in records.items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in other.items():
            archive.writestr(f"archive/{name}", data)
    return path


def test_views_of_shared_storages_have_their_offsets_and_strides(tmp_path):
    pickled = state_dict(
        tensor("whole", (3, 4), (4, 1)),
        tensor("transposed", (4, 3), (1, 4)),
        tensor("column", (3,), (4,), offset=2),
        tensor("scalar", (), (), offset=11),
        tensor("empty", (0, 4), (4, 1), offset=12),
    )
    got = read_torch(write_archive(tmp_path / TORCH, pickled))
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = dict(whole=whole, transposed=whole.T, column=whole[:, 2], scalar=whole[2, 3], empty=whole[:0])
    assert_equal_tensors(got, expected)
    assert np.shares_memory(got["whole"], got["transposed"])
    assert not got["whole"].flags.writeable


def test_a_big_endian_file_has_the_same_values(tmp_path):
    pickled = state_dict(tensor("a", (12,), (1,)), tensor("b", (3,), (1,), key="1", kind="BFloat16Storage", size=3))
    bfloat = np.array([1.0, -2.5, 3.0], ml_dtypes.bfloat16)
    records = {"0": np.arange(12, dtype=">f4").tobytes(), "1": bfloat.view(np.uint16).astype(">u2").tobytes()}
    got = read_torch(write_archive(tmp_path / TORCH, pickled, records, byteorder=b"big"))
    assert_equal_tensors(got, dict(a=np.arange(12, dtype=np.float32), b=bfloat))


@pytest.mark.parametrize(
    "module, name, argument",
    [
        ("os", "system", "touch"),
        ("posix", "system", "touch"),
        ("builtins", "eval", "__import__('pathlib').Path('{}').touch()"),
        ("builtins", "exec", "import pathlib; pathlib.Path('{}').touch()"),
        ("subprocess", "check_output", "touch"),
        ("torch", "load", "{}"),
        ("torch.hub", "load", "{}"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__", "{}"),
        ("collections", "OrderedDict.fromkeys", "{}"),
        ("mamba3_jax.convert.torch_file", "write_torch", "{}"),
    ],
)
@pytest.mark.parametrize("how", ["global", "stack_global", "inst", "newobj"])
def test_a_pickle_that_imports_anything_else_is_refused_and_not_run(how, module, name, argument, tmp_path):
    victim = tmp_path / "victim"
    argument = text(argument.replace("{}", str(victim)) + (f" {victim}" if argument == "touch" else ""))
    call = {
        "global": f"c{module}\n{name}\n".encode() + argument + b"\x85R",
        "stack_global": text(module) + text(name) + pickle.STACK_GLOBAL + argument + b"\x85R",
        "inst": b"(" + argument + f"i{module}\n{name}\n".encode(),
        "newobj": f"c{module}\n{name}\n".encode() + argument + b"\x85\x81",
    }[how]
    path = write_archive(tmp_path / TORCH, b"\x80\x04}(" + text("weight") + call + b"u.")
    with pytest.raises(ValueError) as error:
        read_torch(path)
    message = str(error.value)
    assert message.startswith(f"{path}: got a pickle that asks for {module}.{name}") and "\n" not in message
    assert not victim.exists()


def test_a_pickle_cannot_change_what_it_is_given(tmp_path):
    """BUILD sets attributes of any object: on the functions and classes that we hand out it must fail."""
    for handed_out in (
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch\nFloatStorage\n",
        b"ccollections\nOrderedDict\n",
    ):
        poison = handed_out + b"}(" + text("__call__") + text("x") + b"ub0"
        slots = handed_out + b"}}(" + text("__call__") + text("x") + b"u\x86b0"
        for attack in (poison, slots):
            path = write_archive(tmp_path / TORCH, b"\x80\x02" + attack + state_dict()[2:])
            with pytest.raises(ValueError, match="got a damaged file"):
                read_torch(path)


@pytest.mark.parametrize(
    "pickled, message",
    [
        (state_dict(tensor("w", (3, 5), (4, 1))), r"w: got shape \(3, 5\)"),
        (state_dict(tensor("w", (12,), (1,), offset=1)), r"w: got shape \(12,\)"),
        (state_dict(tensor("w", (2,), (-1,), offset=5)), "w: got offset 5"),
        (state_dict(tensor("w", (2,), (1,), offset=-1)), "w: got offset -1"),
        (state_dict(tensor("w", (2, 2), (1,))), "w: got offset 0"),
        (state_dict(tensor("w", (12,), (1,), key="7")), "w: got no record archive/data/7"),
        (state_dict(tensor("w", (12,), (1,), kind="DoubleStorage")), "w: got 48 bytes in record"),
        (state_dict(tensor("w", (13,), (1,), size=13)), "w: got 48 bytes in record"),
        (state_dict(tensor("w", (12,), (1,), kind="QInt8Storage")), "asks for torch.QInt8Storage"),
        (state_dict(text("w") + number(3)), "'w': got int; allowed: a tensor"),
        (state_dict(number(3) + number(3)), "3: got int; allowed: a tensor"),
        (b"\x80\x02" + number(3) + b".", "got a pickled int"),
        (b"\x80\x02" + text("x") + b"Q.", "asks for storage 'x'"),
        (state_dict()[:-1], "got a damaged file"),
        (b"", "got a damaged file"),
        (b"garbage", "got a damaged file"),
        (b"\x80\x02" + b"(" * 100 + b"R.", "got a damaged file"),
    ],
)
def test_a_pickle_that_is_no_dict_of_tensors_within_their_storages_is_refused(pickled, message, tmp_path):
    path = write_archive(tmp_path / TORCH, pickled)
    with pytest.raises(ValueError, match=message) as error:
        read_torch(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


# Damage


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("form", READERS)
def test_a_truncated_file_is_refused(form, part, tmp_path):
    path = tmp_path / form
    WRITERS[form](path, TENSORS)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError) as error:
        READERS[form](path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_changed_bit_in_a_record_is_found_and_its_tensor_named(tmp_path):
    path = tmp_path / TORCH
    write_torch(path, TENSORS)
    data = bytearray(path.read_bytes())
    data[data.index(TENSORS["a"].tobytes()) + 17] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r": a: got CRC .* in record pytorch_model/data/0;"):
        read_torch(path)


def test_a_compressed_record_and_a_repeated_name_are_refused(tmp_path):
    path = write_archive(tmp_path / TORCH, state_dict(tensor("w", (12,), (1,))))
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="w: got 48 bytes in record archive/data/0; needs 48, uncompressed"):
        read_torch(tmp_path / "new")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", bytes(48))
    with pytest.raises(ValueError, match="each name once"):
        read_torch(path)


def safetensors_file(path: Path, header: object, data: bytes = bytes(16)) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return dict(dtype=dtype, shape=list(shape), data_offsets=list(offsets))


@pytest.mark.parametrize(
    "header, message",
    [
        (dict(a=entry(), b=entry(offsets=(4, 12))), "b: got a place that overlaps"),
        (dict(a=entry(), b=entry(shape=(1,), offsets=(12, 16))), "b: got a place that leaves 4 bytes before it unused"),
        (dict(a=entry()), "got 16 bytes of data; the header names 8"),
        (dict(a=entry(), b=entry(shape=(3,), offsets=(8, 20))), "b: got 16 bytes of data; needs 20"),
        (dict(a=entry(shape=(3,))), r"a: got 8 bytes; shape \(3,\) of F32 needs 12"),
        (dict(a=entry(dtype="F8_E4M3")), "a: got dtype 'F8_E4M3'; allowed: F64, F32"),
        (dict(a=entry(shape=(-2,))), r"a: got shape \[-2\]"),
        (dict(a=entry(offsets=(8, 0))), "a: got -8 bytes"),
        (dict(a=entry(offsets=(0, 8, 16))), r"a: got shape \[2\] at"),
        (dict(a=entry(shape=(2.0,))), r"a: got shape \[2.0\]"),
        (dict(a=dict(dtype="F32", shape=[2])), "a: got header"),
        ([1], "got a header that is no JSON object"),
        (b"{", "got a header that is not JSON"),
        (b"\xff\xfe", "got a header that is not JSON"),
        (b'{"a": {}, "a": {}}', "a comes twice"),
    ],
)
def test_a_safetensors_file_that_breaks_the_format_is_refused(header, message, tmp_path):
    path = safetensors_file(tmp_path / SAFETENSORS, header)
    with pytest.raises(ValueError, match=message) as error:
        read_safetensors(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_header_longer_than_the_file_is_refused_unread(tmp_path):
    path = tmp_path / SAFETENSORS
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="got a header of 1152921504606846976 bytes in a file of 10"):
        read_safetensors(path)


# What we write


@pytest.mark.parametrize("form", READERS)
def test_what_is_written_is_read_again(form, tmp_path):
    WRITERS[form](tmp_path / form, TENSORS)
    assert_equal_tensors(READERS[form](tmp_path / form), TENSORS)


@pytest.mark.parametrize("form", READERS)
def test_reading_copies_nothing(form, tmp_path):
    large = dict(w=np.ones((1 << 10, 1 << 13), np.float32))
    WRITERS[form](tmp_path / form, large)
    tracemalloc.start()
    got = READERS[form](tmp_path / form)["w"].T
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < large["w"].nbytes / 3 and got[5, 7] == 1


def test_a_safetensors_file_is_laid_out_by_the_format(tmp_path):
    write_safetensors(tmp_path / SAFETENSORS, TENSORS)
    data = (tmp_path / SAFETENSORS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    assert header.pop("__metadata__") == {"format": "pt"} and start % 8 == 0
    assert {name: fields["dtype"] for name, fields in header.items()} == dict(
        a="F32", b="BF16", c="F64", d="I64", e="F32", f="BOOL"
    )
    for name, fields in header.items():
        first, last = fields["data_offsets"]
        assert data[start + first : start + last] == TENSORS[name].tobytes()
        assert first % TENSORS[name].itemsize == 0 and fields["shape"] == list(TENSORS[name].shape)


class Recorder(pickle.Unpickler):
    """An unpickler of its own, to look into files: storages and calls become tuples."""

    def find_class(self, module, name):
        known = {"OrderedDict": OrderedDict, "_rebuild_tensor_v2": lambda *arguments: arguments[:5]}
        return known.get(name, f"{module}.{name}")

    def persistent_load(self, pid):
        return pid


def look_into(path: Path) -> tuple[dict, set, dict[str, int]]:
    """What a torch file says of every tensor, which names its pickle imports, and where its storages begin."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("pytorch_model/byteorder") == b"little" and archive.read("pytorch_model/version") == b"3\n"
        pickled = archive.read("pytorch_model/data.pkl")
        starts = {}
        for member in archive.infolist():
            name, extra = struct.unpack("<2H", path.read_bytes()[member.header_offset + 26 : member.header_offset + 30])
            starts[member.filename] = member.header_offset + 30 + name + extra
    imported = {argument for code, argument, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
    return dict(Recorder(io.BytesIO(pickled)).load()), imported, starts


def test_a_rewritten_torch_file_says_what_torch_said(tmp_path):
    """The same tensors over the same storages, by the same imports, the tied head included, aligned as torch aligns."""
    write_torch(tmp_path / TORCH, with_tied_head(read_torch(OFFICIAL)))
    ours, theirs = look_into(tmp_path / TORCH), look_into(OFFICIAL)
    assert ours[0] == theirs[0] and list(ours[0]) == list(theirs[0])
    assert ours[1] == theirs[1]
    for _, starts in ((ours[0], ours[2]), (theirs[0], theirs[2])):
        assert all(start % 64 == 0 for name, start in starts.items() if "/data/" in name)


def with_tied_head(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The head as the same object as the embedding, which is how the writer learns that they share a storage."""
    assert np.shares_memory(tensors["lm_head.weight"], tensors["backbone.embedding.weight"])
    return tensors | {"lm_head.weight": tensors["backbone.embedding.weight"]}


# Shards


def write_shards(directory: Path, form: str) -> Path:
    stem, suffix = form.split(".")
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    WRITERS[form](directory / names[0], {name: TENSORS[name] for name in "abc"})
    WRITERS[form](directory / names[1], {name: TENSORS[name] for name in "def"})
    places = {name: names[name in "def"] for name in TENSORS}
    index = directory / f"{form}.index.json"
    index.write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=places)))
    return index


@pytest.mark.parametrize("form", READERS)
def test_shards_are_one_checkpoint(form, tmp_path):
    write_shards(tmp_path, form)
    assert_equal_tensors({name: stored.tensor for name, stored in read_tensors(tmp_path).items()}, TENSORS)


@pytest.mark.parametrize("form", READERS)
def test_shards_that_do_not_fit_the_index_are_refused(form, tmp_path):
    index = write_shards(tmp_path, form)
    places = json.loads(index.read_text())["weight_map"]
    cases = [
        (places | dict(g=places["a"]), f"{tmp_path / places['a']}: g: got no such tensor"),
        ({name: place for name, place in places.items() if name != "b"}, f"{tmp_path / places['b']}: b: got an extra"),
        (places | dict(a=places["d"]), ": a: got an extra tensor"),
        (places | dict(a="elsewhere." + form.split(".")[1]), f"{index}: got shard 'elsewhere."),
        (places | dict(a=f"../{tmp_path.name}/{places['a']}"), f"{index}: got shard '../"),
        ([], f"{index}: got no weight_map"),
    ]
    for changed, message in cases:
        index.write_text(json.dumps(dict(weight_map=changed)))
        with pytest.raises(ValueError) as error:
            read_tensors(tmp_path)
        assert message in str(error.value)
