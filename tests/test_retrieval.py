"""The retrieval experiment: its grid, its report from synthetic numbers, the depth of its needles, and a smoke run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import further_tests, grid, retrieval
from experiments.command import parse
from experiments.grid import GridConfig
from experiments.retrieval import ALL_MQAR, MQAR, Probe, Results, RetrievalConfig
from mamba3_jax import cli
from mamba3_jax.tasks import get_task, induction_heads, needle
from mamba3_jax.tasks.needle import NEEDLE

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "retrieval.yaml"
MODELS = ("mamba3", "mamba3-mimo", "mamba2", "gated_deltanet", "attention")
GROUPS = [f"{group},layers={n}" for group in ("S3", "S5", "Z60") for n in (1, 4)]


def command(*options: str):
    return parse("retrieval", RetrievalConfig, ["--config", str(CONFIG), *options], cells=True)


@pytest.fixture(scope="module")
def places() -> dict:
    return {place[:3]: place for place in grid.cells(command().config)}


def test_every_model_meets_every_task(places):
    one_width = ("selective_copying", "induction_heads", "needle")
    for model in (*MODELS, "mamba3-conv"):
        assert {(model, task, d) for task in MQAR for d in (64, 128, 256)} <= set(places)
    for model in MODELS:
        assert {(model, task, 64) for task in (*one_width, *GROUPS)} <= set(places)
    assert {("attention-nope", task, 64) for task in one_width} <= set(places)


def test_a_place_in_the_grid_is_what_its_cell_trains(places):
    for (model, task, d), place in places.items():
        config = place.config
        assert config.model.d_model == d
        assert config.model.mixer == model.split("-")[0]
        assert config.model.mimo_rank == (4 if model == "mamba3-mimo" else None)
        convolves = model in ("mamba3-conv", "mamba2", "gated_deltanet")
        assert config.model.conv_width == (4 if convolves else 0)
        assert config.task == task.split(",")[0]
        if ",layers=" in task:
            assert config.model.n_layers == int(task[-1]) and config.supervision == "every"
            assert config.model.dt_max == (1.0 if model.startswith("mamba3") else 0.1)
        if task in ALL_MQAR:
            length, pairs = ALL_MQAR[task]
            assert config.curriculum.exact and config.curriculum.lengths == config.exact_lengths == (length,)
            assert get_task(task).answers == pairs and task.endswith("_zeros") == (task in MQAR)


def test_a_smoke_run_has_every_task_and_every_model(places):
    smoke = list(grid.cells(command().config, smoke=True))
    families = ("mqar", "selective_copying", "induction_heads", "needle", "S")
    assert all(any(place.config.task.startswith(family) for place in smoke) for family in families)
    assert {place.model for place in smoke} == {model for model, _, _ in places}


def test_a_task_of_a_grid_names_models_that_it_has():
    with pytest.raises(ValueError, match=r"tasks.parity.models: got 'mamba9'; allowed: 'mamba3'"):
        GridConfig(shared={}, models={"mamba3": {}}, tasks={"parity": {"models": {"mamba9": {}}}}, d_models=(8,))


@pytest.mark.parametrize(
    "option, message",
    [
        (["--needle_depths", "[0.5, 1.5]"], "depth: got 1.5"),
        (["--induction_lengths", "[128, 64]"], "induction_lengths: got [128, 64]"),
        (["--longest", '{"mamba9": 8}'], "longest: got 'mamba9'"),
    ],
)
def test_a_bad_option_ends_with_one_line(option, message, capsys):
    with pytest.raises(SystemExit):
        command(*option)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def synthetic(places: dict, scores: dict) -> Results:
    """Results with some scores, given by (cell, test), and a summary of each of those cells."""
    summaries = {
        key: dict(
            task=places[key].config.task, headline="64", steps=4000, seconds=36.0, device="a device",
            selected=dict(learning_rate=1e-3, best_step=250), test={"64": dict(accuracy=0.5, rows=100)},
        )
        for key, _ in scores
    }  # fmt: skip
    by_cell: dict = {key: {} for key, _ in scores}
    for (key, test), accuracy in scores.items():
        by_cell[key][test.name] = dict(accuracy=accuracy, rows=16)
    return Results(command().config, places, summaries, by_cell)


def table(text: str, title: str) -> dict[tuple[str, str], str]:
    """The cells of the table under a heading, by (row, column); a row is named by its columns before the numbers."""
    lines = [line for line in text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = 2 if heads[1] in ("d_model", "layers") else 1
    return {(" ".join(row[:names]), h): c for row in rows for h, c in zip(heads[names:], row[names:], strict=True)}


def test_numbers_land_in_their_cells_and_the_others_say_not_run(places):
    results = synthetic(
        places,
        {
            (("mamba2", "mqar_16_zeros", 128), Probe(get_task("mqar_16_zeros"), 256)): 0.111,
            (("mamba2", "mqar_16", 64), Probe(get_task("mqar_16"), 256)): 0.444,
            (("attention", "selective_copying", 64), Probe(get_task("selective_copying"), 512)): 0.222,
            (("attention", "induction_heads", 64), Probe(induction_heads(), 64)): 0.333,
            (("mamba3", "needle", 64), Probe(needle(0.0), 128)): 0.5,
            **{(("gated_deltanet", "needle", 64), Probe(needle(d), 128)): d for d in (0.0, 0.25, 0.5, 0.75, 1.0)},
            (("mamba3-mimo", "S5,layers=4", 64), Probe(get_task("S5"), 32)): 0.555,
        },
    )
    text = retrieval.render(command(), results)
    expected = {
        "MQAR": {("Mamba-2 128", "256 tokens, 16 pairs"): "11.1"},
        "MQAR with noise": {("Mamba-2 64", "256 tokens, 16 pairs"): "44.4"},
        "Selective copying": {("attention, RoPE", "512"): "22.2", ("test rows", "512"): "16"},
        "Induction heads": {("attention, RoPE", "64"): "33.3", ("test rows", "64"): "16"},
        # A mean over some of the depths is no mean.
        "Needle in a haystack": {("Gated DeltaNet", "128"): "50.0", ("test rows", "128"): "80"},
        "Word problems": {("Mamba-3, MIMO 4", "S5, 32 (trained)"): "55.5"},
    }
    for title, numbers in expected.items():
        cells = table(text, title)
        assert {place: cells[place] for place in numbers} == numbers
        others = {value for place, value in cells.items() if place not in numbers and place[0] != "test rows"}
        assert others <= {"not run", "not evaluated"}, title
    induction = table(text, "Induction heads")
    assert induction["attention, RoPE", "1048576"] == "not evaluated"
    assert induction["Mamba-3", "1048576"] == "not run" and ("Mamba-3", "256 (trained)") in induction


def test_a_report_shows_no_table_or_figure_of_what_was_not_run(places):
    text = retrieval.render(command(), synthetic(places, {}))
    titles = "MQAR", "MQAR with noise", "Selective copying", "Induction heads", "Needle in a haystack", "Word problems"
    for title in titles:
        section = text.split(f"## {title}\n")[1].split("\n## ")[0]
        assert section.endswith("\n\nNot run.\n") and "|" not in section and "png" not in section


def test_the_report_lists_what_deviates_from_the_sources(places):
    text = retrieval.render(command(), synthetic(places, {}))
    assert "- `batch_size` is 128; the source has 512 (mqar_4, mqar_8)" in text
    assert "- `batch_size` is 128; the source has 256 (mqar_16_zeros)" in text
    assert "- `curriculum.lengths` is [256]; the source has [4112] (selective_copying)" in text


def test_the_figures_draw_from_nothing_and_from_everything(places):
    everything = {}
    for key, place in places.items():
        own = Probe(get_task(place.config.task), place.config.exact_lengths[-1])
        everything |= {(key, probe): 0.5 for probe in (own, *further_tests.further_tests(command(), place))}
    for scores in ({}, everything):
        for plot, _ in retrieval.FIGURES.values():
            retrieval.plt.close(plot(synthetic(places, scores)))


@pytest.mark.parametrize("depth, length", [(0.0, 64), (0.25, 64), (0.5, 256), (1.0, 100)])
def test_the_rows_of_a_needle_test_have_it_at_that_depth(places, depth, length):
    config = command("--rows", "40", "--tokens", str(20 * length)).config
    batches = further_tests._batches(Probe(needle(depth), length), config, places["mamba3", "needle", 64])
    tokens = np.concatenate([batch.tokens for batch in batches])
    assert tokens.shape == (20, length)  # as many as the tokens allow
    rows, where = np.nonzero(tokens == NEEDLE)
    assert (rows == np.arange(20)).all() and (where == int(depth * (length - 5) + 0.5)).all()


def test_a_row_that_is_long_goes_alone(places, monkeypatch):
    monkeypatch.setattr(further_tests, "TOKENS_AT_ONCE", 128)
    monkeypatch.setattr(further_tests, "SCORES_AT_ONCE", 64**2)
    config = command("--rows", "4").config
    for model, sizes in ("mamba2", [2, 2]), ("attention", [1, 1, 1, 1]):
        batches = further_tests._batches(Probe(induction_heads(), 64), config, places[model, "induction_heads", 64])
        assert [len(batch.tokens) for batch in batches] == sizes
    assert len({tuple(row) for batch in batches for row in np.asarray(batch.tokens)}) == 4


def test_a_smoke_run_leaves_its_files_and_each_score_under_its_depth(tmp_path, monkeypatch, capsys):
    """The score is replaced by where the needle was, so that a cell of the heat map shows its own depth."""

    def where_the_needle_is(sweep, parameters, batches):
        places = np.concatenate([np.argmax(batch.tokens == NEEDLE, axis=1) for batch in batches])
        return dict(accuracy=[float(places.mean() / (batches[0].tokens.shape[1] - 5))])

    monkeypatch.setattr(further_tests, "evaluate", where_the_needle_is)
    argv = ["experiment", "retrieval", "--config", str(CONFIG), "--smoke", "--only", "*,needle,*", "--rows", "4"]
    argv += ["--results_dir", str(tmp_path), "--needle_lengths", "[64]"]
    assert cli.main(argv) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"mamba2,needle,d=64", "report.md", "needle.png"}
    file = tmp_path / "mamba2,needle,d=64" / further_tests.FURTHER
    scores = json.loads(file.read_text())
    assert set(scores) == {Probe(needle(depth), 64).name for depth in (0.0, 0.25, 0.5, 0.75, 1.0)}
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        score = scores[f"needle_at_{depth:g},n=64"]
        assert score["rows"] == 4 and score["accuracy"] == pytest.approx(depth, abs=0.5 / 59)
    assert table((tmp_path / "report.md").read_text(), "Needle in a haystack")["Mamba-2", "64"] == "50.2"

    # What is done is not done again; a score that is missing is measured by itself.
    del scores["needle_at_1,n=64"]
    file.write_text(json.dumps(scores))
    monkeypatch.setattr(further_tests, "evaluate", lambda *_: dict(accuracy=[0.125]))
    assert cli.main(argv) == 0
    assert json.loads(file.read_text()) == scores | {"needle_at_1,n=64": dict(accuracy=0.125, rows=4)}

    # With a damaged checkpoint, or without one, as in a clone, nothing is made up and nothing is lost.
    file.write_text(json.dumps(scores))
    metrics = (file.parent / "metrics.jsonl").read_text()
    checkpoints = file.parent / "checkpoints"
    damaged = max((path for path in checkpoints.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for message in (damaged.name, "without a checkpoint to test"):
        with pytest.raises(SystemExit):
            cli.main(argv)
        *_, line = capsys.readouterr().err.splitlines()
        assert message in line and "; allowed: " in line
        assert json.loads(file.read_text()) == scores and (file.parent / "metrics.jsonl").read_text() == metrics
        shutil.rmtree(checkpoints, ignore_errors=True)
