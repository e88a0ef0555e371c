"""The kernels of whole sequences against the recurrence.

On a CPU they are interpreted. `JAX_PLATFORMS=cuda pytest tests/kernels/test_triton.py` runs them on a GPU.
"""

import contextlib
import dataclasses
import functools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.ops import EULER, SSMState, api, ssm
from mamba3_jax.ops.decode import decode
from mamba3_jax.ops.triton import triton
from pallas.triton import backward
from pallas.triton.angles import before_chunks
from pallas.triton.block_sizes import default_block_sizes
from pallas.triton.forward import forward
from pallas.triton.tiles import Tiling
from test_operator import (
    assert_states_close,
    call,
    cut,
    make,
    projection,
    random_state,
    split_static,
    values_and_gradients,
)

INTERPRET = jax.default_backend() != "gpu"
# Relative Frobenius norm, of values and of gradients. A GPU makes float32 products of three TF32 ones, and its sines
# and cosines are good to 2^-20.
TOLERANCE = {jnp.float32: 1e-5 if INTERPRET else 1e-4, jnp.bfloat16: 1e-2}
# Of the same kernels that cut their work otherwise: on a GPU, of other TF32 products.
REORDERED = 1e-6 if INTERPRET else TOLERANCE[jnp.float32]

SIZES = dict(p=16, n=32, s=8)
# Of the operator, and how the kernels cut it: (arguments, rows of a tile, segments).
VARIANTS = {
    "siso packed": (dict(packed=True), 16, 2),
    "siso groups rope1": (dict(g=2, h=4, b=1, s=16), 32, 2),
    "siso no rotation, no D, no gate": (dict(rotation="none", bare=True, gate=False), 16, 1),
    "siso 6 heads": (dict(h=6, b=1, bare=True), 16, 1),
    "mimo rank 2 packed": (dict(r=2, mimo=True, packed=True, gate=False, s=16), 16, 1),
    "mimo rank 4, ranks kept": (dict(r=4, mimo=True, reduce=False, b=1), 32, 3),
    "mimo rank 8 groups": (dict(r=8, mimo=True, g=2, b=1, lam=EULER, s=16), 16, 1),
}
# What differs from those in plain JAX only.
FORWARD_VARIANTS = {
    "siso standard rope": (dict(rotation="rope", b=1), 16, 1),
    "mimo rank 1": (dict(r=1, mimo=True, b=1, h=3, s=16), 16, 2),
}


