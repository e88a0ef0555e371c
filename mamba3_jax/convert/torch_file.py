"""The file of torch.save, read and written without torch: a zip of a pickle and of one uncompressed record per storage.

    NAME/data.pkl     a dict: name -> _rebuild_tensor_v2(storage, offset, shape, strides, ...)
    NAME/data/KEY     a storage's bytes
    NAME/byteorder    "little" or "big"; little where it is absent
    NAME/version      "3"

A pickle is a program. The reader looks through it before it runs: it may use only the instructions that torch writes,
nest little, and have no tuples as keys, whose hash recurses without a limit. It may name the few functions below, which
rebuild tensors and are written here; any other import is refused before it happens. Every record's CRC is checked.
"""

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
ALIGNMENT = 64
# What the zip module adds to the header of a record of 2 GiB and more.
ZIP64_EXTRA = 20
PIECE = 1 << 22
# Of a record that is read whole; a pickle has some 200 bytes for each tensor.
MAX_SMALL_RECORD = 1 << 22
OPCODES = set(
    "PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID SETITEM SETITEMS EMPTY_DICT EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE BINPUT LONG_BINPUT BINGET LONG_BINGET".split()
)
# Of a shape, a stride or an offset; its bytes are still an index.
MAX_NUMBER = 1 << 48
# A tensor is four deep: a tuple that names a storage, the storage, the arguments, the call.
MAX_DEPTH = 16
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
NO_ZIP = "not a torch file of version 1.6 or later"


class _Storage(NamedTuple):
    """What a pickle gets where it asks for a storage class. A tuple: the pickle cannot change it."""

    dtype: np.dtype


class _Record(NamedTuple):
    """A storage: its record's key and what is in it."""

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """A view of a storage, in elements."""

    record: object
    offset: object
    shape: object
    strides: object


