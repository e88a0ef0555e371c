"""The `mamba3` command.

    mamba3 experiment NAME --config FILE [--option value ...]     trains, evaluates and reports; see experiments/
    mamba3 experiment --list                                      what there is
    mamba3 reproduce NAME [--smoke]                               a table or figure of results/, by its name
    mamba3 reproduce --list                                       the names, and what each costs

A bad configuration ends with status 2 and one line, never a traceback.
"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USAGE = "usage: mamba3 experiment NAME --config FILE [--option value ...], or mamba3 reproduce NAME; either --list"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if len(argv) < 2 or argv[0] not in ("experiment", "reproduce"):
        return _fail(USAGE)
    sys.path.insert(0, str(ROOT))
    if argv[0] == "reproduce":
        return _reproduce(argv[1:])
    names = _experiments()
    if argv[1] == "--list":
        print("\n".join(names))
        return 0
    if argv[1] not in names:
        found = ", ".join(names) or "none; experiments/ comes with a clone, not with the installed package"
        return _fail(f"experiment: got {argv[1]!r}; allowed: {found}")
    return importlib.import_module(f"experiments.{argv[1]}").main(argv[2:])


def _reproduce(argv: list[str]) -> int:
    if not (ROOT / "experiments").is_dir():
        return _fail("reproduce: got no experiments/; allowed: a clone, because the installed package has none")
    return importlib.import_module("experiments.reproduce").main(argv)


def _experiments() -> list[str]:
    """Modules of experiments/ that are commands: those that define `main`; `reproduce` has a word of its own."""
    commands = (p.stem for p in (ROOT / "experiments").glob("*.py") if "\ndef main(" in p.read_text())
    return sorted(set(commands) - {"reproduce"})


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
