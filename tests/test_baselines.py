"""The baselines: Mamba-2, Gated DeltaNet and attention, each against a plain loop in float64."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from mamba3_jax.layers import (
    AttentionBuffer,
    AttentionConfig,
    AttentionState,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    GatedDeltaNetState,
    Mamba2,
    Mamba2Config,
    MixerConfig,
    attention,
    build_mixer,
)
from mamba3_jax.models import LM, LMConfig, count_parameters
from mamba3_jax.training.optimizer import decay_mask
from test_delta_rule import plain_delta_rule
from test_layers import (
    T,
    assert_close,
    assert_names,
    no_documents,
    normalise,
    plain_conv,
    randomised,
    silu,
    tokens,
    without_type_checks,  # noqa: F401, a fixture
)

# The layers

SMALL = dict(d_model=8, d_state=6, head_dim=4)
OPTIONS = {
    "mamba2": Mamba2Config(**SMALL, chunk_size=5),
    "mamba2, groups, no conv": Mamba2Config(**SMALL, ngroups=2, conv_width=0),
    "gated deltanet": GatedDeltaNetConfig(**SMALL, chunk_size=5),
    "gated deltanet, positive, no conv": GatedDeltaNetConfig(**SMALL, negative_eigenvalues=False, conv_width=0),
    "attention": AttentionConfig(d_model=8, n_heads=2),
    "attention, grouped, base 100": AttentionConfig(d_model=16, n_heads=4, n_kv_heads=2, rope_base=100.0),
    "attention, one kv head, no positions": AttentionConfig(d_model=8, n_heads=4, n_kv_heads=1, rotation="none"),
    "attention, wide heads, partly turned, conv, biases": AttentionConfig(
        d_model=8, n_heads=2, head_dim=6, rotary_dim=4, conv_width=4, qkv_bias=True, out_bias=True
    ),
}


def after_conv(c, w: dict, u: np.ndarray, projection: str) -> tuple[np.ndarray, list[list]]:
    """The projection after the convolution or its silu alone, and the state that the convolution adds per token."""
    raw = u @ w[projection, "kernel"]
    if not c.conv_width:
        return silu(raw), [[] for _ in raw]
    y, tails = plain_conv(w["conv", "weight"], w["conv", "bias"], raw)
    return y, [[tail] for tail in tails]


def plain_mamba2(c: Mamba2Config, w: dict, u: np.ndarray) -> tuple[np.ndarray, list]:
    t, h, p, n, g = len(u), c.nheads, c.head_dim, c.d_state, c.ngroups
    xBC, tails = after_conv(c, w, u, "xBC_proj")
    x, B, C = np.split(xBC, [h * p, h * p + g * n], axis=1)
    x, B, C = x.reshape(t, h, p), *(np.repeat(a.reshape(t, g, n), h // g, axis=1) for a in (B, C))
    dt = np.logaddexp(0, u @ w["dt_proj", "kernel"] + w["dt_bias",])
    H, ys, states = np.zeros((h, p, n)), [], []
    for i in range(t):
        decay = np.exp(-dt[i] * np.exp(w["A_log",]))
        H = decay[:, None, None] * H + np.einsum("h,hp,hn->hpn", dt[i], x[i], B[i])
        ys.append(np.einsum("hpn,hn->hp", H, C[i]) + w["D",][:, None] * x[i])
        states.append([H, *tails[i]])
    y = np.reshape(ys, (t, h * p)) * silu(u @ w["z_proj", "kernel"])
    weight = w["norm_weight",]
    return normalise(y.reshape(len(y), *weight.shape), weight).reshape(y.shape) @ w["out_proj", "kernel"], states


def plain_gated_deltanet(c: GatedDeltaNetConfig, w: dict, u: np.ndarray) -> tuple[np.ndarray, list]:
    t, h, p, n = len(u), c.nheads, c.head_dim, c.d_state
    qkv, tails = after_conv(c, w, u, "qkv_proj")
    q, k, v = (a.reshape(t, h, -1) for a in np.split(qkv, [h * n, 2 * h * n], axis=1))
    q, k = (a / np.sqrt(np.sum(a**2, -1, keepdims=True) + 1e-6) for a in (q, k))
    a, b = np.split(u @ w["rate_proj", "kernel"], 2, axis=1)
    log_alpha = -np.exp(w["A_log",]) * np.logaddexp(0, a + w["dt_bias",])
    beta = (1 + c.negative_eigenvalues) / (1 + np.exp(-b))
    heads = [
        plain_delta_rule(q[:, i] / np.sqrt(n), k[:, i], v[:, i], log_alpha[:, i], beta[:, i], np.zeros((p, n)))
        for i in range(h)
    ]
    o = normalise(np.stack([o for o, _ in heads], axis=1), w["norm", "weight"])
    y = o.reshape(t, h * p) * silu(u @ w["z_proj", "kernel"])
    states = [[np.stack(S), *tail] for S, tail in zip(zip(*(states for _, states in heads)), tails)]
    return y @ w["out_proj", "kernel"], states


def plain_attention(c: AttentionConfig, w: dict, u: np.ndarray) -> tuple[np.ndarray, list]:
    """Dense, with complex numbers for RoPE; of the state the values, because a packed document's keys are turned on."""
    t, h, g, p, turning = len(u), c.n_heads, c.kv_heads, c.p, 2 * c.rotated_pairs
    qkv, tails = u @ w["qkv_proj", "kernel"] + w.get(("qkv_proj", "bias"), 0), [[] for _ in u]
    if c.conv_width:
        qkv, tails = plain_conv(w["conv", "weight"], w["conv", "bias"], qkv, activation=np.asarray)
        tails = [[tail] for tail in tails]
    q, k, v = np.split(qkv.reshape(t, h + 2 * g, p), [h, h + g], axis=1)
    if c.rotation == "rope":
        spin = np.exp(1j * np.outer(np.arange(t), c.rope_base ** (-2 * np.arange(turning // 2) / turning)))[:, None]
        turned = ((a[..., : turning // 2] + 1j * a[..., turning // 2 : turning]) * spin for a in (q, k))
        q, k = (np.concatenate([pair, a[..., turning:]], axis=-1) for pair, a in zip(turned, (q, k)))
    k, values = (np.repeat(a, h // g, axis=1) for a in (k, v))
    scores = np.einsum("ihp,jhp->hij", q, k.conj()).real / np.sqrt(p)
    weights = np.where(np.tril(np.ones((t, t), bool)), np.exp(scores), 0)
    y = np.einsum("hij,jhp->ihp", weights / weights.sum(-1, keepdims=True), values).reshape(t, h * p)
    y = y @ w["out_proj", "kernel"] + w.get(("out_proj", "bias"), 0)
    return y, [[v[: i + 1], *tails[i]] for i in range(t)]


def observe(state, row: int) -> list[jax.Array]:
    """The arrays of one row of a state that the plain loops return."""
    if isinstance(state, AttentionState):
        values = state.v[row, int(state.first[row]) : int(state.position[row])]
        return [values] + ([] if state.conv is None else [state.conv[row]])
    operator = state.delta if isinstance(state, GatedDeltaNetState) else state.ssm.ssm
    return [operator[row]] + ([] if state.conv is None else [state.conv[row]])


class Case(NamedTuple):
    """A mixer with random parameters w: `plain` takes w and one document, `run` and `step` are jitted."""

    config: MixerConfig
    plain: Callable
    w: dict
    run: Callable
    step: Callable
    gradients: Callable
    empty: NamedTuple
    tolerance: float


PLAIN = {Mamba2Config: plain_mamba2, GatedDeltaNetConfig: plain_gated_deltanet, AttentionConfig: plain_attention}


@functools.cache
def build(option: str) -> Case:
    config = OPTIONS[option]
    mixer, w = randomised(lambda: build_mixer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.float64)))
    graph, parameters = nnx.split(mixer)
    run = jax.jit(lambda p, u, state, ids: nnx.merge(graph, p)(u, state, ids))
    step = jax.jit(lambda p, u, state: nnx.merge(graph, p).step(u, state))
    gradients = jax.jit(jax.grad(lambda p, u, weight: jnp.sum(weight * nnx.merge(graph, p)(u)[0]), argnums=(0, 1)))
    return Case(
        config=config,
        plain=functools.partial(PLAIN[type(config)], config),
        w=w,
        run=functools.partial(run, parameters),
        step=functools.partial(step, parameters),
        gradients=functools.partial(gradients, parameters),
        empty=mixer.empty_state(2),
        # jax.nn.dot_product_attention takes its softmax in float32, and RoPE's frequencies are float32 numbers.
        tolerance=1e-6 if isinstance(config, AttentionConfig) else 1e-11,
    )


@pytest.fixture(params=OPTIONS)
def case(request):
    """In float64, so that 1e-11 is asked of all but attention."""
    with jax.enable_x64(True):
        yield build(request.param)


def test_every_option_is_the_plain_loop_in_one_call_or_in_pieces(case):
    """Outputs and states of a call of 12 tokens, and of a step, 4 tokens, a step and the rest."""
    u = tokens(T, d=case.config.d_model)
    rows = [case.plain(case.w, u[row]) for row in range(2)]
    y, end = case.run(u, case.empty, no_documents(T))
    for row in range(2):
        assert_close(y[row], rows[row][0], case.tolerance)
    pieces, state = [], case.empty
    for start, stop in ((0, 1), (1, 5), (5, 6), (6, T)):
        if stop == start + 1:
            y, state = case.step(u[:, start], state)
            pieces.append(np.asarray(y)[:, None])
        else:
            y, state = case.run(u[:, start:stop], state, no_documents(stop - start))
            pieces.append(np.asarray(y))
        for row in range(2):
            for got, expected in zip(observe(state, row), rows[row][1][stop - 1], strict=True):
                assert_close(got, expected, case.tolerance, what=(row, stop))
    for row in range(2):
        assert_close(np.concatenate(pieces, axis=1)[row], rows[row][0], case.tolerance)
    for got, expected in zip(jax.tree.leaves(state), jax.tree.leaves(end), strict=True):
        assert_close(got, expected, case.tolerance)


def test_packed_documents_are_separate_documents(case):
    """Two calls of 12 tokens: documents of 1 and 2 tokens (shorter than the convolution), one across the calls."""
    lengths, u = ([5, 11, 1, 5, 2], [2, 1, 21]), tokens(2 * T, d=case.config.d_model)
    ids = jnp.asarray([np.repeat(np.arange(len(row)), row) for row in lengths], jnp.int32)
    first, state = case.run(u[:, :T], case.empty, ids[:, :T])
    second, state = case.run(u[:, T:], state, ids[:, T:])
    y = np.concatenate([first, second], axis=1)
    for row in range(2):
        start = 0
        for length in lengths[row]:
            expected, states = case.plain(case.w, u[row, start : start + length])
            assert_close(y[row, start : start + length], expected, case.tolerance, what=(row, start))
            start += length
        for got, expected in zip(observe(state, row), states[-1], strict=True):
            assert_close(got, expected, case.tolerance)


def test_no_output_depends_on_a_later_token(case):
    u = tokens(T, d=case.config.d_model)
    changed = u.copy()
    changed[:, 7:] += 1
    y, _ = case.run(u, case.empty, no_documents(T))
    y_, _ = case.run(changed, case.empty, no_documents(T))
    np.testing.assert_array_equal(y[:, :7], y_[:, :7])
    assert np.all(np.any(np.asarray(y != y_)[:, 7:], axis=-1))


def test_gradients_are_the_plain_loops_slopes(case):
    """Of every parameter and of the input, along a random direction: central differences of the float64 loop."""
    rng = np.random.default_rng(2)
    u = tokens(T, b=1, d=case.config.d_model)
    weight = rng.standard_normal(u.shape)
    parameters, du = case.gradients(u, weight)
    grads = flatten_dict(nnx.to_pure_dict(parameters)) | {"u": du[0]}
    values = case.w | {"u": u[0]}
    assert grads.keys() == values.keys()
    for path, grad in grads.items():
        direction, step = rng.standard_normal(grad.shape), 1e-5
        moved = [values | {path: values[path] + sign * step * direction} for sign in (1, -1)]
        up, down = (np.sum(weight[0] * case.plain(w, w["u"])[0]) for w in moved)
        np.testing.assert_allclose(np.sum(direction * grad), (up - down) / (2 * step), rtol=1e-5, err_msg=str(path))


@pytest.mark.parametrize("at_once", [1, 5])
def test_attention_in_blocks_of_tokens_is_attention(at_once, monkeypatch):
    """Where all scores at once would not fit: packed documents, values and gradients."""
    config = OPTIONS["attention, grouped, base 100"]
    with jax.enable_x64(True):
        mixer, _ = randomised(lambda: build_mixer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.float64)))
        u = jnp.asarray(tokens(T, d=config.d_model))
        ids = jnp.asarray([np.repeat([0, 1], row) for row in ([5, 7], [1, 11])], jnp.int32)

        def run(u):
            y, _ = mixer(u, segment_ids=ids)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

        whole = jax.jit(jax.grad(run, has_aux=True))(u)
        monkeypatch.setattr(attention, "SCORES", at_once * 2 * config.n_heads * T)
        blocks = jax.jit(jax.grad(run, has_aux=True))(u)
    for got, expected in zip(blocks, whole):
        assert_close(got, expected, 1e-6)


@pytest.mark.parametrize("option", [name for name in OPTIONS if name.startswith("attention")])
def test_attention_in_a_buffer_of_fixed_size(option):
    """Packed documents, a call and then steps, are one call; a state that grew goes on in reserved slots."""
    with jax.enable_x64(True):
        config, case = OPTIONS[option], build(option)
        u = tokens(T, d=config.d_model)
        ids = jnp.asarray([np.repeat([0, 1], row) for row in ([5, 7], [1, 11])], jnp.int32)
        y, grown = case.run(u, case.empty, ids)
        mixer = nnx.eval_shape(lambda: build_mixer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.float64)))
        first, state = case.run(u[:, :8], mixer.empty_state(2, capacity=T), ids[:, :8])
        last = []
        for i in range(8, T):
            step, state = case.step(u[:, i], state)
            last.append(step)
        assert isinstance(state, AttentionBuffer) and state.k.shape[1] == T
        assert_close(np.concatenate([first, np.stack(last, axis=1)], axis=1), y, case.tolerance)
        for row in range(2):
            for got, expected in zip(observe(state, row), observe(grown, row), strict=True):
                assert_close(got, expected, case.tolerance)
        reserved = grown.reserve(3)
        assert isinstance(reserved, AttentionBuffer) and reserved.k.shape[1] == T + 3
        for one, other in ((grown, reserved), (case.step(u[:, 0], grown)[1], case.step(u[:, 0], reserved)[1])):
            assert_close(case.step(u[:, 1], other)[0], case.step(u[:, 1], one)[0], case.tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.05)])
@pytest.mark.parametrize("option", OPTIONS)
def test_lower_precision_is_close_and_keeps_float32_states(option, dtype, tolerance):
    """A state has the dtypes of the empty one, and but for attention, which holds what it computed, its shapes."""
    config = OPTIONS[option]
    mixer, w = randomised(lambda: build_mixer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    u = jnp.asarray(tokens(T, d=config.d_model), dtype)
    y, state = nnx.jit(lambda mixer, u: mixer(u))(mixer, u)
    assert y.dtype == dtype
    for row in range(2):
        assert_close(y[row], PLAIN[type(config)](config, w, np.float64(u[row]))[0], tolerance)
    empty = mixer.empty_state(2)
    if isinstance(config, AttentionConfig):
        assert state.k.shape == state.v.shape == (2, T, config.kv_heads, config.p)
        assert state.k.dtype == state.v.dtype == dtype
        state = state._replace(k=state.k[:, :0], v=state.v[:, :0])
    else:
        assert {a.dtype for a in jax.tree.leaves(state)} <= {jnp.dtype(jnp.float32)}
    chex.assert_trees_all_equal_shapes_and_dtypes(empty, state)


@pytest.mark.parametrize(
    "config, low, high",
    [
        (Mamba2Config(512, head_dim=1, d_state=2, A_min=2.0, A_max=3.0), 2, 3),
        (GatedDeltaNetConfig(512, head_dim=1, d_state=1), 1e-4, 16),
    ],
)
def test_initial_decays(config, low, high):
    """Rates uniform and step sizes log-uniform in their ranges, by a 1 % Kolmogorov test over 1,024 heads."""
    mixer = build_mixer(config, rngs=nnx.Rngs(0))
    rate = np.exp(np.float64(mixer.A_log[...]))
    dt = np.logaddexp(0, np.float64(mixer.dt_bias[...]))
    for quantile in ((rate - low) / (high - low), np.log(dt / 1e-3) / np.log(100)):
        assert quantile.shape == (1024,) and quantile.min() > -1e-5 and quantile.max() < 1 + 1e-5
        assert np.max(np.abs(np.sort(quantile) - (np.arange(1024) + 0.5) / 1024)) < 1.63 / np.sqrt(1024)


# In the language model

D, INNER, H, N, P, VOCAB = 16, 32, 4, 6, 8, 32
XBC, QKV = INNER + 2 * N, 2 * H * N + INNER
COUNTS = {
    # projections; the convolution's taps and bias; dt_bias, A_log and D; norm; out_proj
    Mamba2Config(D, d_state=N, head_dim=P): D * (INNER + XBC + H) + 5 * XBC + 3 * H + INNER + INNER * D,
    # projections; the convolution's taps and bias; dt_bias and A_log; norm; out_proj
    GatedDeltaNetConfig(D, d_state=N, head_dim=P): D * (INNER + QKV + 2 * H) + 5 * QKV + 2 * H + P + INNER * D,
    # q and out_proj; two key and two value heads
    AttentionConfig(D, n_heads=H, n_kv_heads=2): 2 * D * D + D * 4 * (D // H),
}


@pytest.mark.parametrize("mixer", COUNTS, ids=lambda config: type(config).__name__)
def test_language_models_run_in_pieces(mixer):
    """A cached call continues another, and a step continues both."""
    config = LMConfig(mixer, n_layers=2, vocab_size=VOCAB, mlp_width=8)
    lm, _ = randomised(lambda: LM(config, rngs=nnx.Rngs(0)))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 9)), jnp.int32)
    run = nnx.jit(lambda lm, tokens, cache: lm(tokens, cache))
    whole, _ = run(lm, ids, None)
    assert whole.shape == (2, 9, VOCAB) and np.std(whole) > 0
    first, cache = run(lm, ids[:, :5], lm.empty_cache(2))
    second, cache = run(lm, ids[:, 5:8], cache)
    last, _ = nnx.jit(lambda lm, tokens, cache: lm.step(tokens, cache))(lm, ids[:, 8], cache)
    assert_close(jnp.concatenate([first, second, last[:, None]], axis=1), whole, 1e-5)


