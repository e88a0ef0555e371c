"""The decode kernel against the recurrence, and lowered for GPUs without one.

On a CPU it is interpreted. `JAX_PLATFORMS=cuda pytest tests/kernels/test_decode.py` runs it on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from mamba3_jax.ops import EULER, SSMState, ssm_step
from mamba3_jax.ops.decode import decode
from pallas.triton import decode as kernel
from test_operator import assert_states_close, call, cut, make, random_state, split_static

INTERPRET = jax.default_backend() != "gpu"
# Relative Frobenius norm; the sums are over 16 channels and at most 8 ranks. A GPU's sines are good to 2^-20.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}

VARIANTS = {
    "siso": dict(),
    "siso rope1": dict(s=8),
    "siso groups": dict(g=2, h=4),
    "siso odd heads": dict(h=3),
    "siso angles per head": dict(hh=2, h=2),
    "siso bare": dict(bare=True, gate=False),
    "siso standard rope": dict(rotation="rope"),
    "siso no rotation": dict(rotation="none"),
    "siso euler": dict(lam=EULER),
    "mimo rank 1": dict(r=1, mimo=True),
    "mimo rank 2": dict(r=2, mimo=True, g=2, h=4),
    "mimo rank 4": dict(r=4, mimo=True),
    "mimo rank 4 rope1": dict(r=4, mimo=True, s=8),
    "mimo rank 8": dict(r=8, mimo=True),
    "mimo ranks kept": dict(r=2, mimo=True, reduce=False),
    "mimo without gate": dict(r=2, mimo=True, gate=False),
    "mimo bare but for the gate": dict(r=2, mimo=True, bare=True),
    "mimo bare, ranks kept": dict(r=2, mimo=True, bare=True, gate=False, reduce=False),
    "mimo standard rope": dict(r=2, mimo=True, rotation="rope"),
    "mimo no rotation": dict(r=2, mimo=True, rotation="none"),
}


PER_TOKEN = ("x", "B", "C", "dt", "A", "lam", "omega", "z")


def token(args, t=0):
    """The arguments of one step."""
    return {k: v[:, 0] if k in PER_TOKEN and np.ndim(v) > 1 else v for k, v in cut(args, t, t + 1).items()}


def stepper(function, args, **options):
    """`function` of (t, state), compiled once for all steps."""
    _, static = split_static(token(args))
    run = jax.jit(functools.partial(function, **static, **options))
    return lambda t, state: run(**split_static(token(args, t))[0], state=state)


def error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


def assert_close(state: SSMState, expected: SSMState, tolerance: float):
    assert_states_close(state._replace(ssm=expected.ssm, k=expected.k, v=expected.v), expected, 1e-5)
    for name in ("ssm", "k", "v"):
        assert getattr(state, name).shape == getattr(expected, name).shape
        assert error(getattr(state, name), getattr(expected, name)) <= tolerance, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_the_recurrence(variant):
    """Three steps in a row from a random state, each from the state that the kernel itself returned."""
    args = make(3, **VARIANTS[variant])
    step, reference = stepper(decode, args, interpret=INTERPRET), stepper(ssm_step, args, implementation="recurrent")
    state = expected = random_state(args)
    for t in range(3):
        y, state = step(t, state)
        y_, expected = reference(t, expected)
        assert y.shape == y_.shape and y.dtype == y_.dtype
        assert error(y, y_) <= TOLERANCE[jnp.float32]
        assert_close(state, expected, TOLERANCE[jnp.float32])


@pytest.mark.parametrize("variant", ["siso", "mimo rank 4"])
def test_low_precision(variant):
    """bfloat16 inputs and state: the state stays bfloat16, the angle float32, and both near the recurrence."""
    args = make(3, **VARIANTS[variant], dtype=jnp.bfloat16)
    narrow = random_state(args)
    narrow = narrow.map(lambda a: a.astype(jnp.bfloat16))._replace(angle=narrow.angle)
    state, expected = narrow, narrow.map(lambda a: a.astype(jnp.float32))
    step, reference = stepper(decode, args, interpret=INTERPRET), stepper(ssm_step, args, implementation="recurrent")
    for t in range(3):
        y, state = step(t, state)
        y_, expected = reference(t, expected)
        assert y.dtype == y_.dtype == jnp.bfloat16
        assert jax.tree.map(lambda a: a.dtype, state) == jax.tree.map(lambda a: a.dtype, narrow)
        assert error(y, y_) <= TOLERANCE[jnp.bfloat16]
        assert_close(state, expected, TOLERANCE[jnp.bfloat16])


@pytest.mark.parametrize(
    "variant", ["siso", "mimo rank 2", "mimo ranks kept", "siso standard rope", "siso no rotation"]
)
def test_prefill_and_decode_are_one_pass(variant):
    """Outputs and all four states."""
    args = make(12, **VARIANTS[variant])
    whole, final = call(args)
    _, state = call(cut(args, 0, 8))
    step = stepper(decode, args, interpret=INTERPRET)
    for t in range(8, 12):
        y, state = step(t, state)
        assert error(y, whole[:, t]) <= TOLERANCE[jnp.float32], t
    assert_close(state, final, TOLERANCE[jnp.float32])


@pytest.mark.parametrize("variant", ["siso", "mimo rank 4"])
def test_blocks_do_not_change_the_result(variant):
    args = make(1, **VARIANTS[variant])
    state = random_state(args)
    y, new = decode(**token(args), state=state, interpret=INTERPRET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "default_block_sizes", lambda p, n, r: kernel.BlockSizes(block_p=2, num_warps=1))
        y_, new_ = decode(**token(args), state=state, interpret=INTERPRET)
    assert error(y_, y) <= 1e-6
    assert_close(new_, new, 1e-6)


def test_default_blocks_are_powers_of_two_within_the_head():
    for p, n, r in [(64, 128, 1), (64, 128, 8), (128, 256, 4), (64, 64, 2), (8, 16, 1), (1, 2, 1), (64, 16384, 1)]:
        sizes = kernel.default_block_sizes(p, n, r)
        assert 1 <= sizes.block_p <= p and p % sizes.block_p == 0
        assert sizes.num_warps in (1, 2, 4, 8)


def test_angles_of_many_revolutions():
    """They stay in [-pi, pi], where the GPU's sine and cosine are accurate, to the bits of the reference."""
    args = make(1) | dict(dt=jnp.full((2, 1, 2), 50.0))
    state = random_state(args)
    _, new = stepper(decode, args, interpret=INTERPRET)(0, state)
    _, expected = stepper(ssm_step, args, implementation="recurrent")(0, state)
    assert np.max(np.abs(new.angle)) <= np.pi + 1e-5
    assert np.max(np.abs(np.sin((new.angle - expected.angle) / 2))) <= 1e-6


