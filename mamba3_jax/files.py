"""Files and directories that come into being whole or not at all: written under another name, renamed when done."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


def unfinished(path: Path) -> Path:
    """The name of a file or directory while it is written. One that a killed process left is replaced."""
    return path.with_name(f".{path.name}.unfinished")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` if all goes well and vanishes if not."""
    temporary = unfinished(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `path` if all goes well and vanishes if not."""
    temporary = unfinished(path)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(name: str, path: Path) -> None:
    """Raises ValueError, under the argument's name, unless a directory can come into being as `path`."""
    if path.is_symlink() or path.name in ("", ".."):
        raise ValueError(f"{name}: got {path}, which is a link or has no name; allowed: a new or an empty directory")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{name}: got {path}, which is not empty; allowed: a new or an empty directory")
