"""Bad arguments: one line that names the argument, what came, and what is allowed."""

import jax.numpy as jnp
import jaxtyping
import pytest

from mamba3_jax.ops import SSMState, ssm, ssm_step
from test_operator import make


@pytest.fixture(autouse=True)
def without_type_checks():
    """Users run without jaxtyping's checks, which would speak first here."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def _odd_state():
    args = make(5)
    return args | {k: args[k][..., :15] for k in ("B", "C", "B_bias", "C_bias")}


def _three_heads_two_groups():
    return make(5, h=3, g=2)


CASES = {
    "wrong shape": (
        lambda: make(5) | dict(C=jnp.zeros((2, 5, 1, 1, 8))),
        "C: got shape (2, 5, 1, 1, 8)",
        "(2, 5, 1, 1, 16)",
    ),
    "wrong rank": (lambda: make(5) | dict(B=jnp.zeros((2, 5, 1, 16))), "B: got rank 4", "(b t r g n)"),
    "not an array": (lambda: make(5) | dict(x=[1.0]), "x: got list", "an array"),
    "wrong dtype": (lambda: make(5) | dict(dt=jnp.ones((2, 5, 2), int)), "dt: got dtype int32", "floating"),
    "lam out of range": (lambda: make(5, lam=1.5), "lam: got 1.5", "from 0 to 1"),
    "groups": (_three_heads_two_groups, "B: got ngroups g=2", "a divisor of the h=3 heads"),
    "odd n": (_odd_state, "B: got state size n=15", "even"),
    "rope fraction": (
        lambda: make(5, s=3),
        "omega: got s=3 pairs, rope_fraction 0.375",
        "s=4 (rope_fraction 0.5) or s=8",
    ),
    "omega missing": (lambda: make(5) | dict(omega=None), "omega: got None", 'rotation "none"'),
    "omega without rotation": (lambda: make(5) | dict(rotation="none"), "omega: got an array", "None"),
    "unknown rotation": (
        lambda: make(5) | dict(rotation="spin"),
        "rotation: got 'spin'",
        "'data_dependent', 'rope', 'none'",
    ),
    "unknown implementation": (
        lambda: make(5) | dict(implementation="cuda"),
        "implementation: got 'cuda'",
        "'recurrent', 'chunked', 'triton', 'tpu'",
    ),
    "chunk size": (lambda: make(5) | dict(chunk_size=0), "chunk_size: got 0", "a positive integer"),
    "rank without mimo_x": (lambda: make(5, r=2), "mimo_x: got None", "r=1 (SISO)"),
    "mimo_o without mimo_x": (lambda: make(5) | dict(mimo_o=jnp.ones((2, 1, 8))), "mimo_o: got an array", "None"),
    "gate without mimo_z": (lambda: make(5, r=2, mimo=True) | dict(mimo_z=None), "mimo_z: got", "both"),
    "state of another shape": (
        lambda: make(5) | dict(initial_state=SSMState.zeros(2, 2, 8, 32, s=4)),
        "initial_state.ssm: got shape (2, 2, 8, 32)",
        "(2, 2, 8, 16)",
    ),
    "unsorted documents": (
        lambda: make(5) | dict(segment_ids=jnp.asarray([[0, 0, 1, 1, 1], [0, 1, 0, 1, 1]])),
        "segment_ids: got a smaller id",
        "never decrease",
    ),
    "documents as floats": (
        lambda: make(5) | dict(segment_ids=jnp.zeros((2, 5))),
        "segment_ids: got dtype float32",
        "integer",
    ),
    "no tokens": (lambda: make(0), "x: got t=0", "at least 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments_are_named(case):
    build, given, allowed = CASES[case]
    with pytest.raises((ValueError, TypeError)) as error:
        ssm(**build())
    message = str(error.value)
    assert message.startswith(given) and "; allowed: " in message and allowed in message and "\n" not in message


STEP_CASES = {
    "time axis left in": (lambda a: a | dict(x=a["x"][:, None]), "x: got rank 4", "(b h p)"),
    "a plain tuple": (lambda a: a | dict(state=tuple(a["state"])), "initial_state: got tuple", "SSMState"),
    "state of integers": (
        lambda a: a | dict(state=a["state"].map(lambda u: u.astype(int))),
        "initial_state.angle: got dtype int32",
        "floating",
    ),
}


@pytest.mark.parametrize("case", STEP_CASES)
def test_bad_arguments_of_a_step_are_named(case):
    change, given, allowed = STEP_CASES[case]
    args = make(1)
    token = {k: v[:, 0] if k in ("x", "B", "C", "dt", "A", "lam", "omega", "z") else v for k, v in args.items()}
    with pytest.raises((ValueError, TypeError)) as error:
        ssm_step(**change(token | dict(state=SSMState.zeros(2, 2, 8, 16, s=4))))
    assert str(error.value).startswith(given) and allowed in str(error.value)


def test_an_explicit_choice_never_falls_back():
    expected = "implementation: got 'tpu' on a machine with cpu devices.* need a TPU; allowed: recurrent, chunked"
    with pytest.raises(NotImplementedError, match=expected):
        ssm(**make(5), implementation="tpu")


@pytest.mark.parametrize("kernel", ["triton", "tpu"])
def test_the_kernels_choose_their_chunks(kernel):
    expected = f"^chunk_size: got 512 for implementation '{kernel}'; allowed: None, since the kernels choose theirs$"
    with pytest.raises(ValueError, match=expected):
        ssm(**make(5), implementation=kernel, chunk_size=512)
