"""The discretisation ablation: its cells, which text is read for what, its perplexity, and the report's numbers."""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cell, discretization, grid
from experiments.command import parse
from experiments.sweep import CurriculumConfig, Sweep
from experiments.training import evaluate
from mamba3_jax import cli
from mamba3_jax.layers import Mamba3Config
from mamba3_jax.models import LMConfig
from mamba3_jax.tasks import get_task
from mamba3_jax.tasks.pydoc_bytes import text_of, topics_of_splits, windows
from mamba3_jax.training.optimizer import OptimizerConfig

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "discretization.yaml"
TEXT = discretization.TEXT


def command(*options: str):
    return parse("discretization", discretization.Config, ["--config", str(CONFIG), *options], cells=True)


@functools.cache
def all_cells() -> dict[tuple[str, str], cell.Config]:
    return {
        (place.model, place.task): place.config
        for one in command().config.grids(smoke=False)
        for place in grid.cells(one)
    }


def test_every_combination_is_a_cell_on_every_task():
    """Three lambdas x biases or none x convolution or none; on the language model also table 10a's initial biases."""
    models: dict[str, list[tuple]] = {}
    for (_, task), config in all_cells().items():
        m = config.model
        models.setdefault(task, []).append((m.discretization, m.bc_bias_init, m.bc_bias_trainable, m.conv_width))
    factorial = set(itertools.product(("trapezoidal", "euler", 0.5), ("ones", None), (True,), (0, 4)))
    inits = {("zeros", True), ("ones", False), ("uniform", True), ("symmetric", True)}
    expected = factorial | {("trapezoidal", init, trained, 0) for init, trained in inits}
    assert list(models) == ["parity", "modular_arithmetic", "mqar_4", TEXT]
    for task, found in models.items():
        assert len(found) == len(set(found)) and set(found) == (expected if task == TEXT else factorial)


def test_variants_of_a_task_differ_in_nothing_else():
    def rest(config):
        return dataclasses.replace(config, model=dataclasses.replace(
            config.model, discretization="euler", bc_bias_init=None, bc_bias_trainable=True, conv_width=0
        ))  # fmt: skip

    for task in command().config.options:
        assert len({rest(config) for (_, name), config in all_cells().items() if name == task}) == 1


def test_the_language_model_is_selected_by_loss_with_three_seeds_and_full_windows():
    for (_, task), config in all_cells().items():
        if task == TEXT:
            assert config.n_seeds == 3 and config.select == "loss" and config.stop_accuracy > 1
            assert config.curriculum == CurriculumConfig((256,), exact=True) and config.exact_lengths == (256,)


def test_no_text_is_in_two_splits():
    topics = topics_of_splits()
    assert sum(map(len, topics.values())) == len(set().union(*topics.values()))
    windows_of = {split: {text_of(split)[i : i + 100].tobytes() for i in range(text_of(split).size - 99)}
                  for split in topics}  # fmt: skip
    shared = windows_of["train"] & (windows_of["validation"] | windows_of["test"])
    # Sentences that the manual repeats ("Changed in version ...") are no leak; whole paragraphs would be.
    assert len(shared) < 0.01 * len(windows_of["validation"] | windows_of["test"])


def text_config(**options) -> cell.Config:
    model = next(config.model for (_, task), config in all_cells().items() if task == TEXT)
    small = dataclasses.replace(model, d_model=16, d_state=8, head_dim=16, n_layers=1, mlp_width=0)
    fixed = dict(task=TEXT, uniform_from=None, curve_lengths=(), exact_lengths=(64,), select="loss")
    return cell.Config(model=small, curriculum=CurriculumConfig((64,), exact=True), **fixed | options)


def test_training_reads_the_training_text_only():
    sweep = text_config(batch_size=8).sweep()
    assert sweep.task.name == "pydoc_bytes_train"
    batch = sweep._training_batch(jnp.int32(0), jax.random.key(3), 64)
    train = text_of("train").tobytes()
    for tokens, labels in zip(np.asarray(batch.tokens), np.asarray(batch.labels)):
        assert bytes([*tokens, labels[-1]]) in train
    assert batch.mask.all()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_asks_for_every_byte_of_its_split_once(split, monkeypatch):
    """In pieces of whichever size; none of it is training text."""
    monkeypatch.setattr(cell, "EVALUATION_TOKENS", 64 * 100)
    ((name, pieces),) = cell.evaluation_sets(text_config(), split).items()
    assert name == "64" and len(pieces) > 3 and all(len(piece.tokens) <= 100 for piece in pieces)
    asked = np.concatenate([np.asarray(piece.labels)[np.asarray(piece.mask)] for piece in pieces])
    assert asked.astype(np.uint8).tobytes() == text_of(split)[1:].tobytes()
    assert all(piece.mask.all() for piece in pieces[:-1]) and len(pieces[-1].tokens) == 1