class _RebuildTensor:
    """Stands for torch._utils._rebuild_tensor_v2. No attributes, so that a pickle cannot set one."""

    __slots__ = ()

    def __call__(self, record, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> _Tensor:
        return _Tensor(record, offset, shape, strides)


class _RebuildParameter:
    """Stands for torch._utils._rebuild_parameter: the tensor itself."""

    __slots__ = ()

    def __call__(self, tensor, requires_grad=False, hooks=None) -> _Tensor:
        return tensor


class _Names(dict):
    """Stands for collections.OrderedDict, without its arguments and the attributes that torch hangs on it."""

    __slots__ = ()

    def __init__(self):
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


ALLOWED = {
    ("collections", "OrderedDict"): _Names,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
} | {("torch", name): _Storage(dtype) for name, dtype in STORAGES.items()}


class _Unpickler(pickle.Unpickler):
    """Imports nothing: a name is looked up in ALLOWED or refused. Makes descriptions of tensors, not arrays."""

    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise ValueError(f"got a pickle that asks for {module}.{name}; allowed: what rebuilds tensors")
        return ALLOWED[module, name]

    def persistent_load(self, pid):
        match pid:
            case ("storage", _Storage() as storage, str(key), str(), int(size)) if size >= 0:
                return _Record(key, storage.dtype, size)
        raise ValueError(f"got a pickle that asks for a storage by a {type(pid).__name__}; allowed: as torch does")


def _check_program(pickled: bytes) -> None:
    """Walks through the pickle without running it, keeping of every value only how deep it is nested; 0 has no parts.

    Raises:
        ValueError: an instruction or a nesting that torch does not write.
    """
    stack: list[int | None] = []  # None is a mark
    memo: dict[int, int] = {}
    for code, argument, _ in _instructions(pickled):
        if code.name not in OPCODES:
            raise ValueError(f"got a pickle with the instruction {code.name}; allowed: those that torch.save writes")
        if code.name in ("BINPUT", "LONG_BINPUT"):
            if argument > len(pickled):  # the unpickler makes a list as long as the largest
                raise ValueError(f"got a pickle with a value number {argument}; it has {len(pickled)} bytes")
            memo[argument] = stack[-1]
        elif code.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code.name == "MARK":
            stack.append(None)
        else:
            parts = _take(stack, code)
            changes = code.name in ("SETITEM", "SETITEMS", "BUILD")
            if changes:
                changed, *parts = parts
            if code.name in ("SETITEM", "SETITEMS") and any(parts[::2]):
                raise ValueError("got a pickle with a dict whose key is no text; allowed: tensors by name")
            depth = max(parts, default=0) + 1 if parts or code.name in ("EMPTY_TUPLE", "EMPTY_DICT") else 0
            if depth > MAX_DEPTH:
                raise ValueError(f"got a pickle nested more than {MAX_DEPTH} deep; allowed: tensors by name")
            if code.stack_after:
                stack.append(changed if changes else depth)


def _instructions(pickled: bytes) -> Iterator[tuple]:
    try:
        yield from pickletools.genops(pickled)
    except ValueError as error:
        raise ValueError(f"got a damaged file ({error})") from None


def _take(stack: list[int | None], code: pickletools.OpcodeInfo) -> list[int]:
    """Takes an instruction's operands from the stack, lowest first."""
    before = code.stack_before
    parts = []
    if pickletools.markobject in before:
        while (value := stack.pop()) is not None:
            parts.append(value)
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        value = stack.pop()
        if value is None:
            raise ValueError("got a damaged file, whose pickle takes a mark for a value")
        parts.append(value)
    return parts[::-1]


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors by name, read-only and memory-mapped: nothing is copied until it is used.

    Tensors that share a storage share its memory here too.

    Raises:
        ValueError: a damaged file, one that is not a dict of tensors, or one whose pickle asks for more than tensors,
            in one line that names the file, and the tensor where there is one.
    """
    with path.open("rb") as file:
        try:
            archive = _Archive(file)
            pickled = archive.read("data.pkl")
            _check_program(pickled)
            described = _Unpickler(io.BytesIO(pickled)).load()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except Exception as error:  # whatever a damaged archive or a forged pickle does to the one who reads it
            raise ValueError(f"{path}: got a damaged file, or {NO_ZIP} ({type(error).__name__}: {error})") from None
        if not isinstance(described, dict):
            raise ValueError(f"{path}: got a pickled {type(described).__name__}; allowed: a dict of tensors by name")
        arrays = {}
        for name, tensor in described.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise ValueError(f"{path}: {name!r:.80}: got {type(tensor).__name__}; allowed: a tensor")
            try:
                arrays[name] = _view(archive, tensor)
            except (ValueError, OverflowError, RecursionError, MemoryError) as error:
                raise ValueError(f"{path}: {name}: {error}") from None
    return arrays


def _view(archive: "_Archive", tensor: _Tensor) -> np.ndarray:
    """The tensor, which lies within its storage."""
    record, offset, shape, strides = tensor
    if not (isinstance(record, _Record) and isinstance(shape, tuple) and isinstance(strides, tuple)):
        kinds = ", ".join(type(part).__name__ for part in tensor)
        raise ValueError(f"got {kinds}; allowed: a storage, an offset, a shape and strides")
    numbers = (offset, *shape, *strides)
    if not all(type(number) is int for number in numbers):
        kinds = ", ".join(sorted({type(number).__name__ for number in numbers}))
        raise ValueError(f"got an offset, a shape or strides of {kinds}; allowed: integers >= 0")
    if len(shape) != len(strides) or not all(0 <= number <= MAX_NUMBER for number in numbers):
        raise ValueError(
            f"got offset {offset}, shape {shape!r:.80}, strides {strides!r:.80}; "
            f"allowed: as many strides as sizes, integers from 0 to {MAX_NUMBER}"
        )
    storage = archive.storage(record)
    if 0 in shape:
        return np.empty(shape, storage.dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if last >= storage.size or math.prod(shape) > storage.size:
        raise ValueError(f"got shape {shape}, strides {strides}, offset {offset} in a storage of {storage.size}")
    steps = tuple(stride * storage.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


class _Archive:
    """The zip: small records by name, storages as memory-mapped vectors."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.zip = zipfile.ZipFile(file)
        members = self.zip.infolist()
        self.members = {member.filename: member for member in members}
        roots = [name.removesuffix("/data.pkl") for name in self.members if name.endswith("/data.pkl")]
        if len(roots) != 1 or len(self.members) != len(members):
            raise ValueError(f"got {len(roots)} data.pkl and {len(members)} records; allowed: one, and each name once")
        self.root = roots[0]
        self.swapped = f"{self.root}/byteorder" in self.members and self.read("byteorder").strip() == b"big"
        self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.storages: dict[_Record, np.ndarray] = {}

    def read(self, name: str) -> bytes:
        """A small record, whose CRC the zip module checks."""
        member = self.members[f"{self.root}/{name}"]
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > MAX_SMALL_RECORD:
            found = f"{member.file_size} bytes in record {member.filename}"
            raise ValueError(f"got {found}; allowed: at most {MAX_SMALL_RECORD}, uncompressed")
        return self.zip.read(member)

    def storage(self, record: _Record) -> np.ndarray:
        """A whole storage as a vector, its CRC checked."""
        if record not in self.storages:
            name = f"{self.root}/data/{record.key}"
            if name not in self.members:
                raise ValueError(f"got no record {name}; the file is damaged")
            member, needed = self.members[name], record.size * record.dtype.itemsize
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != needed:
                raise ValueError(f"got {member.file_size} bytes in record {name}; needs {needed}, uncompressed")
            start = self._start(member)
            self._check_sum(member, start)
            vector = np.frombuffer(self.mapped, record.dtype, count=record.size, offset=start if needed else 0)
            if self.swapped and needed:
                unsigned = np.dtype(f"u{record.dtype.itemsize}")
                vector = vector.view(unsigned).byteswap().view(record.dtype)
            self.storages[record] = vector
        return self.storages[record]

    def _start(self, member: zipfile.ZipInfo) -> int:
        """Where a record's bytes begin: behind a header of its own, whose length only that header says."""
        header = self.mapped[member.header_offset : member.header_offset + LOCAL_HEADER.size]
        if len(header) != LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
            raise ValueError(f"got no record where the archive's table has {member.filename}; the file is damaged")
        name, extra = LOCAL_HEADER.unpack(header)[-2:]
        return member.header_offset + LOCAL_HEADER.size + name + extra

    def _check_sum(self, member: zipfile.ZipInfo, start: int) -> None:
        """Reads the record piece by piece, outside the mapping, so that it does not fill the process's memory."""
        self.file.seek(start)
        left, crc = member.file_size, 0
        while left and (piece := self.file.read(min(left, PIECE))):
            left, crc = left - len(piece), zlib.crc32(piece, crc)
        if left:
            raise ValueError(f"got {left} bytes too few in record {member.filename}; the file is truncated")
        if crc != member.CRC:
            raise ValueError(
                f"got CRC {crc:08x} in record {member.filename}; written as {member.CRC:08x}: it was changed"
            )


def write_torch(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes what torch.load(path, weights_only=True) reads. One array under two names is one storage."""
    kinds = {dtype: kind for kind, dtype in STORAGES.items()}
    keys = {id(tensor): str(key) for key, tensor in enumerate({id(t): t for t in tensors.values()}.values())}
    arrays = {keys[id(tensor)]: tensor for tensor in tensors.values()}
    entries = [(name, keys[id(tensor)], kinds[tensor.dtype], tensor.shape) for name, tensor in tensors.items()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, f"{path.stem}/data.pkl", _pickled(entries))
        _write_record(archive, f"{path.stem}/byteorder", b"little")
        for key, array in arrays.items():
            _write_record(
                archive, f"{path.stem}/data/{key}", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            )
        _write_record(archive, f"{path.stem}/version", b"3\n")


def _write_record(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """A record whose bytes begin at a multiple of 64, as torch aligns them, behind padding in the header."""
    member = zipfile.ZipInfo(name)
    member.file_size = len(data)
    large = len(data) >= zipfile.ZIP64_LIMIT
    padding_header = 4
    at = archive.fp.tell() + LOCAL_HEADER.size + len(name) + padding_header + (ZIP64_EXTRA if large else 0)
    padding = -at % ALIGNMENT
    member.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(member, "w", force_zip64=large) as record:
        for first in range(0, len(data), PIECE):
            record.write(data[first : first + PIECE])


def _pickled(entries: list[tuple[str, str, str, tuple[int, ...]]]) -> bytes:
    """The pickle of OrderedDict(name -> tensor), whose functions need not exist here: opcodes of protocol 2."""
    ordered = pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    parts = [pickle.PROTO, b"\2", ordered, pickle.MARK]
    for name, key, kind, shape in entries:
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        storage = [_text("storage"), pickle.GLOBAL, f"torch\n{kind}\n".encode(), _text(key), _text("cpu")]
        parts += [
            _text(name),
            pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n",
            *(pickle.MARK, pickle.MARK, *storage, _integer(math.prod(shape)), pickle.TUPLE, pickle.BINPERSID),
            *(_integer(0), pickle.MARK, *map(_integer, shape), pickle.TUPLE),
            *(pickle.MARK, *map(_integer, strides), pickle.TUPLE),
            *(pickle.NEWFALSE, ordered, pickle.TUPLE, pickle.REDUCE),
        ]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def _integer(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded
