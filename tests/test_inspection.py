"""What `mamba3 inspect` says of a model: against counts, actual caches, layers set by hand, and the figure's axes."""

import functools
import json
import math
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba3_jax import cli
from mamba3_jax.inference import inspect_command, inspection
from mamba3_jax.inference.inspection import layer_dynamics, parameter_table, state_table
from mamba3_jax.inference.inspection_report import plot
from mamba3_jax.layers import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, Mamba3, Mamba3Config
from mamba3_jax.models import LM, LMConfig, count_parameters, preset
from mamba3_jax.models.checkpoint import save_model

SISO = Mamba3Config(d_model=32, d_state=16, head_dim=16)
MIXERS = {
    "siso": SISO,
    "mimo, conv": Mamba3Config(d_model=32, d_state=16, head_dim=16, mimo_rank=2, conv_width=3),
    "rope": Mamba3Config(d_model=32, d_state=16, head_dim=16, rotation="rope", discretization=0.5),
    "no rotation": Mamba3Config(d_model=32, d_state=16, head_dim=16, rotation="none", discretization="euler"),
    "mamba2": Mamba2Config(d_model=32, d_state=16, head_dim=16),
    "gated deltanet": GatedDeltaNetConfig(d_model=32, d_state=16, head_dim=16),
    "attention": AttentionConfig(d_model=32, n_heads=4, n_kv_heads=2),
}
CONFIGS = {name: LMConfig(mixer, n_layers=2, vocab_size=100, mlp_width=32) for name, mixer in MIXERS.items()}
HYBRID = LMConfig(SISO, n_layers=3, vocab_size=256, attention=MIXERS["attention"], attention_layers=(1,))
CONFIGS |= {"hybrid": HYBRID, "untied": LMConfig(SISO, n_layers=1, vocab_size=100, tie_embeddings=False)}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(100, size=(1, 50)), jnp.int32)


