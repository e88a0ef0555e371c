"""The mixer and the language model against the official implementation: outputs, caches, gradients, greedy text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import golden_data as golden
import official_names as official
from mamba3_jax.layers import MixerState
from mamba3_jax.ops import SSMState

MODULES = [
    pytest.param(name, dtype, id=f"{name}-{np.dtype(dtype)}")
    for name in golden.files("module_*")
    for dtype in (np.float32, np.float64)
    if dtype == np.float32 or golden.is_float64(golden.load(name)[0])
]
LMS = ("lm_tied", "lm_mimo_bf16", "lm_hybrid", "lm_hybrid_rotary")
TOLERANCE = golden.TOLERANCES[np.float32]


def assert_gradients_close(got: dict, arrays: dict, rtol: float) -> None:
    """Every gradient of the file, by its official name; one that vanishes is held to 1/1000 of the largest."""
    expected = {name.removeprefix("grad."): a for name, a in arrays.items() if name.startswith("grad.")}
    assert got.keys() == expected.keys()
    largest = max(np.max(np.abs(a)) for a in expected.values())
    for name, a in expected.items():
        golden.assert_close(got[name], a, rtol, f"grad.{name}", max(np.max(np.abs(a)), 1e-3 * largest))


def assert_cache_close(state: MixerState, arrays: dict, prefix: str, rtol: float) -> None:
    """The four caches, whose k is (b, r, h, n) there, SISO included."""
    assert state.conv is None
    expected = {f"{prefix}_{name}": arrays[f"{prefix}.{name}_state"] for name in SSMState._fields}
    golden.assert_state_close(state.ssm, golden.state_from(expected, prefix, mimo=True), rtol)


def segment_ids(cu_seqlens: np.ndarray) -> jax.Array:
    lengths = np.diff(cu_seqlens)
    return jnp.asarray(np.repeat(np.arange(len(lengths)), lengths)[None], jnp.int32)


@pytest.mark.parametrize("name, dtype", MODULES)
def test_module(name, dtype):
    """y and every gradient of whole rows; of packed files through segment_ids."""
    arrays, meta = golden.load(name)
    rtol = golden.TOLERANCES[dtype]
    with jax.enable_x64(dtype == np.float64):
        graph, parameters = nnx.split(official.load_mixer(arrays, meta, dtype))
        ids = segment_ids(arrays["cu_seqlens"]) if "cu_seqlens" in arrays else None
        u, dy = jnp.asarray(arrays["u"], dtype), jnp.asarray(arrays["dy"], dtype)

        def loss(parameters, u):
            y, _ = nnx.merge(graph, parameters)(u, segment_ids=ids)
            return jnp.sum(y * dy), y

        (_, y), (grads, grad_u) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(parameters, u)
        assert all(a.dtype == dtype for a in jax.tree.leaves((y, grads, grad_u)))
        golden.assert_close(y, arrays["y"], rtol["value"], "y")
        assert_gradients_close(official.mixer_gradients(grads) | dict(u=grad_u), arrays, rtol["gradient"])


@pytest.mark.parametrize("name, dtype", [case for case in MODULES if "packed" not in case.id])
def test_prefill_then_decode(name, dtype):
    """Outputs and the four caches after the prefill, then token by token up to the end of the row."""
    arrays, meta = golden.load(name)
    rtol = golden.TOLERANCES[dtype]["value"]
    with jax.enable_x64(dtype == np.float64):
        graph, parameters = nnx.split(official.load_mixer(arrays, meta, dtype))
        u = jnp.asarray(arrays["u"], dtype)
        start = int(arrays["prefill_len"])

        @jax.jit
        def run(parameters, u):
            mixer = nnx.merge(graph, parameters)
            first, prefilled = mixer(u[:, :start])
            step = functools.partial(_decode_step, mixer)
            last, outputs = jax.lax.scan(step, prefilled, jnp.moveaxis(u[:, start:], 1, 0))
            return first, prefilled, jnp.moveaxis(outputs, 0, 1), last

        first, prefilled, outputs, last = run(parameters, u)
        assert all(a.dtype == dtype for a in jax.tree.leaves((first, prefilled, outputs, last)))
        golden.assert_close(first, arrays["prefill.y"], rtol, "prefill.y")
        assert_cache_close(prefilled, arrays, "prefill", rtol)
        golden.assert_close(outputs, arrays["decode.y"], rtol, "decode.y")
        assert_cache_close(last, arrays, "decode", rtol)


def _decode_step(mixer, state, u):
    y, state = mixer.step(u, state)
    return state, y


@pytest.fixture(params=LMS)
def lm(request):
    """A checkpoint of the full set and its golden arrays."""
    folder = golden.DIRECTORY / request.param
    if not folder.exists():
        pytest.skip(f"{request.param} is in the full golden set only (MAMBA3_GOLDEN=DIR)")
    with np.load(folder / "golden.npz", allow_pickle=False) as data:
        return nnx.split(official.load_lm(folder)), dict(data)


def test_lm_logits_and_gradients(lm):
    """Logits and losses of the full pass, and the mean loss's gradients where the folder has them."""
    (graph, parameters), arrays = lm
    ids = jnp.asarray(arrays["input_ids"])

    def loss(parameters):
        logits, _ = nnx.merge(graph, parameters)(ids)
        log_p = jax.nn.log_softmax(logits[:, :-1])
        token_loss = -jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1)[..., 0]
        return token_loss.mean(), (logits, token_loss)

    has_gradients = any(name.startswith("grad.") for name in arrays)
    run = jax.value_and_grad(loss, has_aux=True) if has_gradients else lambda p: (loss(p), None)
    (mean, (logits, token_loss)), grads = jax.jit(run)(parameters)
    golden.assert_close(logits, arrays["logits"], TOLERANCE["value"], "logits")
    golden.assert_close(token_loss, arrays["token_loss"], TOLERANCE["value"], "token_loss")
    golden.assert_close(mean, arrays["loss"], TOLERANCE["value"], "loss")
    if has_gradients:
        named = official.lm_gradients(grads, nnx.merge(graph, parameters))
        assert_gradients_close(named, arrays, TOLERANCE["gradient"])


