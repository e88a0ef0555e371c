"""What the reports of `mamba3 eval`, `mamba3 inspect` and the sweeps share: tables, the machine, files."""

import json
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax
from matplotlib.figure import Figure


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown, aligned so that it is readable as text too: the first column to the left, the others to the right."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]

    def line(row: Sequence[str]) -> str:
        aligned = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def on_terminal(report: str) -> str:
    """A report without its figures."""
    return "\n".join(line for line in report.splitlines() if not line.startswith("!["))


def command_line(argv: Sequence[str]) -> str:
    """How to repeat a command of `mamba3`."""
    return shlex.join(["uv", "run", "mamba3", *argv])


def environment() -> dict[str, str | dict[str, str]]:
    """The device and the versions, for a summary."""
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()}), {platform.machine()}"
    return dict(device=device, versions={name: version(name) for name in ("jax", "flax", "optax", "numpy")})


def read_text(name: str, path: Path) -> str:
    """A text file; raises ValueError, naming the option, for one that is not there, not UTF-8 or empty."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ValueError(f"{name}: got {path} ({error.strerror}); allowed: a text file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: got {path} (byte {error.start} is not UTF-8); allowed: a text file") from None
    if not text:
        raise ValueError(f"{name}: got {path}, which is empty; allowed: a text file")
    return text


def write(folder: Path, report: str, summary: dict, figures: dict[str, Figure]) -> None:
    """report.md, summary.json and the figures by their names; raises ValueError where they cannot be written."""
    try:
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=130, metadata={"Software": None})
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        (folder / "report.md").write_text(report)
    except OSError as error:
        message = f"results_dir: got {folder} ({error.strerror}); allowed: a folder that can be written"
        raise ValueError(message) from None
