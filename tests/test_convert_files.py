"""Checkpoint files without torch: what torch wrote is read, what we write has its form, and nothing else gets in."""

import dataclasses
import io
import json
import math
import pickle
import pickletools
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import golden_data as golden
from mamba3_jax.convert import command, write_released
from mamba3_jax.convert.files import SAFETENSORS, TORCH, WRITERS, read_tensors
from mamba3_jax.convert.safetensors import read_safetensors, write_safetensors
from mamba3_jax.convert.torch_file import read_torch, write_torch
from mamba3_jax.layers import AttentionConfig, Mamba3Config
from mamba3_jax.models import LM, LMConfig

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
    found = {
        "global": f"that asks for {module}.{name}",
        "stack_global": "with the instruction STACK_GLOBAL",
        "inst": "with the instruction INST",
        "newobj": "with the instruction NEWOBJ",
    }[how]
    assert message.startswith(f"{path}: got a pickle {found}") and "\n" not in message
    assert not victim.exists()


def test_a_pickle_cannot_change_what_it_is_given(tmp_path):
    """BUILD sets attributes of any object: on the functions and classes that we hand out it must fail."""
    for handed_out in (
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch\nFloatStorage\n",
        b"ccollections\nOrderedDict\n",
    ):
        poison = handed_out + b"}(" + text("__call__") + text("x") + b"ub."
        slots = handed_out + b"}}(" + text("__call__") + text("x") + b"u\x86b."
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
        (b"\x80\x02" + text("x") + b"Q.", "asks for a storage by a str"),
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


DEEP = b")" + b"\x85" * 200_000


