"""Command lines: what is typed is what the configuration gets."""

import dataclasses

import pytest

from mamba3_jax.command import parse


@dataclasses.dataclass(frozen=True)
class Config:
    """Some options.

    Attributes:
        model: a name.
        prompt: a text.
        steps: a number.
    """

    model: str = "m"
    prompt: str | None = None
    steps: int | None = 3


@pytest.mark.parametrize(
    "text", ["# Heading", "null", "~", "", "5", "a: b", "[1]", "'x'", '"', " a\n", "true", "-", "é"]
)
@pytest.mark.parametrize("form", [lambda name, text: [f"--{name}", text], lambda name, text: [f"--{name}={text}"]])
@pytest.mark.parametrize("name", ["prompt", "model"])
def test_a_text_is_kept_as_it_is_typed(name, form, text):
    assert getattr(parse("x", Config, form(name, text)), name) == text


def test_an_option_that_is_absent_keeps_its_default_and_numbers_are_read():
    assert parse("x", Config, ["--steps", "null"]) == Config(steps=None)
    assert parse("x", Config, ["# a", "--prompt", "null", "--prompt", "~"], positional="model") == Config("# a", "~")


def test_a_text_may_come_from_a_file_and_the_command_line_goes_first(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("prompt: from the file\nsteps: 7\n")
    assert parse("x", Config, ["--config", str(file)]) == Config(prompt="from the file", steps=7)
    assert parse("x", Config, ["--config", str(file), "--prompt", "~"]) == Config(prompt="~", steps=7)
