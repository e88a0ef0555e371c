"""The gated delta rule: its chunk-parallel form against a plain loop in float64, and its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.ops.delta_rule import CHUNKS_AT_ONCE, UNROLLED_CHUNKS, gated_delta_rule
from test_layers import assert_close, assert_names, without_type_checks  # noqa: F401, a fixture


def delta_inputs(t: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """q, k of length 1, v, log_alpha with decays from none to total, beta over all of (0, 2), and a state; b 2, h 3."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, t, 3, size)) for size in (6, 6, 5))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    log_alpha = -rng.exponential(0.3, (2, t, 3))
    log_alpha[:, 3::7] = 0
    log_alpha[:, 5::11] = -2000
    return q, k, v, log_alpha, rng.uniform(0, 2, (2, t, 3)), rng.standard_normal((2, 3, 5, 6))


def plain_delta_rule(q, k, v, log_alpha, beta, state, xp=np):
    """The recurrence as the paper writes it, for one head of one document: outputs, and the state after every token."""
    outputs, states = [], []
    for t in range(len(q)):
        forget = xp.eye(k.shape[1]) - beta[t] * xp.outer(k[t], k[t])
        state = xp.exp(log_alpha[t]) * state @ forget + beta[t] * xp.outer(v[t], k[t])
        outputs.append(state @ q[t])
        states.append(state)
    return xp.stack(outputs), xp.stack(states)


def plain_delta_rows(q, k, v, log_alpha, beta, state):
    """Every row and head of a batch: (b, t, h, p), and the last state."""
    o, last = np.zeros(v.shape), np.zeros(state.shape)
    for row, head in np.ndindex(q.shape[0], q.shape[2]):
        token_inputs = (a[row, :, head] for a in (q, k, v, log_alpha, beta))
        o[row, :, head], states = plain_delta_rule(*token_inputs, state[row, head])
        last[row, head] = states[-1]
    return o, last


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float64, 1e-11), (jnp.float32, 1e-5)])
@pytest.mark.parametrize("t, chunk_size", [(1, 64), (37, 1), (37, 5), (37, 37), (37, 64)])
def test_delta_rule_is_the_recurrence_for_every_chunk_size(t, chunk_size, dtype, tolerance):
    """Down to decays of exp(-2000), which are 0, so that nothing may pass and nothing may be NaN."""
    with jax.enable_x64(dtype == jnp.float64):
        inputs = [jnp.asarray(a, dtype) for a in delta_inputs(t)]
        run = jax.jit(functools.partial(gated_delta_rule, chunk_size=chunk_size))
        o, state = run(*inputs[:5], initial_state=inputs[5])
        assert o.dtype == state.dtype == dtype
        expected, last = plain_delta_rows(*(np.float64(a) for a in inputs))
        assert_close(o, expected, tolerance)
        assert_close(state, last, tolerance)


