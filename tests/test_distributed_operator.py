"""The operator on meshes of four devices: values, states and gradients are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.distributed.mesh import MeshConfig, make_mesh
from mamba3_jax.distributed.operator import Span, passed
from mamba3_jax.ops import FIXED_TRAPEZOID, ssm, ssm_step
from mamba3_jax.ops.discretization import exponential_trapezoidal
from test_operator import (
    assert_states_close,
    call,
    cast,
    cut,
    distance,
    make,
    random_state,
    split_static,
    values_and_gradients,
)

# Lengths of documents in rows of 16 tokens; cut in four: over three spans and inside one; at an edge, and a whole span.
PACKED = [[2, 11, 3], [4, 4, 8]]


def on_mesh(**shape):
    return jax.set_mesh(make_mesh(MeshConfig(**shape)))


def arguments(t=16, packed=False, **kwargs):
    args = make(t, **(dict(p=4, n=8, s=2) | kwargs), dtype=jnp.float64)
    if packed:
        args |= dict(segment_ids=jnp.asarray([np.repeat([0, 2, 7], lengths) for lengths in PACKED], jnp.int32))
    return args


@pytest.mark.parametrize("kwargs", [dict(), dict(r=2, mimo=True), dict(rotation="none")], ids=["siso", "mimo", "still"])
def test_a_span_passes_on_a_state_as_its_tokens_do(kwargs):
    """Through the first row; in the second a document begins, and nothing is left of what enters."""
    with jax.enable_x64(True):
        args = arguments(5, **kwargs)
        args |= dict(segment_ids=jnp.asarray([[3, 3, 3, 3, 3], [3, 3, 4, 4, 4]], jnp.int32))
        state = cast(random_state(args), jnp.float64)
        end = call(args, implementation="recurrent")[1]
        coefficients = exponential_trapezoidal(args["dt"], args["A"], args["lam"])
        restarts = jnp.asarray([False, True])
        span = Span(end, coefficients.log_decay.sum(1), coefficients.carry[:, 0], restarts)
        expected = call(args, initial_state=state, implementation="recurrent")[1]
        assert_states_close(passed(state, span, args.get("mimo_x")), expected, 1e-12)


SISO, MIMO = dict(h=4, g=2), dict(r=2, mimo=True)
GRADIENTS = {
    "time": (dict(sequence=4), SISO),
    "heads in shared groups": (dict(tensor=4), SISO),
    "heads of one group and time, MIMO": (dict(tensor=2, sequence=2), MIMO),
}


@functools.cache
def on_one_device(**kwargs):
    """Arguments of packed rows, a state that enters, and what one device makes of them."""
    args = arguments(packed=True, **kwargs)
    state = cast(random_state(args), jnp.float64)
    return args, state, values_and_gradients(args, state, implementation="recurrent")


@pytest.mark.parametrize("case", GRADIENTS)
def test_values_states_and_gradients_are_those_of_one_device(case):
    """Of every input and of the incoming state, through the output and the final state, which all devices agree on."""
    shape, kwargs = GRADIENTS[case]
    with jax.enable_x64(True):
        args, state, (y_, final_, gradients_) = on_one_device(**kwargs)
        with on_mesh(**shape):
            y, final, gradients = values_and_gradients(args, state, implementation="chunked")
        assert len({str(shard.index) for shard in y.addressable_shards}) == 4
        assert distance(y, y_) <= 1e-11
        assert_states_close(final, final_, 1e-11)
        for a in final:
            for shard in a.addressable_shards:
                np.testing.assert_array_equal(shard.data, np.asarray(a)[shard.index])
        for (path, a), b in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(gradients_), strict=True):
            assert distance(a, b) <= 1e-11, path


VALUES = {
    "standard rope, lambda a number": (dict(sequence=4), dict(rotation="rope", lam=FIXED_TRAPEZOID)),
    "angles per head, ranks kept": (dict(tensor=2, sequence=2), dict(hh=2, r=2, mimo=True, reduce=False)),
    "rows and groups": (dict(data=2, tensor=2), dict(h=4, g=2, rotation="none")),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_and_states_are_those_of_one_device(case):
    shape, kwargs = VALUES[case]
    with jax.enable_x64(True):
        args = arguments(**kwargs)
        y_, final_ = call(args, implementation="recurrent")
        with on_mesh(**shape):
            y, final = call(args, implementation="recurrent")
        assert distance(y, y_) <= 1e-11
        assert_states_close(final, final_, 1e-11)


@pytest.mark.parametrize("kwargs", [dict(h=4, g=2), dict(r=2, mimo=True)], ids=["siso", "mimo"])
def test_steps_leave_the_state_where_it_is(kwargs):
    with jax.enable_x64(True):
        args = arguments(2, **kwargs)
        static = {name: args[name] for name in ("B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o") if name in args}
        token = {k: u[:, 0] for k, u in cut(args, 0, 1).items() if k not in static and k != "rotation"}
        step = jax.jit(functools.partial(ssm_step, **static))
        state = cast(random_state(args), jnp.float64)
        y_, state_ = step(**token, state=state)
        with on_mesh(fsdp=2, tensor=2):
            y, state = step(**token, state=state)
        assert {shard.data.shape[:2] for a in state for shard in a.addressable_shards} == {(1, args["x"].shape[2] // 2)}
        assert distance(y, y_) <= 1e-12
        assert_states_close(state, state_, 1e-12)


def test_cutting_time_costs_less_than_half_of_the_work_again():
    """FLOPs of each of two devices, against one with its tokens alone: its first pass makes no outputs."""
    arrays, static = split_static(make(128, b=1, h=1, p=64, n=64, s=16))

    def flops(arrays):
        run = jax.jit(lambda arrays: ssm(**arrays, **static, implementation="chunked", chunk_size=64)[0])
        return run.lower(arrays).compile().cost_analysis()["flops"]

    alone = flops(cut(arrays, 0, 64))
    with on_mesh(sequence=2):
        assert flops(arrays) < 1.5 * alone


ERRORS = {
    "rows": (dict(data=2, fsdp=2), dict(), r"x: got b=2 rows on a mesh of slice=1 x data=2 x fsdp=2; allowed: a mul"),
    "heads": (dict(tensor=4), dict(), "x: got h=2 heads on a mesh of tensor=4; allowed: a multiple of 4"),
    "time": (dict(sequence=4), dict(t=10), "x: got t=10 tokens on a mesh of sequence=4; allowed: a multiple of 4"),
    "groups": (dict(tensor=2), dict(h=6, g=3), "B: got ngroups g=3 on a mesh of tensor=2; allowed: a multiple or a"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_the_mesh_does_not_divide_is_refused(case):
    shape, kwargs, message = ERRORS[case]
    shapes = jax.eval_shape(lambda: split_static(make(**(dict(t=8) | kwargs)))[0])
    with on_mesh(**shape), pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(ssm, **shapes)
    assert "\n" not in str(error.value)
