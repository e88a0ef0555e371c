"""Released checkpoints in and out: numbers, names, bits, and what is refused."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import golden_data as golden
from mamba3_jax.convert import command, plausibility, read_released, write_released
from mamba3_jax.convert.files import SAFETENSORS, TORCH, WRITERS, read_tensors
from mamba3_jax.convert.released import parameters_of
from mamba3_jax.inference import Sampling, generate
from mamba3_jax.layers import AttentionConfig, Mamba2Config, Mamba3Config
from mamba3_jax.models import LM, LMConfig, abstract_model
from mamba3_jax.models.checkpoint import load_model, read_config, save_model

SMALL = dict(d_model=32, d_state=16, head_dim=16, a_activation="heavy_tail")
CONFIGS = {
    "siso": LMConfig(Mamba3Config(**SMALL), n_layers=2, vocab_size=61, mlp_width=100),
    "mimo": LMConfig(
        Mamba3Config(**SMALL, mimo_rank=2, ngroups=2, output_norm="before_gate", rope_fraction=1.0, chunk_size=8),
        n_layers=2,
        vocab_size=64,
        tie_embeddings=False,
        vocab_multiple=8,
        dtype="bfloat16",
    ),
    "hybrid": LMConfig(
        Mamba3Config(**SMALL, A_floor=0.01),
        n_layers=3,
        vocab_size=50,
        mlp_width=128,
        attention=AttentionConfig(
            32, n_heads=4, n_kv_heads=2, head_dim=16, rotary_dim=8, conv_width=4, qkv_bias=True, out_bias=True
        ),
        attention_layers=(0, 2),
    ),
}
GOLDEN_LMS = ("lm_tied", "lm_mimo_bf16", "lm_hybrid", "lm_hybrid_rotary")
FORMS = (TORCH, SAFETENSORS)
WIDE = {"dt_bias", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"}


def draw(config: LMConfig) -> dict:
    """Parameters for a config, in the mix of dtypes in which the official code creates them."""
    rng = np.random.default_rng(0)
    shapes = parameters_of(abstract_model(config))
    narrow = np.dtype(jnp.dtype(config.dtype))
    values = {path: 0.2 * rng.standard_normal(a.shape) for path, a in shapes.items()}
    return unflatten_dict({p: a.astype(np.float32 if p[-1] in WIDE else narrow) for p, a in values.items()})


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a released checkpoint of a config and says where."""

    def write(name: str, form: str = TORCH) -> Path:
        directory = tmp_path / "released"
        directory.mkdir()
        write_released(directory, CONFIGS[name], draw(CONFIGS[name]), form=form)
        return directory

    return write


def convert(*argv: object) -> int:
    return command.main([str(word) for word in argv])


def refused(capsys, *argv: object, destination: Path) -> str:
    """The one line with which a conversion ends that leaves nothing behind."""
    before = sorted(destination.parent.iterdir())
    with pytest.raises(SystemExit) as left:
        convert(*argv)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sorted(destination.parent.iterdir()) == before
    return line


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        first, second = np.asarray(a[name]), np.asarray(b[name])
        assert (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes()), name


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    """Copies, which outlive the file."""
    return {name: np.array(stored.tensor) for name, stored in read_tensors(directory).items()}


def edit_config(directory: Path, **fields: object) -> Path:
    """Changes fields of config.json; those named part__name in one of its parts."""
    file = directory / "config.json"
    values = json.loads(file.read_text())
    for name, value in fields.items():
        *part, name = name.split("__")
        (values[part[0]] if part else values)[name] = value
    file.write_text(json.dumps(values))
    return file


def rewrite(directory: Path, form: str, tensors: dict[str, np.ndarray]) -> Path:
    (directory / form).unlink(missing_ok=True)  # who has mapped the old file keeps it
    WRITERS[form](directory / form, tensors)
    return directory / form


