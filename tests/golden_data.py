"""Reads the golden files and runs our operator on them. tests/golden/README.md says what is in a file.

tests/golden holds a part of the set (it is capped at 7 MB); MAMBA3_GOLDEN=DIR runs the same tests on all of it.
"""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mamba3_jax.ops import SSMState, angular_velocity, ssm
from mamba3_jax.ops.api import Implementation

DIRECTORY = Path(os.environ.get("MAMBA3_GOLDEN") or Path(__file__).parent / "golden")

# Relative to the largest entry. In float32 the files of long rows get ten times more: 490 revolutions at 12 rad a step.
TOLERANCES = {
    np.float32: dict(value=1e-5, gradient=1e-4),
    np.float64: dict(value=1e-11, gradient=1e-11),
}


def files(pattern: str) -> list[str]:
    return sorted(path.stem for path in DIRECTORY.glob(f"{pattern}.npz"))


def load(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of a file and its `meta`."""
    with np.load(DIRECTORY / f"{name}.npz", allow_pickle=False) as data:
        arrays = dict(data)
    return arrays, json.loads(str(arrays.pop("meta")))


def is_float64(arrays: dict[str, np.ndarray]) -> bool:
    return arrays["y"].dtype == np.float64


def run_operator(
    args: dict, implementation: Implementation | None, *, segment_ids=None, initial_state=None, chunk_size=None
) -> tuple[jnp.ndarray, SSMState]:
    """Our `ssm` on arrays named and laid out as the official operator's."""
    mimo = "MIMO_V" in args
    dt = jnp.moveaxis(args["DT"], 1, 2)

    def with_rank(u):
        return u if mimo else jnp.expand_dims(u, -3)

    def ranked_bias(u):
        return u if mimo else u[:, None]

    return ssm(
        args["V"],
        with_rank(args["K"]),
        with_rank(args["Q"]),
        dt,
        jnp.moveaxis(args["ADT"], 1, 2) / dt,
        1 / (1 + jnp.exp(-jnp.moveaxis(args["Trap"], 1, 2))),
        angular_velocity(args["Angles"]),
        B_bias=ranked_bias(args["K_bias"]),
        C_bias=ranked_bias(args["Q_bias"]),
        D=args.get("D"),
        z=args.get("Z"),
        mimo_x=args.get("MIMO_V"),
        mimo_z=args.get("MIMO_Z"),
        mimo_o=args.get("MIMO_Out"),
        initial_state=initial_state,
        segment_ids=segment_ids,
        implementation=implementation,
        chunk_size=chunk_size,
    )


def state_from(arrays: dict, prefix: str, mimo: bool) -> SSMState | None:
    """Our state from the official layout: k is (b, r, h, n) there, without the rank axis for SISO."""
    if f"{prefix}_ssm" not in arrays:
        return None
    k = jnp.asarray(arrays[f"{prefix}_k"])
    k = jnp.moveaxis(k, 1, 2) if mimo else k[:, :, None]
    return SSMState(*(jnp.asarray(arrays[f"{prefix}_{name}"]) for name in ("angle", "ssm")), k, arrays[f"{prefix}_v"])


def assert_state_close(got: SSMState, expected: SSMState, rtol: float) -> None:
    for name, a, b in zip(SSMState._fields, got, expected):
        assert_close(a, b, rtol, name, period=2 * np.pi if name == "angle" else None)


def assert_close(
    got, expected, rtol: float, name: str, scale: float | None = None, period: float | None = None
) -> None:
    """max |got - expected| <= rtol * scale, where scale is the largest expected entry unless given."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    difference = got - expected
    if period is not None:
        difference -= period * np.round(difference / period)
        scale = 1.0
    error = np.max(np.abs(difference), initial=0)
    scale = np.max(np.abs(expected), initial=0) if scale is None else scale
    assert error <= rtol * scale, f"{name}: error {error:.3g} > {rtol:g} * {scale:.3g}"
