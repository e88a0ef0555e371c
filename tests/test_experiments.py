"""What all experiments share: sweeps that survive a bad run, grids that resume, results by name, refusals."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from experiments import cell, grid, processes, reproduce, sweep, table_5b
from experiments.command import from_dict, parse
from experiments.grid import GridConfig
from experiments.models import ModelConfig
from experiments.sweep import CurriculumConfig, Sweep
from experiments.training import Schedule, Training
from mamba3_jax import cli
from mamba3_jax.layers import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, Mamba3Config
from mamba3_jax.tasks import accuracy, get_task, mqar
from mamba3_jax.training.optimizer import OptimizerConfig

MODELS = {
    "mamba3": dict(),
    "mamba2": dict(mixer="mamba2", conv_width=2),
    "gated_deltanet": dict(mixer="gated_deltanet", conv_width=2),
    "attention": dict(mixer="attention", n_heads=2),
}


def make_sweep(task="parity", model=None, **changes) -> Sweep:
    task = get_task(task) if isinstance(task, str) else task
    options = dict(
        task=task, model=ModelConfig(**dict(d_model=8, d_state=8, head_dim=8) | (model or {})).lm(task.vocab_size),
        optimizer=OptimizerConfig(warmup_steps=2), curriculum=CurriculumConfig((4, 8), 0.5), supervision="final",
        batch_size=8, max_steps=20, peaks=(1e-2, 3e-3), seeds=(0, 1),
    )  # fmt: skip
    return Sweep(**options | changes)


def test_a_run_that_is_not_finite_fails_and_leaves_the_others_alone():
    """One of three runs gets a NaN; the others are what they are without it, and it keeps the parameters it had."""
    three = make_sweep(peaks=(1e-2, 3e-3, 1e-3), seeds=(0, 1, 2))
    healthy = three.init()
    poisoned = jax.tree.map(lambda a: a.at[1].set(jnp.nan), healthy.parameters)
    runs, metrics = three.train(healthy._replace(parameters=poisoned), 3)
    expected, expected_metrics = three.train(healthy, 3)
    assert runs.failed.tolist() == [False, True, False] and expected.failed.tolist() == [False] * 3
    for got, want, before in zip(*map(jax.tree.leaves, (runs.parameters, expected.parameters, poisoned))):
        np.testing.assert_array_equal(got[::2], want[::2])
        np.testing.assert_array_equal(got[1], before[1])
    np.testing.assert_array_equal(metrics.loss[::2], expected_metrics.loss[::2])


def test_a_failed_run_is_said_to_have_failed_and_is_never_selected(tmp_path, monkeypatch):
    """A cell of two rates, one of them poisoned in its third step: the report names it and tests the other."""
    train, calls = Sweep.train, []

    def poison(self, runs, steps):
        calls.append(steps)
        if len(calls) == 3:
            runs = runs._replace(parameters=jax.tree.map(lambda a: a.at[0].set(jnp.inf), runs.parameters))
        return train(self, runs, steps)

    monkeypatch.setattr(Sweep, "train", poison)
    command = command_of(tmp_path / "cell", max_steps=4)
    assert cell.execute(command) == 0
    summary = json.loads((tmp_path / "cell" / "summary.json").read_text())
    assert [run["failed"] for run in summary["runs"]] == [True, False]
    assert "then failed" in (tmp_path / "cell" / "report.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "cell" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["failed"] == [0] and lines[-1]["loss"][0] is None and lines[-1]["loss"][1] is not None
    assert [run["best_step"] for run in summary["runs"]] == [2, summary["selected"]["best_step"]]


def command_of(directory, **changes):
    """A cell so small that it takes seconds."""
    options = grid.smoke_options("parity") | dict(task="parity", learning_rates=[1e-3, 2e-3], **changes)
    options["model"] = options["model"] | dict(d_model=8, head_dim=8)
    config, text = from_dict(cell.Config, options, "test")
    return cell.Command(config, text, directory, "a test")


def test_a_sweep_that_does_not_fit_says_how_much_it_needs_and_what_to_lower(tmp_path, monkeypatch, capsys):
    """The need is the compiler's own figure, so it grows with the batch."""
    monkeypatch.setattr(sweep, "memory_available", lambda: 100_000)
    with pytest.raises(SystemExit) as error:
        cell.execute(command_of(tmp_path / "cell", batch_size=64))
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1 and message.startswith("batch_size: got 64")
    needed = int(message.split("needs ")[1].split(" ")[0].replace(",", ""))
    assert "the 100,000 bytes there" in message and needed > 100_000
    assert not (tmp_path / "cell").exists()
    assert "lower batch_size, n_seeds, the number of learning_rates or --processes" in message
    assert make_sweep(batch_size=128).memory_needed(1) > 1.5 * make_sweep(batch_size=32).memory_needed(1)