# Numbers, names and bits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GOLDEN_LMS)
def test_an_imported_checkpoint_has_the_official_logits_and_greedy_text(name, form, tmp_path):
    folder = golden.DIRECTORY / name
    if not folder.exists():
        pytest.skip(f"{name} is in the full golden set only (MAMBA3_GOLDEN=DIR)")
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(folder / "config.json", source)
    if (folder / form).exists():
        shutil.copy(folder / form, source)
    else:
        rewrite(source, form, tensors_of(folder))
    assert convert(source, tmp_path / "ours") == 0
    model = load_model(tmp_path / "ours", dtype="float32")
    with np.load(folder / "golden.npz", allow_pickle=False) as arrays:
        ids, logits, greedy = arrays["input_ids"], arrays["logits"], arrays["greedy_ids"]
        drawable = arrays["greedy_ids_unpadded"]
    got, _ = nnx.jit(lambda model, ids: model(ids))(model, jnp.asarray(np.concatenate([ids, greedy], axis=1)))
    t = ids.shape[1]
    golden.assert_close(got[:, :t], logits, 1e-4, "logits", scale=1.0)
    np.testing.assert_array_equal(jnp.argmax(got[:, t - 1 : -1], axis=-1), greedy)
    # Generation draws no padding of the vocabulary.
    text = generate(model, ids.tolist(), max_new_tokens=drawable.shape[1], sampling=Sampling(temperature=0)).tokens
    np.testing.assert_array_equal(text, drawable)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_export_then_import_is_the_identity(name, form, tmp_path):
    config, parameters = CONFIGS[name], draw(CONFIGS[name])
    save_model(tmp_path / "ours", config, parameters)
    word = {TORCH: "torch", SAFETENSORS: "safetensors"}[form]
    assert convert(tmp_path / "ours", tmp_path / "released", "--format", word) == 0
    assert convert(tmp_path / "released", tmp_path / "again") == 0
    assert read_config(tmp_path / "again") == config
    again = load_model(tmp_path / "again")
    assert_same_bits(parameters_of(again), flatten_dict(parameters))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_import_then_export_is_the_identity(name, form, checkpoint, tmp_path):
    source = checkpoint(name, form)
    word = {TORCH: "torch", SAFETENSORS: "safetensors"}[form]
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again", "--format", word)
    assert (source / "config.json").read_bytes() == (tmp_path / "again/config.json").read_bytes()
    assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(source))
    if form == SAFETENSORS:
        assert (source / form).read_bytes() == (tmp_path / "again" / form).read_bytes()


def test_what_the_format_does_not_record_is_said_and_comes_back_with_the_same_option(tmp_path, capsys):
    mixer = dataclasses.replace(CONFIGS["siso"].mixer, a_activation="softplus")
    config = dataclasses.replace(CONFIGS["siso"], mixer=mixer, dtype="bfloat16")
    save_model(tmp_path / "ours", config, draw(CONFIGS["siso"]))
    convert(tmp_path / "ours", tmp_path / "released")
    warnings = capsys.readouterr().err
    assert "does not record mixer.a_activation='softplus', dtype='bfloat16'" in warnings
    assert "--a_activation softplus" in warnings
    convert(tmp_path / "released", tmp_path / "again", "--a_activation", "softplus", "--dtype", "bfloat16")
    assert read_config(tmp_path / "again") == config