def test_lm_prefill_then_steps_and_greedy_continuation(lm):
    """Half a prompt, the rest token by token; then 16 greedy tokens, over the padded and over the real vocabulary."""
    (graph, parameters), arrays = lm
    ids = jnp.asarray(arrays["input_ids"])
    half, vocab_size = ids.shape[1] // 2, nnx.merge(graph, parameters).config.vocab_size

    @jax.jit
    def run(parameters, ids):
        model = nnx.merge(graph, parameters)

        def read(cache, tokens):
            logits, cache = model.step(tokens, cache)
            return cache, logits

        def write(limit, carry, _):
            logits, cache = carry
            tokens = jnp.argmax(logits[:, :limit], axis=-1)
            return model.step(tokens, cache), (tokens, logits)

        b, t = ids.shape
        first, cache = model(ids[:, :half], model.empty_cache(b, capacity=t + arrays["greedy_ids"].shape[1]))
        cache, second = jax.lax.scan(read, cache, ids[:, half:].T)
        start = (second[-1], cache)
        _, padded = jax.lax.scan(functools.partial(write, None), start, length=arrays["greedy_ids"].shape[1])
        _, real = jax.lax.scan(functools.partial(write, vocab_size), start, length=arrays["greedy_ids"].shape[1])
        return jnp.concatenate([first, jnp.moveaxis(second, 0, 1)], axis=1), padded, real[0]

    logits, (greedy, greedy_logits), greedy_real = run(parameters, ids)
    golden.assert_close(logits, arrays["logits"], TOLERANCE["value"], "logits")
    np.testing.assert_array_equal(greedy.T, arrays["greedy_ids"])
    np.testing.assert_array_equal(greedy_real.T, arrays["greedy_ids_unpadded"])
    golden.assert_close(jnp.moveaxis(greedy_logits, 0, 1), arrays["greedy_logits"], TOLERANCE["value"], "greedy_logits")


def test_lm_packed_row(lm):
    (graph, parameters), arrays = lm
    if "packed_ids" not in arrays:
        pytest.skip("this folder has no packed row")
    ids = segment_ids(arrays["packed_cu_seqlens"])
    run = jax.jit(lambda parameters, tokens: nnx.merge(graph, parameters)(tokens, segment_ids=ids)[0])
    logits = run(parameters, jnp.asarray(arrays["packed_ids"]))
    golden.assert_close(logits, arrays["packed_logits"], TOLERANCE["value"], "packed_logits")