ERRORS = {
    "p": (dict(p=6), "x: got head dim p=6", "powers of two"),
    "n": (dict(n=12, s=3), "B: got state size n=12", "powers of two"),
    "r": (dict(r=3, mimo=True), "B: got rank r=3", "1, 2, 4, 8"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_sizes_outside_the_kernel_are_named(case):
    kwargs, got, allowed = ERRORS[case]
    args = make(1, **kwargs)
    with pytest.raises(NotImplementedError) as caught:
        decode(**token(args), state=random_state(args), interpret=INTERPRET)
    assert got in str(caught.value) and allowed in str(caught.value)


def test_dtypes_outside_the_kernel_are_named():
    with jax.enable_x64(True):
        args = make(1, dtype=jnp.float64)
        with pytest.raises(NotImplementedError, match="x: got dtype float64; allowed .* computes in float32"):
            decode(**token(args), state=random_state(args), interpret=INTERPRET)
        args = make(1)
        state = random_state(args)
        with pytest.raises(NotImplementedError, match="state.ssm: got dtype float64; allowed"):
            decode(**token(args), state=state._replace(ssm=state.ssm.astype(jnp.float64)), interpret=INTERPRET)
    state = random_state(args)
    with pytest.raises(NotImplementedError, match="state.angle: got dtype bfloat16; allowed .*: float32$"):
        decode(**token(args), state=state._replace(angle=state.angle.astype(jnp.bfloat16)), interpret=INTERPRET)


@pytest.mark.parametrize("variant", ["siso", "siso no rotation", "mimo rank 4", "mimo bare, ranks kept"])
@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA B200"])
def test_lowers_for_gpus(device, variant):
    """To Triton IR, which needs no GPU, with the whole state updated in place."""
    args = make(1, **VARIANTS[variant])
    state = random_state(args)
    state = state._replace(ssm=state.ssm.astype(jnp.bfloat16))
    arrays, static = split_static(token(args) | dict(state=state))
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(device, num_cores=None, platform="gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(functools.partial(decode, **static)).trace(**arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 1
    assert text.count("#stablehlo.output_operand_alias") == (3 if variant == "siso no rotation" else 4)
