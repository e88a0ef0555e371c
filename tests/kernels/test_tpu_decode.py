"""The decode kernel for TPUs, interpreted on the CPU against the recurrence: the cases of test_decode.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # what a run found has no public name
from jax.experimental.pallas import tpu as pltpu

from kernels.test_decode import TOLERANCE, VARIANTS, assert_close, error, stepper, token
from mamba3_jax.ops import ssm_step
from mamba3_jax.ops.decode import decode
from pallas.tpu.decode import default_block_sizes
from pallas.tpu.tiles import cosine
from test_operator import make, random_state

# Each covers what the others do not.
STEPS = ("siso odd heads", "siso groups", "siso angles per head", "siso no rotation", "mimo rank 4 rope1",
         "mimo standard rope", "mimo bare, ranks kept")  # fmt: skip
tpu_step = functools.partial(decode, kernel="tpu", interpret=True)


def assert_steps(args, state, steps: int, step=tpu_step):
    """Steps in a row, each from the state that the kernel itself returned."""
    dtype = args["x"].dtype.type
    expected = state.map(lambda a: a.astype(jnp.float32))
    run, reference = stepper(step, args), stepper(ssm_step, args, implementation="recurrent")
    for t in range(steps):
        y, new = run(t, state)
        y_, expected = reference(t, expected)
        assert y.shape == y_.shape and y.dtype == y_.dtype
        assert jax.tree.map(lambda a: a.dtype, new) == jax.tree.map(lambda a: a.dtype, state)
        assert error(y, y_) <= TOLERANCE[dtype]
        assert_close(new, expected, TOLERANCE[dtype])
        state = new


@pytest.mark.parametrize("variant", STEPS)
def test_steps_are_the_recurrence(variant):
    args = make(2, **VARIANTS[variant])
    assert_steps(args, random_state(args), steps=2)


@pytest.mark.parametrize("r", [1, 4])
def test_low_precision_in_blocks_of_rows_and_heads(r):
    """bfloat16 inputs and state, three rows, two blocks of 8 heads: the state stays bfloat16, the angle float32."""
    args = make(2, b=3, h=16, r=r, mimo=r > 1, dtype=jnp.bfloat16)
    state = random_state(args)
    assert_steps(args, state.map(lambda a: a.astype(jnp.bfloat16))._replace(angle=state.angle), steps=2)


def test_no_races_in_place():
    """The TPU interpreter, with its buffers and transfers, on a state that is overwritten."""
    args = make(1, b=2, h=2, r=2, mimo=True)
    interpret = pltpu.InterpretParams(detect_races=True)
    assert_steps(args, random_state(args), 1, functools.partial(decode, kernel="tpu", interpret=interpret))
    assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found


def test_block_sizes_divide_rows_and_heads_that_share_projections():
    assert default_block_sizes(128, 64, 1, 64, 128, 4) == default_block_sizes(128, 64, 8, 64, 128, 4)
    for b, h, g in [(1, 24, 1), (7, 48, 1), (6, 4, 2), (128, 64, 64)]:
        blocks = default_block_sizes(b, h, g, 64, 128, 4)
        assert b % blocks.rows == 0 and blocks.heads in (8, h)
        assert blocks.heads == h or h // g % blocks.heads == 0


def test_blocks_count_the_lanes_that_n_leaves_empty():
    """In VMEM 32 channels take as much as 128, and 4 rows of p in bfloat16 as much as 16."""
    assert default_block_sizes(128, 32, 1, 64, 32, 4) == default_block_sizes(128, 32, 1, 64, 128, 4)
    assert default_block_sizes(128, 32, 1, 4, 32, 2) == default_block_sizes(128, 32, 1, 16, 128, 2)


def test_states_that_do_not_fit_are_named():
    args = make(1, b=1, h=12, p=64, n=2048, s=512)
    with pytest.raises(NotImplementedError, match=r"state.ssm: got 6291456 bytes of 12 heads .*; allowed .* 3145728"):
        jax.eval_shape(lambda: tpu_step(**token(args), state=random_state(args)))


def test_cosine_of_any_turn():
    """Within 2e-7 of the exact one, at its zeros and ends and after many revolutions."""
    turns = np.float32(np.concatenate([np.arange(-8, 9) / 4, np.linspace(-2, 2, 100001)]))
    assert np.max(np.abs(cosine(jnp.asarray(turns)) - np.cos(2 * np.pi * turns.astype(np.float64)))) < 2e-7
