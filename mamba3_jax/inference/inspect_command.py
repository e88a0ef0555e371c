"""`mamba3 inspect MODEL`: parameters by module, state per sequence, decays and angles on a text.

    mamba3 inspect DIRECTORY [--text FILE] [--results_dir DIR]
    mamba3 inspect mamba3-siso-1.5b          a published size: shapes only
"""

import dataclasses
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mamba3_jax.command import fail, parse, results_folder
from mamba3_jax.data import check_vocabulary, load_tokenizer
from mamba3_jax.inference import inspection_report
from mamba3_jax.inference.inspection import layer_dynamics, parameter_table, state_table
from mamba3_jax.inference.reports import command_line, environment, on_terminal, read_text, write
from mamba3_jax.models import LM, PRESETS, abstract_model, preset
from mamba3_jax.models.checkpoint import load_model, model_directory
from mamba3_jax.tasks.pydoc_bytes import text_of


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """What to look at.

    Attributes:
        model: a model directory, a run directory that holds one, or the name of a published size.
        text: UTF-8 file to measure on; None is a part of Python's help, or random tokens where the vocabulary is not
            one of text.
        tokens: of the text that are read at most.
        results_dir: folder for report.md, summary.json and the figure; None only prints.
    """

    model: str
    text: Path | None = None
    tokens: int = 2048
    results_dir: Path | None = None

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"tokens: got {self.tokens}; allowed: a positive integer")
        if self.model in PRESETS and self.text is not None:
            raise ValueError(f"text: got {self.text} with a published size, which has no weights; allowed: none")


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    config = parse("inspect", InspectConfig, argv, positional="model")
    try:
        _inspect(config, command_line(["inspect", *argv]))
    except (ValueError, NotImplementedError) as error:
        fail(str(error))
    return 0


def _inspect(config: InspectConfig, command: str) -> None:
    began = time.perf_counter()
    layers, text = None, "none: a published size without weights"
    if config.model in PRESETS:
        model = abstract_model(preset(config.model))
    else:
        model, tokens, text = _load(config)
        layers = layer_dynamics(model, jnp.asarray(tokens, jnp.int32)[None])
    folder = None if config.results_dir is None else results_folder(config.results_dir)
    summary = dict(command=command, model=config.model, text=text)
    summary |= dict(
        parameters=[row._asdict() for row in parameter_table(model)],
        state=[row._asdict() for row in state_table(model)],
        layers=None if layers is None else [dataclasses.asdict(layer) for layer in layers],
        seconds=round(time.perf_counter() - began, 1),
        **environment(),
    )
    report = inspection_report.report(summary)
    print(on_terminal(report))
    if folder is not None:
        figures = {"layers.png": inspection_report.plot(layers)} if layers else {}
        write(folder, report, summary, figures)
        print(f"report: {folder / 'report.md'}")


def _load(config: InspectConfig) -> tuple[LM, list[int], str]:
    """The model, the tokens to measure on and what they are."""
    given = None if config.text is None else read_text("text", config.text)
    if not Path(config.model).exists():
        raise ValueError(f"model: got {config.model!r}; allowed: a model's directory, {', '.join(PRESETS)}")
    directory = model_directory(Path(config.model))
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    vocab = model.config.vocab_size
    if given is None and tokenizer.vocab_size > vocab:
        tokens = np.random.default_rng(0).integers(vocab, size=config.tokens).tolist()
        return model, tokens, f"{config.tokens} random tokens, because {vocab} are no vocabulary of text"
    check_vocabulary(tokenizer, model.config, directory)
    name = "Python's help (pydoc)" if given is None else str(config.text)
    tokens = tokenizer.encode(text_of("validation").tobytes().decode() if given is None else given)[: config.tokens]
    return model, tokens, f"{len(tokens)} tokens of {name}"