def test_drawn_tasks_still_draw_their_sets_from_keys_of_their_own():
    config = cell.Config(model=text_config().model, task="parity", validation_rows=4, test_rows=6, exact_lengths=(12,),
                         uniform_from=4, curve_lengths=())  # fmt: skip
    sets = {split: cell.evaluation_sets(config, split) for split in ("validation", "test")}
    rows = {name: [len(batch.tokens) for batch in batches] for name, batches in sets["test"].items()}
    assert rows == {"12": [6], "4-12": [6]}
    assert not np.array_equal(sets["validation"]["12"][0].tokens, sets["test"]["12"][0].tokens[:4])


@pytest.mark.parametrize("options", [dict(uniform_from=8), dict(curve_lengths=(8,))])
def test_sets_that_a_held_out_text_cannot_have_are_refused(options):
    with pytest.raises(ValueError, match="allowed: null, \\[\\], because its text is evaluated whole"):
        text_config(**options)


def test_perplexity_is_exp_of_the_mean_loss_over_the_split():
    """Of random models, against the mean over all bytes of log-probabilities taken one by one, in float64."""
    sweep = Sweep(
        task=get_task(TEXT), model=LMConfig(Mamba3Config(d_model=16, d_state=8, head_dim=16), 1, 256),
        optimizer=OptimizerConfig(), curriculum=CurriculumConfig((128,), exact=True), supervision="final", batch_size=2,
        max_steps=1, peaks=(1e-3, 1e-3), seeds=(0, 1),
    )  # fmt: skip
    parameters = sweep.init().parameters
    (pieces,) = cell.evaluation_sets(text_config(exact_lengths=(128,)), "test").values()
    measured = evaluate(sweep, parameters, pieces)["loss"]
    whole = windows("test", 128)
    forward = jax.jit(lambda one: sweep.merge(one)(whole.tokens)[0])
    for i in range(2):
        logits = np.asarray(forward(jax.tree.map(lambda p: p[i], parameters)), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        log_p = np.take_along_axis(log_p, np.asarray(whole.labels)[..., None], -1)[..., 0]
        direct = -log_p[np.asarray(whole.mask)].sum() / (text_of("test").size - 1)
        np.testing.assert_allclose(measured[i], direct, rtol=1e-6)
        summary = summary_of([measured[i]])
        found = discretization.perplexities({("trapezoid", TEXT): summary})["trapezoid"]
        np.testing.assert_allclose(found.mean, np.exp(direct), rtol=1e-5)
        np.testing.assert_allclose(found.bits, direct / np.log(2), rtol=1e-6)


def summary_of(losses: list[float], scaled: float = 0.0, told: list[str] | None = None) -> dict:
    """What the report reads of a cell's summary.json."""
    tests = [{"256": dict(loss=loss, scaled=scaled)} for loss in losses]
    return dict(headline="256", test=tests[0], seeds=[dict(test=test) for test in tests], seconds=60.0, device="1 x x",
                deviations=told)  # fmt: skip


def row(text: str, *begins: str) -> list[str]:
    """The cells of the one row of a table that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith("| " + " | ".join(begins) + " |")]
    return [value.strip() for value in line.strip("|").split("|")]


def section(text: str, title: str) -> str:
    return text.split(f"## {title}")[1].split("\n## ")[0]


def test_the_report_has_each_number_in_its_place():
    perplexity = {
        "trapezoid": (4.0, 4.1, 4.2),
        "trapezoid-no_bias": (4.5, 4.6, 4.7),
        "euler-no_bias": (4.4, 4.55, 4.6),
        "trapezoid-conv": (3.7, 3.8, 3.9),
        "half": (4.1, 4.2, 4.3),
        "euler-no_bias-conv": (5.1, 5.2, 5.3),
        "bias_uniform": (4.05, 4.15, 4.25),
    }
    done = {(model, TEXT): summary_of([math.log(p) for p in values]) for model, values in perplexity.items()}
    told = ["`model.discretization` is 0.5; the protocol has trapezoidal", "`batch_size` is 1; the protocol has 2"]
    done["half-conv", "parity"] = summary_of([0.5], 87.5, told)
    done["half-conv", "mqar_4"] = summary_of([0.5], 12.25)
    text = discretization.render(command(), done)

    biases = section(text, "Table 5a")
    assert row(biases, "no", "no", "no")[3:] == ["4.517 +- 0.104", "2.175", "16.68"]
    assert row(biases, "no", "yes", "no")[3:] == ["4.600 +- 0.100", "2.201", "16.49"]
    assert row(biases, "yes", "yes", "no")[3:] == ["4.100 +- 0.100", "2.035", "15.72"]
    assert row(biases, "yes", "yes", "yes")[3:] == ["3.800 +- 0.100", "1.926", "15.85"]
    assert row(biases, "no", "no", "yes")[3:] == ["5.200 +- 0.100", "2.378", "-"]
    assert row(biases, "yes", "no", "no")[3:] == ["not run", "not run", "15.81"]

    lambdas = section(text, "Table 8")
    assert row(lambdas, "lambda = 1/2")[1:] == ["4.200 +- 0.100", *["not run"] * 3, "15.76"]
    assert row(lambdas, "trapezoid, lambda from the data")[1:] == [
        "4.100 +- 0.100", "4.600 +- 0.100", "3.800 +- 0.100", "not run", "15.72",
    ]  # fmt: skip
    assert row(lambdas, "exponential-Euler")[1:] == ["not run", "4.517 +- 0.104", "not run", "5.200 +- 0.100", "15.81"]

    inits = section(text, "Table 10a")
    expected = {"ones": "15.72", "zeros": "16.57", "frozen ones": "15.80", "U(0, 1)": "15.76", "U(-1, 1)": "16.07"}
    assert {name: row(inits, name)[-1] for name in expected} == expected
    assert row(inits, "U(0, 1)")[1:3] == ["4.150 +- 0.100", "2.053"] and row(inits, "zeros")[1] == "not run"

    spread = section(text, "Do the differences exceed")
    assert row(spread, "biases, with the trapezoid")[1:] == [
        "+4.90%", "+12.20%", "exceeds the seeds' spread, the paper's order",
    ]  # fmt: skip
    assert row(spread, "no convolution, with biases and trapezoid")[1:] == [
        "+0.83%", "-7.32%", "exceeds the seeds' spread, the opposite order",
    ]  # fmt: skip
    assert row(spread, "lambda from the data instead of 1/2")[-1] == "within the seeds' spread"
    assert row(spread, "lambda from the data instead of 1")[2:] == ["not run", "not run"]
    assert "Of the 5 differences measured, 2 exceed the seeds' spread, 1 of them in the paper's order and 1" in text
    assert "equal variants do so in one comparison of 10" in text

    tasks = section(text, "Synthetic tasks")
    assert row(tasks, "half-conv")[1:] == ["87.50", "not run", "12.25"]
    assert row(tasks, "euler")[1:] == ["not run"] * 3
    assert "`batch_size` is 1" in text and "`model.discretization` is 0.5" not in text
    assert "Only the order of the variants can be compared" in text and "440M parameters" in text


def test_one_seed_decides_nothing():
    done = {(model, TEXT): summary_of([loss]) for model, loss in (("trapezoid", 1.0), ("half", 2.0))}
    text = discretization.render(command(), done)
    assert row(text, "lambda from the data instead of 1/2")[-1] == "one seed: no spread to compare with"
    assert "nothing is said about their order" in text and "+- " not in section(text, "Table 8")


def test_a_smoke_run_leaves_its_files(tmp_path):
    """Of its four cells those whose task begins with a p; `mamba3 reproduce discretization --smoke` runs them all."""
    argv = ["--config", str(CONFIG), "--smoke", "--only", "*,p*", "--results_dir", str(tmp_path)]
    assert cli.main(["experiment", "discretization", *argv]) == 0
    cells = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert {path.name.split(",")[1] for path in cells} == {"parity", TEXT}
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in cells} == {
        "report.md", "discretization.png",
    }  # fmt: skip
    (text_cell,) = [path for path in cells if TEXT in path.name]
    summary = json.loads((text_cell / "summary.json").read_text())
    assert summary["test"]["8"]["rows"] == len(windows("test", 8).tokens)
    assert "not run" in (tmp_path / "report.md").read_text()