def official_shapes(options: dict) -> dict[str, tuple[int, ...]]:
    """The state dict of the official model class, from config.json alone: the formulas of its constructors."""
    d, width, ssm = options["d_model"], options["d_intermediate"], options["ssm_cfg"]
    vocab = math.ceil(options["vocab_size"] / options["pad_vocab_size_multiple"]) * options["pad_vocab_size_multiple"]
    shapes = {"backbone.embedding.weight": (vocab, d), "backbone.norm_f.weight": (d,), "lm_head.weight": (vocab, d)}
    for i in range(options["n_layer"]):
        layer = {"norm.weight": (d,)}
        if i in options["attn_layer_idx"]:
            heads = options["attn_cfg"]
            p = heads.get("head_dim") or d // heads["num_heads"]
            qkv = p * (heads["num_heads"] + 2 * (heads.get("num_heads_kv") or heads["num_heads"]))
            layer |= {"mixer.in_proj.weight": (qkv, d), "mixer.out_proj.weight": (d, p * heads["num_heads"])}
            if heads.get("qkv_proj_bias", True):
                layer["mixer.in_proj.bias"] = (qkv,)
            if heads.get("out_proj_bias", True):
                layer["mixer.out_proj.bias"] = (d,)
            if heads.get("d_conv", 0):
                layer |= {"mixer.conv1d.weight": (qkv, 1, heads["d_conv"]), "mixer.conv1d.bias": (qkv,)}
        else:
            n, inner, p = ssm["d_state"], ssm["expand"] * d, ssm["headdim"]
            h, r = inner // p, ssm["mimo_rank"] if ssm.get("is_mimo", False) else 1
            angles = int(n * ssm.get("rope_fraction", 0.5)) // 2
            layer |= {f"mixer.{name}": (h,) for name in ("dt_bias", "D")}
            layer |= {f"mixer.{name}": (h, r, n) for name in ("B_bias", "C_bias")}
            layer |= {f"mixer.{name}.weight": (n,) for name in ("B_norm", "C_norm")}
            layer["mixer.in_proj.weight"] = (2 * inner + 2 * n * ssm["ngroups"] * r + 3 * h + angles, d)
            layer["mixer.out_proj.weight"] = (d, inner)
            if ssm.get("is_mimo", False):
                layer |= {f"mixer.mimo_{name}": (h, r, p) for name in "xzo"}
            if ssm.get("is_outproj_norm", False):
                layer["mixer.norm.weight"] = (inner,)
        if width:
            hidden = math.ceil(width / 128) * 128
            layer |= {"norm2.weight": (d,), "mlp.fc1.weight": (2 * hidden, d), "mlp.fc2.weight": (d, hidden)}
        shapes |= {f"backbone.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_has_the_official_names_and_shapes(name, checkpoint):
    source = checkpoint(name)
    expected = official_shapes(json.loads((source / "config.json").read_text()))
    assert {name: a.shape for name, a in tensors_of(source).items()} == expected


@pytest.mark.parametrize("name", GOLDEN_LMS)
def test_the_official_checkpoints_have_them_too(name):
    folder = golden.DIRECTORY / name
    if not folder.exists():
        pytest.skip(f"{name} is in the full golden set only (MAMBA3_GOLDEN=DIR)")
    expected = official_shapes(json.loads((folder / "config.json").read_text()))
    shapes = {name: stored.tensor.shape for name, stored in read_tensors(folder).items()}
    assert {"lm_head.weight": expected["lm_head.weight"]} | shapes == expected


def test_a_tied_head_is_optional_and_must_be_the_embedding(checkpoint, tmp_path, capsys):
    source = checkpoint("siso")
    tensors = tensors_of(source)
    with_head = read_released(source)
    rewrite(source, TORCH, {name: a for name, a in tensors.items() if name != "lm_head.weight"})
    assert_same_bits(flatten_dict(read_released(source).parameters), flatten_dict(with_head.parameters))
    rewrite(source, TORCH, tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})
    line = refused(capsys, source, tmp_path / "ours", destination=tmp_path / "ours")
    assert TORCH in line and "lm_head.weight" in line


# What is refused: one line, nothing written


@pytest.mark.parametrize("form", FORMS)
def test_missing_extra_and_misshapen_tensors_are_refused(form, checkpoint, tmp_path, capsys):
    source, destination = checkpoint("siso", form), tmp_path / "ours"
    tensors = tensors_of(source)
    tensors.pop("lm_head.weight", None)
    at = "backbone.layers.1.mixer.in_proj.weight"
    cases = {
        "got no such tensor": {name: a for name, a in tensors.items() if name != at},
        "got an extra tensor": tensors | {"backbone.layers.7.mixer.D": tensors["backbone.layers.1.mixer.D"]},
        "got shape (32, 176)": tensors | {at: tensors[at].T},
        "got dtype float16": tensors | {at: tensors[at].astype(np.float16)},
        "got dtype int32": tensors | {at: tensors[at].astype(np.int32)},
    }
    for message, changed in cases.items():
        rewrite(source, form, changed)
        line = refused(capsys, source, destination, destination=destination)
        name = next(iter(changed.keys() ^ tensors.keys()), at)
        assert message in line and str(source / form) in line and name in line


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("siso", dict(architectures=["Mamba3"]), "architectures: got an unknown field; allowed: d_model, d_inter"),
        ("siso", dict(ssm_cfg__conv=4), "ssm_cfg.conv: got an unknown field; allowed: layer, d_state"),
        ("siso", dict(attn_cfg=dict(heads=4)), "attn_cfg.heads: got an unknown field; allowed: num_heads"),
        ("siso", dict(ssm_cfg=dict(d_state=16)), "ssm_cfg.layer: got 'Mamba1'; allowed: 'Mamba3'"),
        ("siso", dict(rms_norm=False), "rms_norm: got False; allowed: True"),
        ("siso", dict(n_layer="2"), "n_layer: got '2'; allowed: a int"),
        ("siso", dict(tie_embeddings=1), "tie_embeddings: got 1; allowed: a bool"),
        ("siso", dict(ssm_cfg__headdim=24), "head_dim: got 24"),
        ("hybrid", dict(attn_cfg__causal=False), "attn_cfg.causal: got False; allowed: True"),
        ("hybrid", dict(attn_cfg__mlp_dim=64), "attn_cfg.mlp_dim: got 64; allowed: 0"),
        ("hybrid", dict(attn_cfg__rotary_emb_interleaved=True), "attn_cfg.rotary_emb_interleaved: got True"),
        ("hybrid", dict(attn_cfg__softmax_scale=1.0), "attn_cfg.softmax_scale: got 1.0; allowed: 0.25"),
        ("hybrid", dict(attn_cfg=dict(causal=True)), "n_heads: got 0"),
        ("hybrid", dict(attn_layer_idx=[0, 3]), "attention_layers: got (0, 3)"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(name, fields, message, checkpoint, tmp_path, capsys):
    source, destination = checkpoint(name), tmp_path / "ours"
    file = edit_config(source, **fields)
    line = refused(capsys, source, destination, destination=destination)
    assert line.startswith(str(file)) and message in line


def test_fields_that_do_not_change_the_function_are_read(checkpoint):
    source = checkpoint("hybrid")
    before = read_released(source).config
    edit_config(source, residual_in_fp32=False, fused_add_norm=False, ssm_cfg__fuse_pregate_headwise_norm=False)
    edit_config(source, ssm_cfg__dropout=0.1, ssm_cfg__dt_init_floor=1e-3, attn_cfg__softmax_scale=0.25)
    assert read_released(source).config == before


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rotation="rope"), "mixer.rotation: got 'rope'"),
        (dict(discretization="euler"), "mixer.discretization: got 'euler'"),
        (dict(conv_width=4), "mixer.conv_width: got 4"),
        (dict(bc_bias_init=None), "mixer.bc_bias_init: got None"),
        (dict(angle_bound=1.0), "mixer.angle_bound: got 1.0"),
        (dict(output_norm="after_gate"), "mixer.output_norm: got 'after_gate'"),
        (dict(output_norm="before_gate", output_norm_grouped=False), "mixer.output_norm_grouped: got False"),
        (None, "mixer: got Mamba2Config"),
    ],
)
def test_a_model_that_the_format_cannot_describe_is_refused(changes, message, tmp_path, capsys):
    mixer = Mamba2Config(32) if changes is None else Mamba3Config(**SMALL, **changes)
    config = LMConfig(mixer, n_layers=1, vocab_size=16)
    save_model(tmp_path / "ours", config, draw(config))
    destination = tmp_path / "released"
    assert refused(capsys, tmp_path / "ours", destination, destination=destination).startswith(message)


