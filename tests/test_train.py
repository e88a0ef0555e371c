"""`mamba3 train`: the step, exact resumption, what is written, and one line for what is wrong."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from bigram import Bigram
from mamba3_jax.checksums import CHECKSUMS
from mamba3_jax.cli import main as mamba3
from mamba3_jax.command import parse
from mamba3_jax.data import pipeline
from mamba3_jax.data.pipeline import DataConfig, TokenBatch, batches, open_data
from mamba3_jax.distributed.mesh import MeshConfig, make_mesh
from mamba3_jax.layers import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, Mamba3Config, Undecayed
from mamba3_jax.models import LM, LMConfig
from mamba3_jax.models.checkpoint import load_model, read_config, save_model
from mamba3_jax.training import train_command
from mamba3_jax.training.config import TrainConfig
from mamba3_jax.training.loop import Run
from mamba3_jax.training.metrics import line_of
from mamba3_jax.training.optimizer import PretrainingOptimizerConfig, learning_rate
from mamba3_jax.training.run_directory import RunDirectory
from mamba3_jax.training.state import TrainState, init_state
from mamba3_jax.training.step import StepConfig, compile_train_step
from mamba3_jax.training.train_command import _open, main
from test_data import write
from test_tensorboard import scalars

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(d_model=32, d_state=16, head_dim=16)
MODEL = LMConfig(Mamba3Config(**SMALL), n_layers=1, vocab_size=256, mlp_width=64)
OPTIMIZER = PretrainingOptimizerConfig(warmup_steps=2, peak_learning_rate=1e-2)
ONE_DEVICE = make_mesh(MeshConfig())
STEP = StepConfig(MODEL, OPTIMIZER, steps=20, loss_chunk=8)
OPTIONS = [
    "--model.mamba3.d_model=32", "--model.mamba3.d_state=16", "--model.mamba3.head_dim=16", "--model.dtype=float32",
    "--model.n_layers=1",
    "--data.context=32", "--data.batch_size=4", "--optimizer.warmup_steps=4", "--eval_batches=2", "--log_every=3",
]  # fmt: skip
# How often the run of the kill test is killed; the promise is ten, as .ci/run has it.
KILLS = int(os.environ.get("MAMBA3_TRAIN_KILLS", "3"))


def batch_of(seed: int, b: int = 4, t: int = 21) -> TokenBatch:
    """Random tokens in two documents a row, some without a target."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, 256, (2, b, t), dtype=np.int32)
    segments = np.broadcast_to((np.arange(t) >= t // 3).astype(np.int32), (b, t)).copy()
    return TokenBatch(tokens, targets, segments, rng.random((b, t)) < np.linspace(0.3, 0.9, b)[:, None])


@functools.cache
def compiled(config: StepConfig):
    return compile_train_step(config, ONE_DEVICE)


@functools.cache
def initial(model: LMConfig) -> TrainState:
    """The state of seed 0, on the host."""
    return jax.device_get(init_state(model, OPTIMIZER, ONE_DEVICE, seed=0))


def steps(config: StepConfig, *batches: TokenBatch):
    """(state, metrics of each step), from the parameters of seed 0."""
    step, state, metrics = compiled(config), jax.tree.map(jnp.array, initial(config.model)), []
    for batch in batches:
        state, out = step(state, batch)
        metrics.append(jax.device_get(out))
    return state, metrics


def options(run_dir: Path, *more: str) -> list[str]:
    return [*OPTIONS, f"--run_dir={run_dir}", *more]


def written(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def weights(run_dir: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(load_model(run_dir), nnx.Param))]


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_gradient_accumulation_is_one_large_batch():
    """Also where the parts have different numbers of targets."""
    batch = batch_of(1)
    expected, (whole,) = steps(STEP, batch)
    got, (parts,) = steps(dataclasses.replace(STEP, accumulation=2), batch)
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-6)
    np.testing.assert_allclose(parts.gradient_norm, whole.gradient_norm, rtol=1e-5)
    # Adam's first moment is the gradient, times 0.1 and clipped.
    assert_close(got.optimizer_state[1].mu, expected.optimizer_state[1].mu, atol=1e-7)


def test_rematerialised_blocks_change_nothing_and_need_less_memory():
    model = LMConfig(AttentionConfig(32, n_heads=2), n_layers=4, vocab_size=256, mlp_width=64)
    batch, needed, results = batch_of(1, t=64), {}, {}
    for remat in ("none", "blocks"):
        config = dataclasses.replace(STEP, model=model, remat=remat)
        step = compile_train_step(config, ONE_DEVICE).lower(initial(model), batch).compile()
        needed[remat] = step.memory_analysis().temp_size_in_bytes
        results[remat] = step(jax.tree.map(jnp.array, initial(model)), batch)
    assert needed["blocks"] < 0.7 * needed["none"]
    (plain, expected), (again, metrics) = results["none"], results["blocks"]
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-6)
    assert_close(again.optimizer_state[1].mu, plain.optimizer_state[1].mu, atol=1e-7)