@pytest.mark.parametrize(
    "pickled, message",
    [
        (b"}" + DEEP + b"I1\ns.", "nested more than 16 deep"),
        (b"}" + DEEP + b"K\1s.", "nested more than 16 deep"),
        (b"}" + b")" + b"\x85" * 5 + b"K\1s.", "a dict whose key is no text"),
        (b"}(" + text("a") + number(1) + b")" + number(1) + b"u.", "a dict whose key is no text"),
        (b"}" + text("a") + b")q\0" + b"h\0\x86q\0" * 40 + b"s.", "nested more than|damaged"),
        (b"}I1\nI1\ns.", "the instruction INT"),
        (b"}r\xff\xff\xff\x7f.", "a value number 2147483647"),
        (b"ccollections\nOrderedDict\n}\x85R.", "damaged file"),
        (
            state_dict(text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(K\1\x85\x85K\1K\1K\1tR"),
            "w: got tuple, int, int",
        ),
        (b"(" * 100_000 + b".", "damaged file"),
        (b"}" * 5_000_000 + b".", "allowed: at most 4194304"),
    ],
    ids=range(11),
)
def test_a_pickle_made_to_exhaust_the_reader_is_refused_before_it_runs(pickled, message, tmp_path):
    path = write_archive(tmp_path / TORCH, pickled)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        read_torch(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert time.monotonic() - start < 20


def test_what_hangs_on_an_ordered_dict_is_left_out(tmp_path):
    """torch's _metadata, and an attack's `items`."""
    for attributes in (text("_metadata") + b"}", text("items") + number(3)):
        built = state_dict(tensor("w", (12,), (1,)))[:-1] + b"}(" + attributes + b"ub."
        got = read_torch(write_archive(tmp_path / TORCH, built))
        assert_equal_tensors(got, dict(w=np.arange(12, dtype=np.float32)))


def long(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


@pytest.mark.parametrize(
    "offset, shape, strides",
    [(0, (2,), (2**70,)), (0, (2**70,), (0,)), (2**70, (1,), (1,)), (0, (0, 2**70), (1, 1)), (0, (2**40,), (0,)),
     (0, (0, 2**47, 2**47), (1, 1, 1))],
)  # fmt: skip
def test_views_of_absurd_sizes_are_refused(offset, shape, strides, tmp_path):
    sizes, steps = (b"(" + b"".join(map(long, values)) + b"t" for values in (shape, strides))
    pickled = state_dict(text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n" + storage() + long(offset) + sizes + steps
                         + b"\x89ccollections\nOrderedDict\n)RtR")  # fmt: skip
    with pytest.raises(ValueError, match=": w: ") as error:
        read_torch(write_archive(tmp_path / TORCH, pickled))
    assert "\n" not in str(error.value)


def test_a_compressed_pickle_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / TORCH, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"}" * (1 << 26))
    tracemalloc.start()
    with pytest.raises(ValueError, match="67108864 bytes in record archive/data.pkl; allowed: at most 4194304"):
        read_torch(tmp_path / TORCH)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


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
            new.writestr(name, old.read(name), None if "/data/" in name else zipfile.ZIP_STORED)
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


# Whole conversions


CONFIG = LMConfig(Mamba3Config(32, d_state=16, head_dim=16, a_activation="heavy_tail"), n_layers=2, vocab_size=61)
HYBRID = dataclasses.replace(CONFIG, attention=AttentionConfig(32, n_heads=2), attention_layers=(1,))


def released(directory: Path, config: LMConfig = CONFIG) -> Path:
    directory.mkdir()
    model = LM(config, rngs=nnx.Rngs(0))
    write_released(directory, config, nnx.to_pure_dict(nnx.state(model, nnx.Param)), form=TORCH)
    return directory


def refused(capsys, source: Path, destination: Path, *options: str) -> str:
    before = sorted(destination.parent.iterdir())
    with pytest.raises(SystemExit) as left:
        command.main([str(source), str(destination), *options])
    assert left.value.code == 2 and sorted(destination.parent.iterdir()) == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_config_json_that_lies_is_refused_at_once(tmp_path, capsys):
    source = released(tmp_path / "source", HYBRID)
    file = source / "config.json"
    fields = json.loads(file.read_text())
    cases = [
        (dict(n_layer=1_000_000), "n_layer: got 1000000; the tensors are of 2 layers"),
        (dict(n_layer=2**70), "n_layer: got 1180591620717411303424; allowed: a int"),
        (dict(attn_layer_idx=[1, 1]), "attention_layers: got (1, 1)"),
        (dict(attn_layer_idx=[10**9]), "attention_layers: got (1000000000,)"),
        (dict(vocab_size=2**31 - 1, pad_vocab_size_multiple=2**31 - 1, d_model=2**30), ""),
    ]
    cases += [
        (dict(ssm_cfg=fields["ssm_cfg"] | dict(A_floor=a)), "ssm_cfg.A_floor: got ") for a in (math.nan, math.inf)
    ]
    for change in (dict(num_heads=2.0), dict(head_dim=16.5), dict(num_heads_kv=1.0), dict(num_heads=True)):
        (name,) = change
        cases.append(
            (dict(attn_cfg=fields["attn_cfg"] | change), f"attn_cfg.{name}: got {change[name]}; allowed: a int")
        )
    for change, message in cases:
        file.write_text(json.dumps(fields | change))
        start = time.monotonic()
        line = refused(capsys, source, tmp_path / "ours")
        assert str(source) in line and message in line and time.monotonic() - start < 10
    file.write_text('{"d_model": 16, ' + json.dumps(fields)[1:])
    assert "d_model comes twice" in refused(capsys, source, tmp_path / "ours")


def test_a_destination_that_cannot_become_a_directory_is_refused(tmp_path, capsys, monkeypatch):
    source = released(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert "which is a link or has no name" in refused(capsys, source, tmp_path / "link")
    monkeypatch.chdir(tmp_path / "empty")
    assert "which is a link or has no name" in refused(capsys, source, Path("."))


def tokenizer_file(file: Path, vocabulary: dict, **changes: object) -> Path:
    model = dict(type="WordLevel", vocab=vocabulary, unk_token="<none>")
    file.write_text(json.dumps(dict(version="1.0", added_tokens=[], model=model) | changes))
    return file


def test_a_tokenizer_that_does_not_load_or_has_no_ids_is_refused(tmp_path, capsys):
    pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    source = released(tmp_path / "source")
    for vocabulary, changes in (
        (dict(a=0), dict(model=dict(type="Nonsense", vocab=dict(a=0)))),
        (dict(a=-1), {}),
        (dict(a=0.5), {}),
        (dict(a=True), {}),
        ({}, {}),
    ):
        file = tokenizer_file(source / "tokenizer.json", vocabulary, **changes)
        assert f"tokenizer: got {file}" in refused(capsys, source, tmp_path / "ours")


def test_a_text_of_no_tokens_or_a_failing_check_does_not_undo_the_import(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    source = released(tmp_path / "source")
    tokenizer_file(source / "tokenizer.json", {"<none>": 0})
    assert command.main([str(source), str(tmp_path / "first")]) == 0
    assert "perplexity: not checked (the tokenizer makes 1 tokens" in capsys.readouterr().out

    def fail(*_):
        raise MemoryError

    tokenizer_file(source / "tokenizer.json", {"<none>": 0}, pre_tokenizer=dict(type="Whitespace"))
    monkeypatch.setattr(command.plausibility, "measure", fail)
    assert command.main([str(source), str(tmp_path / "second")]) == 0
    assert "perplexity: not checked (MemoryError)" in capsys.readouterr().out
    assert (tmp_path / "second" / "model.yaml").exists()