def test_the_memory_that_is_there_is_the_machines():
    total = sweep.memory_available() * len(jax.local_devices())
    assert 2**28 < total < 2**46


@pytest.mark.parametrize("model", MODELS)
def test_two_rows_that_share_one_are_two_rows(model):
    """Every model's answers on packed pairs are its answers on the rows by themselves."""
    one = make_sweep("modular_arithmetic", MODELS[model], peaks=(1e-2,), seeds=(0,))
    lm = one.merge(jax.tree.map(lambda p: p[0], one.init().parameters))
    batch = one.task.sample_pairs(jax.random.key(1), 8, 9, 16)
    packed, _ = jax.jit(lambda lm, b: lm(b.tokens, None, b.segment_ids))(lm, batch)
    firsts = (batch.segment_ids == 0).sum(1).tolist()
    seconds = jnp.stack([jnp.roll(tokens, -first) for tokens, first in zip(batch.tokens, firsts)])
    alone, _ = jax.jit(lambda lm, tokens: lm(tokens))(lm, seconds)
    for i, first in enumerate(firsts):
        np.testing.assert_allclose(packed[i, first:], alone[i, : 16 - first], rtol=1e-4, atol=1e-5)


def test_logits_of_the_asked_positions_only_give_the_same_loss_and_accuracy():
    """Against all logits, masked: for a task with several answers in a row, and for pairs of rows."""
    for task, curriculum in ((mqar(2, vocab_size=16), CurriculumConfig((16,), exact=True)),
                             (get_task("parity"), CurriculumConfig((8,)))):  # fmt: skip
        one = make_sweep(task, peaks=(1e-2,), seeds=(0,), curriculum=curriculum)
        parameters = jax.tree.map(lambda p: p[0], one.init().parameters)
        batch = one._training_batch(jnp.asarray(0), jax.random.key(0), curriculum.lengths[0])
        loss, correct = jax.jit(one._loss)(parameters, batch)
        logits = jax.jit(lambda p, b: one.merge(p)(b.tokens, None, b.segment_ids)[0])(parameters, batch)
        each = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.labels[..., None], -1)[..., 0]
        np.testing.assert_allclose(loss, each[batch.mask].mean(), rtol=1e-5)
        np.testing.assert_allclose(correct, accuracy(logits, batch), rtol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_products_train_float32_parameters(model):
    """The losses of two steps are the float32 ones to bfloat16's accuracy, and are not the same.

    Of two, because steps at this rate amplify what differs: Gated DeltaNet's first three losses are within 0.13%, its
    fourth is 3.9% off on a CPU that multiplies in bfloat16.
    """
    losses, options = {}, MODELS[model] | dict(d_model=32, d_state=16, n_layers=2)
    for dtype in ("float32", "bfloat16"):
        one = make_sweep("modular_arithmetic", options | dict(dtype=dtype), curriculum=CurriculumConfig((16,)))
        runs, metrics = one.train(one.init(), 2)
        assert {leaf.dtype for leaf in jax.tree.leaves(runs.parameters)} == {jnp.dtype("float32")}
        losses[dtype] = metrics.loss
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=2e-3)
    assert (losses["bfloat16"] != losses["float32"]).all()


@pytest.mark.parametrize(
    "lengths, longest",
    [((10, 20, 40, 80, 160), (10, 20, 40, 80, 160)), ((40, 80, 120, 160), (40, 80, 160, 160)), ((7, 9), (9, 9))],
)
def test_stages_share_sizes_that_hold_their_rows(lengths, longest):
    curriculum = CurriculumConfig(lengths)
    assert tuple(curriculum.longest(stage) for stage in range(len(lengths))) == longest


