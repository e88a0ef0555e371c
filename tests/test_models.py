"""The language model: a plain formula, caches, packing, bfloat16, parameter counts of the published sizes."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba3_jax.layers import Mamba3Config
from mamba3_jax.models import LM, PRESETS, Cache, LMConfig, count_parameters, preset
from test_layers import (
    assert_close,
    assert_names,
    assert_state_close,
    normalise,
    plain_mixer,
    randomised,
    silu,
    without_type_checks,  # noqa: F401, a fixture
)

# float32 against a float64 formula of 27 tokens and two blocks; the published tolerance of the outputs is the same.
TOLERANCE = 1e-5
T = 12
SISO = LMConfig(Mamba3Config(d_model=16, d_state=8, head_dim=8), n_layers=2, vocab_size=20, mlp_width=100)
MIMO = LMConfig(
    Mamba3Config(d_model=16, d_state=8, head_dim=8, mimo_rank=2, conv_width=3, output_norm="before_gate"),
    n_layers=2,
    vocab_size=16,
    tie_embeddings=False,
)
MODELS = {"siso, mlp, tied, padded": SISO, "mimo, norm, conv, untied": MIMO}


def plain_lm(config: LMConfig, w: dict, tokens: np.ndarray) -> tuple[np.ndarray, list]:
    """Logits of one document and the last states of its mixers, in float64."""
    x, states = w["embedding",][tokens], []
    for i in range(config.n_layers):
        block = {path[2:]: value for path, value in w.items() if path[:2] == ("blocks", i)}
        mixer = {path[1:]: value for path, value in block.items() if path[0] == "mixer"}
        mixed, state = plain_mixer(config.mixer, mixer, normalise(x, block["norm", "weight"]))
        x = x + mixed
        states.append(state[-1])
        if config.mlp_width:
            value, gate = np.split(normalise(x, block["norm2", "weight"]) @ block["mlp", "fc1", "kernel"], 2, axis=1)
            x = x + (value * silu(gate)) @ block["mlp", "fc2", "kernel"]
    head = w["embedding" if config.tie_embeddings else "head",]
    return normalise(x, w["norm", "weight"]) @ head.T, states


class Case(NamedTuple):
    """A model with random parameters: `plain` takes one document, the rest is jitted."""

    config: LMConfig
    plain: Callable
    whole: Callable
    run: Callable
    step: Callable
    empty: Cache


@functools.cache
def build(name: str) -> Case:
    config = MODELS[name]
    model, w = randomised(lambda: LM(config, rngs=nnx.Rngs(0)))
    graph, parameters = nnx.split(model)
    whole = jax.jit(lambda p, tokens: nnx.merge(graph, p)(tokens))
    run = jax.jit(lambda p, tokens, cache, ids: nnx.merge(graph, p)(tokens, cache, ids))
    step = jax.jit(lambda p, tokens, cache: nnx.merge(graph, p).step(tokens, cache))
    jitted = (functools.partial(f, parameters) for f in (whole, run, step))
    return Case(config, functools.partial(plain_lm, config, w), *jitted, model.empty_cache(2))


@pytest.fixture(params=MODELS)
def case(request):
    return build(request.param)


def draw(config: LMConfig, t: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.vocab_size, (2, t), dtype=np.int32)


def test_logits_are_the_plain_formula(case):
    """Tied or not, with an MLP or not; over the padded vocabulary."""
    tokens = draw(case.config, T)
    logits, cache = case.whole(tokens)
    assert logits.dtype == jnp.float32 and logits.shape == (2, T, case.config.padded_vocab_size)
    for row in range(2):
        expected, states = case.plain(tokens[row])
        assert_close(logits[row], expected, TOLERANCE)
        for state, end in zip(cache, states, strict=True):
            assert_state_close(state, row, end, TOLERANCE)


def test_pieces_and_steps_equal_one_call(case):
    """Two calls of 12 tokens, then three steps."""
    tokens, cache, pieces = draw(case.config, 2 * T + 3), case.empty, []
    for start in (0, T):
        logits, cache = case.run(tokens[:, start : start + T], cache, jnp.zeros((2, T), jnp.int32))
        pieces.append(logits)
    for t in range(2 * T, 2 * T + 3):
        logits, cache = case.step(tokens[:, t], cache)
        assert logits.dtype == jnp.float32
        pieces.append(logits[:, None])
    joined = np.concatenate(pieces, axis=1)
    for row in range(2):
        expected, states = case.plain(tokens[row])
        assert_close(joined[row], expected, TOLERANCE)
        for state, end in zip(cache, states, strict=True):
            assert_state_close(state, row, end, TOLERANCE)


def test_packed_documents_do_not_see_each_other(case):
    lengths, tokens = ([5, 1, 6], [2, 10]), draw(case.config, T)
    ids = jnp.asarray([np.repeat(np.arange(len(row)), row) for row in lengths], jnp.int32)
    logits, cache = case.run(tokens, case.empty, ids)
    for row in range(2):
        documents = np.split(tokens[row], np.cumsum(lengths[row])[:-1])
        expected, states = zip(*map(case.plain, documents))
        assert_close(logits[row], np.concatenate(expected), TOLERANCE)
        for state, end in zip(cache, states[-1], strict=True):
            assert_state_close(state, row, end, TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_does_not_grow_with_the_text(dtype):
    """The shapes and dtypes of the empty cache, after 1 token and after 100,000."""
    config = LMConfig(SISO.mixer, n_layers=2, vocab_size=20, dtype=dtype)
    model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
    empty = model.empty_cache(3)
    for t in (1, 100_000):
        tokens = jax.ShapeDtypeStruct((3, t), jnp.int32)
        logits, cache = nnx.eval_shape(lambda model, tokens: model(tokens), model, tokens)
        assert logits.shape == (3, t, 32) and logits.dtype == jnp.float32
        chex.assert_trees_all_equal_shapes_and_dtypes(cache, empty)


def test_bfloat16_stays_near_float32():
    """The same parameters: logits within 2 %, in float32, and not equal, so that the products are in bfloat16."""
    tokens = jnp.asarray(draw(SISO, T))
    logits = {}
    for dtype in ("float32", "bfloat16"):
        config = LMConfig(SISO.mixer, n_layers=2, vocab_size=20, mlp_width=100, dtype=dtype)
        graph, parameters = nnx.split(randomised(lambda config=config: LM(config, rngs=nnx.Rngs(0)))[0])
        assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(parameters))
        logits[dtype], cache = jax.jit(lambda p, graph=graph: nnx.merge(graph, p)(tokens))(parameters)
        assert all(a.dtype == jnp.float32 for a in jax.tree.leaves((logits[dtype], cache)))
    assert np.any(logits["float32"] != logits["bfloat16"])
    assert_close(logits["bfloat16"], logits["float32"], 2e-2)


def test_bfloat16_does_not_round_the_residual_stream():
    """A block whose branches write nothing is the identity on float32 numbers that bfloat16 cannot hold."""
    config = LMConfig(SISO.mixer, n_layers=1, vocab_size=20, mlp_width=100, dtype="bfloat16")
    block = randomised(lambda: LM(config, rngs=nnx.Rngs(0)))[0].blocks[0]
    for projection in (block.mixer.out_proj, block.mlp.fc2):
        projection.kernel[...] = jnp.zeros(projection.kernel.shape)
    x = jnp.asarray(1 + 2.0**-20 * np.arange(1, 1 + T * 16).reshape(1, T, 16), jnp.float32)
    graph, parameters = nnx.split(block)
    y, _ = jax.jit(lambda p, x: nnx.merge(graph, p)(x, None, None))(parameters, x)
    assert np.all(x != x.astype(jnp.bfloat16)) and y.dtype == jnp.float32
    np.testing.assert_array_equal(y, x)


def test_gradients_are_finite_and_reach_every_parameter():
    """In bfloat16, with every kind of parameter the model has."""
    config = LMConfig(MIMO.mixer, n_layers=2, vocab_size=16, mlp_width=100, tie_embeddings=False, dtype="bfloat16")
    graph, parameters = nnx.split(randomised(lambda: LM(config, rngs=nnx.Rngs(0)))[0])
    tokens = jnp.asarray(draw(config, T))

    def loss(p):
        log_p = jax.nn.log_softmax(nnx.merge(graph, p)(tokens)[0][:, :-1])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(parameters)
    chex.assert_tree_all_finite((value, grads))
    for path, grad in jax.tree.leaves_with_path(grads):
        assert grad.dtype == jnp.float32 and np.any(grad), path


def test_residual_projections_shrink_with_depth():
    """Bound 1 / sqrt(d_in * branches): one branch per block for the mixer, one for the MLP."""
    for mlp_width, branches in ((0, 3), (128, 6)):
        config = LMConfig(SISO.mixer, n_layers=3, vocab_size=20, mlp_width=mlp_width)
        block = LM(config, rngs=nnx.Rngs(0)).blocks[2]
        projections = [block.mixer.out_proj] + ([block.mlp.fc2] if mlp_width else [])
        for projection in projections:
            bound = (projection.kernel.shape[0] * branches) ** -0.5
            largest = np.abs(projection.kernel[...]).max()
            assert 0.97 * bound < largest <= bound * (1 + 1e-6)


def test_embeddings_start_at_their_published_spread():
    model = LM(LMConfig(Mamba3Config(d_model=64, d_state=8), 1, 1000, tie_embeddings=False), rngs=nnx.Rngs(0))
    embedding, head = np.asarray(model.embedding[...]), np.asarray(model.head[...])
    assert embedding.shape == head.shape == (1008, 64) and not np.array_equal(embedding, head)
    assert abs(embedding.std() - 0.02) < 2e-4 and abs(head.std() - 0.02) < 2e-4


@pytest.mark.parametrize(
    "vocab_size, multiple, padded", [(61, 8, 64), (64, 8, 64), (65, 8, 72), (7, 1, 7), (128256, 16, 128256)]
)
def test_vocabulary_is_padded_to_a_multiple(vocab_size, multiple, padded):
    config = LMConfig(SISO.mixer, 1, vocab_size, vocab_multiple=multiple)
    assert config.padded_vocab_size == padded
    assert nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))).embedding.shape == (padded, 16)


def test_a_tied_head_is_no_parameter():
    tied, untied = (LMConfig(SISO.mixer, 1, 20, tie_embeddings=tie) for tie in (True, False))
    counts = [count_parameters(nnx.eval_shape(lambda c=c: LM(c, rngs=nnx.Rngs(0)))) for c in (tied, untied)]
    assert counts[1] - counts[0] == 32 * 16


# d_model, layers, MLP width rounded up to a multiple of 128, MIMO rank, and the count as the releases are named. Ours
# is 894,551,808 where the release is called 894m.
PUBLISHED = {
    "mamba3-siso-180m": (768, 12, 1536, None, "187m"),
    "mamba3-siso-440m": (1024, 24, 2048, None, "443m"),
    "mamba3-siso-880m": (1536, 24, 3072, None, "893m"),
    "mamba3-siso-1.5b": (2048, 24, 4096, None, "1.5b"),
    "mamba3-mimo-180m": (768, 12, 1280, 4, "187m"),
    "mamba3-mimo-440m": (1024, 24, 1792, 4, "444m"),
    "mamba3-mimo-880m": (1536, 24, 2816, 4, "895m"),
    "mamba3-mimo-1.5b": (2048, 24, 3840, 4, "1.5b"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    """Counted by hand: state 128, head dim 64, expand 2, 32 rotated pairs, one group, vocabulary 128,256, tied."""
    d, layers, mlp, rank, released = PUBLISHED[name]
    r, n, inner, heads = rank or 1, 128, 2 * d, 2 * d // 64
    in_proj = d * (2 * inner + 2 * r * n + 3 * heads + 32)
    vectors = 2 * heads + 2 * n + 2 * heads * r * n  # dt_bias and D; norms of B and C; biases of B and C
    ranks = 3 * r * inner if rank else 0
    block = 2 * d + in_proj + vectors + ranks + inner * d + 3 * d * mlp
    expected = 128256 * d + layers * block + d
    assert count_parameters(nnx.eval_shape(lambda: LM(preset(name), rngs=nnx.Rngs(0)))) == expected
    rounded = f"{expected / 1e6:.0f}m" if expected < 1e9 else f"{expected / 1e9:.1f}b"
    assert rounded == released


def test_presets_are_the_eight_published_models():
    assert set(PRESETS) == set(PUBLISHED)
    config = preset("mamba3-mimo-440m", vocab_size=1000, dtype="float32")
    assert config.vocab_size == 1000 and config.dtype == "float32" and preset("mamba3-mimo-440m").dtype == "bfloat16"


def test_an_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(ValueError) as error:
        preset("mamba3-7b")
    assert_names(str(error.value), "name", "got 'mamba3-7b'", ", ".join(map(repr, PRESETS)))


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("n_layers", 0, "a positive integer"),
        ("vocab_size", -1, "a positive integer"),
        ("vocab_multiple", 0, "a positive integer"),
        ("mlp_width", -1, "0 (no MLP) or a positive width"),
        ("dtype", "float16", "'float32', 'bfloat16'"),
    ],
)
def test_a_bad_option_is_named(field, value, allowed, without_type_checks):  # noqa: F811
    with pytest.raises(ValueError) as error:
        LMConfig(**dict(mixer=SISO.mixer, n_layers=1, vocab_size=20) | {field: value})
    assert_names(str(error.value), field, f"got {value!r}", allowed)
