"""What experiments' command lines share: a config file, dotted overrides, a results directory, one-line errors."""

import dataclasses
import shlex
from pathlib import Path

import jsonargparse
import yaml

from mamba3_jax.command import fail, instantiate, one_line, option_parser

RESULTS = Path("results")
# Options of the report alone: the rows that it shows are in the same folder.
REPORTING = ("measure", "peers")


@dataclasses.dataclass(frozen=True)
class Command[Config]:
    """A parsed command line.

    Attributes:
        config: the configuration.
        text: the configuration's canonical text.
        results_dir: where results go.
        line: how to repeat it.
        only: of an experiment with several cells, those whose name matches the pattern.
        processes: so many of those cells run at a time, each in a process of its own.
        smoke: whether everything is shrunk until it runs in seconds and means nothing.
    """

    config: Config
    text: str
    results_dir: Path
    line: str
    only: str = "*"
    processes: int = 1
    smoke: bool = False


def parse[Config](name: str, config_class: type[Config], argv: list[str], *, cells: bool = False) -> Command[Config]:
    """Reads `--config FILE`, then `--dotted.option value` overrides, then `--results_dir DIR`.

    Results go to results/<name of the file>, with the overridden options in the name, unless told otherwise.

    Args:
        name: the experiment's.
        config_class: a frozen dataclass that validates itself.
        argv: what followed the name.
        cells: whether the experiment has several cells, and so `--only PATTERN`, `--processes N` and `--smoke`.

    Raises:
        SystemExit: status 2 after one line on stderr, for a bad option, value or file.
    """
    parser = option_parser(f"mamba3 experiment {name}", config_class)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_argument("--results_dir", type=str, default=None, help="default: results/<config>[,option=value...]")
    if cells:
        parser.add_argument("--only", type=str, default="*", help="run the cells whose name matches the pattern")
        parser.add_argument("--processes", type=int, default=1, help="run so many cells at a time, on all GPUs")
        parser.add_argument("--smoke", action="store_true", help="a few tiny steps of everything, in seconds")
    try:
        parsed = parser.parse_args(argv)
        config = instantiate(parser, parsed, config_class)
        files = [str(path) for path in parsed.config or []]
        base = parser.parse_args([f"--config={path}" for path in files])
        base = instantiate(parser, base, config_class)
        if cells and parsed.processes < 1:
            raise ValueError(f"processes: got {parsed.processes}; allowed: a positive integer")
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        fail(one_line(error, config_class))
    directory = parsed.results_dir or RESULTS / _default_name(name, files, to_dict(base), to_dict(config))
    for option in ("--only", "--processes", "--measure"):
        argv = _without(option, argv)
    line = shlex.join(["uv", "run", "mamba3", "experiment", name, *argv])
    options = dict(only=parsed.only, processes=parsed.processes, smoke=parsed.smoke) if cells else {}
    return Command(config, _text(config), Path(directory), line, **options)


def from_dict[Config](config_class: type[Config], values: dict, what: str) -> tuple[Config, str]:
    """A configuration and its canonical text from nested options.

    Raises:
        SystemExit: status 2 after one line on stderr that begins with `what`.
    """
    parser = option_parser(what, config_class)
    try:
        config = instantiate(parser, parser.parse_object(values), config_class)
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        fail(f"{what}: {one_line(error, config_class)}")
    return config, _text(config)


def completed(config_class: type, text: str) -> str:
    """The text of an older configuration, with the options that it lacks at their defaults."""
    return yaml.safe_dump(_completed(config_class, yaml.safe_load(text)), sort_keys=False)


def _completed(config_class: type, values: dict) -> dict:
    done = {}
    for field in dataclasses.fields(config_class):
        if field.name in values:
            nested = dataclasses.is_dataclass(field.type) and isinstance(values[field.name], dict)
            done[field.name] = _completed(field.type, values[field.name]) if nested else values[field.name]
        elif field.default is not dataclasses.MISSING:
            done |= to_dict({field.name: field.default})
    return done | {name: value for name, value in values.items() if name not in done}


def _text(config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _without(option: str, argv: list[str]) -> list[str]:
    """A command line without an option and its value."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        skip = word == option
    return kept


def to_dict(config) -> dict:
    """A configuration as plain YAML values."""
    return {k: list(v) if isinstance(v, tuple) else to_dict(v) if isinstance(v, dict) else v
            for k, v in (config if isinstance(config, dict) else dataclasses.asdict(config)).items()}  # fmt: skip


def _default_name(name: str, files: list[str], base: dict, config: dict) -> str:
    before, after = flatten(base), flatten(config)
    different = {key: value for key, value in after.items() if before.get(key) != value}
    changed = [f"{key}={value}" for key, value in different.items() if key not in REPORTING]
    return ",".join([Path(files[-1]).stem if files else name, *changed]).replace("/", "_").replace(" ", "")


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested options as dotted ones."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
