"""Model directories: what is saved is loaded, and what is broken is named and leaves nothing behind."""

import dataclasses
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from mamba3_jax.layers import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, Mamba3Config
from mamba3_jax.models import LM, PRESETS, LMConfig, preset
from mamba3_jax.models.checkpoint import config_from_dict, config_to_dict, load_model, read_config, save_model

SIZES = dict(d_model=16, d_state=8, head_dim=8)
HYBRID = LMConfig(
    Mamba3Config(**SIZES, mimo_rank=2),
    n_layers=2,
    vocab_size=37,
    mlp_width=8,
    tie_embeddings=False,
    dtype="bfloat16",
    attention=AttentionConfig(16, n_heads=2, conv_width=3, qkv_bias=True),
    attention_layers=(1,),
)


def parameters_of(config: LMConfig) -> dict:
    """Random ones, the matrices in bfloat16 and the rest in float32."""
    state = nnx.to_pure_dict(nnx.state(LM(config, rngs=nnx.Rngs(0)), nnx.Param))
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16 if a.ndim == 2 else jnp.float32), state)


@pytest.fixture
def saved(tmp_path):
    """A saved hybrid and its parameters."""
    parameters = parameters_of(HYBRID)
    save_model(tmp_path / "hybrid", HYBRID, parameters)
    return tmp_path / "hybrid", parameters


CONFIGS = [
    HYBRID,
    LMConfig(Mamba2Config(**SIZES), 1, 5),
    LMConfig(GatedDeltaNetConfig(**SIZES), 1, 5),
    LMConfig(AttentionConfig(16, n_heads=2, rope_base=123.5), 1, 5),
    LMConfig(Mamba3Config(**SIZES, discretization=0.25, A_floor=1e-7, bc_bias_init=None), 1, 5),
    *map(preset, PRESETS),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_survives_yaml(config):
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config_to_dict(config)))) == config


def test_a_loaded_model_is_the_saved_one_bit_for_bit(saved):
    """Dtypes included; from the run directory around it too."""
    path, parameters = saved
    for place in (path, path.parent / "run"):
        model = load_model(place)
        assert model.config == HYBRID
        loaded = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        jax.tree.map(np.testing.assert_array_equal, loaded, parameters)
        assert jax.tree.map(lambda a: a.dtype, loaded) == jax.tree.map(lambda a: a.dtype, parameters)
        shutil.copytree(path, path.parent / "run" / "model", dirs_exist_ok=True)
    assert sorted(p.name for p in path.iterdir()) == ["checksums.json", "model.yaml", "parameters"]


def test_float32_on_request_computes_in_float32_from_the_stored_values(saved):
    path, parameters = saved
    model = load_model(path, "float32")
    assert model.config == dataclasses.replace(HYBRID, dtype="float32")
    loaded = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert {a.dtype for a in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.float32(b)), loaded, parameters)
    tokens = jnp.zeros((1, 3), jnp.int32)
    logits, _ = nnx.jit(lambda m, t: m(t))(model, tokens)
    rounded, _ = nnx.jit(lambda m, t: m(t))(load_model(path), tokens)
    np.testing.assert_allclose(rounded, logits, atol=0.02 * np.abs(logits).max())