def test_source_and_destination_that_do_not_serve_are_refused(checkpoint, tmp_path, capsys, monkeypatch):
    source, destination = checkpoint("siso"), tmp_path / "ours"
    assert "which is not empty" in refused(capsys, source, source, destination=destination)
    assert "got 'nowhere'" in refused(capsys, "nowhere", destination, destination=destination)
    assert "which is none" in refused(capsys, tmp_path, destination, destination=destination)
    assert "for an import" in refused(capsys, source, destination, "--format", "torch", destination=destination)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    line = refused(capsys, "state-spaces/mamba3-siso-187m", destination, destination=destination)
    assert "uv sync --extra hub" in line
    (source / TORCH).unlink()
    assert "got no tensors" in refused(capsys, source, destination, destination=destination)


def test_a_failing_write_leaves_nothing(checkpoint, tmp_path, capsys, monkeypatch):
    convert(checkpoint("siso"), tmp_path / "ours")

    def fail(path, tensors):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setitem(WRITERS, TORCH, fail)
    destination = tmp_path / "again"
    assert "no space left" in refused(capsys, tmp_path / "ours", destination, destination=destination)


# The tokenizer and the text


def word_tokenizer(file: Path, size: int) -> Path:
    """A tokenizer.json of whole words; those it does not know are its last but one id."""
    words = ["the", "and", "a", "to", "in", "of", "was", ".", ","]
    vocabulary = {word: i for i, word in enumerate(words)} | {f"word{i}": i for i in range(len(words), size - 1)}
    model = dict(type="WordLevel", vocab=vocabulary, unk_token=f"word{size - 2}")
    added = dict(
        id=size - 1, content="<s>", single_word=False, lstrip=False, rstrip=False, normalized=False, special=True
    )
    file.write_text(
        json.dumps(
            dict(
                version="1.0",
                truncation=None,
                padding=None,
                added_tokens=[added],
                normalizer=None,
                pre_tokenizer=dict(type="Whitespace"),
                post_processor=None,
                decoder=None,
                model=model,
            )
        )
    )
    return file