def arguments(t=37, packed=False, **kwargs):
    args = make(t, **(SIZES | kwargs))
    if packed:
        # Documents that begin inside a chunk, at its edge and at the next token; every other row has one.
        rows = [np.repeat([0, 2, 3, 7], lengths) for lengths in ([5, 11, 1, 20], [37, 0, 0, 0])]
        args |= dict(segment_ids=jnp.asarray(np.stack(rows * (len(args["x"]) // 2)), jnp.int32))
    return args


@contextlib.contextmanager
def interpreted(rows=16, segments=1, **cut):
    """Inside, `ssm` and `ssm_step` take this machine for one with a GPU; if it is not, the kernels run interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        whole = "programs" not in cut
        blocks = default_block_sizes(1, 64, 128, jnp.float32, "9.0")
        # Programs take all heads then.
        blocks = dataclasses.replace(blocks, rows=rows, **(dict(programs=1) | cut))
        options = dict(blocks=blocks, segments=segments, interpret=INTERPRET)
        patch.setattr(api, "triton", functools.partial(triton, **options))
        patch.setattr(api, "decode", functools.partial(decode, interpret=INTERPRET))
        patch.setattr(api, "_platform", lambda: "cuda")
        patch.setattr(api, "_step_kernel", lambda: "triton")
        # `programs` of a part, so that a batch this small has parts; without them it has none.
        patch.setattr(backward, "WAVES", 1)
        if whole:
            patch.setattr(backward, "rows_at_once", lambda b, *_: b)
        yield


def in_float64(function, args, *rest, **options):
    """`function` of the same numbers, by the recurrence."""

    def wide(a):
        floats = isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jnp.floating)
        return jnp.asarray(np.asarray(a).astype(np.float64)) if floats else a

    with jax.enable_x64(True):
        args, rest = jax.tree.map(wide, (args, rest))
        return function(args, *rest, **options, implementation="recurrent")


def error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


def assert_all_close(found, expected, tolerance: float):
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert error(a, b) <= tolerance, (path, error(a, b))


def assert_final_close(a: SSMState, b: SSMState, tolerance: float):
    assert_states_close(SSMState(a.angle, b.ssm, b.k, b.v), b, 1e-5)
    assert_all_close(a[1:], b[1:], tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_states_and_gradients_are_those_of_the_recurrence(variant):
    """Of every input and of the incoming state, through the output and the final state; 37 tokens are padded to 48."""
    kwargs, rows, segments = VARIANTS[variant]
    args = arguments(**kwargs)
    state = random_state(args)
    with interpreted(rows, segments):
        y, final, gradients = values_and_gradients(args, state, implementation="triton")
    y_, final_, gradients_ = in_float64(values_and_gradients, args, state)
    assert y.dtype == jnp.float32
    assert error(y, y_) <= TOLERANCE[jnp.float32]
    assert_final_close(final, final_, TOLERANCE[jnp.float32])
    assert_all_close(gradients, gradients_, TOLERANCE[jnp.float32])


@pytest.mark.parametrize(
    "kwargs",
    [dict(g=2, h=4, packed=True), dict(r=2, mimo=True, gate=False, reduce=False, b=1)],
    ids=["siso", "mimo, no gate, ranks kept"],
)
def test_slabs_and_programs_of_the_gradients_add_up(kwargs):
    """Two slabs of turning channels, and every head in a program of its own."""
    args = arguments(s=16, **kwargs)
    state = random_state(args)
    with interpreted(rows=16, turning_slab=16, heads=1):
        *_, gradients = values_and_gradients(args, state, implementation="triton")
    assert_all_close(gradients, in_float64(values_and_gradients, args, state)[-1], TOLERANCE[jnp.float32])


@pytest.mark.parametrize("given, used", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(
    "kwargs, segments",
    [(dict(packed=True), 2), (dict(r=2, mimo=True, b=1, s=16), 1), (dict(rotation="none", bare=True, gate=False), 3)],
    ids=["siso packed", "mimo", "no rotation, no D, no gate"],
)
def test_gradients_without_a_state_before_or_a_use_of_the_one_after(kwargs, segments, given, used):
    """A sequence that begins, as in training, has no state; and nothing comes back through one that is dropped."""
    args = arguments(**kwargs)
    arrays, static = split_static(args)

    def gradients(state_and_arrays, **options):
        state, arrays = state_and_arrays

        def loss(state, arrays):
            y, final = ssm(**arrays, **static, initial_state=state, **options)
            return projection(y, *final) if used else projection(y)

        floats = {name: u for name, u in arrays.items() if name != "segment_ids"}
        return jax.grad(lambda state, floats: loss(state, arrays | floats), (0, 1))(state, floats)

    inputs = (random_state(args) if given else None, arrays)
    with interpreted(rows=16, segments=segments, programs=2):
        found = jax.jit(functools.partial(gradients, implementation="triton"))(inputs)
    assert_all_close(found, in_float64(gradients, inputs), TOLERANCE[jnp.float32])


@pytest.mark.parametrize(
    "kwargs, rows, stages, segments, programs, at_once",
    [
        (dict(g=2, h=4), 32, 2, 1, 4, 1),
        (dict(r=2, mimo=True), 16, 1, 1, 4, 2),
        (dict(rotation="none", bare=True, gate=False), 16, 2, 1, 2, 1),
        (dict(packed=True), 16, 2, 2, 8, 2),
        (dict(r=1, mimo=True, gate=False), 16, 2, 1, 2, 1),
        (dict(s=16, h=4), 16, 1, 1, 4, 1),
    ],
    ids=["siso", "mimo", "no rotation, no D, no gate", "siso packed", "mimo of rank 1, no gate", "two turning slabs"],
)
def test_gradients_of_a_few_rows_after_those_of_others(kwargs, rows, stages, segments, programs, at_once):
    """Of one row of four at once, or of two: arrays of the whole batch and those of a part, whose rows begin at 0.

    Of one stage nothing is carried from one head of a program to the next.
    """
    args = arguments(b=4, **kwargs)
    state = random_state(args)
    cut, whole = [], backward._call_value_gradients

    def noted(grid, given, earlier):
        assert grid.heads == (2 if grid.per_group * grid.heads > 1 else 1)
        cut.append((grid.first, len(given.P), earlier.exit is None))
        return whole(grid, given, earlier)

    cuts = dict(stages=stages, programs=programs, turning_slab=16, heads=2)
    with interpreted(rows=rows, segments=segments, **cuts), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "_call_value_gradients", noted)
        *_, gradients = values_and_gradients(args, state, implementation="triton")
    assert cut == [(first, at_once, first == 0) for first in range(0, 4, at_once)]
    assert_all_close(gradients, in_float64(values_and_gradients, args, state)[-1], TOLERANCE[jnp.float32])


@pytest.mark.parametrize("variant", FORWARD_VARIANTS)
def test_values_and_states_are_those_of_the_recurrence(variant):
    kwargs, rows, segments = FORWARD_VARIANTS[variant]
    args = arguments(**kwargs)
    state = random_state(args)
    with interpreted(rows, segments):
        y, final = call(args, initial_state=state, implementation="triton")
    y_, final_ = in_float64(lambda args, state, **options: call(args, initial_state=state, **options), args, state)
    assert error(y, y_) <= TOLERANCE[jnp.float32]
    assert_final_close(final, final_, TOLERANCE[jnp.float32])


def assert_low_precision_is_close(args, inside, implementation: str, angle: float = 4e-2):
    """Values, states and gradients in bfloat16; `inside` is a context in which the kernels are interpreted.

    `angle` is the error of what the initial angle receives, a sum over all tokens of terms that nearly cancel: 0.016
    and 0.049 for the chunked form.
    """
    state = random_state(args)
    with inside:
        y, final, gradients = values_and_gradients(args, state, implementation=implementation)
    y_, final_, gradients_ = in_float64(values_and_gradients, args, state)
    assert y.dtype == jnp.bfloat16 and final.ssm.dtype == jnp.float32
    assert error(y, y_) <= TOLERANCE[jnp.bfloat16]
    assert_final_close(final, final_, TOLERANCE[jnp.bfloat16])
    angles = (u["initial_state"].angle for u in (gradients, gradients_))
    assert error(*angles) <= angle
    gradients["initial_state"], gradients_["initial_state"] = (
        u["initial_state"]._replace(angle=None) for u in (gradients, gradients_)
    )
    assert_all_close(gradients, gradients_, TOLERANCE[jnp.bfloat16])


@pytest.mark.parametrize("kwargs", [dict(), dict(r=4, mimo=True)], ids=["siso", "mimo"])
def test_low_precision(kwargs):
    args = arguments(**kwargs, s=16, b=1, dtype=jnp.bfloat16)
    assert_low_precision_is_close(args, interpreted(rows=64), "triton", angle=TOLERANCE[jnp.bfloat16])


def test_low_precision_of_x_alone():
    """B and C may be wider than x: the kernels then narrow what they make of them."""
    args = arguments(s=16, b=1, dtype=jnp.bfloat16)
    wide = args | {name: args[name].astype(jnp.float32) for name in ("B", "C")}
    assert_low_precision_is_close(wide, interpreted(rows=64), "triton", angle=TOLERANCE[jnp.bfloat16])


def test_low_precision_of_turns_does_not_depend_on_the_length():
    """What a turn receives is a sum over all later tokens: off by 0.011 here, summed as such by 0.020 and the more the
    longer the row is (the chunked form: 0.041)."""
    args = arguments(512, b=1, h=1, gate=False, s=16, dtype=jnp.bfloat16)

    def gradient(args, **options):
        def total(omega):
            return jnp.sum(call(args | dict(omega=omega), **options)[0].astype(args["dt"].dtype) ** 2)

        return jax.grad(total)(args["omega"])

    with interpreted(rows=64):
        found = gradient(args, implementation="triton")
    assert error(found, in_float64(gradient, args)) <= 1.25e-2


def test_chunks_and_segments_do_not_change_the_result():
    args = arguments(60, b=1, s=16)
    state = random_state(args)
    results = []
    for rows, segments in ((16, 1), (16, 4), (32, 2)):
        with interpreted(rows, segments):
            results.append(call(args, initial_state=state, implementation="triton"))
    for y, final in results[1:]:
        assert error(y, results[0][0]) <= REORDERED
        assert_final_close(final, results[0][1], 2 * REORDERED)


def test_one_call_equals_three_wherever_it_is_cut():
    """Outputs and all four states; the first call has one token."""
    args = arguments(40, r=2, mimo=True, b=1, s=16)
    with interpreted():
        whole, final = call(args, implementation="triton")
        outputs, state = [], None
        for start, stop in ((0, 1), (1, 17), (17, 40)):
            y, state = call(cut(args, start, stop), initial_state=state, implementation="triton")
            outputs.append(y)
    assert error(jnp.concatenate(outputs, 1), whole) <= REORDERED
    assert_final_close(state, final, REORDERED)


def test_packed_documents_are_separate_documents():
    args = arguments(40, b=1, s=16)
    ids = jnp.asarray(np.repeat([[0, 1, 5]], [16, 1, 23], axis=1), jnp.int32)
    with interpreted():
        packed, final = call(args, segment_ids=ids, implementation="triton")
        pieces = [
            call(cut(args, start, stop), implementation="triton") for start, stop in ((0, 16), (16, 17), (17, 40))
        ]
    assert error(packed, jnp.concatenate([y for y, _ in pieces], 1)) <= REORDERED
    assert_final_close(final, pieces[-1][1], REORDERED)


@pytest.mark.parametrize("dtype, limit", [(jnp.float32, 1e-4), (jnp.bfloat16, 3e-4)], ids=["float32", "bfloat16"])
def test_angles_that_chunks_start_from(dtype, limit):
    """3000 steps of 10, all turning the same way, in chunks of 64: those of float32, whose turns are wrapped one by one
    before they are summed, are closer to the sum in float64 (7.6e-5) than those of bfloat16 (2.1e-4)."""
    args = arguments(3000, b=1, gate=False, s=16, dtype=dtype)
    args |= dict(dt=jnp.full_like(args["dt"], 10, jnp.float32), omega=jnp.abs(args["omega"].astype(jnp.float32)) % 3.14)
    made = []

    def kernels(*args):
        *out, theta0 = forward(*args)
        made.append(theta0)
        return out

    with interpreted(rows=64), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["mamba3_jax.ops.triton"], "ssm", kernels)
        ssm(**args, implementation="triton")
    found = np.asarray(made[0], np.float64)
    turned = np.cumsum(np.asarray(args["dt"], np.float64)[..., None] * np.asarray(args["omega"], np.float64), 1)
    expected = np.concatenate([np.zeros_like(turned[:, :1]), turned[:, 63::64]], 1)
    assert found.shape == expected.shape
    assert np.max(np.abs(2 * np.sin((found - expected) / 2))) <= limit


def test_angles_are_summed_modulo_2_pi_in_any_number_of_chunks():
    """45 chunks, not a multiple of those at a time, of two rows, which a write beyond the first would reach, that begin
    at angles of up to 20 revolutions: the float64 sum of the same numbers."""
    turned, start = (
        scale * jax.random.normal(jax.random.key(i), shape, jnp.float32)
        for i, (scale, shape) in enumerate([(2.0, (2, 45, 3, 16)), (40.0, (2, 3, 16))])
    )
    found = before_chunks(turned, start, Tiling(16, 1, 32, 16, 16, precise=True, interpret=INTERPRET))
    sums = np.cumsum(np.asarray(turned, np.float64), axis=1)
    expected = np.asarray(start, np.float64)[:, None] + np.pad(sums[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    assert np.max(np.abs(found)) <= 3.1416
    assert np.max(np.abs(2 * np.sin((np.asarray(found, np.float64) - expected) / 2))) <= 3e-6


@pytest.mark.parametrize("rows", [16, 64])
def test_weak_decay_after_a_strong_one_and_angles_that_wrap_at_every_step(rows):
    """exp(-500) must not cost the next tokens' decays their digits, nor 1.5 revolutions per token the angle its own, in
    a chunk and from one to the next."""
    args = arguments(64, b=1, gate=False)
    wipe = (jnp.arange(64) % 3 == 0)[None, :, None]
    args |= dict(A=jnp.where(wipe, -500.0, -1e-3) * jnp.ones_like(args["A"]), dt=jnp.ones_like(args["dt"]))
    args |= dict(omega=args["omega"] + 3 * np.pi)
    with interpreted(rows=rows):
        y, _ = call(args, implementation="triton")
    assert error(y, in_float64(call, args)[0]) <= (5e-6 if INTERPRET else TOLERANCE[jnp.float32])


def test_angle_after_many_chunks():
    """3000 tokens in 188 chunks, always turning the same way: the angle is the float64 sum to 1e-4."""
    args = arguments(3000, b=1, h=1, gate=False, s=16)
    args |= dict(omega=jnp.abs(args["omega"]))
    with interpreted():
        _, final = call(args, implementation="triton")
    turned = np.sum(np.asarray(args["dt"], np.float64)[..., None] * np.asarray(args["omega"], np.float64), 1)
    assert np.max(np.abs(np.sin((np.asarray(final.angle, np.float64) - turned) / 2))) <= 1e-4


def test_extreme_steps_stay_finite():
    """No NaN or Inf, forward or backward, for dt from 1e-6 to 50."""
    args = arguments(b=1)
    ones = jnp.ones_like(args["dt"])
    mixed = jnp.where(jnp.arange(37) % 2, 1e-6, 50.0)[None, :, None] * ones
    arrays, static = split_static(args | dict(A=30 * args["A"]))

    @jax.jit
    @jax.grad
    def gradients(arrays):
        y, final = ssm(**arrays, **static, implementation="triton")
        return projection(y, *final)

    with interpreted(rows=32, segments=2):
        for dt in (1e-6 * ones, 50 * ones, mixed):
            chex.assert_tree_all_finite(gradients(arrays | dict(dt=dt, initial_state=random_state(args))))
