"""The CRC-32 of every file below a folder, kept in one file: whether what is there is, bit for bit, what was saved.

To be checked before the files are read: the storage library finds some changes only, and not in one line.
"""

import json
import zlib
from pathlib import Path

CHECKSUMS = "checksums.json"


def write_checksums(file: Path, folder: Path, parts: tuple[str, ...] = (".",)) -> None:
    """Writes those of all files below the folder, or below these parts of it."""
    file.write_text(json.dumps(_checksums(folder, parts), indent=1) + "\n")


def check_files(file: Path, folder: Path, parts: tuple[str, ...] = (".",)) -> None:
    """Raises ValueError, naming the first file, unless all are as they were when `write_checksums` was called."""
    try:
        saved = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{file}: got no checksums ({told}); allowed: as they were saved") from error
    found = _checksums(folder, parts)
    for name in sorted(saved.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{folder / name}: got no such file; allowed: every file that was saved")
        if saved.get(name) != found[name]:
            raise ValueError(f"{folder / name}: got a file that was changed since it was saved; allowed: as it was")


def _checksums(folder: Path, parts: tuple[str, ...]) -> dict[str, str]:
    """By the path below the folder."""
    sums = {}
    for path in sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file()):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(2**20):
                crc = zlib.crc32(block, crc)
        sums[path.relative_to(folder).as_posix()] = f"{crc:08x}"
    return sums