def test_a_tokenizer_travels_along(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    config = LMConfig(Mamba2Config(**SIZES), 1, 5)
    save_model(tmp_path / "m", config, parameters_of(config), tmp_path / "t.json")
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("change, text", [
    (lambda p: p.pop("norm"), "got no norm.weight"),
    (lambda p: p.update(extra=np.ones(3)), "got extra; allowed: the arrays of the config"),
    (lambda p: p.update(embedding=np.ones((3, 16))), "got embedding of shape (3, 16); allowed: (48, 16)"),
])  # fmt: skip
def test_parameters_of_another_model_are_refused_and_nothing_is_written(tmp_path, change, text):
    parameters = parameters_of(HYBRID)
    change(parameters)
    with pytest.raises(ValueError) as error:
        save_model(tmp_path / "m", HYBRID, parameters)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_directory_in_use_is_left_alone(saved):
    path, parameters = saved
    with pytest.raises(ValueError, match="which is not empty; allowed: a new or an empty directory"):
        save_model(path, HYBRID, parameters)
    assert load_model(path).config == HYBRID


@pytest.mark.parametrize("edit, text", [
    (lambda c: c | dict(depth=3), "depth: got a field that is not known"),
    (lambda c: c | dict(mixer=c["mixer"] | dict(heads=3)), "mixer.heads: got a field that is not known"),
    (lambda c: c | dict(mixer=c["mixer"] | dict(type="Mamba9")), "mixer.type: got 'Mamba9'; allowed: Mamba3Config"),
    (lambda c: c | dict(n_layers=0), "n_layers: got 0"),
    (lambda c: [c], "got a broken configuration"),
    (lambda c: c | dict(vocab_size=256.5), "vocab_size: got 256.5; allowed: int"),
    (lambda c: c | dict(n_layers=True), "n_layers: got True; allowed: int"),
    (lambda c: c | dict(mlp_width=10**30), "mlp_width: got 1"),
    (lambda c: c | dict(tie_embeddings="no"), "tie_embeddings: got 'no'; allowed: bool"),
    (lambda c: c | dict(mixer=c["mixer"] | dict(A_floor=float("nan"))), "mixer.A_floor: got nan; allowed: float"),
    (lambda c: c | dict(mixer=c["mixer"] | dict(mimo_rank=[[]])), "mixer.mimo_rank: got list"),
    (lambda c: c | dict(attention_layers=[1.0]), "attention_layers: got tuple"),
])  # fmt: skip
def test_a_broken_configuration_names_its_file(saved, edit, text):
    path, _ = saved
    file = path / "model.yaml"
    file.write_text(yaml.safe_dump(edit(yaml.safe_load(file.read_text()))))
    with pytest.raises(ValueError) as error:
        read_config(path)
    assert str(error.value).startswith(str(file)) and text in str(error.value) and "\n" not in str(error.value)


def test_parameters_of_another_config_are_named_when_loaded(saved):
    path, _ = saved
    file = path / "model.yaml"
    file.write_text(yaml.safe_dump(config_to_dict(dataclasses.replace(HYBRID, mlp_width=200))))
    with pytest.raises(ValueError, match=r"parameters: got blocks.0.mlp.fc1.kernel of shape \(16, 256\); allowed"):
        load_model(path)


def test_missing_and_truncated_files_are_named(saved, tmp_path):
    path, _ = saved
    with pytest.raises(ValueError, match="nowhere, without model.yaml"):
        load_model(tmp_path / "nowhere")
    shutil.rmtree(path / "parameters" / "d")
    with pytest.raises(ValueError, match="parameters/d/.*: got no such file; allowed: every file that was saved"):
        load_model(path)
    shutil.rmtree(path / "parameters")
    with pytest.raises(ValueError, match="parameters/.*: got no such file"):
        load_model(path)


def test_a_deeply_nested_configuration_is_one_line(saved):
    path, _ = saved
    (path / "model.yaml").write_text("[" * 5000)
    with pytest.raises(ValueError) as error:
        read_config(path)
    assert str(error.value).startswith(str(path / "model.yaml")) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, text", [
    (dict(n_layers=1_000_000), "n_layers: got 1000000; "),
    (dict(vocab_size=2**31 - 1, vocab_multiple=2**31 - 1), ""),
    (dict(mlp_width=2**31 - 1), ""),
])  # fmt: skip
def test_sizes_far_beyond_the_parameters_are_refused_at_once(saved, change, text):
    path, _ = saved
    file = path / "model.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        load_model(path)
    assert text in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("change", ["flipped", "truncated", "empty", "another model's"])
def test_a_changed_file_is_named_in_one_line_whichever_it_is(saved, change, capsys):
    """Before the storage library reads it, which does not see all changes."""
    path, parameters = saved
    save_model(path.parent / "other", HYBRID, jax.tree.map(lambda a: a + 1, parameters))
    files = sorted(file for file in (path / "parameters").rglob("*") if file.is_file())
    assert len(files) > 5
    for file in files:
        whole = file.read_bytes()
        other = path.parent / "other" / file.relative_to(path)
        middle = len(whole) // 2
        changed = {
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :] if whole else b"x",
            "truncated": whole[:-1] if whole else b"x",
            "empty": b"" if whole else b"x",
            "another model's": other.read_bytes() if other.exists() else whole,
        }[change]
        if changed == whole:
            continue
        file.write_bytes(changed)
        with pytest.raises(ValueError) as error:
            load_model(path)
        assert str(error.value).startswith(f"{file}: got a file that was changed") and "\n" not in str(error.value)
        file.write_bytes(whole)
    assert capsys.readouterr().err == ""
    assert load_model(path).config == HYBRID


def test_a_file_that_was_not_saved_is_named(saved):
    path, _ = saved
    (path / "parameters" / "new").write_text("x")
    with pytest.raises(ValueError, match="parameters/new: got a file that was changed"):
        load_model(path)


def test_missing_and_broken_checksums_are_said(saved):
    path, _ = saved
    (path / "checksums.json").write_text("[1]")
    with pytest.raises(ValueError, match="checksums.json: got no checksums"):
        load_model(path)
    (path / "checksums.json").unlink()
    with pytest.raises(ValueError, match="checksums.json: got no checksums"):
        load_model(path)


def test_a_neighbour_is_left_alone_and_links_are_refused(tmp_path):
    config = LMConfig(Mamba2Config(**SIZES), 1, 5)
    neighbour = tmp_path / "m.unfinished"
    neighbour.mkdir()
    (neighbour / "mine").write_text("x")
    # What a process that was killed left.
    (tmp_path / ".m.unfinished/parameters").mkdir(parents=True)
    save_model(tmp_path / "m", config, parameters_of(config))
    assert (neighbour / "mine").read_text() == "x" and load_model(tmp_path / "m").config == config
    assert (tmp_path / "m").stat().st_mode == neighbour.stat().st_mode
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for path in (tmp_path / "link", Path(".")):
        with pytest.raises(ValueError, match="which is a link or has no name"):
            save_model(path, config, parameters_of(config))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "link", "m", "m.unfinished"]
