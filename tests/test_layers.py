"""The layers: every option against a plain loop, state passing, packing, causality, initialisation, errors."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from mamba3_jax.layers import Mamba3, Mamba3Config, MixerState, RMSNorm, SwiGLU, mamba3
from mamba3_jax.layers.conv import CausalConv
from mamba3_jax.layers.parameters import linear
from mamba3_jax.models import LM, LMConfig
from mamba3_jax.ops import SSMState
from mamba3_jax.training.optimizer import decay_mask

SMALL = dict(d_model=8, d_state=8, head_dim=4)
OPTIONS = {
    "defaults": dict(chunk_size=5),
    "conv, rope 1": dict(conv_width=4, rope_fraction=1.0),
    "euler, conv of one tap, no biases": dict(discretization="euler", conv_width=1, bc_bias_init=None),
    "fixed lambda, standard rope": dict(discretization=0.5, rotation="rope"),
    "no rotation, heavy tail, groups": dict(rotation="none", a_activation="heavy_tail", ngroups=2, A_floor=0.5),
    "mimo, groups, small angles": dict(mimo_rank=2, ngroups=2, angle_bound=1.0),
    "mimo, norm before, grouped, conv": dict(mimo_rank=3, output_norm="before_gate", conv_width=4),
    "mimo, norm before, whole": dict(mimo_rank=2, output_norm="before_gate", output_norm_grouped=False),
    "mimo, norm after, grouped, euler": dict(mimo_rank=1, output_norm="after_gate", discretization="euler"),
    "mimo, norm after, whole, rope": dict(
        mimo_rank=2, output_norm="after_gate", output_norm_grouped=False, rotation="rope"
    ),
    "norm before, grouped": dict(output_norm="before_gate", bc_bias_init="symmetric"),
    "norm before, whole": dict(output_norm="before_gate", output_norm_grouped=False, bc_bias_init="uniform"),
    "norm after, grouped": dict(output_norm="after_gate", bc_bias_init="zeros"),
    "norm after, whole": dict(output_norm="after_gate", output_norm_grouped=False, bc_bias_trainable=False),
}
T = 12


def silu(u):
    return u / (1 + np.exp(-u))


def normalise(u, weight, axis=-1):
    return u / np.sqrt(np.mean(u**2, axis, keepdims=True) + 1e-5) * weight


def plain_conv(weight, bias, u, activation=silu):
    """One document (t, d) through the convolution, and its tails: the last inputs after every token, 0 at first."""
    past = len(weight) - 1
    padded = np.concatenate([np.zeros((past, u.shape[1])), u])
    y = [bias + sum(weight[back] * padded[past + t - back] for back in range(past + 1)) for t in range(len(u))]
    return activation(np.array(y)), [padded[t + 1 : t + 1 + past] for t in range(len(u))]


def plain_inputs(c: Mamba3Config, w: dict, u: np.ndarray) -> tuple[list[np.ndarray], list]:
    """What the recurrence reads of one document (t, d), time first, and the convolution's tails."""
    t, h, p, n, r, g, s = len(u), c.nheads, c.head_dim, c.d_state, c.rank, c.ngroups, c.rotated_pairs
    learned_lam, turning = c.discretization == "trapezoidal", c.rotation == "data_dependent"
    sizes = [h * p, h * p, r * g * n, r * g * n, h, h, h * learned_lam, s * turning]
    z, x, B, C, dt, A, trap, angle = np.split(u @ w["in_proj", "kernel"], np.cumsum(sizes)[:-1], axis=1)
    tails = [None] * t
    if c.conv_width:
        joined, tails = plain_conv(w["conv", "weight"], w["conv", "bias"], np.concatenate([x, B, C], axis=1))
        x, B, C = np.split(joined, np.cumsum(sizes[1:4])[:-1], axis=1)
    dt = np.logaddexp(0, dt + w["dt_bias",])
    act = np.logaddexp(0, A) if c.a_activation == "softplus" else np.where(A >= 0, 1 + A, 1 / (1 + np.abs(A)))
    A = -np.maximum(act, c.A_floor)
    lam = {"trapezoidal": 1 / (1 + np.exp(-trap)), "euler": 1.0}.get(c.discretization, c.discretization)
    if turning:
        turn = dt[:, :, None] * c.angle_bound * np.tanh(angle)[:, None]
    else:
        # Standard RoPE's frequencies are float32 numbers.
        turn = np.broadcast_to(np.float32(10000.0 ** (-2 * np.arange(s) / n)), (t, h, s))
    group = np.arange(h) * g // h
    B, C = (normalise(a.reshape(t, r, g, n), w[f"{k}_norm", "weight"]) for k, a in dict(B=B, C=C).items())
    B, C = (np.moveaxis(a[:, :, group], 1, 2) + w.get((f"{k}_bias",), 0) for k, a in dict(B=B, C=C).items())
    x, z = x.reshape(t, h, p), z.reshape(t, h, p)
    return [x, z, B, C, np.exp(dt * A), dt, np.broadcast_to(lam, dt.shape), turn], tails


