"""Rows of metrics.jsonl: what an experiment measured cell by cell, and need not measure again.

A row stands as long as the device, jax, XLA_FLAGS, the settings and the code are the same: `identity`.
"""

import fnmatch
import hashlib
import json
import os
from pathlib import Path

import jax

from mamba3_jax.command import fail

ROOT = Path(__file__).resolve().parent.parent
METRICS = "metrics.jsonl"
IDENTITY = ("device", "jax", "flags", "settings", "code")


def identity(config, folders: tuple[str, ...]) -> dict:
    """What must be the same for a row to stand; `config.settings` are the settings, `folders` hold the code."""
    code = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            code.update(path.read_bytes())
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    flags = os.environ.get("XLA_FLAGS", "")
    return dict(zip(IDENTITY, (device, jax.__version__, flags, config.settings, code.hexdigest()[:12])))


def read(folder: Path, name: str = METRICS) -> list[dict]:
    """All rows of a results directory, oldest first."""
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def newest_identity(rows: list[dict], folder: Path) -> dict:
    """That of the last row, for a report without measuring; one line and status 2 if there is no row."""
    if not rows:
        fail(f"measure: got false with no rows in {folder / METRICS}; allowed: true, or a results_dir with rows")
    return {key: rows[-1][key] for key in IDENTITY}


def of_identity(rows: list[dict], same: dict) -> dict[str, dict]:
    """Those that stand, by name, the newest of each."""
    return {row["name"]: row for row in rows if {key: row[key] for key in same} == same}


def comparable(rows: list[dict], same: dict) -> dict[str, dict]:
    """Those that a report shows beside each other, by name, the newest of each: of any code, all else the same."""
    return of_identity(rows, {key: value for key, value in same.items() if key != "code"})


def stands(row: dict | None, same: dict) -> bool:
    """Whether a cell with this row need not be measured."""
    return row is not None and "reason" not in row and row["code"] == same["code"]


def add(folder: Path, row: dict, name: str = METRICS) -> None:
    """Writes a row behind the others."""
    with (folder / name).open("a") as file:
        file.write(json.dumps(row) + "\n")


def choose[Cell](cells: list[Cell], only: str) -> list[Cell]:
    """The cells whose name matches the pattern of --only; one line and status 2 if there are none."""
    if chosen := [cell for cell in cells if fnmatch.fnmatch(cell.name, only)]:
        return chosen
    fail(f"only: got {only!r}, which matches no cell; allowed: a pattern of {cells[-1].name!r}")
