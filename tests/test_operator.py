"""The operator's contract, held by every implementation against the literal recurrence in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.ops import EULER, FIXED_TRAPEZOID, SSMState, api, rope_frequencies, ssm, ssm_step
from mamba3_jax.ops.recurrent import complex_recurrence

IMPLEMENTATIONS = ("recurrent", "chunked")

# Relative to the largest entry of the float64 oracle. Sums are at most a few hundred terms in all cases below.
TOLERANCE = {jnp.float64: 1e-11, jnp.float32: 2e-5, jnp.bfloat16: 2e-2}

VARIANTS = {
    "siso": dict(),
    "groups": dict(g=2, h=4),
    "rope1": dict(s=8),
    "odd sizes": dict(h=3, p=5, n=12, s=3),
    "mimo": dict(r=3, mimo=True),
    "mimo rank 1": dict(r=1, mimo=True),
    "mimo without gate": dict(r=2, mimo=True, gate=False),
    "mimo ranks kept": dict(r=2, mimo=True, reduce=False),
    "euler": dict(lam=EULER),
    "fixed trapezoid": dict(lam=FIXED_TRAPEZOID),
    "standard rope": dict(rotation="rope"),
    "no rotation": dict(rotation="none"),
    "no bias, D, gate": dict(bare=True, gate=False),
    "angles per head": dict(hh=2, h=2),
}


# The arguments with a time axis (lam and omega only in some variants).
TOKENS = ("x", "B", "C", "dt", "A", "lam", "omega", "z", "segment_ids")


def make(t=37, *, b=2, h=2, g=1, p=8, n=16, s=4, r=1, hh=1, mimo=False, gate=True, reduce=True, bare=False,
         lam=None, rotation="data_dependent", dtype=jnp.float32, seed=0):  # fmt: skip
    """Random arguments of `ssm`, drawn in float32 so that all dtypes see the same numbers, by NumPy."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    args = dict(
        x=normal(b, t, h, p), B=normal(b, t, r, g, n), C=normal(b, t, r, g, n),
        dt=np.logaddexp(0, normal(b, t, h)), A=-np.exp(normal(b, t, h) - 1),
        lam=1 / (1 + np.exp(-normal(b, t, h))) if lam is None else lam,
        omega={"data_dependent": np.pi * np.tanh(normal(b, t, hh, s)), "rope": rope_frequencies(n, s)}.get(rotation),
        rotation=rotation,
    )  # fmt: skip
    if not bare:
        args |= dict(B_bias=1 + normal(h, r, n), C_bias=1 + normal(h, r, n), D=normal(h))
    if gate:
        args |= dict(z=normal(b, t, h, p))
    if mimo:
        args |= dict(mimo_x=normal(h, r, p)) | (dict(mimo_z=normal(h, r, p)) if gate else {})
        args |= dict(mimo_o=normal(h, r, p)) if reduce else {}
    return cast(args, dtype)


def cast(tree, dtype):
    """Every array as one of JAX."""
    arrays = jax.Array | np.ndarray
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a).astype(dtype)) if isinstance(a, arrays) else a, tree)


def random_state(args, seed=1) -> SSMState:
    b, _, h, p = args["x"].shape
    r, n = args["B"].shape[2], args["B"].shape[4]
    s = 0 if args["omega"] is None else args["omega"].shape[-1]
    rng = np.random.default_rng(seed)
    return SSMState(
        *(jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in SSMState.shapes(b, h, p, n, r, s))
    )


def cut(args, start, stop):
    """The tokens start..stop of the arguments; by NumPy, because JAX compiles every slice."""
    timed = {k: v for k, v in args.items() if k in TOKENS and np.ndim(v) > 1}
    return args | {k: jnp.asarray(np.asarray(v)[:, start:stop]) for k, v in timed.items()}


def split_static(args):
    """(arrays, the rest): what jit traces and what it does not."""
    arrays = {k: v for k, v in args.items() if isinstance(v, jax.Array | SSMState)}
    return arrays, {k: v for k, v in args.items() if k not in arrays}


def call(args, **options):
    """`ssm`, jitted, on a dictionary of arguments."""
    arrays, static = split_static(args | options)
    return jax.jit(functools.partial(ssm, **static))(**arrays)


