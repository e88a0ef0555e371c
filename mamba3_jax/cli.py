"""The `mamba3` command.

    mamba3 experiment NAME --config FILE [--option value ...]     trains, evaluates and reports; see experiments/
    mamba3 experiment --list                                      what there is

A bad configuration ends with status 2 and one line, never a traceback.
"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USAGE = "usage: mamba3 experiment NAME --config FILE [--option value ...], or mamba3 experiment --list"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if len(argv) < 2 or argv[0] != "experiment":
        return _fail(USAGE)
    names = _experiments()
    if argv[1] == "--list":
        print("\n".join(names))
        return 0
    if argv[1] not in names:
        found = ", ".join(names) or "none; experiments/ comes with a clone, not with the installed package"
        return _fail(f"experiment: got {argv[1]!r}; allowed: {found}")
    sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"experiments.{argv[1]}").main(argv[2:])


def _experiments() -> list[str]:
    """Modules of experiments/ that are commands: those that define `main`."""
    return sorted(p.stem for p in (ROOT / "experiments").glob("*.py") if "\ndef main(" in p.read_text())


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
