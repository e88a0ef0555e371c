"""The kernels of whole sequences against the recurrence, and lowered for GPUs without one.

On a CPU they are interpreted. `JAX_PLATFORMS=cuda pytest tests/kernels/test_triton.py` runs them on a GPU.
"""

import contextlib
import dataclasses
import functools
import re
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mamba3_jax.ops import EULER, SSMState, api, ssm, ssm_step
from mamba3_jax.ops.decode import decode
from mamba3_jax.ops.triton import triton
from pallas.triton import backward
from pallas.triton.block_sizes import default_block_sizes
from pallas.triton.operands import Operands
from pallas.triton.tiles import Tiling
from test_operator import assert_states_close, call, cut, make, random_state, split_static, values_and_gradients

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
            parts = (y, *final) if used else (y,)
            return sum(jnp.sum(jnp.sin(jnp.arange(u.size) + 1.0).reshape(u.shape) * u) for u in parts)

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


def test_states_of_chunks_are_not_kept_for_the_backward_pass():
    """Nothing is kept that holds a state for each chunk; coefficients are made anew; parts wait for one another."""
    args = arguments(64, b=4)
    arrays, static = split_static(args)
    with interpreted(rows=16, programs=2):
        loss = sharded_loss(static)
        kept = jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(lambda a: loss(a)[0], a)[1], arrays))
        text = jax.jit(jax.grad(loss, has_aux=True)).lower(arrays).as_text()
    n, p = args["B"].shape[-1], args["x"].shape[-1]
    assert kept and not [u.shape for u in kept if u.ndim == 5 and {n, p} <= set(u.shape[-2:])]
    # Before the coefficients, and two in each of the four parts.
    assert text.count("optimization_barrier") == 1 + 2 * 4


def test_block_sizes_fit_the_gpu():
    """Tiles of float32 by the width of a head; less is fetched ahead where larger states would not fit."""
    tiles = {(p, n): default_block_sizes(1, p, n, jnp.float32, "9.0") for p in (16, 64) for n in (64, 128)}
    assert {size: blocks.rows for size, blocks in tiles.items()} == {
        (16, 64): 32,
        (64, 64): 16,
        (16, 128): 16,
        (64, 128): 16,
    }
    assert [blocks.stages for blocks in tiles.values()] == [2, 2, 1, 2]
    assert [blocks.num_warps for blocks in tiles.values()] == [2, 4, 2, 4]

    def ahead(capability, p, n, r=1):
        blocks = default_block_sizes(r, p, n, jnp.bfloat16, capability)
        return blocks.serial_stages, blocks.stages

    assert [ahead(gpu, 64, 128) for gpu in ("8.0", "8.9", "9.0", "10.0", "12.0")] == [
        (3, 2),
        (3, 2),
        (3, 2),
        (1, 1),
        (1, 1),
    ]
    assert [ahead(gpu, 64, 256) for gpu in ("8.0", "8.6", "8.9", "9.0", "10.0")] == [
        (3, 2),
        (2, 1),
        (2, 1),
        (3, 2),
        (1, 1),
    ]
    assert {ahead(gpu, 128, 256) for gpu in ("8.0", "8.9", "9.0")} == {(2, 1)}
    assert {ahead(gpu, 64, 128, r=4) for gpu in ("8.0", "8.9", "9.0", "10.0")} == {(1, 1)}