def plain_mixer(c: Mamba3Config, w: dict, u: np.ndarray) -> tuple[np.ndarray, list[MixerState]]:
    """One document (t, d) through the mixer by the module's equations: outputs, and the state after every token."""
    h, p, n, r, s = c.nheads, c.head_dim, c.d_state, c.rank, c.rotated_pairs
    mimo_x, mimo_z, mimo_o = (w.get((name,), np.ones((h, 1, 1))) for name in ("mimo_x", "mimo_z", "mimo_o"))
    first, second = (np.arange(s), np.arange(s) + n // 2) if c.mimo_rank else (np.arange(s) * 2, np.arange(s) * 2 + 1)

    def rotate(a, theta):
        turned, cos, sin = a.copy(), np.cos(theta)[:, None], np.sin(theta)[:, None]
        turned[..., first] = a[..., first] * cos - a[..., second] * sin
        turned[..., second] = a[..., first] * sin + a[..., second] * cos
        return turned

    def norm(o):
        return normalise(o, w["norm_weight",][:, None], -1 if c.output_norm_grouped else (0, 2))

    def outer(v, k):
        return np.einsum("hrp,hrn->hpn", v[:, None] * mimo_x, k)

    theta, H, k, v = np.zeros((h, s)), np.zeros((h, p, n)), np.zeros((h, r, n)), np.zeros((h, p))
    inputs, tails = plain_inputs(c, w, u)
    ys, states = [], []
    for *token, tail in zip(*inputs, tails):
        x, z, B, C, alpha, dt, lam, turn = (a[:, None, None] if a.ndim == 1 else a for a in token)
        H = alpha * (H + (1 - lam) * dt * outer(v, k))
        theta, v = theta + turn, x
        k, q = rotate(B, theta), rotate(C, theta)
        H = H + lam * dt * outer(v, k)
        o = np.einsum("hpn,hrn->hrp", H, q) + w["D",][:, None, None] * v[:, None] * mimo_x
        gate = silu(z[:, None] * mimo_z)
        match c.output_norm:
            case "none":
                o = o * gate
            case "before_gate":
                o = norm(o) * gate
            case "after_gate":
                o = norm(o * gate)
        ys.append((o * mimo_o).sum(1).reshape(-1) @ w["out_proj", "kernel"])
        states.append(MixerState(SSMState(theta, H, k, v), tail))
    return np.array(ys), states


class Case(NamedTuple):
    """A mixer with random parameters: `plain` takes one document of numpy, `run` and `step` are jitted."""

    plain: Callable
    run: Callable
    step: Callable
    empty: MixerState


def randomised(make: Callable[[], nnx.Module]) -> tuple[nnx.Module, dict[tuple, np.ndarray]]:
    """A module with no parameter at its initial value and step sizes of order one, and its parameters by path."""
    rng = np.random.default_rng(0)
    module = nnx.eval_shape(make)
    parameters, dtype = nnx.state(module), jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    w = {}
    for path, value in flatten_dict(nnx.to_pure_dict(parameters)).items():
        centre = 0 if path[-1] in ("kernel", "embedding", "head", "dt_bias") else 1
        scale = 0.5 * value.shape[0] ** -0.5 if path[-1] == "kernel" else 0.3
        w[path] = np.float64(np.float32(centre + scale * rng.standard_normal(value.shape)))
    nnx.replace_by_pure_dict(parameters, unflatten_dict({path: jnp.asarray(value, dtype) for path, value in w.items()}))
    nnx.update(module, parameters)
    return module, w


@functools.cache
def build(option: str) -> Case:
    config = Mamba3Config(**SMALL | OPTIONS[option])
    mixer, w = randomised(lambda: Mamba3(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.float64)))
    graph, parameters = nnx.split(mixer)
    run = jax.jit(lambda p, u, state, ids: nnx.merge(graph, p)(u, state, ids))
    step = jax.jit(lambda p, u, state: nnx.merge(graph, p).step(u, state))
    return Case(
        functools.partial(plain_mixer, config, w),
        functools.partial(run, parameters),
        functools.partial(step, parameters),
        jax.tree.map(lambda a: np.zeros(a.shape), mixer.empty_state(2)),
    )