def test_each_mixer_gets_its_own_options_and_no_others():
    kinds = {"mamba3": Mamba3Config, "mamba2": Mamba2Config, "gated_deltanet": GatedDeltaNetConfig,
             "attention": AttentionConfig}  # fmt: skip
    for name, options in MODELS.items():
        config = ModelConfig(d_model=8, d_state=8, head_dim=8, **options).mixer_config()
        assert type(config) is kinds[name] and config.d_model == 8
    assert ModelConfig(d_model=8, mixer="attention", rotation="none").mixer_config().rotation == "none"
    with pytest.raises(ValueError, match="^rotation: got rope with mixer 'mamba2'"):
        ModelConfig(d_model=8, head_dim=8, mixer="mamba2", rotation="rope")
    with pytest.raises(ValueError, match="^mixer: got 'mamba4'"):
        ModelConfig(d_model=8, mixer="mamba4")


GRID = {
    "shared": {"model": {"d_state": 8, "head_dim": 8}},
    "models": {"mamba3": {}, "mamba2": {"mixer": "mamba2", "conv_width": 2}},
    "tasks": {"parity": {}, "even_pairs": {}},
    "d_models": [8, 16],
}


@pytest.fixture
def tiny_grid(tmp_path):
    """(options) -> the command of a grid of eight cells, two of them in smoke form."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(GRID, sort_keys=False))
    argv = ["--config", str(path), "--results_dir", str(tmp_path / "results")]
    return lambda *options: parse("table_5b", GridConfig, [*argv, *options], cells=True)


def run_grid(command) -> int:
    return grid.run(command, command.config)


def test_a_grid_is_every_model_on_every_task_at_every_width(tiny_grid):
    places = list(grid.cells(tiny_grid().config))
    assert {place[:3] for place in places} == {
        (model, task, d) for model in GRID["models"] for task in GRID["tasks"] for d in GRID["d_models"]
    }
    for place in places:
        assert (place.config.task, place.config.model.d_model) == (place.task, place.d_model)
        assert place.config.model.mixer == place.model
    smoke = list(grid.cells(tiny_grid().config, smoke=True))
    assert {p.model for p in smoke} == set(GRID["models"]) and {p.task for p in smoke} == set(GRID["tasks"])


def test_a_grid_runs_what_is_not_done_and_what_only_names(tiny_grid, monkeypatch):
    """Killed after its first cell, it does the second; done, it does nothing; with --only, it does that."""
    done, execute = [], cell.execute

    def once(command, deviations):
        done.append(command.results_dir.name)
        return execute(command, deviations) if len(done) != 2 else 130

    monkeypatch.setattr(cell, "execute", once)
    assert run_grid(tiny_grid("--smoke", "--only", "*even_pairs*")) == 0
    assert done == ["mamba2,even_pairs,d=8"]
    assert run_grid(tiny_grid("--smoke")) == 130
    assert run_grid(tiny_grid("--smoke")) == 0
    assert done[1:] == ["mamba3,parity,d=8"] * 2
    assert run_grid(tiny_grid("--smoke")) == 0 and len(done) == 3
    found = grid.summaries(tiny_grid("--smoke"))
    assert {key[:2] for key in found} == {("mamba2", "even_pairs"), ("mamba3", "parity")}
    assert found["mamba3", "parity", 8]["command"].endswith("--only 'mamba3,parity,d=8'")


def test_cells_in_processes_of_their_own_leave_what_one_process_leaves(tiny_grid, capsys):
    """And a second time there is nothing to do."""
    apart = tiny_grid("--smoke", "--processes", "2")
    assert run_grid(apart) == 0
    found = {key: summary["command"] for key, summary in grid.summaries(apart).items()}
    assert {key[:2] for key in found} == {("mamba2", "even_pairs"), ("mamba3", "parity")}
    assert found["mamba3", "parity", 8] == f"{tiny_grid('--smoke').line} --only 'mamba3,parity,d=8'"
    assert capsys.readouterr().out.count(": done; ") == 2
    assert run_grid(apart) == 0 and not capsys.readouterr().out


@pytest.fixture
def shell(tiny_grid, tmp_path, monkeypatch):
    """(scripts by name) -> the status of running them, two at a time, as if they were cells; run.started: they."""

    def start(command, name, gpu, environment):
        with (tmp_path / f"{name}.log").open("w") as log:
            process = subprocess.Popen(["bash", "-c", scripts[name]], stdout=log)
        run.started.append(process)
        return processes._Running(name, gpu, process, tmp_path / f"{name}.log")

    def run(found: dict[str, str]) -> int:
        scripts.update(found)
        return processes.run_apart(tiny_grid("--processes", "2"), list(found))

    scripts: dict[str, str] = {}
    run.started = []
    monkeypatch.setattr(processes, "_start", start)
    return run


def terminate_once(*there) -> None:
    """Sends this process SIGTERM when all of these files are there, or when they should be."""

    def wait():
        deadline = time.monotonic() + 30
        while not all(path.exists() for path in there) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def test_a_cell_that_fails_leaves_the_others_alone_and_its_status_is_the_grids(shell, tmp_path, capsys):
    """The first of two; what it printed is kept, and that of the others is not."""
    scripts = {"bad": "echo why; exit 3", "good": f"touch {tmp_path}/a", "worse": "sleep 1; kill -9 $$"}
    assert shell(scripts | {"next": f"touch {tmp_path}/b"}) == 3
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()
    out = capsys.readouterr().out
    assert f"== bad: status 3, see {tmp_path}/bad.log; " in out and "== worse: killed by SIGKILL, see " in out
    assert "2 of 4 cells done" in out and (tmp_path / "bad.log").read_text() == "why\n"
    assert not (tmp_path / "good.log").exists()


@pytest.mark.parametrize("failed", [False, True], ids=["none failed", "one failed"])
def test_an_interrupt_is_handed_on_and_what_waits_is_not_begun(shell, tmp_path, capsys, failed):
    """Both cells that run save, also if one before them has failed; the third never starts."""
    save = "trap 'touch {0}; exit 130' INT; touch {0}.began; while true; do sleep 0.1; done"
    cells = {"failing": "exit 3"} if failed else {}
    cells |= {name: save.format(tmp_path / name) for name in ("one", "two")} | {"three": f"touch {tmp_path}/three"}
    terminate_once(tmp_path / "one.began", tmp_path / "two.began")
    assert shell(cells) == (3 if failed else 130)
    assert (tmp_path / "one").exists() and (tmp_path / "two").exists() and not (tmp_path / "three").exists()
    assert "the same command resumes" in capsys.readouterr().out


def test_a_second_interrupt_ends_at_once_what_does_not_heed_the_first(shell, tmp_path):
    terminate_once(tmp_path / "began")
    deaf = f"trap 'touch {tmp_path}/asked' INT; touch {tmp_path}/began; while true; do sleep 0.1; done"
    terminate_once(tmp_path / "asked")
    with pytest.raises(KeyboardInterrupt):
        shell({"one": deaf, "two": "exec sleep 60"})
    assert (tmp_path / "asked").exists()
    assert [process.returncode for process in shell.started][0] == -signal.SIGKILL
    assert all(process.returncode is not None for process in shell.started)


def test_nothing_goes_on_after_an_error(shell, tmp_path, monkeypatch):
    def stop(seconds):
        raise RuntimeError("no more")

    monkeypatch.setattr(processes.time, "sleep", stop)
    with pytest.raises(RuntimeError, match="no more"):
        shell({"one": "exec sleep 60"})
    assert [process.returncode for process in shell.started] == [-signal.SIGKILL]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_cell_is_asked_to_stop_when_the_process_that_started_it_is_killed(tmp_path):
    """A process in the middle starts a cell's shell and is killed; what the cell would run is a sleep here."""
    waits = "open(sys.argv[1], 'w').close(); import time; time.sleep(60)"
    cell_code = processes.CELL.replace('runpy.run_module("mamba3_jax.cli", run_name="__main__")', waits)
    assert cell_code != processes.CELL
    began = tmp_path / "began"
    middle = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]], start_new_session=True)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", middle, cell_code, str(began)], stdout=subprocess.PIPE, text=True)
    with parent:
        pid = int(parent.stdout.readline())
        while not began.exists():
            time.sleep(0.05)
        parent.kill()
    for _ in range(100):
        if not _lives(pid):
            break
        time.sleep(0.1)
    assert not _lives(pid)