def test_bfloat16_computes_on_float32_weights_and_states():
    config = dataclasses.replace(STEP, model=dataclasses.replace(MODEL, dtype="bfloat16"))
    state, (metrics,) = steps(config, batch_of(1))
    kept = (state.parameters, state.optimizer_state)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert metrics.loss == pytest.approx(steps(STEP, batch_of(1))[1][0].loss, rel=0.01)
    assert metrics.loss.dtype == np.float32


def test_z_loss_adds_to_what_is_descended_but_not_to_the_loss_that_is_reported():
    plain, with_z = (steps(dataclasses.replace(STEP, z_loss=z), batch_of(1))[1][0] for z in (0.0, 1.0))
    assert with_z.loss == plain.loss and with_z.gradient_norm > 1.01 * plain.gradient_norm


@pytest.mark.parametrize(
    "model",
    [
        LMConfig(Mamba3Config(**SMALL, mimo_rank=2), 1, 256),
        LMConfig(Mamba2Config(**SMALL), 1, 256),
        LMConfig(GatedDeltaNetConfig(**SMALL), 1, 256),
        LMConfig(AttentionConfig(32, n_heads=2), 1, 256, tie_embeddings=False),
        LMConfig(Mamba3Config(**SMALL), 2, 256, attention=AttentionConfig(32, n_heads=2), attention_layers=(1,)),
    ],
    ids=["mimo", "mamba2", "gated_deltanet", "attention", "hybrid"],
)
def test_every_mixer_learns(model):
    """A batch by heart: its loss falls at every one of a few steps."""
    _, metrics = steps(dataclasses.replace(STEP, model=model, steps=5), *[batch_of(1)] * 5)
    losses = [float(m.loss) for m in metrics]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    step = compiled(STEP)
    state, _ = steps(STEP, batch_of(1))
    broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), state.parameters)
    before = jax.tree.map(np.array, (broken, state.optimizer_state))
    state, metrics = step(state._replace(parameters=broken), batch_of(2))
    assert not metrics.finite and metrics.skipped == metrics.skipped_in_row == 1 and state.step == 2
    jax.tree.map(np.testing.assert_array_equal, (state.parameters, state.optimizer_state), before)
    whole, _ = steps(STEP, batch_of(1))
    state, metrics = step(state._replace(parameters=whole.parameters), batch_of(3))
    assert metrics.finite and metrics.skipped == 1 and metrics.skipped_in_row == 0


def test_norms_biases_and_rates_do_not_decay():
    """A step without a target has no gradient: only decay moves the parameters."""
    config = dataclasses.replace(STEP, optimizer=dataclasses.replace(OPTIMIZER, weight_decay=0.5))
    batch = batch_of(1)
    before = initial(MODEL).parameters
    state, _ = steps(config, batch._replace(mask=np.zeros_like(batch.mask)))
    abstract = nnx.state(nnx.eval_shape(lambda: LM(MODEL, rngs=nnx.Rngs(0))), nnx.Param)
    for (path, variable), old, new in zip(
        nnx.to_flat_state(abstract), jax.tree.leaves(before), jax.tree.leaves(state.parameters), strict=True
    ):
        factor = 1.0 if isinstance(variable, Undecayed) else 1 - 0.5 * OPTIMIZER.peak_learning_rate / 2
        np.testing.assert_allclose(new, factor * old, rtol=1e-6, err_msg=str(path))


