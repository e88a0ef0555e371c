"""The TPU kernels of sequences, in TPU interpret mode on the CPU: the contract, against a float64 recurrence."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic.interpret.race_detection_state import RaceDetectionState
from jax.experimental.pallas import tpu as pltpu
from test_triton import (
    TOLERANCE,
    VARIANTS,
    arguments,
    assert_all_close,
    assert_final_close,
    assert_low_precision_is_close,
    error,
    in_float64,
)

from mamba3_jax.ops import api, ssm
from mamba3_jax.ops.tpu import tpu
from pallas.tpu.block_sizes import BlockSizes
from test_operator import call, cut, random_state, split_static, values_and_gradients

# Two heads of 64 channels to a block of lanes, as in the published models; n and s as there too.
PUBLISHED = dict(p=64, n=128, s=32)
# Arguments of the operator, and blocks of lanes per step. The sizes of `VARIANTS` do not fill the lanes and are padded.
CASES = {
    "siso, pairs of heads, groups, packed": (PUBLISHED | dict(h=4, g=2, packed=True), 1),
    "siso no rotation, no D, no gate": (VARIANTS["siso no rotation, no D, no gate"][0], 2),
    "mimo rank 2 packed": (VARIANTS["mimo rank 2 packed"][0] | dict(gate=True), 1),
}


@contextlib.contextmanager
def interpreted(chunk=16, blocks=1, **params):
    """Inside, `ssm` takes this machine for one with a TPU, and its kernels run interpreted, as `params` say."""
    with pytest.MonkeyPatch.context() as patch:
        options = dict(blocks=BlockSizes(chunk, blocks), interpret=pltpu.InterpretParams(**params))
        patch.setattr(api, "tpu", functools.partial(tpu, **options))
        patch.setattr(api, "_platform", lambda: "tpu")
        yield


@pytest.mark.parametrize("case", CASES)
def test_values_states_and_gradients_are_those_of_the_recurrence(case):
    """Of every input and of the incoming state, through the output and the final state; 37 tokens are padded to 48."""
    kwargs, blocks = CASES[case]
    args = arguments(**kwargs)
    state = random_state(args)
    with interpreted(blocks=blocks):
        y, final, gradients = values_and_gradients(args, state, implementation="tpu")
    y_, final_, gradients_ = in_float64(values_and_gradients, args, state)
    assert y.dtype == jnp.float32
    assert error(y, y_) <= TOLERANCE[jnp.float32]
    assert_final_close(final, final_, TOLERANCE[jnp.float32])
    assert_all_close(gradients, gradients_, TOLERANCE[jnp.float32])


def test_low_precision():
    """MIMO whose ranks are kept, two heads to a block of lanes, all channels turning."""
    args = arguments(20, **(PUBLISHED | dict(r=4, mimo=True, reduce=False, s=64, b=1, dtype=jnp.bfloat16)))
    assert_low_precision_is_close(args, interpreted(), "tpu")


def test_one_call_equals_three_wherever_it_is_cut_and_however_it_is_chunked():
    """Outputs and all four states; the first call has one token, and the calls have chunks of their own."""
    args = arguments(40, r=2, mimo=True, b=1, s=16)
    with interpreted(chunk=40, blocks=2):
        whole, final = call(args, implementation="tpu")
    outputs, state = [], None
    for start, stop, chunk in ((0, 1, 8), (1, 17, 16), (17, 40, 8)):
        with interpreted(chunk=chunk):
            y, state = call(cut(args, start, stop), initial_state=state, implementation="tpu")
        outputs.append(y)
    assert error(jnp.concatenate(outputs, 1), whole) <= 1e-6
    assert_final_close(state, final, 1e-6)


def test_weak_decay_after_a_strong_one_and_angles_that_wrap_at_every_step():
    """exp(-500) must not cost the next tokens' decays their digits, nor 1.5 revolutions per token the angle its own."""
    args = arguments(64, b=1, gate=False)
    wipe = (jnp.arange(64) % 3 == 0)[None, :, None]
    args |= dict(A=jnp.where(wipe, -500.0, -1e-3) * jnp.ones_like(args["A"]), dt=jnp.ones_like(args["dt"]))
    args |= dict(omega=args["omega"] + 3 * np.pi)
    with interpreted(chunk=64):
        y, _ = call(args, implementation="tpu")
    assert error(y, in_float64(call, args)[0]) <= 5e-6


def test_extreme_steps_stay_finite():
    """No NaN or Inf, forward or backward, for steps of 1e-6 and 50 side by side."""
    args = arguments(20, b=1, h=1)
    dt = jnp.where(jnp.arange(20) % 2, 1e-6, 50.0)[None, :, None] * jnp.ones_like(args["dt"])
    with interpreted():
        found = values_and_gradients(args | dict(dt=dt, A=30 * args["A"]), random_state(args), implementation="tpu")
    chex.assert_tree_all_finite(found)


@pytest.mark.parametrize("kwargs", [dict(b=1), dict(b=2, r=2, mimo=True, g=2, h=4)], ids=["siso", "mimo"])
def test_no_races(kwargs, monkeypatch):
    """Between copies to and from VMEM and the kernels, forward and backward; JAX tells it in no public way.

    On one core: rows that two share are not looked at.
    """
    kernels = []

    def detector(*args, **kwargs):
        kernels.append(RaceDetectionState(*args, **kwargs))
        return kernels[-1]

    monkeypatch.setattr(interpreter, "RaceDetectionState", detector)
    args = arguments(20, **kwargs)
    arrays, static = split_static(args)
    with interpreted(detect_races=True):
        jax.block_until_ready(jax.grad(lambda a: jnp.sum(ssm(**a, **static, implementation="tpu")[0]))(arrays))
    assert [kernel.races_found for kernel in kernels] == [False, False]
    assert all(kernel.writes for kernel in kernels)