def test_a_hybrid_has_attention_where_it_says_and_decodes_in_a_buffer_of_fixed_size():
    """Blocks of two kinds; prefill and steps equal one call, and the cache keeps its shapes."""
    attention = AttentionConfig(D, n_heads=H, rotary_dim=2)
    config = LMConfig(Mamba2Config(D, d_state=N, head_dim=P), 3, VOCAB, attention=attention, attention_layers=(0, 2))
    lm, _ = randomised(lambda: LM(config, rngs=nnx.Rngs(0)))
    assert [isinstance(block.mixer.config, AttentionConfig) for block in lm.blocks] == [True, False, True]
    ids = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 9)), jnp.int32)
    run = nnx.jit(lambda lm, tokens, cache: lm(tokens, cache))
    step = nnx.jit(lambda lm, tokens, cache: lm.step(tokens, cache))
    whole, _ = run(lm, ids, None)
    first, cache = run(lm, ids[:, :5], lm.empty_cache(2, capacity=9))
    outputs = [first]
    for i in range(5, 9):
        before = cache
        logits, cache = step(lm, ids[:, i], cache)
        chex.assert_trees_all_equal_shapes_and_dtypes(before, cache)
        outputs.append(logits[:, None])
    assert_close(jnp.concatenate(outputs, axis=1), whole, 1e-5)


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(attention_layers=(1,)), "attention_layers: got (1,) with attention None; allowed: both, or neither"),
        (dict(attention=AttentionConfig(D, n_heads=H)), "allowed: both, or neither"),
        (dict(attention=AttentionConfig(D, n_heads=H), attention_layers=(3,)), "got (3,); allowed: different layers"),
        (dict(attention=AttentionConfig(D, n_heads=H), attention_layers=(1, 0)), "from 0 to 2, in rising order"),
        (
            dict(attention=AttentionConfig(32, n_heads=H), attention_layers=(1,)),
            "attention: got d_model 32; allowed: 16",
        ),
    ],
)
def test_a_hybrid_that_does_not_fit_is_named(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        LMConfig(Mamba2Config(D, d_state=N, head_dim=P), 3, VOCAB, **options)


@pytest.mark.parametrize("mixer", COUNTS, ids=lambda config: type(config).__name__)
def test_parameters_are_counted_and_gains_and_biases_spared_from_decay(mixer):
    lm = nnx.eval_shape(lambda: LM(LMConfig(mixer, n_layers=3, vocab_size=VOCAB), rngs=nnx.Rngs(0)))
    assert count_parameters(lm) == VOCAB * D + D + 3 * (D + COUNTS[mixer])
    decayed = flatten_dict(nnx.to_pure_dict(decay_mask(nnx.state(lm.blocks[0].mixer, nnx.Param))))
    assert {path for path, value in decayed.items() if value} == {
        path for path in decayed if path[-1] == "kernel" or path == ("conv", "weight")
    }


# Errors

CONFIGS = {
    Mamba2Config: dict(d_model=64, head_dim=16),
    GatedDeltaNetConfig: dict(d_model=64, head_dim=16),
    AttentionConfig: dict(d_model=64, n_heads=4),
}
OPTION_ERRORS = [
    *[(config, "d_model", 0, "a positive integer") for config in CONFIGS],
    *[
        (config, *error)
        for config in (Mamba2Config, GatedDeltaNetConfig)
        for error in (
            ("d_state", 0, "a positive integer"),
            ("expand", -1, "a positive integer"),
            ("head_dim", 24, "a divisor of the inner width 128"),
            ("conv_width", -1, "0 (none) or the number of taps"),
            ("chunk_size", 0, "a positive integer, or None"),
        )
    ],
    (Mamba2Config, "ngroups", 3, "a divisor of the 8 heads"),
    (Mamba2Config, "d_state", 15, "an even size"),
    (Mamba2Config, "dt_min", 0.2, "0 < dt_min <= dt_max"),
    (Mamba2Config, "A_min", 0.0, "0 < A_min <= A_max"),
    (AttentionConfig, "n_heads", 0, "a positive integer"),
    (AttentionConfig, "n_heads", 3, "a divisor of d_model 64"),
    (AttentionConfig, "n_heads", 64, "an even size"),
    (AttentionConfig, "n_kv_heads", 0, "a positive integer"),
    (AttentionConfig, "n_kv_heads", 3, "a divisor of the 4 heads"),
    (AttentionConfig, "rotation", "spin", "'rope', 'none'"),
    (AttentionConfig, "rope_base", 0.0, "a positive number"),
    (AttentionConfig, "head_dim", 0, "a positive integer, or None"),
    (AttentionConfig, "rotary_dim", 3, "an even number up to the head's 16"),
    (AttentionConfig, "rotary_dim", 18, "an even number up to the head's 16"),
    (AttentionConfig, "conv_width", -1, "0 (none) or the number of taps"),
]


@pytest.mark.parametrize("config, name, value, allowed", OPTION_ERRORS)
def test_a_bad_option_is_named(config, name, value, allowed, without_type_checks):  # noqa: F811, a fixture
    with pytest.raises(ValueError) as error:
        config(**CONFIGS[config] | {name: value})
    assert_names(str(error.value), name, f"got {value!r}", allowed)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_mixer_names_a_wrong_width(option, without_type_checks):  # noqa: F811, a fixture
    mixer = nnx.eval_shape(lambda: build_mixer(OPTIONS[option], rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError) as error:
        mixer(jnp.zeros((2, 3, 5)))
    assert_names(str(error.value), "u", "got shape (2, 3, 5)", "(b t d)")


@pytest.mark.parametrize("mixer, config", [(Mamba2, Mamba2Config), (GatedDeltaNet, GatedDeltaNetConfig)])
def test_a_state_of_another_config_is_named(mixer, config, without_type_checks):  # noqa: F811, a fixture
    with_conv, without = (mixer(config(**SMALL, conv_width=width), rngs=nnx.Rngs(0)) for width in (4, 0))
    for one, other in ((with_conv, without), (without, with_conv)):
        with pytest.raises(ValueError) as error:
            one(jnp.zeros((2, 3, 8)), other.empty_state(2))
        assert_names(str(error.value), "state", "got one of another config", f"conv_width {one.config.conv_width}")


def test_only_a_config_builds_a_mixer(without_type_checks):  # noqa: F811, a fixture
    with pytest.raises(TypeError) as error:
        build_mixer("attention", rngs=nnx.Rngs(0))
    allowed = "Mamba3Config, Mamba2Config, GatedDeltaNetConfig, AttentionConfig"
    assert_names(str(error.value), "config", "got str", allowed)