def test_a_tokenizer_goes_along_and_fits_the_vocabulary(checkpoint, tmp_path, capsys):
    source, destination = checkpoint("siso"), tmp_path / "ours"
    file = word_tokenizer(source / "tokenizer.json", 62)
    line = refused(capsys, source, destination, destination=destination)
    assert str(file) in line and "62" in line and "61" in line
    other = word_tokenizer(tmp_path / "other.json", 61)
    convert(source, destination, "--tokenizer", other)
    assert (destination / "tokenizer.json").read_bytes() == other.read_bytes()
    convert(destination, tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == other.read_bytes()
    other.write_text("{}")
    line = refused(capsys, source, tmp_path / "new", "--tokenizer", other, destination=tmp_path / "new")
    assert "without a vocabulary" in line


def test_an_import_says_what_a_text_says_about_it(checkpoint, tmp_path, capsys):
    pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    source = checkpoint("siso")
    convert(source, tmp_path / "first")
    assert "perplexity: not checked" in capsys.readouterr().out
    word_tokenizer(source / "tokenizer.json", 61)
    convert(source, tmp_path / "second")
    released, said = read_released(source), capsys.readouterr().out
    tokens = plausibility_tokens(source)
    found = plausibility.measure(released.config, released.parameters, tokens)
    assert f"perplexity: {found.chosen:.4g} on a short text, {found.other:.4g} with the other a_activation" in said


def plausibility_tokens(source: Path) -> list[int]:
    from mamba3_jax.data.tokenizer import load_tokenizer

    return load_tokenizer(source).encode(plausibility.TEXT)


@pytest.mark.parametrize("name", ["mimo", "hybrid"])
def test_the_perplexity_block_by_block_is_that_of_the_model(name):
    config, parameters = CONFIGS[name], draw(CONFIGS[name])
    tokens = np.random.default_rng(1).integers(config.vocab_size, size=40).tolist()
    found = plausibility.measure(config, parameters, tokens)
    rtol = 1e-4 if config.dtype == "float32" else 1e-2
    assert found.chosen == pytest.approx(whole_perplexity(config, parameters, tokens), rel=rtol)
    other = dataclasses.replace(config, mixer=dataclasses.replace(config.mixer, a_activation="softplus"))
    assert plausibility.measure(other, parameters, tokens) == found[::-1]
    assert found.chosen != found.other


def whole_perplexity(config: LMConfig, parameters: dict, tokens: list[int]) -> float:
    graph, state = nnx.split(abstract_model(config))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, parameters))
    logits, _ = nnx.jit(LM.__call__)(nnx.merge(graph, state), jnp.asarray(tokens)[None])
    log_p = jax.nn.log_softmax(logits[0, :-1, : config.vocab_size])
    return math.exp(-np.mean(np.asarray(log_p)[np.arange(len(tokens) - 1), np.array(tokens[1:])]))


def test_a_trained_model_tells_which_activation_it_was_trained_with():
    """It knows the text by heart, with bytes as tokens."""
    config = LMConfig(Mamba3Config(**SMALL), n_layers=2, vocab_size=256)
    graph, parameters = nnx.split(LM(config, rngs=nnx.Rngs(0)))
    tokens = np.frombuffer(plausibility.TEXT.encode(), np.uint8).astype(np.int32)
    optimizer = optax.adam(1e-2)

    def loss(parameters):
        logits, _ = nnx.merge(graph, parameters)(jnp.asarray(tokens)[None, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits[0], tokens[1:]).mean()

    @jax.jit
    def step(parameters, state):
        updates, state = optimizer.update(jax.grad(loss)(parameters), state, parameters)
        return optax.apply_updates(parameters, updates), state

    untrained = plausibility.measure(config, nnx.to_pure_dict(parameters), tokens.tolist())
    assert max(untrained) < 1.01 * min(untrained) and "below 150" in plausibility.complaint(config, untrained)
    state = optimizer.init(parameters)
    for _ in range(120):
        parameters, state = step(parameters, state)
    found = plausibility.measure(config, nnx.to_pure_dict(parameters), tokens.tolist())
    assert plausibility.complaint(config, found) is None
    wrong = dataclasses.replace(config, mixer=dataclasses.replace(config.mixer, a_activation="softplus"))
    assert "--a_activation heavy_tail; that is probably" in plausibility.complaint(
        wrong, plausibility.Plausibility(*found[::-1])
    )


def test_a_warning_names_the_activation_that_fits_better():
    config = CONFIGS["siso"]
    check = lambda chosen, other: plausibility.complaint(config, plausibility.Plausibility(chosen, other))  # noqa: E731
    assert check(20.0, 900.0) is None and check(20.0, 19.9) is None
    assert "--a_activation softplus; that is probably" in check(900.0, 20.0)
    assert "--a_activation softplus; that is probably" in check(math.nan, 20.0)
    assert "below 150" in check(900.0, 899.0) and "below 150" in check(math.nan, math.nan)