@functools.cache
def model_of(name: str) -> LM:
    return LM(CONFIGS[name], rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_holds_every_parameter_once(name):
    model = model_of(name)
    rows, leaves = parameter_table(model), jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(row.parameters for row in rows) == count_parameters(model)
    assert sum(row.bytes for row in rows) == sum(leaf.nbytes for leaf in leaves)
    assert sum(row.count for row in rows) == len(leaves)
    blocks = model.config.n_layers
    assert next(row for row in rows if row.name == "blocks.*.norm.weight") == (
        ("blocks.*.norm.weight", (32,), blocks, 32 * blocks, "float32", 4 * 32 * blocks)
    )


def test_parameters_are_counted_in_the_dtype_that_they_have():
    model = LM(CONFIGS["siso"], rngs=nnx.Rngs(0))
    model.embedding = nnx.Param(model.embedding[...].astype(jnp.bfloat16))
    row = next(row for row in parameter_table(model) if row.name == "embedding")
    assert (row.dtype, row.bytes) == ("bfloat16", 2 * 112 * 32)


@pytest.mark.parametrize("name", CONFIGS)
def test_state_bytes_are_those_of_the_caches(name):
    model, sizes = model_of(name), {}
    for tokens in (0, 1, 5):
        cache = jax.eval_shape(lambda tokens: model(tokens)[1], TOKENS[:, :tokens]) if tokens else model.empty_cache(1)
        for block, state in zip(model.blocks, cache):
            kind = type(block.mixer).__name__, tokens
            bytes_of_state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            sizes[kind] = sizes.get(kind, 0) + bytes_of_state
    rows = state_table(model)
    assert sum(row.layers for row in rows) == model.config.n_layers
    assert {(row.kind, n): row.bytes + n * row.bytes_per_token for row in rows for n in (0, 1, 5)} == sizes
    assert all((row.bytes_per_token > 0) == (row.kind == "Attention") for row in rows)


def test_a_published_size_needs_no_weights():
    model = nnx.eval_shape(lambda: LM(preset("mamba3-siso-1.5b"), rngs=nnx.Rngs(0)))
    assert sum(row.parameters for row in parameter_table(model)) == count_parameters(model)
    # 24 layers of 64 heads of 64 x 128 float32, and what the trapezoid and the angles add: k, v and 32 angles per head.
    assert state_table(model) == [("Mamba3", 24, 24 * 64 * 4 * (64 * 128 + 128 + 64 + 32), 0)]


def set_by_hand(mixer: Mamba3, dt: float, A: float, lam: float, omega: float) -> None:
    """The same numbers for every head and token: in_proj has no bias, so its norm feeds it ones in channel 0."""
    sizes = mixer.config.projection_sizes
    raw = dict(dt=math.log(math.expm1(dt)), A=math.log(math.expm1(A)), trap=math.log(lam / (1 - lam)))
    raw["angle"] = math.atanh(omega / math.pi)
    row = jnp.concatenate([jnp.full(size, raw.get(name, 0.0)) for name, size in sizes.items()])
    mixer.in_proj.kernel[...] = jnp.zeros_like(mixer.in_proj.kernel[...]).at[0].set(row)
    mixer.dt_bias[...] = jnp.zeros_like(mixer.dt_bias[...])


@pytest.mark.parametrize("dt, A, lam, omega", [(0.02, 3.0, 0.7, 0.5), (1.0, 0.001, 0.2, 2.0), (2.0, 0.5, 0.5, 2.5)])
def test_a_layer_set_by_hand_has_its_half_life_turn_and_lambda(dt, A, lam, omega):
    model = LM(LMConfig(SISO, n_layers=1, vocab_size=100), rngs=nnx.Rngs(0))
    set_by_hand(model.blocks[0].mixer, dt, A, lam, omega)
    # Every token is a vector (100, 0, 0, ...), which the norm makes (sqrt(32), 0, ...) and its weight (1, 0, ...).
    model.embedding[...] = jnp.zeros_like(model.embedding[...]).at[:, 0].set(100.0)
    model.blocks[0].norm.weight[...] = jnp.full(32, 32**-0.5)
    (layer,) = layer_dynamics(model, TOKENS)
    half_life, turn = math.log(2) / (A * dt), abs(math.remainder(omega * dt, 2 * math.pi))
    for spread, value, heads in ((layer.half_life, half_life, 4), (layer.turn, turn, 4 * SISO.rotated_pairs)):
        assert len(spread.by_head) == heads
        np.testing.assert_allclose([spread.low, spread.median, spread.high, *spread.by_head], value, rtol=1e-4)
    assert layer.above_quarter == (turn > math.pi / 2) and layer.lam == pytest.approx(lam, rel=1e-4)


@pytest.mark.parametrize("name", ["siso", "mimo, conv", "hybrid"])
def test_every_layer_is_measured_on_what_it_reads(name):
    model = model_of(name)
    x = model.embedding[...][TOKENS]
    for block, layer in zip(model.blocks, layer_dynamics(model, TOKENS)):
        if isinstance(block.mixer, Mamba3):
            u = block.norm(x)
            dynamics = block.mixer.dynamics(u)
            turn = dynamics["dt"][..., None] * dynamics["omega"]
            medians = np.median(np.abs(turn), axis=(0, 1)).ravel()
            np.testing.assert_allclose(layer.turn.by_head, medians, rtol=1e-4)
        else:
            assert (layer.kind, layer.half_life, layer.turn, layer.lam) == ("Attention", None, None, None)
        x, _ = block(x, None, None)


def test_blocks_of_a_kind_compile_once():
    inspection._run_block.clear_cache()
    layer_dynamics(LM(HYBRID, rngs=nnx.Rngs(0)), TOKENS)
    assert inspection._run_block._cache_size() == 2


def test_half_lives_of_the_baselines_are_those_of_their_decays():
    for name in ("mamba2", "gated deltanet"):
        model = model_of(name)
        block = model.blocks[0]
        mixer, u = block.mixer, block.norm(model.embedding[...][TOKENS])
        raw = mixer.dt_proj(u) if name == "mamba2" else mixer.rate_proj(u)[..., :4]
        log_decay = -np.exp(mixer.A_log[...]) * np.log1p(np.exp(raw + mixer.dt_bias[...][None, None]))
        expected = np.median(math.log(0.5) / log_decay, axis=(0, 1))
        layer = layer_dynamics(model, TOKENS)[0]
        np.testing.assert_allclose(layer.half_life.by_head, expected, rtol=1e-4)
        assert (layer.turn, layer.above_quarter, layer.lam) == (None, None, None)


def test_the_ablations_say_what_applies():
    (rope, _), (none, _) = (layer_dynamics(model_of(name), TOKENS) for name in ("rope", "no rotation"))
    np.testing.assert_allclose(rope.turn.by_head, 10000.0 ** (-2 * np.arange(4) / 16), rtol=1e-5)
    assert rope.lam == 0.5 and none.lam == 1.0 and none.turn is None and none.half_life is not None


def test_the_figure_names_its_axes_with_their_units():
    left, right = plot(layer_dynamics(model_of("hybrid"), TOKENS)).axes
    assert left.get_ylabel() == "half-life, tokens" and right.get_ylabel() == "turn per token, radians"
    assert all(axis.get_xlabel() == "layer, from 1" and axis.get_yscale() == "log" for axis in (left, right))
    assert [text.get_text() for text in left.texts] == ["Attention"]
    dots = [line for line in left.lines if line.get_marker() == "."]
    assert [len(line.get_ydata()) for line in dots] == [4, 4]
    left, right = plot(layer_dynamics(model_of("attention"), TOKENS)).axes
    assert left.texts[0].get_text() == right.texts[0].get_text() == "no layer has one"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for name, config in dict(model=HYBRID, states=CONFIGS["siso"]).items():
        model = LM(config, rngs=nnx.Rngs(0))
        save_model(folder / name, config, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return folder


def test_the_command_prints_and_writes_the_tables(directory, tmp_path, capsys):
    (tmp_path / "text").write_text("So many words, so little time. " * 5)
    out = tmp_path / "out"
    line = ["inspect", str(directory), "--text", str(tmp_path / "text"), "--tokens", "64", "--results_dir", str(out)]
    assert cli.main(line) == 0
    assert {path.name for path in out.iterdir()} == {"summary.json", "report.md", "layers.png"}
    report, summary = (out / "report.md").read_text(), json.loads((out / "summary.json").read_text())
    # A terminal shows no figure.
    shown = "\n".join(line for line in report.splitlines() if "layers.png" not in line)
    assert capsys.readouterr().out.startswith(shown) and "(layers.png)" in report
    total = count_parameters(nnx.eval_shape(lambda: LM(HYBRID, rngs=nnx.Rngs(0))))
    assert f" {total:,} |" in report and sum(row["parameters"] for row in summary["parameters"]) == total
    assert f"Measured on 64 tokens of {tmp_path / 'text'}." in report
    assert [layer["kind"] for layer in summary["layers"]] == ["Mamba3", "Attention", "Mamba3"]
    assert f"{summary['layers'][0]['half_life']['median']:.3g} |" in report


def test_a_results_folder_that_cannot_be_written_is_one_line(directory, tmp_path, capsys):
    (tmp_path / "report.md").mkdir()
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", str(directory), "--tokens", "40", "--results_dir", str(tmp_path)])
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and message.startswith(f"results_dir: got {tmp_path} (")


def test_the_command_has_a_text_of_its_own_and_takes_random_tokens_where_there_is_no_text(directory, capsys):
    assert cli.main(["inspect", str(directory), "--tokens", "40"]) == 0
    assert "Measured on 40 tokens of Python's help (pydoc)." in capsys.readouterr().out
    assert cli.main(["inspect", str(directory / "states"), "--tokens", "40"]) == 0
    assert "Measured on 40 random tokens, because 100 are no vocabulary of text." in capsys.readouterr().out


def test_a_closed_pipe_is_not_blamed_on_the_folder(monkeypatch):
    monkeypatch.setattr(inspect_command, "print", Mock(side_effect=BrokenPipeError), raising=False)
    with pytest.raises(BrokenPipeError):
        inspect_command.main(["mamba3-siso-180m"])


def test_the_command_takes_a_published_size(capsys):
    assert cli.main(["inspect", "mamba3-siso-180m"]) == 0
    out = capsys.readouterr().out
    assert "128256x768" in out and "## State" in out and "## Layers" not in out


BAD = {
    "no such model": (["none-such"], "model: got 'none-such'; allowed: a model's directory, mamba3-siso-180m, "),
    "no tokens": (["mamba3-siso-180m", "--tokens", "0"], "tokens: got 0; allowed: a positive integer"),
    "a text without weights": (["mamba3-siso-180m", "--text", "a"], "text: got a with a published size"),
    "no such text": (["{}", "--text", "{}/none"], "text: got {}/none (No such file or directory); allowed: a text"),
    "a text for no text": (["{}/states", "--text", __file__], "tokenizer: got 256 ids for the model in {}/states"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, directory, capsys):
    options, message = BAD[case]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", *(option.format(directory) for option in options)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and message.format(directory) in error