@pytest.mark.parametrize("chunk_size, least, most", [
    (4, 1, UNROLLED_CHUNKS), (2, UNROLLED_CHUNKS + 1, CHUNKS_AT_ONCE), (1, CHUNKS_AT_ONCE + 1, 13)
])  # fmt: skip
def test_delta_rule_has_the_gradients_of_the_recurrence(chunk_size, least, most):
    """Of every argument, the initial state included, over three packed documents, against jax.grad of the loop.

    Of few chunks, which are unrolled, of a loop over them, and of several groups, which are recomputed.
    """
    assert least <= -(-13 // chunk_size) <= most
    lengths = [7, 1, 5]
    ids = jnp.asarray(np.repeat([np.arange(3)] * 2, lengths, axis=1), jnp.int32)
    weights = np.random.default_rng(1)
    with jax.enable_x64(True):
        inputs = [jnp.asarray(a) for a in delta_inputs(13)]
        w_o, w_state = (jnp.asarray(weights.standard_normal(shape)) for shape in ((2, 13, 3, 5), (2, 3, 5, 6)))

        def chunked_loss(*inputs):
            o, state = gated_delta_rule(*inputs[:5], initial_state=inputs[5], segment_ids=ids, chunk_size=chunk_size)
            return jnp.sum(w_o * o) + jnp.sum(w_state * state)

        def plain_loss(*inputs):
            starts = np.cumsum([0, *lengths])

            def head(*inputs):
                states = [inputs[5], *[jnp.zeros_like(inputs[5])] * 2]
                documents = [
                    plain_delta_rule(*(a[start:end] for a in inputs[:5]), state, xp=jnp)
                    for start, end, state in zip(starts, starts[1:], states)
                ]
                return jnp.concatenate([o for o, _ in documents]), documents[-1][1][-1]

            per_head = jax.vmap(head, in_axes=(1, 1, 1, 1, 1, 0), out_axes=(1, 0))
            o, state = jax.vmap(per_head)(*inputs)
            return jnp.sum(w_o * o) + jnp.sum(w_state * state)

        every = tuple(range(6))
        got, expected = (jax.jit(jax.grad(f, argnums=every))(*inputs) for f in (chunked_loss, plain_loss))
        for name, g, e in zip(("q", "k", "v", "log_alpha", "beta", "initial_state"), got, expected):
            assert np.any(e), name
            assert_close(g, e, what=name)


def test_delta_rule_continues_and_packs():
    """Two calls cut inside the second document are the separate documents; the first one continues a state."""
    q, k, v, log_alpha, beta, initial = delta_inputs(20)
    lengths, cut = [[6, 9, 5], [1, 15, 4]], 11
    ids = jnp.asarray([np.repeat([3, 4, 9], row) for row in lengths], jnp.int32)
    with jax.enable_x64(True):
        *row, state = (jnp.asarray(a) for a in (q, k, v, log_alpha, beta, initial))
        run = jax.jit(functools.partial(gated_delta_rule, chunk_size=4))
        first, state = run(*(a[:, :cut] for a in row), initial_state=state, segment_ids=ids[:, :cut])
        second, state = run(*(a[:, cut:] for a in row), initial_state=state, segment_ids=ids[:, cut:])
        o = np.concatenate([first, second], axis=1)
    for row, head in np.ndindex(2, 3):
        start, entered = 0, initial[row, head]
        for length in lengths[row]:
            document = (a[row, start : start + length, head] for a in (q, k, v, log_alpha, beta))
            expected, states = plain_delta_rule(*document, entered)
            assert_close(o[row, start : start + length, head], expected)
            start, entered = start + length, np.zeros((5, 6))
        assert_close(state[row, head], states[-1])


def test_memory_of_a_long_row_is_that_of_some_of_its_chunks():
    """A row of 65,536 tokens takes little more beside its inputs and outputs than one of 4,096."""

    def temporaries(t):
        vectors = jax.ShapeDtypeStruct((1, t, 2, 8), jnp.float32)
        numbers = jax.ShapeDtypeStruct((1, t, 2), jnp.float32)
        program = jax.jit(gated_delta_rule).lower(vectors, vectors, vectors, numbers, numbers).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert 0 < temporaries(65_536) < 1.5 * temporaries(4_096)


def repeated_key(t: int) -> tuple[np.ndarray, ...]:
    """q, k, v, log_alpha, beta of t near-reflections along one key, in float32."""
    q, v = np.random.default_rng(0).standard_normal((2, 1, t, 1, 8)).astype(np.float32)
    # Of length 1 in float32 too: the eigenvalue is 1 - beta |k|^2, and as many equal errors of it would add up.
    k = np.broadcast_to(np.float32([0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0]), (1, t, 1, 8))
    return q, k, v, np.zeros((1, t, 1), np.float32), np.full((1, t, 1), 1.9999, np.float32)


def test_a_repeated_key_with_beta_near_2_stays_accurate_in_float32():
    """1,000 near-reflections along one key: the reason for the triangular solve.

    Nothing is forgotten, because the eigenvalue along the key is near -1. The powers of the triangular matrix, whose
    sum is its inverse on paper, have lost every digit after one chunk of 64.
    """
    inputs = repeated_key(1000)
    beta = inputs[-1]
    o, state = jax.jit(gated_delta_rule)(*map(jnp.asarray, inputs))
    expected, last = plain_delta_rows(*map(np.float64, inputs), np.zeros((1, 1, 8, 8)))
    assert_close(o, expected, 1e-5)
    assert_close(state, last, 1e-5)

    L = np.tril(np.full((64, 64), beta[0, 0, 0]), -1)
    power = total = np.eye(64, dtype=np.float32)
    for _ in range(63):
        power = -L @ power
        total = total + power
    assert np.max(np.abs(total - np.linalg.inv(np.eye(64) + np.float64(L)))) > 1e9


def test_gradients_of_a_repeated_key_stay_accurate_in_float32():
    """Against those in float64, which test_delta_rule_has_the_gradients_of_the_recurrence holds to the loop's."""
    inputs = repeated_key(256)
    weights = np.random.default_rng(1).standard_normal((1, 256, 1, 8)).astype(np.float32)

    def gradients(dtype):
        grad = jax.grad(lambda *a: jnp.sum(weights * gated_delta_rule(*a)[0]), argnums=range(5))
        return jax.jit(grad)(*(jnp.asarray(a, dtype) for a in inputs))

    with jax.enable_x64(True):
        expected = [np.asarray(g) for g in gradients(jnp.float64)]
    for name, g, e in zip(("q", "k", "v", "log_alpha", "beta"), gradients(jnp.float32), expected):
        assert_close(g, e, 5e-5, name)


DELTA = dict(zip(("q", "k", "v", "log_alpha", "beta"), (jnp.asarray(a, jnp.float32) for a in delta_inputs(4))))
ARGUMENT_ERRORS = {
    "k": (dict(k=DELTA["k"][:, :3]), "got shape (2, 3, 3, 6)", "(b t h n) = (2, 4, 3, 6)"),
    "q": (dict(q=DELTA["q"].astype(jnp.bfloat16)), "got dtype bfloat16", "float32"),
    "beta": (dict(beta=DELTA["beta"][..., None]), "got rank 4", "(b t h)"),
    "initial_state": (dict(initial_state=jnp.zeros((2, 3, 6, 5))), "got shape (2, 3, 6, 5)", "(2, 3, 5, 6)"),
    "chunk_size": (dict(chunk_size=0), "got 0", "a positive integer"),
    "segment_ids": (
        dict(segment_ids=jnp.asarray([[0, 0, 0, 0], [1, 1, 0, 0]])),
        "got a smaller id after a larger one in row 1 at token 2",
        "ids that never decrease",
    ),
}


@pytest.mark.parametrize("name", ARGUMENT_ERRORS)
def test_a_bad_argument_of_the_delta_rule_is_named(name, without_type_checks):  # noqa: F811, a fixture
    options, given, allowed = ARGUMENT_ERRORS[name]
    with pytest.raises((ValueError, TypeError)) as error:
        gated_delta_rule(**DELTA | options)
    assert_names(str(error.value), name, given, allowed)