def distance(a, b) -> float:
    """Largest difference relative to the largest entry of `b`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.max(np.abs(a - b), initial=0) / max(np.max(np.abs(b), initial=0), 1e-30))


def assert_states_close(a: SSMState, b: SSMState, tolerance: float):
    turns = (np.asarray(a.angle, np.float64) - np.asarray(b.angle, np.float64)) / (2 * np.pi)
    assert np.max(np.abs(turns - np.round(turns)), initial=0) * 2 * np.pi <= tolerance
    for name in ("ssm", "k", "v"):
        assert distance(getattr(a, name), getattr(b, name)) <= tolerance, name


def in_complex(args, **options):
    """The operator with its core replaced by the literal complex recurrence."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "recurrent", complex_recurrence)
        return call(args, **options, implementation="recurrent")


def projection(*arrays):
    """A number that every element of the arrays changes, each by a weight of its own."""
    return sum(jnp.sum(jnp.sin(jnp.arange(a.size) + 1.0).reshape(a.shape) * a) for a in arrays)


def values_and_gradients(args, state, **options):
    """(y, final state) and the gradient of a random projection of both, with respect to every array and the state."""
    arrays, static = split_static(args | dict(initial_state=state))

    @jax.jit
    def run(arrays):
        def loss(floats):
            y, final = ssm(**(arrays | floats), **static, **options)
            return projection(y, *final), (y, final)

        floats = {k: v for k, v in arrays.items() if k != "segment_ids"}
        return jax.grad(loss, has_aux=True)(floats)

    gradients, (y, final) = run(arrays)
    return y, final, gradients


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunked_is_the_recurrence_and_so_are_its_gradients(variant, packed):
    """Values, states and the gradient of every input and of the incoming state, in float64.

    Packed: one row's documents begin inside a chunk of 13, at a chunk's edge and at the next token; the other has one.
    """
    if packed and variant not in ("siso", "mimo", "groups", "standard rope"):
        pytest.skip("documents touch what these variants share with the four that are tested packed")
    with jax.enable_x64(True):
        args = make(**VARIANTS[variant], dtype=jnp.float64)
        state = cast(random_state(args), jnp.float64)
        if packed:
            lengths = [[5, 8, 1, 23], [37, 0, 0, 0]]
            args |= dict(segment_ids=jnp.asarray([np.repeat([0, 2, 3, 7], row) for row in lengths], jnp.int32))
        y, final, gradients = values_and_gradients(args, state, implementation="chunked", chunk_size=16)
        y_, final_, gradients_ = values_and_gradients(args, state, implementation="recurrent")
        assert y.dtype == jnp.float64
        assert distance(y, y_) <= 1e-11
        assert_states_close(final, final_, 1e-11)
        chex.assert_trees_all_equal_shapes_and_dtypes(gradients, gradients_)
        for (path, a), b in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(gradients_)):
            assert distance(a, b) <= 1e-11, path


@pytest.mark.parametrize("variant", VARIANTS)
def test_complex_recurrence_is_the_real_one(variant):
    """Propositions 2 to 4: a complex state that turns equals a real one with rotated B and C."""
    with jax.enable_x64(True):
        args = make(**VARIANTS[variant], dtype=jnp.float64)
        state = cast(random_state(args), jnp.float64)
        ids = jnp.asarray([[0] * 20 + [1] * 17, [0] * 37], jnp.int32)
        y, final = in_complex(args, initial_state=state, segment_ids=ids)
        y_, final_ = call(args, initial_state=state, segment_ids=ids, implementation="recurrent")
        assert distance(y, y_) <= 1e-11
        assert_states_close(final, final_, 1e-11)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", ["siso", "mimo"])