def test_rows_at_once_fill_the_gpu_and_divide_the_batch():
    many, waves = 2**20, backward.WAVES
    # No more than four parts, each of which has kernels of its own to compile.
    assert backward.rows_at_once(32, many, 128, 256) == 8
    assert backward.rows_at_once(7, many, 1024, 256) == 7
    assert backward.rows_at_once(8, many, 128, 256) == 2
    assert backward.rows_at_once(8, many, 64, 256) == 4
    # Five rows would do, and six divide the batch; of three rows all together make too few.
    assert backward.rows_at_once(6, many, 60, 256) == backward.rows_at_once(12, many, 60, 256) == 6
    assert backward.rows_at_once(3, many, 60, 256) == 3
    assert backward.rows_at_once(1, many, 4096, 256) == 1
    # The kernels over chunks want several times as many; rows of one chunk are cut too.
    assert backward.rows_at_once(8, 4096 // waves, many, 4096) == 8
    assert backward.rows_at_once(2048, waves, many, 256) == 512
    assert backward.rows_at_once(2048, 1, many, 512 // waves) == 512
    # Of 8 rows of 2048 tokens and 64 heads: SISO has too few programs to be cut, MIMO of rank 4 not.
    blocks = default_block_sizes(1, 64, 128, jnp.bfloat16, "9.0")
    found = [backward.rows_at_once(8, 64 // blocks.heads * chunks, 64, blocks.programs) for chunks in (32, 128)]
    assert found == [8, 4]


def test_programs_have_fewer_heads_where_they_would_leave_the_gpu_empty():
    """Of 64 heads, one row of 512 or 2048 tokens, and 8 of 2048; and of 12 heads a group."""
    blocks = default_block_sizes(1, 64, 128, jnp.bfloat16, "9.0")

    def heads(b, t, h, g):
        x, B = (jax.ShapeDtypeStruct((b, t, k, 64), jnp.bfloat16) for k in (h, g))
        ops = Operands(**dict.fromkeys(Operands._fields) | dict(x=x, B=B))
        return backward._Grid(ops, 0, b, Tiling(64, 1, 128, 32, 64, False), blocks).heads

    assert [heads(*sizes) for sizes in ((1, 512, 64, 1), (1, 2048, 64, 1), (8, 2048, 64, 1))] == [2, 8, blocks.heads]
    assert heads(1, 64, 12, 1) == 1 and heads(64, 2048, 24, 2) == 12


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
    given = []

    def kernels(arguments, *_):
        given.append(arguments)
        return jnp.zeros_like(arguments.x), jnp.zeros((1, 2, SIZES["n"], SIZES["p"]))

    with interpreted(rows=64), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["mamba3_jax.ops.triton"], "ssm", kernels)
        ssm(**args, implementation="triton")
    found = np.asarray(given[0].theta0, np.float64)
    turned = np.cumsum(np.asarray(args["dt"], np.float64)[..., None] * np.asarray(args["omega"], np.float64), 1)
    expected = np.concatenate([np.zeros_like(turned[:, :1]), turned[:, 63::64]], 1)
    assert found.shape == expected.shape
    assert np.max(np.abs(2 * np.sin((found - expected) / 2))) <= limit


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
        return sum(jnp.sum(jnp.sin(jnp.arange(u.size) + 1.0).reshape(u.shape) * u) for u in (y, *final))

    with interpreted(rows=32, segments=2):
        for dt in (1e-6 * ones, 50 * ones, mixed):
            chex.assert_tree_all_finite(gradients(arrays | dict(dt=dt, initial_state=random_state(args))))


AXES = dict(
    x="bthp", z="bthp", B="btrgn", C="btrgn", dt="bth", A="bth", lam="bth", omega="bt1s", B_bias="hrn", C_bias="hrn",
    D="h", mimo_x="hrp", mimo_z="hrp", mimo_o="hrp", angle="bhs", ssm="bhpn", k="bhrn", v="bhp",
)  # fmt: skip
SHARDED = {
    "batch": ((4, 1), dict()),
    "heads": ((1, 4), dict()),
    "batch and heads": ((2, 2), dict(r=2, mimo=True)),
    "heads of a group apart": ((1, 4), dict(g=2)),
}


def sharded_loss(static):
    def loss(arrays):
        y, final = ssm(**arrays, **static, implementation="triton")
        return sum(jnp.sum(jnp.sin(jnp.arange(u.size) + 1.0).reshape(u.shape) * u) for u in (y, *final)), (y, final)

    return loss


def shardings(mesh, arrays):
    def one(name, value):
        if isinstance(value, SSMState):
            return SSMState(*(one(*item) for item in value._asdict().items()))
        return NamedSharding(mesh, P(*({"b": "data", "h": "model"}.get(axis) for axis in AXES[name])))

    return {name: one(name, value) for name, value in arrays.items()}


@functools.cache
def on_one_device(**kwargs):
    """(arguments, the function, what it returns) of values and gradients."""
    args = arguments(20, b=4, h=4, s=16, **kwargs)
    arrays, static = split_static(args | dict(initial_state=random_state(args)))
    gradients = jax.grad(sharded_loss(static), has_aux=True)
    with interpreted():
        return arrays, gradients, jax.jit(gradients)(arrays)


several_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices, as a CPU has in these tests")


@several_devices
@pytest.mark.parametrize("case", SHARDED)
def test_every_device_runs_its_own_rows_and_heads(case):
    """Under `jit` with shardings: the values and gradients of one device, and x never gathered."""
    shape, kwargs = SHARDED[case]
    arrays, gradients, expected = on_one_device(**kwargs)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(shape), ("data", "model"))
    placed = jax.device_put(arrays, shardings(mesh, arrays))
    # So few that every device takes its rows in parts, if it has more than one.
    with interpreted(programs=2):
        compiled = jax.jit(gradients).lower(placed).compile()
    found = compiled(placed)
    assert_all_close(found, expected, 3e-6)
    assert found[1][0].sharding.is_equivalent_to(placed["x"].sharding, 4)
    gathered = re.findall(r"= (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text())
    # Of several groups every device reads B and C whole, and takes its own.
    assert all("2,32]" in shape for shape in gathered) if case == "heads of a group apart" else not gathered


@several_devices
def test_every_device_trains_its_own_rows_and_heads():
    """As above without a state before and with no use of the one after."""
    args = arguments(20, b=4, h=4, g=2, s=16)
    arrays, static = split_static(args)

    def loss(arrays):
        y = ssm(**arrays, **static, implementation="triton")[0]
        return jnp.sum(jnp.sin(jnp.arange(y.size) + 1.0).reshape(y.shape) * y)

    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    placed = jax.device_put(arrays, shardings(mesh, arrays))
    with interpreted(programs=2):
        expected = jax.jit(jax.grad(loss))(arrays)
        compiled = jax.jit(jax.grad(loss)).lower(placed).compile()
    assert_all_close(compiled(placed), expected, 3e-6)
    assert not re.findall(r" (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text())


@several_devices
def test_inside_a_shard_map_and_a_vmap():
    """A sweep's runs are vmapped, those of each device by themselves; the two rows of a run one after the other."""
    args = arguments(20, s=16)
    arrays, static = split_static(args)
    gradients = jax.grad(lambda a: sharded_loss(static)(a)[0])
    runs = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a, 0.2 * a, -a]), arrays)
    runs |= dict(dt=jnp.abs(runs["dt"]), A=-jnp.abs(runs["A"]))
    mesh = Mesh(np.array(jax.devices()[:2]), ("each",))
    with interpreted(programs=2):
        mapped = jax.shard_map(jax.vmap(gradients), mesh=mesh, in_specs=P("each"), out_specs=P("each"), check_vma=False)
        found = jax.jit(mapped)(runs)
        single = jax.jit(gradients)
        for i in range(4):
            assert_all_close(jax.tree.map(lambda a: a[i], found), single(jax.tree.map(lambda a: a[i], runs)), 3e-6)


@pytest.mark.parametrize(
    "kwargs, dtype",
    [
        (dict(), jnp.bfloat16),
        (dict(s=64, gate=False), jnp.bfloat16),
        (dict(r=4, mimo=True), jnp.bfloat16),
        (dict(r=8, mimo=True, g=4, reduce=False), jnp.bfloat16),
        (dict(p=16, n=64, s=16), jnp.float32),
    ],
    ids=["siso", "siso, all turn, no gate", "mimo", "mimo rank 8, groups, ranks kept", "siso float32 of a sweep"],
)
@pytest.mark.parametrize(
    "device, capability",
    [("NVIDIA A100-SXM4-80GB", "8.0"), ("NVIDIA H100 80GB HBM3", "9.0"), ("NVIDIA B200", "10.0")],
    ids=["A100", "H100", "B200"],
)
def test_lowers_for_gpus(device, capability, kwargs, dtype):
    """To Triton IR, which needs no GPU: the forward and backward pass of a layer of 64 heads."""
    sizes = dict(p=64, n=128, s=32) | kwargs
    shapes = jax.eval_shape(lambda: split_static(make(2048, b=8, h=64, **sizes))[0])
    static = dict(rotation="data_dependent")
    wide = ("dt", "A", "lam", "omega")
    shapes = {k: u if k in wide else jax.ShapeDtypeStruct(u.shape, dtype) for k, u in shapes.items()}
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(device, num_cores=None, platform="gpu"))
    with pytest.MonkeyPatch.context() as patch, jax.sharding.use_abstract_mesh(mesh):
        blocks = default_block_sizes(sizes.get("r", 1), sizes["p"], sizes["n"], dtype, capability)
        patch.setattr(api, "triton", functools.partial(triton, blocks=blocks))
        patch.setattr(api, "_platform", lambda: "cuda")
        traced = jax.jit(jax.value_and_grad(sharded_loss(static), has_aux=True)).trace(shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    names = set(re.findall(r'name = "(ssm_\w+)"', text))
    gradients = {f"ssm_{of}_gradients" for of in ("coefficient", "output", "value", "projection")}
    assert names == {"ssm_coefficients", "ssm_states", "ssm_outputs", "ssm_adjoints"} | gradients


def test_layers_of_one_shape_share_their_kernels():
    """Traced and lowered once, however many there are: it is most of what JAX does before the compiler."""
    shapes = jax.eval_shape(lambda: split_static(make(64, h=2, p=64, n=64, s=16))[0])
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"))
    with pytest.MonkeyPatch.context() as patch, jax.sharding.use_abstract_mesh(mesh):
        patch.setattr(api, "_platform", lambda: "cuda")
        two = jax.jit(lambda a: ssm(**(a | dict(x=ssm(**a)[0])))[0])
        text = two.trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('name = "ssm_outputs"') == 1


def test_without_a_state_no_zeros_of_its_size_are_made():
    """Written and read, those of a state before a sequence and of a gradient after it took some 0.04 of 2.9 ms of a
    layer's forward and backward pass on an H200, 0.03 of it to make them. Of several segments there are some."""
    shapes = jax.eval_shape(lambda: split_static(make(64, b=128, h=2, p=32, n=64, s=16))[0])
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"))

    def lowered(state):
        def loss(a):
            return jnp.sum(ssm(**a, initial_state=state)[0])

        return jax.jit(jax.grad(loss)).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()

    def zeros(text):
        return re.findall(r"broadcast_in_dim.*-> tensor<128x2x(?:1x)?(?:64x32|32x64)xf32>", text)

    with pytest.MonkeyPatch.context() as patch, jax.sharding.use_abstract_mesh(mesh):
        patch.setattr(api, "_platform", lambda: "cuda")
        assert zeros(lowered(SSMState.zeros(128, 2, 32, 64, s=16)))
        assert not zeros(lowered(None))


ERRORS = {
    "head dim": (dict(p=8), "x: got head dim p=8", "16, 32, 64, 128"),
    "state size": (dict(n=16, s=4), "B: got state size n=16", "32, 64, 128, 256"),
    "rank": (dict(r=3, mimo=True), "B: got rank r=3", "1, 2, 4, 8"),
    "angles per head": (dict(hh=2), "omega: got one row for each of h=2 heads", "one row for all heads"),
    "dtype": (dict(dtype=jnp.float16), "x: got dtype float16", "bfloat16, float32"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_explicit_choice_names_what_does_not_fit_and_none_falls_back(case, caplog):
    kwargs, got, allowed = ERRORS[case]
    args = arguments(5, **kwargs)
    with interpreted(), caplog.at_level("INFO", logger="mamba3_jax.ops.api"):
        with pytest.raises(NotImplementedError) as caught:
            ssm(**args, implementation="triton")
        api._log_choice.cache_clear()
        jax.eval_shape(lambda: ssm(**args))
    message = str(caught.value)
    assert message.startswith(got) and "; allowed in the triton kernels" in message and allowed in message
    assert [r.getMessage() for r in caplog.records] == [
        f"ssm on cuda: implementation 'chunked' for sequences ({message})"
    ]


def test_float64_is_refused():
    with jax.enable_x64(True), interpreted():
        with pytest.raises(NotImplementedError, match="x: got dtype float64; allowed .* compute in float32"):
            ssm(**arguments(5, dtype=jnp.float64), implementation="triton")


def step_of(args, **options):
    per_token = ("x", "B", "C", "dt", "A", "lam", "omega", "z")
    token = {k: v[:, 0] if k in per_token and np.ndim(v) > 1 else v for k, v in args.items()}
    return jax.eval_shape(lambda: ssm_step(**token, **options))


@pytest.mark.skipif(not INTERPRET, reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_named():
    args = arguments(1)
    expected = "implementation: got 'triton' on a machine with cpu devices.*; allowed: recurrent, chunked"
    with pytest.raises(NotImplementedError, match=expected):
        ssm(**args, implementation="triton")
    with pytest.raises(NotImplementedError, match=expected):
        step_of(args, state=random_state(args), implementation="triton")


def test_what_a_gpu_picks(caplog):
    """Sequences and steps by the kernels, one token of a prefill by the recurrence; each logged once."""
    api._log_choice.cache_clear()
    args, odd = arguments(5), arguments(1, p=6)
    narrow = random_state(args)
    narrow = narrow.map(lambda a: a.astype(jnp.bfloat16))._replace(angle=narrow.angle)
    with interpreted(), caplog.at_level("INFO", logger="mamba3_jax.ops.api"):
        for _ in range(2):
            jax.eval_shape(lambda: ssm(**args))
            jax.eval_shape(lambda: ssm(**cut(args, 0, 1)))
            _, new = step_of(cut(args, 0, 1), state=narrow)
            step_of(odd, state=random_state(odd))
        with pytest.raises(NotImplementedError, match="x: got head dim p=6"):
            step_of(odd, state=random_state(odd), implementation="triton")
        with pytest.raises(ValueError, match="initial_state.ssm: got shape"):
            step_of(cut(args, 0, 1), state=random_state(odd), implementation="triton")
    assert [a.dtype for a in new] == [jnp.float32] + [jnp.bfloat16] * 3
    prefix = "ssm on cuda: implementation"
    assert [r.getMessage().removeprefix(prefix) for r in caplog.records[:3]] == [
        " 'triton' for sequences",
        " 'recurrent' for one token",
        " 'triton' for steps",
    ]
    assert len(caplog.records) == 4 and "'recurrent' for steps (x: got head dim p=6" in caplog.records[3].getMessage()