@pytest.fixture(params=OPTIONS)
def case(request):
    """In float64, so that 1e-11 is asked of everything."""
    with jax.enable_x64(True):
        yield build(request.param)


def tokens(t: int, b: int = 2, d: int = SMALL["d_model"]) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((b, t, d))


def assert_close(got, expected, tolerance: float = 1e-11, what: object = ""):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, what
    error = np.max(np.abs(got - expected), initial=0)
    assert error <= tolerance * np.max(np.abs(expected), initial=0), f"{what}: {error}"


def assert_state_close(got: MixerState, row: int, expected: MixerState, tolerance: float = 1e-11):
    """One row of a state against the plain loop's."""
    turns = (np.asarray(got.ssm.angle[row], np.float64) - expected.ssm.angle) / (2 * np.pi)
    assert np.max(np.abs(turns - np.round(turns)), initial=0) * 2 * np.pi <= 10 * tolerance
    for name in ("ssm", "k", "v"):
        assert_close(getattr(got.ssm, name)[row], getattr(expected.ssm, name), tolerance, name)
    assert (got.conv is None) == (expected.conv is None)
    if got.conv is not None:
        assert_close(got.conv[row], expected.conv, tolerance, "conv")


def no_documents(t: int) -> jax.Array:
    return jnp.zeros((2, t), jnp.int32)


def test_every_option_is_the_plain_loop(case):
    """Outputs and the state; the output norm's variants and the activations of A are in the loop."""
    u = tokens(T)
    y, state = case.run(u, case.empty, no_documents(T))
    assert y.dtype == jnp.float64
    for row in range(2):
        expected, states = case.plain(u[row])
        assert_close(y[row], expected)
        assert_state_close(state, row, states[-1])


def test_calls_continue_each_other_wherever_the_cut_is(case):
    """`cut` decode steps, then one call: the outputs and state of the whole row, convolution included."""
    u, state, stepped = tokens(2 * T), case.empty, []
    rows = [case.plain(u[row]) for row in range(2)]
    for cut in range(T + 1):
        y, end = case.run(u[:, cut : cut + T], state, no_documents(T))
        joined = np.stack([*stepped, *np.moveaxis(np.asarray(y), 1, 0)], axis=1)
        for row in range(2):
            assert_close(joined[row], rows[row][0][: cut + T], what=cut)
            assert_state_close(end, row, rows[row][1][cut + T - 1])
        y, state = case.step(u[:, cut], state)
        stepped.append(np.asarray(y))