def test_wsd_holds_the_rate_and_then_decays_linearly():
    config = dataclasses.replace(OPTIMIZER, schedule="wsd", decay_fraction=0.2, end_learning_rate=0.0, warmup_steps=10)
    rates = [float(learning_rate(config, jnp.float32(1.0), jnp.asarray(step), 100)) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[10:81], 1.0)
    np.testing.assert_allclose(rates[80:], 1 - np.arange(20) / 20, rtol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbed."""
    path = tmp_path_factory.mktemp("finished") / "run"
    extras = ["--tensorboard=true"] if importlib.util.find_spec("tensorboardX") else []
    several = ["--checkpoint_every=4", "--eval_every=5", "--profile_steps=2:4", *extras]
    assert main(options(path, "--steps=10", *several)) == 0
    return path


def test_a_run_writes_what_it_says(finished, capsys):
    records = written(finished)
    assert [r["step"] for r in records] == [3, 5, 6, 9, 10]
    assert records[-1].keys() == {
        "step", "loss", "gradient_norm", "learning_rate", "skipped", "tokens", "validation_loss",
        "validation_perplexity",
    }  # fmt: skip
    assert records[-1]["tokens"] == 10 * 4 * 32 and records[1].keys() == {
        "step", "validation_loss", "validation_perplexity",
    }  # fmt: skip
    timing = written(finished, "timing.jsonl")
    assert timing[1]["tokens_per_second"] > 0 and 0 <= timing[1]["data_wait"] <= 1 and "mfu" not in timing[1]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "profile").rglob("*.xplane.pb"))
    assert read_config(finished) == LMConfig(Mamba3Config(**SMALL), n_layers=1, vocab_size=256)
    assert mamba3(["generate", str(finished), "--prompt", "The ", "--max_new_tokens=4", "--temperature=0"]) == 0
    assert capsys.readouterr().out


def test_tensorboard_has_the_numbers_of_both_files(finished):
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    records = written(finished) + written(finished, "timing.jsonl")
    wanted = {(r["step"], name): value for r in records for name, value in r.items() if name != "step"}
    assert scalars(finished / "tensorboard") == pytest.approx(wanted, rel=1e-6)


def test_the_written_config_is_that_of_the_run(finished, tmp_path):
    """`--config run/config.yaml` is the same run again."""
    assert main(["--config", str(finished / "config.yaml"), f"--run_dir={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again/metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def nll_of(model: LM, batch: TokenBatch) -> tuple[float, int]:
    """The sum over the targets of a batch, from all logits at once, and their number."""
    run = nnx.jit(lambda model, tokens, ids: model(tokens, None, ids)[0])
    logits = run(model, jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids))
    likely = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch.targets)[..., None], -1)[..., 0]
    return -float(jnp.sum(likely * batch.mask)), int(batch.mask.sum())


def test_validation_is_the_mean_over_its_targets(finished):
    """Of the final weights."""
    data = open_data(DataConfig(context=32, batch_size=4))
    held_out = itertools.islice(batches(data, "validation", seed=0), 2)
    nll, count = np.sum([nll_of(load_model(finished), batch) for batch in held_out], axis=0)
    assert written(finished)[-1]["validation_loss"] == pytest.approx(nll / count, rel=1e-5)
    assert written(finished)[-1]["validation_perplexity"] == pytest.approx(np.exp(nll / count), rel=1e-5)


def test_sigterm_saves_the_step_and_the_same_command_goes_on(finished, tmp_path, monkeypatch, capsys):
    """To the same bytes, wherever in an interval it came."""
    path = tmp_path / "run"
    command = options(path, "--steps=10", "--checkpoint_every=4", "--eval_every=5")
    advance = Run.advance

    def interrupted(run):
        line = advance(run)
        if run.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return line

    monkeypatch.setattr(Run, "advance", interrupted)
    assert main(command) == 130 and "resumes" in capsys.readouterr().out
    assert RunDirectory(path, (path / "config.yaml").read_text()).latest_step == 7
    monkeypatch.setattr(Run, "advance", advance)
    assert main(command) == 0
    assert (path / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, weights(path), weights(finished))


def test_too_many_steps_that_are_not_finite_stop_the_run(tmp_path, monkeypatch, capsys):
    """With one line; the last good checkpoint stays, and is the newest."""
    path = tmp_path / "run"
    advance = Run.advance

    def broken(run):
        if run.step == 3:
            nan = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), run.state.parameters)
            run.state = run.state._replace(parameters=nan)
        return advance(run)

    monkeypatch.setattr(Run, "advance", broken)
    with pytest.raises(SystemExit) as stopped:
        main(options(path, "--steps=30", "--checkpoint_every=1", "--max_nonfinite=5", "--eval_every=5"))
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert "5 steps in a row" in err and "checkpoint of step 3" in err and err.count("\n") == 1
    assert "validation not finite, perplexity not finite" in out
    assert [r["validation_loss"] for r in written(path) if "validation_loss" in r] == [None]
    assert RunDirectory(path, (path / "config.yaml").read_text()).latest_step == 3


def test_init_from_starts_from_the_weights_of_another_run(finished, tmp_path, capsys):
    """Its first loss is theirs on the first batch; a run that is resumed goes on from its own checkpoint."""
    path = tmp_path / "run"
    start = ["--config", str(finished / "config.yaml"), f"--run_dir={path}", f"--init_from={finished}"]
    assert main([*start, "--steps=1", "--seed=1"]) == 0
    batch = next(batches(open_data(DataConfig(context=32, batch_size=4)), "train", seed=1))
    nll, count = nll_of(load_model(finished), batch)
    assert written(path)[0]["loss"] == pytest.approx(nll / count, rel=1e-5)
    before = weights(path)
    capsys.readouterr()
    assert main([*start, "--steps=1", "--seed=1"]) == 0 and len(written(path)) == 1
    assert "already finished, 1 steps" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, weights(path), before)


def test_a_run_that_ended_before_its_first_checkpoint_still_starts_from_init_from(finished, tmp_path):
    path = tmp_path / "run"
    start = ["--config", str(finished / "config.yaml"), f"--run_dir={path}", f"--init_from={finished}"]
    config = parse("train", TrainConfig, start)
    RunDirectory(path, config.text).close()
    run = _open(config)
    got = [np.asarray(leaf) for leaf in jax.tree.leaves(run.state.parameters)]
    run.close()
    jax.tree.map(np.testing.assert_array_equal, got, weights(finished))


def test_other_data_are_refused_and_the_metrics_stay(finished, tmp_path, monkeypatch, capsys):
    """Also those of the steps after the checkpoint."""
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    shutil.rmtree(path / "checkpoints/10")
    before = (path / "metrics.jsonl").read_bytes()
    other = dataclasses.replace(open_data(DataConfig(context=32, batch_size=4)), checksum="other")
    monkeypatch.setattr(train_command, "open_data", lambda config: other)
    with pytest.raises(SystemExit):
        main(["--config", str(path / "config.yaml"), f"--run_dir={path}"])
    err = capsys.readouterr().err
    assert err.startswith("data.path: got None (state: got") and err.count("\n") == 1
    assert (path / "metrics.jsonl").read_bytes() == before


def test_a_damaged_validation_shard_stops_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    """Of data too large to be checked when they are opened."""
    monkeypatch.setattr(pipeline, "CHECKED_WHEN_OPENED", 0)
    data = write(tmp_path / "data", dict(train=[np.arange(256)], validation=[np.arange(256)]), 256)
    (shard,) = data.glob("validation*.tokens")
    shard.write_bytes(b"\1" + shard.read_bytes()[1:])
    with pytest.raises(SystemExit) as stopped:
        main(options(tmp_path / "run", "--steps=3", "--eval_every=1", f"--data.path={data}"))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith(f"{shard}: got a wrong checksum") and err.count("\n") == 1


def test_data_without_a_validation_split_are_trained_on_and_say_so(tmp_path, capsys):
    data = write(tmp_path / "data", dict(train=[np.arange(256)]), 256)
    assert main(options(tmp_path / "run", "--steps=1", f"--data.path={data}")) == 0
    assert f"data.path={data}: no split validation" in capsys.readouterr().out
    assert "validation_loss" not in written(tmp_path / "run")[-1]


def test_data_may_be_moved_but_not_changed_between_two_parts_of_a_run(tmp_path, capsys):
    here, there, other = (tmp_path / name for name in ("here", "there", "other"))
    write(here, dict(train=[np.arange(256)]), 256)
    write(other, dict(train=[np.arange(256)] * 2), 256)
    assert main(options(tmp_path / "run", "--steps=1", f"--data.path={here}")) == 0
    here.rename(there)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        main(options(tmp_path / "run", "--steps=1", f"--data.path={other}"))
    assert capsys.readouterr().err.startswith(f"data.path: got {other} (state: got one of a stream with data")
    assert {path: path.read_bytes() for path in files} == files
    assert main(options(tmp_path / "run", "--steps=1", f"--data.path={there}")) == 0
    assert "already finished" in capsys.readouterr().out


def test_a_line_tells_the_rate_of_a_device_where_there_are_several():
    timing = dict(tokens_per_second=1000.0, tokens_per_second_per_device=250.0, tflops_per_device=1.0, data_wait=0.0)
    assert "  1,000 tokens/s  250 tokens/s/device  " in line_of(dict(step=1), timing, 2)
    alone = line_of(dict(step=1), timing | dict(tokens_per_second_per_device=1000.0), 2)
    assert "1,000 tokens/s" in alone and "tokens/s/device" not in alone


@pytest.mark.parametrize(
    "option, message",
    [
        (
            "--model.vocab_size=200",
            "model.vocab_size: got 200 for data whose token ids go up to 255; allowed: at least 256",
        ),
        ("--data.path=nowhere", "nowhere"),
        ("--init_from=nowhere", "model: got nowhere, without model.yaml"),
        ("--accumulation=3", "accumulation: got 3; allowed: a divisor of data.batch_size=4"),
        ("--profile_steps=4:2", "profile_steps: got '4:2'; allowed: 'a:b' with a < b"),
        ("--model.mamba2.d_model=32", "allowed: options of one of mamba3, mamba2, gated_deltanet, attention"),
        ("--model.mamba3.d_state=15", "d_state: got 15; allowed: an even size"),
        ("--optimizer.schedule=linear", "cosine"),
        ("--model.mamba3.implementation=triton", "implementation: got 'triton' on a machine with cpu devices"),
        ("--run_dir=gs://bucket/run", "run_dir: got gs://bucket/run; allowed: a folder of a mounted file system"),
        ("--z_loss=-1", "z_loss: got -1.0; allowed: a number >= 0"),
        ("--seed=4294967296", "seed: got 4294967296; allowed: 0 to 4294967295"),
    ],
)
def test_a_mistake_is_one_line_before_any_file(option, message, tmp_path, capsys):
    path = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        main(options(path, "--steps=3", option))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1
    assert not path.exists()


def test_weights_of_another_model_and_runs_of_another_config_are_refused(finished, tmp_path, capsys):
    """Also weights of the same shapes, where the operator is another one."""
    bare = dataclasses.replace(MODEL, mlp_width=0)
    heavy = dataclasses.replace(bare, mixer=Mamba3Config(**SMALL, a_activation="heavy_tail", dt_max=0.2))
    large = dataclasses.replace(bare, vocab_size=512, dtype="bfloat16")
    for name, config in dict(heavy=heavy, large=large).items():
        save_model(tmp_path / name, config, nnx.to_pure_dict(nnx.state(LM(config, rngs=nnx.Rngs(0)), nnx.Param)))
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    for command, message in (
        (
            options(tmp_path / "run", "--steps=3", f"--init_from={tmp_path / 'heavy'}"),
            "heavy, a model whose mixer.a_activation is 'heavy_tail'; allowed: 'softplus', as in this run",
        ),
        (
            options(tmp_path / "run", "--steps=3", f"--init_from={tmp_path / 'large'}"),
            "of shape (512, 32); allowed: (256, 32)",
        ),
        (options(finished, "--steps=11"), "a run of another config ('steps: 10' there, 'steps: 11' here)"),
        (options(tmp_path, "--steps=3"), "which holds other files; allowed: a run or a new path"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()} == before


def test_a_checkpoint_of_another_model_is_refused_by_the_name_of_an_array(finished):
    """Where a directory's config does not tell."""
    directory = RunDirectory(finished, (finished / "config.yaml").read_text())
    other = dataclasses.replace(MODEL, mlp_width=0, mixer=Mamba3Config(d_model=48, d_state=16, head_dim=16))
    with pytest.raises(ValueError, match=r"checkpoints/10: got .* of shape \(4, 1, 16\); allowed: \(6, 1, 16\)"):
        directory.restore(init_state(other, OPTIMIZER, ONE_DEVICE, seed=0))


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(finished, tmp_path, damage):
    """Each of its files; without it the older one is restored, and one without checksums as it is."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = run / "checkpoints/10"
    files = [path for part in ("arrays", "extra") for path in (newest / part).rglob("*") if path.is_file()]
    directory = RunDirectory(run, (run / "config.yaml").read_text())
    like = initial(read_config(finished))
    for file in files:
        intact = file.read_bytes()
        file.unlink()
        if damage != "missing":
            changed = bytes([intact[0] ^ 1]) + intact[1:] if damage == "flipped" and intact else intact[:-1] or b"x"
            file.write_bytes(changed)
        with pytest.raises(ValueError) as error:
            directory.restore(like)
        told = str(error.value)
        assert told.startswith(f"{file}: got ") and "\n" not in told
        assert told.endswith(f"without {newest} the run goes on from the checkpoint of step 8")
        file.write_bytes(intact)
    assert directory.restore(like)[0].step == 10
    directory.close()
    shutil.rmtree(newest)
    (run / "checkpoints/8/checksums.json").unlink()
    assert RunDirectory(run, (run / "config.yaml").read_text()).restore(like)[0].step == 8


def test_a_run_that_is_killed_at_random_moments_ends_in_the_same_bytes(tmp_path, monkeypatch):
    """SIGKILL, also while a checkpoint is written, of which there is one almost all the time here."""
    # Of its own, because a compiled program that is being written may be destroyed as well.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    # More than it gets to before the last kill.
    common = [f"--steps={20 * KILLS}", "--checkpoint_every=2", "--eval_every=20"]
    assert _process(options(undisturbed, *common)).wait() == 0
    seed = int(os.environ.get("MAMBA3_TRAIN_KILL_SEED", time.time_ns() % 10**6))
    rng = random.Random(seed)
    moments = []
    for _ in range(KILLS):
        process = _process(options(killed, *common))
        # The compilation is most of a process' life; the clock starts when there is something new to destroy.
        before = _steps_seen(killed)
        while process.poll() is None and _steps_seen(killed) <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        moments.append(_steps_seen(killed))
        assert process.poll() is None, f"seed {seed}: it ended before it was killed: {moments}"
        process.kill()
        process.wait()
    assert _process(options(killed, *common)).wait() == 0
    assert (killed / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes(), (seed, moments)
    for got, expected in zip(weights(killed), weights(undisturbed), strict=True):
        np.testing.assert_array_equal(got, expected, err_msg=f"seed {seed}, killed at {moments}")
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in undisturbed.iterdir())
    assert not list(killed.rglob("*tmp*")) and not list(killed.rglob("*unfinished*"))
    assert all((step / CHECKSUMS).is_file() for step in (killed / "checkpoints").iterdir())


def bigram_perplexity(config: DataConfig) -> float:
    """Of the validation split's targets, counted on one epoch of the training split."""
    data = open_data(config)
    model = Bigram(data.vocab_size)
    epoch = data.splits["train"].read(np.arange(data.splits["train"].rows))
    model.count(epoch.tokens[epoch.mask], epoch.targets[epoch.mask])
    held_out = data.splits["validation"].read(np.arange(data.splits["validation"].rows))
    return model.perplexity(held_out.tokens[held_out.mask], held_out.targets[held_out.mask])


def test_the_bigram_baseline_is_a_distribution_and_a_good_one():
    """Each row sums to 1; on the built-in corpus it is far better than the bytes' frequencies, about 25."""
    model = Bigram(4)
    model.count(np.array([0, 0, 1, 2]), np.array([1, 1, 2, 0]))
    p = model.probabilities()
    np.testing.assert_allclose(p.sum(1), 1)
    # c(0) = 2, both of them 1; three pairs were seen, one of them before 1: q(1) = 2 / 7
    assert p[0, 1] == pytest.approx(1.25 / 2 + 0.75 / 2 * 2 / 7) and p[3, 3] == pytest.approx(1 / 7)
    assert 8 < bigram_perplexity(DataConfig()) < 16


def test_the_readmes_config_is_one():
    config = parse("train", TrainConfig, ["--config", str(ROOT / "configs/lm/tiny_cpu.yaml")])
    assert config.data == DataConfig(context=256, batch_size=16) and config.model.lm(256).mixer.d_model == 96


@pytest.mark.skipif("MAMBA3_SLOW" not in os.environ, reason="minutes of training; MAMBA3_SLOW=1 runs it")
def test_tiny_cpu_beats_a_bigram_model_in_five_minutes(tmp_path):
    config = ROOT / "configs/lm/tiny_cpu.yaml"
    began = time.monotonic()
    assert _process(["--config", str(config), f"--run_dir={tmp_path / 'run'}"]).wait() == 0
    assert time.monotonic() - began < 300
    perplexity = written(tmp_path / "run")[-1]["validation_perplexity"]
    baseline = bigram_perplexity(DataConfig(**yaml.safe_load(config.read_text())["data"]))
    print(f"perplexity {perplexity:.3f}, bigram {baseline:.3f}")
    assert perplexity < baseline / 2


def _process(command: list[str]) -> subprocess.Popen:
    script = "import sys; from mamba3_jax.training.train_command import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", script, *command], cwd=ROOT, stdout=subprocess.DEVNULL)


def _steps_seen(run_dir: Path) -> int:
    """The newest checkpoint, finished or not."""
    names = [path.name.split(".")[0] for path in (run_dir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)
