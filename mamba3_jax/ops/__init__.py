"""Functions of arrays: the Mamba-3 operator, and the gated delta rule of a baseline."""

from mamba3_jax.ops.api import Implementation, ssm, ssm_step
from mamba3_jax.ops.delta_rule import gated_delta_rule
from mamba3_jax.ops.discretization import EULER, FIXED_TRAPEZOID
from mamba3_jax.ops.rotation import Rotation, angular_velocity, rope_frequencies
from mamba3_jax.ops.state import SSMState

__all__ = [
    "EULER",
    "FIXED_TRAPEZOID",
    "Implementation",
    "Rotation",
    "SSMState",
    "angular_velocity",
    "gated_delta_rule",
    "rope_frequencies",
    "ssm",
    "ssm_step",
]