def test_packed_documents_are_separate_documents(case):
    """Two calls of 12 tokens: documents of 1 and 2 tokens (shorter than the convolution), one across the calls."""
    lengths, u = ([5, 11, 1, 5, 2], [2, 1, 21]), tokens(2 * T)
    ids = jnp.asarray([np.repeat(np.arange(len(row)), row) for row in lengths], jnp.int32)
    first, state = case.run(u[:, :T], case.empty, ids[:, :T])
    second, state = case.run(u[:, T:], state, ids[:, T:])
    y = np.concatenate([first, second], axis=1)
    for row in range(2):
        start = 0
        for length in lengths[row]:
            expected, states = case.plain(u[row, start : start + length])
            assert_close(y[row, start : start + length], expected, what=(row, start))
            start += length
        assert_state_close(state, row, states[-1])


def test_no_output_depends_on_a_later_token(case):
    u = tokens(T)
    changed = u.copy()
    changed[:, 7:] += 1
    y, _ = case.run(u, case.empty, no_documents(T))
    y_, _ = case.run(changed, case.empty, no_documents(T))
    np.testing.assert_array_equal(y[:, :7], y_[:, :7])
    assert np.all(np.any(np.asarray(y != y_)[:, 7:], axis=-1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_keeps_its_shapes_and_dtypes(dtype):
    """All float32 whatever the compute dtype, so that a scan over decode steps can start from the empty state."""
    config = Mamba3Config(**SMALL, mimo_rank=2, conv_width=4)
    mixer = nnx.eval_shape(lambda: Mamba3(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    empty = mixer.empty_state(2)
    u = jax.ShapeDtypeStruct((2, 5, 8), dtype)
    y, state = nnx.eval_shape(lambda mixer, u: mixer(u, empty), mixer, u)
    assert y.dtype == dtype
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(empty))
    chex.assert_trees_all_equal_shapes_and_dtypes(empty, state)


@pytest.fixture
def operator_arguments(monkeypatch):
    """What a mixer hands to the operator, by a function of (mixer, u); the operator itself is not run."""

    def arguments(mixer: Mamba3, u: jax.Array) -> dict:
        given = {}

        def spy(**options):
            given.update(options)
            return jnp.zeros_like(options["x"]), None

        def run(u):
            mixer(u)
            return {name: given[name] for name in ("A", "dt", "lam", "omega")}

        monkeypatch.setattr(mamba3, "ssm", spy)
        return jax.jit(run)(u)

    return arguments


@pytest.mark.parametrize("activation", ["softplus", "heavy_tail"])
def test_decay_rate_is_at_most_minus_the_floor(activation, operator_arguments):
    """Over 12 orders of magnitude of the raw value on both sides of zero."""
    config = Mamba3Config(d_model=1, expand=1, head_dim=1, d_state=4, a_activation=activation, A_floor=1e-3)
    mixer = Mamba3(config, rngs=nnx.Rngs(0))
    mixer.in_proj.kernel[...] = jnp.ones_like(mixer.in_proj.kernel[...])
    raw = np.float32(np.concatenate([-np.logspace(6, -6, 25), np.logspace(-6, 6, 25)]))
    A = np.asarray(operator_arguments(mixer, jnp.asarray(raw)[None, :, None])["A"]).ravel()
    formula = np.logaddexp(0, raw) if activation == "softplus" else np.where(raw >= 0, 1 + raw, 1 / (1 + np.abs(raw)))
    assert np.all(A <= -np.float32(1e-3))
    np.testing.assert_allclose(A, -np.maximum(formula, 1e-3), rtol=1e-6)


def test_dynamics_are_what_the_operator_gets(operator_arguments):
    mixer = Mamba3(Mamba3Config(**SMALL, angle_bound=2.0), rngs=nnx.Rngs(0))
    u = jnp.asarray(tokens(T), jnp.float32)
    given = operator_arguments(mixer, u)
    found = jax.jit(mixer.dynamics)(u)
    assert found.keys() == {"dt", "A", "lam", "omega"}
    for name, value in found.items():
        assert_close(value, given[name], 1e-6)


@pytest.mark.parametrize("low, high, floor", [(1e-3, 0.1, 1e-3), (1e-6, 1e-2, 1e-4)])
def test_initial_step_sizes_are_log_uniform(low, high, floor):
    """In their range, and never below 1e-4; the distance to the uniform distribution passes a 1 % Kolmogorov test."""
    config = Mamba3Config(d_model=64, expand=16, head_dim=1, d_state=2, rope_fraction=1.0, dt_min=low, dt_max=high)
    dt = np.logaddexp(0, np.float64(Mamba3(config, rngs=nnx.Rngs(0)).dt_bias[...]))
    assert dt.shape == (1024,) and dt.min() >= floor * (1 - 1e-5) and dt.max() <= high * (1 + 1e-5)
    quantile = np.sort(np.log(dt / low) / np.log(high / low))
    start = np.log(floor / low) / np.log(high / low)
    assert quantile[0] < start + 0.01 and quantile[-1] > 0.99
    distance = np.abs(quantile - (np.arange(1024) + 0.5) / 1024)[quantile > start + 1e-3]
    assert distance.size > 256 and distance.max() < 1.63 / np.sqrt(1024)


@pytest.mark.parametrize("init, low, high", [("ones", 1, 1), ("zeros", 0, 0), ("uniform", 0, 1), ("symmetric", -1, 1)])
def test_initial_biases(init, low, high):
    """Range, mean and spread of (h, r, n) numbers."""
    mixer = Mamba3(Mamba3Config(d_model=32, head_dim=4, mimo_rank=2, d_state=32, bc_bias_init=init), rngs=nnx.Rngs(0))
    B, C = np.asarray(mixer.B_bias[...]), np.asarray(mixer.C_bias[...])
    assert np.array_equal(B, C) == (low == high)
    for bias in (B, C):
        assert bias.shape == (16, 2, 32) and bias.min() >= low and bias.max() <= high
        assert abs(bias.mean() - (low + high) / 2) <= 0.05 * (high - low)
        assert abs(bias.std() - (high - low) / np.sqrt(12)) <= 0.05 * (high - low)


def test_no_biases_are_no_parameters():
    mixer = Mamba3(Mamba3Config(**SMALL, bc_bias_init=None), rngs=nnx.Rngs(0))
    assert not hasattr(mixer, "B_bias") and not hasattr(mixer, "C_bias")


def test_only_frozen_biases_have_zero_gradients():
    config = Mamba3Config(**SMALL, mimo_rank=2, output_norm="after_gate", bc_bias_trainable=False)
    graph, parameters = nnx.split(randomised(lambda: Mamba3(config, rngs=nnx.Rngs(0)))[0])
    u = jnp.asarray(tokens(T), jnp.float32)
    grads = jax.jit(jax.grad(lambda p: nnx.merge(graph, p)(u)[0].sum()))(parameters)
    vanishing = {path for path, grad in flatten_dict(nnx.to_pure_dict(grads)).items() if not np.any(grad)}
    assert vanishing == {("B_bias",), ("C_bias",)}


def test_weight_decay_spares_gains_and_biases():
    config = Mamba3Config(**SMALL, mimo_rank=2, conv_width=2, output_norm="before_gate")
    lm = nnx.eval_shape(lambda: LM(LMConfig(config, 1, 16, mlp_width=8, tie_embeddings=False), rngs=nnx.Rngs(0)))
    mask = decay_mask(nnx.state(lm, nnx.Param))
    flat = {"/".join(map(str, path)): decayed for path, decayed in flatten_dict(nnx.to_pure_dict(mask)).items()}
    mixer = "blocks/0/mixer/"
    decayed = {"embedding", "head", "blocks/0/mlp/fc1/kernel", "blocks/0/mlp/fc2/kernel"} | {
        mixer + name for name in ("in_proj/kernel", "out_proj/kernel", "conv/weight", "mimo_x", "mimo_z", "mimo_o")
    }
    spared = {"norm/weight", "blocks/0/norm/weight", "blocks/0/norm2/weight"} | {
        mixer + name
        for name in ("D", "dt_bias", "B_bias", "C_bias", "B_norm/weight", "C_norm/weight", "norm_weight", "conv/bias")
    }
    assert flat == dict.fromkeys(decayed, True) | dict.fromkeys(spared, False)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_rms_norm_is_its_formula_in_float64(dtype, tolerance):
    """From rows of 1e-4, where eps decides, to 1e4; entry by entry, so that bfloat16 is rounded once, at the end."""
    scale = np.logspace(-4, 4, 9)[:, None]
    x = jnp.asarray(scale * np.random.default_rng(0).standard_normal((3, 9, 64)), dtype)
    norm = RMSNorm(64)
    norm.weight[...] = jnp.linspace(0.5, 2, 64)
    y = norm(x)
    assert y.dtype == dtype
    expected = normalise(np.float64(x), np.float64(norm.weight[...]))
    np.testing.assert_allclose(np.float64(y), expected, rtol=tolerance)


@pytest.mark.parametrize("width, rounded", [(1, 128), (128, 128), (129, 256), (1500, 1536)])
def test_swiglu_width_is_rounded_up_to_128(width, rounded):
    mlp = nnx.eval_shape(lambda: SwiGLU(8, width, rngs=nnx.Rngs(0)))
    assert mlp.fc1.kernel.shape == (8, 2 * rounded) and mlp.fc2.kernel.shape == (rounded, 8)


def test_swiglu_is_its_formula():
    mlp = SwiGLU(8, 20, rngs=nnx.Rngs(0))
    x = jnp.asarray(tokens(5), jnp.float32)
    value, gate = np.split(np.float64(x) @ np.float64(mlp.fc1.kernel[...]), 2, axis=-1)
    assert_close(mlp(x), (value * silu(gate)) @ np.float64(mlp.fc2.kernel[...]), 1e-6)


@pytest.mark.parametrize("width", [2, 4])
def test_conv_is_a_plain_loop_wherever_it_is_cut(width):
    """Packed documents in two calls, cut in every place inside a document: a state continues the open one."""
    with jax.enable_x64(True):
        conv, w = randomised(lambda: CausalConv(5, width, rngs=nnx.Rngs(0)))
        u = tokens(10, b=1, d=5)
        run = jax.jit(lambda u, tail, ids: conv(u, tail, ids))
        whole, tail = jax.jit(lambda u, tail: conv(u, tail))(u, conv.empty_tail(1))
        expected, tails = plain_conv(w["weight",], w["bias",], u[0])
        assert_close(whole[0], expected)
        assert_close(tail[0], tails[-1])
        lengths = [4, 1, 2, 3]
        ids = jnp.asarray(np.repeat([0, 1, 2, 5], lengths)[None], jnp.int32)
        documents = [plain_conv(w["weight",], w["bias",], d) for d in np.split(u[0], np.cumsum(lengths)[:-1])]
        for cut in (1, 2, 3, 6, 8, 9):
            first, tail = run(u[:, :cut], conv.empty_tail(1), ids[:, :cut])
            second, tail = run(u[:, cut:], tail, ids[:, cut:])
            assert_close(np.concatenate([first, second], 1)[0], np.concatenate([y for y, _ in documents]), what=cut)
            assert_close(tail[0], documents[-1][1][-1], what=cut)


def test_residual_projections_shrink_with_depth():
    """The same draw over sqrt(branches), for out_proj and fc2 only; U(-1/sqrt(d_in), 1/sqrt(d_in)) for one branch."""
    mixers = [Mamba3(Mamba3Config(d_model=64), rngs=nnx.Rngs(0), residual_branches=k) for k in (1, 9)]
    mlps = [SwiGLU(64, 128, rngs=nnx.Rngs(0), residual_branches=k) for k in (1, 9)]
    for one, nine in ([m.out_proj for m in mixers], [m.fc2 for m in mlps]):
        kernel = np.asarray(one.kernel[...])
        assert abs(kernel).max() <= 128**-0.5 and abs(kernel.std() * np.sqrt(3 * 128) - 1) < 0.02
        np.testing.assert_allclose(nine.kernel[...], kernel / 3, rtol=1e-6)
    for one, nine in ([m.in_proj for m in mixers], [m.fc1 for m in mlps]):
        np.testing.assert_array_equal(nine.kernel[...], one.kernel[...])


ERRORS = {
    "d_model": (dict(d_model=0), "got 0", "a positive integer"),
    "d_state": (dict(d_state=0), "got 0", "a positive integer"),
    "expand": (dict(expand=-1), "got -1", "a positive integer"),
    "head_dim": (dict(head_dim=0), "got 0", "a positive integer"),
    "ngroups": (dict(ngroups=0), "got 0", "a positive integer"),
    "head_dim, not a divisor": (dict(head_dim=24), "got 24", "a divisor of the inner width 128"),
    "ngroups, not a divisor": (dict(ngroups=3), "got 3", "a divisor of the 8 heads"),
    "d_state, odd": (dict(d_state=15), "got 15", "an even size"),
    "mimo_rank": (dict(mimo_rank=0), "got 0", "a positive integer, or None for SISO"),
    "rope_fraction": (dict(rope_fraction=0.25), "got 0.25", "0.5, 1.0"),
    "discretization": (dict(discretization="zoh"), "got 'zoh'", "'trapezoidal', 'euler'"),
    "discretization, a number": (dict(discretization=1.5), "got 1.5", "lambda from 0 to 1"),
    "dt_min": (dict(dt_min=0.0), "got 0.0", "0 < dt_min <= dt_max"),
    "dt_min, above dt_max": (dict(dt_min=0.2), "got 0.2 with dt_max 0.1", "0 < dt_min <= dt_max"),
    "A_floor": (dict(A_floor=-1.0), "got -1.0", "a number >= 0"),
    "angle_bound": (dict(angle_bound=0.0), "got 0.0", "a positive number"),
    "conv_width": (dict(conv_width=-1), "got -1", "0 (none) or the number of taps"),
    "rotation": (dict(rotation="spin"), "got 'spin'", "'data_dependent', 'rope', 'none'"),
    "a_activation": (dict(a_activation="relu"), "got 'relu'", "'softplus', 'heavy_tail'"),
    "bc_bias_init": (dict(bc_bias_init="normal"), "got 'normal'", "'ones', 'zeros', 'uniform', 'symmetric', None"),
    "output_norm": (dict(output_norm="yes"), "got 'yes'", "'none', 'before_gate', 'after_gate'"),
    "implementation": (dict(implementation="cuda"), "got 'cuda'", "'recurrent', 'chunked', 'triton', 'tpu', None"),
}


@pytest.fixture
def without_type_checks():
    """Users run without jaxtyping's checks, which would speak first here."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def assert_names(message: str, field: str, given: str, allowed: str):
    """One line: the field, what came, what is allowed."""
    assert "\n" not in message and message.startswith(f"{field}: {given}")
    assert allowed in message.partition("; allowed: ")[2]


@pytest.mark.parametrize("case", ERRORS)
def test_a_bad_option_is_named(case, without_type_checks):
    options, given, allowed = ERRORS[case]
    with pytest.raises(ValueError) as error:
        Mamba3Config(**dict(d_model=64, head_dim=16) | options)
    assert_names(str(error.value), case.partition(",")[0], given, allowed)


def test_a_single_row_is_a_matrix_on_gpus_and_its_product_the_same(monkeypatch):
    projection = linear(6, 5, rngs=nnx.Rngs(0), use_bias=True)
    x = jax.random.normal(jax.random.key(0), (1, 1, 6))
    expected = np.asarray(x, np.float64) @ np.asarray(projection.kernel[...], np.float64)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, cuda, default: cuda(x))
    np.testing.assert_allclose(projection(x), expected, rtol=1e-6, atol=1e-7)
    monkeypatch.undo()
    lowered = jax.jit(lambda projection, x: projection(x)).trace(projection, x)
    multiplied = {platform: lowered.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "cpu")}
    assert "tensor<8x6xf32>" in multiplied["cuda"] and "tensor<8x6xf32>" not in multiplied["cpu"]
    # No row is not one.
    assert projection(jnp.zeros((3, 0, 6))).shape == (3, 0, 5)
