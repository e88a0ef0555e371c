"""The `mamba3` command.

    mamba3 prepare-data SOURCE... --destination DIR               text to token shards
    mamba3 train --config FILE --run_dir DIR                      a language model; the same command resumes it
    mamba3 compile --config FILE --topology v5e:16x16             its step for a TPU pod that is not here: memory, time
    mamba3 convert SOURCE DESTINATION                             a released checkpoint to a model directory, or back
    mamba3 generate MODEL --prompt TEXT [--option value ...]      text from a model, as it arrives
    mamba3 eval MODEL --perplexity FILE | --tasks NAME,...        perplexity, context lengths, lm-evaluation-harness
    mamba3 inspect MODEL                                          parameters, state, half-lives, angles
    mamba3 bench --cost_model tpu --chip v5e [--b 8 --t 8192 ...]  predicted time and bytes of the kernels on a TPU
    mamba3 experiment NAME --config FILE [--option value ...]     trains, evaluates and reports; see experiments/
    mamba3 experiment --list                                      what there is
    mamba3 reproduce NAME [--smoke]                               a table or figure of results/, by its name
    mamba3 reproduce --list                                       the names, and what each costs

MODEL is a model directory, or a run directory that holds one. `mamba3 COMMAND --help` lists the options. A bad
configuration ends with status 2 and one line, never a traceback.
"""

import importlib
import sys
from pathlib import Path

from mamba3_jax.command import INTERRUPTED, fail

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "prepare-data": "mamba3_jax.data.prepare",
    "train": "mamba3_jax.training.train_command",
    "compile": "mamba3_jax.distributed.compile_command",
    "convert": "mamba3_jax.convert.command",
    "generate": "mamba3_jax.inference.generate_command",
    "eval": "mamba3_jax.inference.eval_command",
    "inspect": "mamba3_jax.inference.inspect_command",
    "bench": "mamba3_jax.bench_command",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    command, *rest = argv or [""]
    try:
        if command in COMMANDS:
            return importlib.import_module(COMMANDS[command]).main(rest)
        if command == "experiment" and rest:
            return _experiment(rest)
        if command == "reproduce":
            return _reproduce(rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output, `head` say, has seen enough.
        sys.stderr.close()
        return 0
    words = ", ".join([*COMMANDS, "experiment", "reproduce"])
    fail(f"command: got {' '.join(argv) or 'none'!r}; allowed: {words}, each followed by its arguments; see --help")


def _experiment(argv: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    names = _experiments()
    if argv[0] == "--list":
        print("\n".join(names))
        return 0
    if argv[0] not in names:
        found = ", ".join(names) or "none; experiments/ comes with a clone, not with the installed package"
        fail(f"experiment: got {argv[0]!r}; allowed: {found}")
    return importlib.import_module(f"experiments.{argv[0]}").main(argv[1:])


def _reproduce(argv: list[str]) -> int:
    if not (ROOT / "experiments").is_dir():
        fail("reproduce: got no experiments/; allowed: a clone, because the installed package has none")
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("experiments.reproduce").main(argv)


def _experiments() -> list[str]:
    """Modules of experiments/ that are commands: those that define `main`; `reproduce` has a word of its own."""
    commands = (p.stem for p in (ROOT / "experiments").glob("*.py") if "\ndef main(" in p.read_text())
    return sorted(set(commands) - {"reproduce"})


if __name__ == "__main__":
    sys.exit(main())
