"""Command lines from frozen dataclasses: every field is an option, and a mistake is one line and status 2."""

import dataclasses
import sys
from pathlib import Path

import jsonargparse

# What a shell expects of a command that Ctrl-C ended.
INTERRUPTED = 130


def parse[Config](name: str, config_class: type[Config], argv: list[str], *, positional: str | None = None) -> Config:
    """Reads `--option value` pairs, nested options with dots, and `--config FILE` for any of them.

    Args:
        name: of the command, after `mamba3`.
        config_class: a frozen dataclass that validates itself.
        argv: what followed the name.
        positional: the field that may also come as the first word.

    Raises:
        SystemExit: status 2 after one line on stderr, for a bad option, value or file; status 0 after `--help`.
    """
    if positional is not None and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}={argv[0]}", *argv[1:]]
    parser = option_parser(f"mamba3 {name}", config_class)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    try:
        parsed = parser.parse_args(argv)
        _keep_texts(parsed, argv, config_class)
        return instantiate(parser, parsed, config_class)
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        fail(one_line(error, config_class))


def option_parser(prog: str, config_class: type) -> jsonargparse.ArgumentParser:
    """A parser with an option for every field, which raises instead of leaving."""
    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(config_class)
    return parser


def instantiate[Config](
    parser: jsonargparse.ArgumentParser, parsed: jsonargparse.Namespace, config_class: type[Config]
) -> Config:
    """The configuration that was parsed."""
    values = parser.instantiate(parsed)
    return config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})


def _keep_texts(parsed: jsonargparse.Namespace, argv: list[str], config_class: type) -> None:
    """Puts texts as they were typed: the parser reads them as YAML, in which "# a", "~" and "null" are nothing."""
    for field in dataclasses.fields(config_class):
        if field.type not in (str, str | None):
            continue
        option = f"--{field.name}"
        for word, following in zip(argv, [*argv[1:], None]):
            if word == option:
                parsed[field.name] = following
            elif word.startswith(f"{option}="):
                parsed[field.name] = word.removeprefix(f"{option}=")


def one_line(error: Exception, config_class: type) -> str:
    """A parser's error without line breaks; of an unknown option with those that there are."""
    message = " ".join(str(error).split())
    if any(text in message for text in ("does not accept option", "unrecognized arguments", "is not accepted")):
        message += f"; allowed: {', '.join(_options(config_class))}"
    return message


def results_folder(path: Path) -> Path:
    """The folder for results, made if it is not there; one line and status 2 if it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"results_dir: got {path} ({error.strerror}); allowed: a folder that can be written")
    return path


def fail(message: str) -> None:
    """One line on stderr, status 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def _options(config_class: type, prefix: str = "") -> list[str]:
    """Every dotted option of a configuration."""
    names = []
    for field in dataclasses.fields(config_class):
        nested = dataclasses.is_dataclass(field.type)
        names += _options(field.type, f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return names
