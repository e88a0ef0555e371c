"""The state-tracking experiment: its command line, what it leaves behind, that interrupted runs resume exactly."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from experiments import cell, command, grid, report, state_tracking, training
from experiments.models import Mixer, ModelConfig
from experiments.sweep import CurriculumConfig, Sweep
from mamba3_jax import cli
from mamba3_jax.command import INTERRUPTED
from mamba3_jax.layers import Mamba3Config
from mamba3_jax.models import LM, LMConfig
from mamba3_jax.models.checkpoint import load_model
from mamba3_jax.models.presets import PRESETS
from mamba3_jax.ops import ssm
from mamba3_jax.tasks import TASKS, accuracy, get_task
from mamba3_jax.training.optimizer import OptimizerConfig, learning_rate
from mamba3_jax.training.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parent.parent


def git(*argv: str) -> str:
    """What git says of this checkout; nothing where there is none."""
    return subprocess.run(["git", *argv], cwd=ROOT, capture_output=True, text=True).stdout


TINY = """
task: parity
supervision: every
model: {d_model: 8, n_layers: 1, d_state: 8, head_dim: 8}
curriculum: {lengths: [4, 8], gate_accuracy: 0.5}
learning_rates: [1.0e-2, 3.0e-2]
batch_size: 8
max_steps: 40
interval: 10
evaluate_every: 20
validation_rows: 16
test_rows: 32
exact_lengths: [8, 12]
uniform_from: 4
curve_lengths: [8, 12]
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """The results of one whole run, shared by the tests that look at them."""
    directory = tmp_path_factory.mktemp("results") / "whole"
    assert _run(tiny, directory) == 0
    return directory


def _run(config: Path, directory: Path, *options: str) -> int:
    argv = ["experiment", "state_tracking", "--config", str(config), "--results_dir", str(directory), *options]
    return cli.main(argv)


def test_a_run_leaves_everything_that_the_readme_promises(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "model", "summary.json", "accuracy.png", "report.md",
    }  # fmt: skip
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [10, 20, 30, 40]
    assert [set(m["validation"]) for m in metrics if "validation" in m] == [{"8", "12", "4-12"}] * 2
    summary = json.loads((finished / "summary.json").read_text())
    assert [run["learning_rate"] for run in summary["runs"]] == [1e-2, 3e-2]
    assert summary["test"]["12"]["rows"] == 32 and set(summary["curve"]) == {"8", "12"}
    text = (finished / "report.md").read_text()
    assert "`supervision` is every; the protocol has final" in text and "accuracy.png" in text


def test_the_selected_run_is_the_best_by_validation(finished):
    summary = json.loads((finished / "summary.json").read_text())
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    scores = np.array([m["validation"]["12"]["accuracy"] for m in metrics if "validation" in m])
    assert summary["selected"]["validation"]["12"]["accuracy"] == scores.max()