def _lives(pid: int) -> bool:
    """Not so if it is gone, or waits only for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_processes_share_the_gpus_and_their_memory(tiny_grid, monkeypatch):
    """Four on two GPUs: each runs on the GPU with the fewest so far, and may take half of its memory."""
    started: list[tuple[list[str], dict]] = []

    def popen(line, env, start_new_session, **_):
        assert start_new_session
        started.append((line, env))

    monkeypatch.setattr(processes.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(processes.subprocess, "Popen", popen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    command, running = tiny_grid("--processes", "4"), []
    command.results_dir.mkdir()
    gpus = processes._gpus(4)
    for name in "abcd":
        gpu = processes._least_used(gpus, running)
        running.append(processes._start(command, name, gpu, processes._share(2)))
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in started] == ["3", "5", "3", "5"]
    assert all(env["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.450" for _, env in started)
    assert all(env["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false" for _, env in started)
    assert started[0][0][3:] == [*shlex.split(command.line)[3:], "--only", "a"]


def test_processes_on_a_tpu_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(processes.jax, "default_backend", lambda: "tpu")
    with pytest.raises(SystemExit):
        processes._gpus(4)
    assert capsys.readouterr().err.startswith("processes: got 4 on a machine with tpu devices")


def test_less_than_one_process_is_refused(tiny_grid, capsys):
    with pytest.raises(SystemExit):
        tiny_grid("--processes", "0")
    assert capsys.readouterr().err == "processes: got 0; allowed: a positive integer\n"


def test_only_that_matches_nothing_is_refused(tiny_grid, capsys):
    command = tiny_grid("--only", "nope")
    with pytest.raises(SystemExit):
        grid.check_only(command, command.config)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("only: got 'nope'") and "mamba3,parity,d=8" in message


def test_a_cell_from_before_an_option_was_added_is_of_the_same_config(tiny_grid):
    """Its config.yaml lacks the option, which then had what is now its default; another value is another config."""
    command = tiny_grid("--smoke")
    place = next(grid.cells(command.config, smoke=True))
    folder = command.results_dir / place.name
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    assert "  dtype: float32\n" in place.text
    (folder / "config.yaml").write_text(place.text.replace("  dtype: float32\n", ""))
    assert place[:3] in grid.summaries(command)
    (folder / "config.yaml").write_text(place.text.replace("dtype: float32", "dtype: bfloat16"))
    with pytest.raises(SystemExit):
        grid.summaries(command)


def test_a_finished_cell_of_another_config_is_refused(tiny_grid, capsys):
    """Not shown in a table beside cells of this one, and not skipped as done."""
    command = tiny_grid("--smoke")
    place = next(grid.cells(command.config, smoke=True))
    folder = command.results_dir / place.name
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    (folder / "config.yaml").write_text(place.text.replace("batch_size: 4", "batch_size: 8"))
    for look in (run_grid, grid.summaries):
        with pytest.raises(SystemExit):
            look(command)
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "'batch_size: 8' there, 'batch_size: 4' here" in message


def test_a_sweep_whose_runs_all_fail_before_a_validation_reports_no_result(tmp_path, capsys, monkeypatch):
    init = Sweep.init
    nan = lambda runs: runs._replace(parameters=jax.tree.map(lambda a: a * jnp.nan, runs.parameters))  # noqa: E731
    monkeypatch.setattr(Sweep, "init", lambda self: nan(init(self)))
    with pytest.raises(SystemExit):
        cell.execute(command_of(tmp_path / "cell"))
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("learning_rates: got [0.001, 0.002], of which every run")
    assert not (tmp_path / "cell" / "summary.json").exists()


@pytest.mark.parametrize("solved, ends", [((0,), False), ((0, 3), True)])
def test_a_sweep_ends_early_only_when_every_seed_is_solved(solved, ends):
    """Two seeds of two rates: runs 0 and 1 are of the first, 2 and 3 of the second."""
    one = make_sweep(peaks=(1e-2, 3e-3) * 2, seeds=(0, 0, 1, 1))
    schedule = Schedule(1, 1, "8", "accuracy", solved=0.9)
    scores = [{"8": dict(accuracy=1.0 if i in solved else 0.5, loss=1.0)} for i in range(4)]
    training = Training(one, schedule, one.init(), None, scores, [1] * 4, [8] * 4, 0.0, [], {})
    assert training.done is ends
    assert training.by_seed == [[0, 1], [2, 3]]


def test_a_bad_cell_of_a_grid_is_named_in_one_line(tiny_grid, capsys):
    config = dataclasses.replace(tiny_grid().config, models={"odd": {"rotation": "spin"}})
    with pytest.raises(SystemExit):
        list(grid.cells(config))
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("cell odd,parity,d=8: ") and "spin" in message


def test_the_table_has_the_best_width_beside_the_papers_number_and_says_what_was_not_run():
    """From made-up summaries: d=32 validates better, so its test counts, though d=64 tests better."""
    command = parse("table_5b", GridConfig, ["--config", "configs/state_tracking/table_5b.yaml"], cells=True)

    def summary(validation, test, d):
        score = dict(accuracy=0.5 + test / 2, scaled=100 * test, standard_error=0.1, loss=0.1, rows=16384)
        run = dict(learning_rate=1e-3, seed=0, best_step=7, max_length=160,
                   validation={"256": dict(accuracy=0.5 + validation / 2, loss=0.1)})  # fmt: skip
        return dict(
            task="parity", headline="256", selected=run, test={"256": score, "40-256": score}, curve={},
            seeds=[dict(test={"256": score})], deviations=[f"width {d}"], seconds=36.0, device="x",
        )  # fmt: skip

    done = {("mamba3", "parity", 64): summary(0.8, 0.95, 64), ("mamba3", "parity", 32): summary(0.9, 0.91, 32)}
    text = table_5b.render(command, done)
    assert "| Mamba-3 | 91.00 (100.00) | not run (98.51) | not run (87.75) |" in text
    assert "| Gated DeltaNet, eigenvalues in [-1, 1] | not run (100.00) | not run (99.25) | not run (93.50) |" in text
    assert "- width 64 (mamba3,parity,d=64)" in text and "64: 80.00" in text
    assert "| Mamba-3 | 2 of 6 | 1.2 | x |" in text and "| Mamba-2 | 0 of 6 | 0.0 | - |" in text


def test_a_deviation_names_its_cells_or_those_that_it_spares_whichever_are_fewer():
    done = {("mamba3", "parity", d): dict(deviations=["a", "b", "c"][: 3 if d == 8 else 2 if d == 16 else 1])
            for d in (8, 16, 32)}  # fmt: skip
    assert table_5b._deviations(done) == [
        "- a (all cells)",
        "- b (all cells but mamba3,parity,d=32)",
        "- c (mamba3,parity,d=8)",
    ]


def test_reproduce_lists_every_result_with_its_cost(capsys):
    assert cli.main(["reproduce", "--list"]) == 0
    text = capsys.readouterr().out
    for name, result in reproduce.RESULTS_BY_NAME.items():
        assert f"{name} " in text and f"2 CPU cores: {result.cpu}, one H100: {result.gpu}" in text
        assert f"mamba3 experiment {result.experiment}" in text


def test_reproduce_knows_every_experiment():
    """Whatever can be run has a name; state_tracking has several."""
    assert {result.experiment for result in reproduce.RESULTS_BY_NAME.values()} == set(cli._experiments())


@pytest.mark.parametrize(
    "argv, given",
    [
        (["chess"], "'chess'"),
        ([], "usage"),
        (["parity_cpu", "--fast"], "got --fast"),
        (["parity_cpu", "--processes=2"], "got --processes=2; allowed: with one of table_5b"),
        (["a", "b"], "usage"),
    ],
)
def test_reproduce_refuses_what_it_does_not_know(argv, given, capsys):
    try:
        status = cli.main(["reproduce", *argv])
    except SystemExit as error:
        status = error.code
    message = capsys.readouterr().err
    assert status == 2 and message.count("\n") == 1 and given in message


def test_reproduce_runs_a_result_end_to_end_in_smoke_form(capsys):
    assert cli.main(["reproduce", "chunked_latency", "--smoke"]) == 0
    assert "chunked_latency ran end to end" in capsys.readouterr().out