def test_low_precision_stays_near_float64(variant, implementation, dtype):
    args = make(100, **VARIANTS[variant], dtype=dtype)
    y, _ = call(args, implementation=implementation)
    assert y.dtype == dtype
    with jax.enable_x64(True):
        expected, _ = call(cast(args, jnp.float64), implementation="recurrent")
    assert distance(y, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_low_precision_B_and_C_that_heads_share_stay_near_float64(implementation):
    """In one chunk of a new row, without a rotation: compiled, CPUs of jaxlib 0.12.0 got these wrong by any amount."""
    args = make(24, h=8, b=4, bare=True, gate=False, lam=EULER, rotation="none", dtype=jnp.bfloat16)

    def gradients(args):
        arrays, static = split_static(args)

        def loss(B, C):
            y, _ = ssm(**arrays | dict(B=B, C=C), **static, implementation=implementation)
            return jnp.sum(y.astype(jnp.promote_types(y.dtype, jnp.float32)) ** 2)

        return jax.jit(jax.grad(loss, (0, 1)))(args["B"], args["C"])

    got = gradients(args)
    with jax.enable_x64(True):
        expected = gradients(cast(args, jnp.float64))
    for mine, true in zip(got, expected):
        assert distance(mine, true) <= TOLERANCE[jnp.bfloat16]


@pytest.mark.parametrize("variant, cuts", [("siso", 1), ("mimo", 17), ("standard rope", 17)])
def test_one_call_equals_two_wherever_it_is_cut(variant, cuts):
    """Outputs and all four states, cut at every position of 70 tokens; every 17th for what shares the same code."""
    with jax.enable_x64(True):
        args = make(70, **VARIANTS[variant], b=1, dtype=jnp.float64)
        whole, final = call(args, implementation="chunked", chunk_size=16)
        empty = jax.tree.map(jnp.zeros_like, final)
        # One function for both parts, which have each length twice.
        run = jax.jit(functools.partial(ssm, **split_static(args)[1], implementation="chunked", chunk_size=16))
        for at in range(1, 70, cuts):
            first, state = run(**split_static(cut(args, 0, at))[0], initial_state=empty)
            second, end = run(**split_static(cut(args, at, 70))[0], initial_state=state)
            assert distance(np.concatenate([first, second], 1), whole) <= 1e-11, at
            assert_states_close(end, final, 1e-11)


@pytest.mark.parametrize("variant", ["siso", "mimo", "no rotation", "standard rope", "mimo ranks kept"])
def test_steps_equal_the_sequence(variant):
    """`ssm_step` from a prefill's state: the same outputs and state as one call."""
    args = make(12, **VARIANTS[variant])
    whole, final = call(args)
    outputs, state = [], call(cut(args, 0, 7))[1]
    static = {k: args.get(k) for k in ("B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o", "rotation")}
    step = jax.jit(lambda token, state: ssm_step(**token, **static, state=state))
    for t in range(7, 12):
        token = {k: v for k, v in cut(args, t, t + 1).items() if k not in static}
        token = {k: v[:, 0] if np.ndim(v) > 1 else v for k, v in token.items()}
        y, state = step(token, state)
        outputs.append(y)
    assert distance(jnp.stack(outputs, 1), whole[:, 7:]) <= TOLERANCE[jnp.float32]
    assert_states_close(state, final, TOLERANCE[jnp.float32])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", ["siso", "mimo"])
def test_packed_documents_are_separate_documents(variant, implementation):
    """Two rows with different boundaries, a document of one token, one that ends at a chunk's edge."""
    lengths = [(16, 1, 30, 3), (9, 41)]
    with jax.enable_x64(True):
        args = make(50, **VARIANTS[variant], dtype=jnp.float64)
        ids = jnp.asarray(np.stack([np.repeat(np.arange(len(row)) * 2, row) for row in lengths]), jnp.int32)
        packed, final = call(args, segment_ids=ids, implementation=implementation, chunk_size=16)
        for row, documents in enumerate(lengths):
            own = {k: v[row : row + 1] if k in TOKENS else v for k, v in args.items()}
            start = 0
            for length in documents:
                y, state = call(cut(own, start, start + length), implementation=implementation, chunk_size=16)
                assert distance(packed[row : row + 1, start : start + length], y) <= 1e-11
                start += length
            assert_states_close(final.map(lambda a: a[row : row + 1]), state, 1e-11)


def test_packed_rows_continue_the_open_document():
    """With a state, the row's first document goes on and the later ones still start from zero."""
    with jax.enable_x64(True):
        args = make(40, b=1, dtype=jnp.float64)
        ids = jnp.asarray(np.repeat([[0, 1]], [25, 15], axis=1), jnp.int32)
        whole, final = call(args, segment_ids=ids)
        _, state = call(cut(args, 0, 10))
        rest, end = call(cut(args | dict(segment_ids=ids), 10, 40), initial_state=state, chunk_size=8)
        assert distance(rest, whole[:, 10:]) <= 1e-11
        assert_states_close(end, final, 1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_output_depends_on_a_later_token(implementation):
    """Causality by gradient: the output at t has an exactly zero gradient in every input after t."""
    args = make(20)
    arrays, static = split_static(args)
    at = 11

    def output(arrays):
        return ssm(**arrays, **static, implementation=implementation, chunk_size=8)[0][:, at].sum()

    gradients = jax.jit(jax.grad(output))(arrays)
    for name in ("x", "B", "C", "dt", "A", "lam", "omega", "z"):
        assert not np.any(gradients[name][:, at + 1 :]), name
        assert np.any(gradients[name][:, at]), name
        # C and the gate act where they stand. All else reaches the output from every earlier token; only the first
        # token's decay and turn have nothing to act on yet.
        first = 1 if name in ("A", "omega") else 0
        reaches = np.any(gradients[name][:, first:at] != 0, axis=tuple(range(2, gradients[name].ndim)))
        assert not np.any(reaches) if name in ("C", "z") else np.all(reaches), name


@pytest.mark.parametrize("variant", ["siso", "mimo"])
def test_chunk_size_does_not_change_the_result(variant):
    with jax.enable_x64(True):
        args = make(300, **VARIANTS[variant], b=1, dtype=jnp.float64)
        state = cast(random_state(args), jnp.float64)
        y, final = call(args, initial_state=state, implementation="chunked", chunk_size=16)
        for chunk_size in (64, 128, 256, 1000):
            y_, final_ = call(args, initial_state=state, implementation="chunked", chunk_size=chunk_size)
            assert distance(y_, y) <= 1e-11, chunk_size
            assert_states_close(final_, final, 1e-11)


def test_weak_decay_after_a_strong_one_keeps_its_precision():
    """A token that wipes the state (exp(-500)) must not cost the next tokens' decays their digits in float32."""
    args = make(64, b=1, rotation="none", gate=False)
    wipe = (jnp.arange(64) % 3 == 0)[None, :, None]
    args |= dict(A=jnp.where(wipe, -500.0, -1e-3) * jnp.ones_like(args["A"]), dt=jnp.ones_like(args["dt"]))
    with jax.enable_x64(True):
        expected, _ = call(cast(args, jnp.float64), implementation="recurrent")
    y, _ = call(args, implementation="chunked", chunk_size=64)
    assert distance(y, expected) <= 2e-6


@pytest.mark.parametrize("step", [1e-6, 50.0, "alternating"])
def test_extreme_steps_stay_finite(step):
    """No NaN or Inf, forward or backward, for dt from 1e-6 to 50."""
    args = make(200)
    dt = jnp.where(jnp.arange(200) % 2, 1e-6, 50.0)[None, :, None] if step == "alternating" else step
    args |= dict(dt=dt * jnp.ones_like(args["dt"]), A=30 * args["A"])
    chex.assert_tree_all_finite(values_and_gradients(args, random_state(args), implementation="chunked"))


def test_memory_of_the_backward_pass():
    """Temporaries at b=2 t=2048 h=8 p=64 n=64: at most 60% of the 159 MB that the package mamba3-jax 1.0.1 takes."""
    arrays, static = split_static(make(2048, b=2, h=8, p=64, n=64, s=16))

    def loss(arrays):
        return ssm(**arrays, **static, implementation="chunked")[0].sum()

    analysis = jax.jit(jax.grad(loss)).lower(arrays).compile().memory_analysis()
    assert analysis.temp_size_in_bytes <= 0.6 * 159e6


def test_a_hundred_thousand_tokens_stay_finite_and_accurate():
    """Forward and backward; the angle after 100,000 tokens is still the float64 sum, within a milliradian."""
    args = make(100_000, b=1, h=1, p=4, n=8, s=2)
    state = random_state(args)
    y, final, gradients = values_and_gradients(args, state, implementation="chunked")
    chex.assert_tree_all_finite((y, final, gradients))
    turns = np.asarray(args["dt"], np.float64)[..., None] * np.asarray(args["omega"], np.float64)
    turned = np.asarray(final.angle, np.float64) - np.asarray(state.angle, np.float64) - turns.sum(1)
    assert np.max(np.abs(turned - 2 * np.pi * np.round(turned / (2 * np.pi)))) < 1e-3


def test_mimo_of_rank_one_is_siso_in_another_channel_order():
    """Only the pairing differs: half-split (i, i + n/2) against neighbours (2i, 2i + 1)."""
    args = make(n=8, s=4)
    order = np.arange(8).reshape(2, 4).T.ravel()
    mimo = dict(args, **{k: args[k][..., np.argsort(order)] for k in ("B", "C", "B_bias", "C_bias")})
    mimo |= {k: jnp.ones((2, 1, 8)) for k in ("mimo_x", "mimo_z", "mimo_o")}
    assert distance(call(mimo)[0], call(args)[0]) <= TOLERANCE[jnp.float32]


def test_state_has_the_promised_shapes_and_dtypes():
    args = make(5, r=2, mimo=True, dtype=jnp.bfloat16)
    _, state = call(args)
    assert [a.shape for a in state] == list(SSMState.shapes(2, 2, 8, 16, 2, 4))
    assert all(a.dtype == jnp.float32 for a in state)


def test_the_choice_is_logged_once(caplog):
    api._log_choice.cache_clear()
    with caplog.at_level("INFO", logger="mamba3_jax.ops.api"):
        for _ in range(2):
            jax.eval_shape(lambda: ssm(**make(3)))
    assert [r.getMessage() for r in caplog.records] == ["ssm on cpu: implementation 'chunked' for sequences"]