@pytest.mark.parametrize("how, kept", [("interrupted", {"20", "30"}), ("failed", {"20"})])
def test_an_interrupted_run_resumes_with_an_identical_stream(tiny, finished, tmp_path, how, kept):
    """Ctrl-C in the third interval, which is saved; or an error, which loses it. No save is left in flight."""
    directory = tmp_path / "cut"
    train, calls = Sweep.train, []

    def interrupted(self, runs, steps):
        calls.append(steps)
        if len(calls) == 3:
            if how == "failed":
                raise RuntimeError("no memory")
            os.kill(os.getpid(), signal.SIGINT)
        return train(self, runs, steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "train", interrupted)
        if how == "failed":
            with pytest.raises(RuntimeError, match="no memory"):
                _run(tiny, directory)
        else:
            assert _run(tiny, directory) == INTERRUPTED
    assert {p.name for p in (directory / "checkpoints").iterdir()} == kept
    assert not (directory / "summary.json").exists()
    assert _run(tiny, directory) == 0
    assert (directory / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()
    results = [json.loads((d / "summary.json").read_text()) for d in (directory, finished)]
    assert all(results[0][key] == results[1][key] for key in ("test", "selected", "device", "versions"))


def _interrupt(patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a run's first interval."""
    train = Sweep.train

    def interrupted(self, runs, steps):
        os.kill(os.getpid(), signal.SIGINT)
        return train(self, runs, steps)

    patch.setattr(Sweep, "train", interrupted)


def test_the_summary_names_what_trained_and_what_tested(tiny, tmp_path, monkeypatch):
    """A run cut short on one machine, continued on another with a newer JAX, and tested on a third."""
    directory = tmp_path / "moved"

    def machine(name, jax):
        return lambda: dict(device=name, versions=dict(jax=jax, optax="1"))

    monkeypatch.setattr(report, "environment", machine("third", "4"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "environment", machine("first", "2"))
        _interrupt(patch)
        assert _run(tiny, directory) == INTERRUPTED
    monkeypatch.setattr(training, "environment", machine("second", "3"))
    assert _run(tiny, directory) == 0
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["device"] == "first; then second; its test on third"
    assert summary["versions"] == dict(jax="2, then 3", optax="1")


def test_a_checkpoint_that_does_not_tell_where_it_was_made_still_resumes(tiny, finished, tmp_path):
    """As sweeps wrote them at first; nothing is claimed of a machine that is not known."""
    directory, save = tmp_path / "older", RunDirectory.save

    def without(self, step, arrays, extra):
        save(self, step, arrays, {key: value for key, value in extra.items() if key != "trained_on"})

    with pytest.MonkeyPatch.context() as patch:
        _interrupt(patch)
        patch.setattr(RunDirectory, "save", without)
        assert _run(tiny, directory) == INTERRUPTED
    assert _run(tiny, directory) == 0
    devices = [json.loads((d / "summary.json").read_text())["device"] for d in (directory, finished)]
    assert devices[0] == f"devices that were not recorded; then {devices[1]}"


def test_a_damaged_checkpoint_is_one_line_that_names_its_file(tiny, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    damaged = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    damaged.write_bytes(bytes([damaged.read_bytes()[0] ^ 1]) + damaged.read_bytes()[1:])
    with pytest.raises(SystemExit) as stopped:
        _run(tiny, run)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1 and message.startswith(f"{damaged}: got ")


def test_a_finished_run_is_reported_again_not_trained_again(tiny, finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(Sweep, "train")
        assert _run(tiny, finished) == 0
    assert (finished / "metrics.jsonl").read_text() == before


def test_a_directory_of_another_config_is_refused_and_untouched(tiny, finished, capsys):
    before = {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()}
    with pytest.raises(SystemExit) as error:
        _run(tiny, finished, "--seed", "1")
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(finished) in message and "'seed: 0' there, 'seed: 1' here" in message
    assert {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()} == before


def test_a_directory_with_other_files_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(SystemExit):
        _run(tiny, tmp_path)
    assert "holds other files" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


BAD_OPTIONS = {
    "unknown key": (["--model.rotatio", "none"], "--model.rotatio", "model.rotation"),
    "value of no choice": (["--model.rotation", "spin"], "model.rotation", "data_dependent"),
    "value out of range": (["--model.rope_fraction", "0.3"], "rope_fraction: got 0.3", "0.5, 1.0"),
    "odd state": (["--model.d_state", "7"], "d_state: got 7", "even"),
    "unknown task": (["--task", "chess"], "task: got 'chess'", "parity"),
    "supervision that is not defined": (
        ["--task", "induction_heads", "--uniform_from", "8"], "supervision: got 'every'", "'final'",
    ),
    "kernel that is not there": (["--model.implementation", "triton"], "implementation: got 'triton'", "'chunked'"),
    "missing file": (["--config", "nowhere.yaml"], "nowhere.yaml", "not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_one_line_and_status_2(tiny, case, capsys, tmp_path):
    options, given, allowed = BAD_OPTIONS[case]
    with pytest.raises(SystemExit) as error:
        _run(tiny, tmp_path / "never", *options)
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1 and given in message and allowed in message
    assert not (tmp_path / "never").exists()


def test_a_directory_that_cannot_be_is_one_line_and_status_2(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as error:
        _run(tiny, tmp_path / "file" / "below")
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1 and message.startswith("results_dir: got")


def test_an_unknown_key_in_a_file_is_named(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("model: {d_model: 16, d_sate: 3}\n")
    with pytest.raises(SystemExit):
        _run(path, tmp_path / "never")
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "d_sate" in message and "d_state" in message


def test_the_command_line_from_a_shell():
    """`mamba3` itself: the list of experiments, and an unknown one with status 2 and one line."""

    def shell(*argv):
        return subprocess.run([sys.executable, "-m", "mamba3_jax.cli", *argv], capture_output=True, text=True)

    assert "state_tracking" in shell("experiment", "--list").stdout.split()
    run = shell("experiment", "chess")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "state_tracking" in run.stderr


def test_results_go_where_the_config_and_its_overrides_say(tiny):
    parsed = command.parse("state_tracking", state_tracking.Config, ["--config", str(tiny), "--model.rotation", "none"])
    assert parsed.results_dir == Path("results/tiny,model.rotation=none")
    parsed = command.parse("state_tracking", state_tracking.Config, ["--config", str(tiny)])
    assert parsed.results_dir == Path("results/tiny")
    assert state_tracking.Config(**{k: v for k, v in vars(parsed.config).items()}) == parsed.config


CONFIGS = {
    "state_tracking": [path for path in (ROOT / "configs/state_tracking").glob("parity*.yaml")],
    "table_5b": [ROOT / "configs/state_tracking/table_5b.yaml"],
    "discretization": [ROOT / "configs/discretization.yaml"],
    "retrieval": [ROOT / "configs/retrieval.yaml"],
    # In test_compile.py and test_training_throughput.py.
    "train": [ROOT / f"configs/lm/{name}.yaml" for name in (*PRESETS, "tiny_cpu", "one_gpu", "precision")],
}


def test_every_config_in_the_tree_is_tested():
    assert {path for paths in CONFIGS.values() for path in paths} == set((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS["state_tracking"], ids=lambda p: p.stem)
def test_every_config_of_one_sweep_is_valid_and_names_known_keys(path):
    config = command.parse("state_tracking", state_tracking.Config, ["--config", str(path)]).config
    assert config.task == yaml.safe_load(path.read_text())["task"]


def test_every_cell_of_the_table_is_valid_and_its_own_model():
    options = ["--config", str(CONFIGS["table_5b"][0])]
    places = list(grid.cells(command.parse("table_5b", grid.GridConfig, options, cells=True).config))
    assert {place.config.model.mixer for place in places} == set(get_args(Mixer)) - {"attention"}
    # Three columns at two widths; and beyond the paper's, at one, two of one model and that of all with smaller heads.
    assert len(places) == 5 * 3 * 2 + 2 + 5


def test_a_baseline_without_its_convolution_is_a_deviation_and_with_it_is_none():
    model = dict(d_model=64, d_state=64, head_dim=64, mixer="mamba2")
    with_conv, without = (
        dataclasses.replace(state_tracking.protocol("parity"), model=ModelConfig(**model, **options))
        for options in ({}, {"conv_width": 0})
    )
    assert with_conv.model.conv_width == 4 and state_tracking.deviations(with_conv) == []
    (line,) = state_tracking.deviations(without)
    assert line.startswith("`model.conv_width` is 0; ") and line.endswith("default is 4")


def test_the_paper_config_deviates_from_the_protocol_nowhere():
    path = ROOT / "configs" / "state_tracking" / "parity.yaml"
    config = command.parse("state_tracking", state_tracking.Config, ["--config", str(path)]).config
    assert state_tracking.deviations(config) == []


def test_every_deviation_is_named():
    """Change any option that the protocol does not leave free, and the report says so."""
    path = ROOT / "configs" / "state_tracking" / "parity.yaml"
    for option in ("--optimizer.b2=0.5", "--max_steps=500", "--model.d_state=8", "--curriculum.gate_accuracy=0.5"):
        argv = ["--config", str(path), option]
        config = command.parse("state_tracking", state_tracking.Config, argv).config
        key = option.lstrip("-").split("=")[0]
        assert [line.split("`")[1] for line in state_tracking.deviations(config)] == [key]


COMMITTED = sorted(git("ls-files", "results/*/summary.json").split())


@pytest.mark.skipif(not COMMITTED, reason="needs a git checkout, which knows the committed results from your own")
def test_committed_results_are_of_the_committed_configs(tmp_path):
    """Of sweeps: parity_cpu was made by the config as it stands, and each names all its deviations."""
    seen = set()
    for name in COMMITTED:
        summary = json.loads(git("show", f"HEAD:{name}"))
        if "task" not in summary:
            continue
        text = git("show", f"HEAD:{Path(name).parent}/config.yaml")
        (tmp_path / "config.yaml").write_text(text)
        parsed = command.parse("state_tracking", state_tracking.Config, ["--config", str(tmp_path / "config.yaml")])
        # Of the other tasks no paper has a protocol; what retrieval deviates from is in its own report.
        follows = parsed.config.task in TASKS and not name.startswith("results/retrieval/")
        deviations = state_tracking.deviations(parsed.config) if follows else None
        # An older one lacks the options that came after it.
        assert parsed.text == command.completed(state_tracking.Config, text), name
        assert summary["deviations"] == deviations, name
        seen.add(parsed.text)
    path = ROOT / "configs" / "state_tracking" / "parity_cpu.yaml"
    assert command.parse("state_tracking", state_tracking.Config, ["--config", str(path)]).text in seen


@pytest.mark.parametrize("runs, rows", [(2, 16), (3, 16), (4, 6)])
def test_runs_and_rows_spread_over_whatever_devices_divide_them(runs, rows):
    """2, 3 and 4 runs, evaluated on rows of other divisors, over the 4 devices of the tests."""
    assert jax.device_count() == 4
    sweep = _sweep(peaks=(1e-2,) * runs, seeds=tuple(range(runs)), curriculum=CurriculumConfig((4,)))
    trained, metrics = sweep.train(sweep.init(), 1)
    assert len(trained.stage.sharding.device_set) == runs and metrics.loss.shape == (runs,)
    batch = sweep.task.sample(jax.random.key(0), rows, 4, 4)
    models = [sweep.merge(jax.tree.map(lambda p: p[i], trained.parameters)) for i in range(runs)]
    expected = [accuracy(model(batch.tokens)[0], batch) for model in models]
    np.testing.assert_allclose(sweep.evaluate(trained.parameters, batch).accuracy, expected, atol=1e-6)


def _sweep(**changes) -> Sweep:
    options = dict(
        task=get_task("parity"), model=LMConfig(Mamba3Config(d_model=8, d_state=8, head_dim=8), 1, 3),
        optimizer=OptimizerConfig(warmup_steps=2), curriculum=CurriculumConfig((4, 8), 0.5), supervision="final",
        batch_size=8, max_steps=20, peaks=(1e-2, 3e-3), seeds=(0, 1),
    )  # fmt: skip
    return Sweep(**options | changes)


def test_runs_at_once_are_runs_alone():
    """vmapped over learning rates and seeds, every run is what it is by itself."""
    together, _ = _sweep().train(_sweep().init(), 5)
    for i, (peak, seed) in enumerate(zip(_sweep().peaks, _sweep().seeds)):
        alone = _sweep(peaks=(peak,), seeds=(seed,))
        runs, _ = alone.train(alone.init(), 5)
        for a, b in zip(jax.tree.leaves(together.parameters), jax.tree.leaves(runs.parameters)):
            np.testing.assert_allclose(a[i], b[0], rtol=2e-4, atol=2e-6)


def test_stages_end_when_solved_or_when_their_steps_are_spent():
    """Each run by itself; a stage that is not solved ends after `stage_steps`, and the last one never does."""
    never = _sweep(curriculum=CurriculumConfig((4, 8), 1.0, stage_steps=10))
    runs, stages = never.init(), []
    for _ in range(4):
        runs, metrics = never.train(runs, 5)
        assert np.all(metrics.accuracy < 1)
        stages.append(runs.stage.tolist())
    assert stages == [[0, 0], [1, 1], [1, 1], [1, 1]]
    at_once = _sweep(curriculum=CurriculumConfig((4, 8), 0.01))
    runs, _ = at_once.train(at_once.init(), 5)
    assert runs.stage.tolist() == [1, 1] and runs.stage_steps.tolist() == [0, 0]


def test_each_size_of_rows_is_compiled_once_when_it_is_reached(monkeypatch):
    """Of three stages, in the precision of whoever trains."""
    programs, one_step = [], Sweep.one_step

    def spy(self, run, peak, key, longest):
        programs.append((longest, jax.config.jax_default_matmul_precision))
        return one_step(self, run, peak, key, longest)

    monkeypatch.setattr(Sweep, "one_step", spy)
    sweep = _sweep(curriculum=CurriculumConfig((4, 8, 16), 1.0, stage_steps=5), max_steps=35)
    runs, traced = sweep.init(), []
    with jax.default_matmul_precision("highest"):
        for _ in range(4):
            runs, _ = sweep.train(runs, 5)
            traced.append(list(dict.fromkeys(programs)))
    expected = [(4, "highest"), (8, "highest"), (16, "highest")]
    assert traced == [expected[:1], expected[:2], expected, expected]
    assert len(programs) == len(expected)


def test_learning_rate_warms_up_and_follows_the_cosine():
    config = OptimizerConfig(warmup_steps=10, end_learning_rate=1e-6)
    rates = [float(learning_rate(config, jnp.float32(1e-2), jnp.asarray(s), 110)) for s in (0, 4, 9, 60, 110)]
    np.testing.assert_allclose(rates, [1e-3, 5e-3, 1e-2, (1e-2 + 1e-6) / 2, 1e-6], rtol=1e-5)


def test_accuracy_counts_the_answer_over_the_whole_vocabulary():
    batch = get_task("parity").sample(jax.random.key(0), 64, 12, 12, supervision="every")
    right = jax.nn.one_hot(batch.labels, 3)
    assert accuracy(right, batch) == 1
    pad_wins = right.at[..., 0].set(2.0)
    assert accuracy(pad_wins, batch) == 0


def test_half_a_turn_per_one_solves_parity_at_any_length():
    """A model set by hand, not trained: every 1 turns the state by pi, and 255 bits come out right, all of them."""
    task = get_task("parity")
    batch = task.sample(jax.random.key(3), 256, 256, 256, 256)
    np.testing.assert_array_equal(_hand_made_parity(batch.tokens)[batch.mask], batch.labels[batch.mask])


def _hand_made_parity(tokens):
    """One write at the first token, no decay, and a turn of pi per 1: the sign of the read is the parity."""
    b, t = tokens.shape
    one = (tokens == 2)[..., None].astype(jnp.float32)
    first = (jnp.arange(t) == 0)[None, :, None, None] * jnp.ones((b, t, 1, 1))
    pair = jnp.broadcast_to(jnp.asarray([1.0, 0.0]), (b, t, 1, 1, 2))
    # dt = 1 throughout; the first token's own turn is already in its key, so it is read back by turning C as well.
    y, _ = ssm(first, pair, pair, jnp.ones((b, t, 1)), jnp.full((b, t, 1), -1e-6), 1.0, np.pi * one[..., None])
    flipped = (y[..., 0, 0] < 0) ^ (tokens[:, :1] == 2)
    return 1 + flipped.astype(jnp.int32)


def test_run_directory_keeps_arrays_and_drops_metrics_after_the_checkpoint(tmp_path):
    arrays = dict(a=jnp.arange(3.0), step=jnp.asarray(7))
    directory = RunDirectory(tmp_path / "run", "x: 1\n")
    assert directory.restore(arrays) is None
    directory.log(dict(step=1))
    directory.save(1, arrays, dict(note="kept"))
    directory.log(dict(step=2))
    directory.close()
    directory = RunDirectory(tmp_path / "run", "x: 1\n")
    restored, extra = directory.restore(jax.tree.map(jnp.zeros_like, arrays))
    directory.close()
    assert extra == dict(note="kept") and directory.metrics() == [dict(step=1)]
    jax.tree.map(np.testing.assert_array_equal, restored, arrays)


def test_turns_by_token_are_the_models_own():
    """Layer 1 sees one token at a time, so its mean turn per token is dt * omega of that token's embedding."""
    model = LM(LMConfig(Mamba3Config(d_model=8, d_state=8, head_dim=8), 1, 3), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 1, 3)
    turns = report.turns_by_token(model, tokens)
    mixer = model.blocks[0].mixer
    u = model.blocks[0].norm(model.embedding[...][jnp.asarray([[2]])])
    dynamics = mixer.dynamics(u)
    expected = dynamics["dt"][0, 0][:, None] * dynamics["omega"][0, 0]
    np.testing.assert_allclose(turns[0, 2], expected.ravel(), rtol=1e-5)
    assert np.isnan(turns[0, 0]).all()


@pytest.mark.parametrize("task", ["parity", "modular_arithmetic_brackets", "S5", "Z60"])
def test_names_of_tokens_do_not_run_into_one_another(task):
    """Under the figure of the turns, however many tokens there are; of a few none is left out."""
    symbols = get_task(task).symbols
    figure, (_, axis) = report.plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    report._plot_turns(axis, symbols, np.zeros((1, len(symbols), 1)))
    figure.canvas.draw()
    labels = axis.get_xticklabels()
    boxes = [label.get_window_extent() for label in labels]
    report.plt.close(figure)
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))
    if len(symbols) < 15:
        assert [label.get_text() for label in labels] == list(symbols)


def test_the_selected_model_is_kept_and_scores_what_the_report_says(finished):
    values = yaml.safe_load((finished / "config.yaml").read_text())
    config, _ = command.from_dict(cell.Config, values, "config")
    (batch,) = cell.evaluation_sets(config, "test")["12"]
    with jax.default_matmul_precision("highest"):
        logits, _ = nnx.jit(lambda model, tokens: model(tokens))(load_model(finished), batch.tokens)
    summary = json.loads((finished / "summary.json").read_text())
    assert accuracy(logits, batch) == pytest.approx(summary["test"]["12"]["accuracy"])
