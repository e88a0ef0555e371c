"""Flax NNX layers."""

from mamba3_jax.layers.mamba3 import Mamba3, Mamba3Config, MixerState
from mamba3_jax.layers.mlp import SwiGLU
from mamba3_jax.layers.norm import RMSNorm
from mamba3_jax.layers.parameters import Undecayed

__all__ = ["Mamba3", "Mamba3Config", "MixerState", "RMSNorm", "SwiGLU", "Undecayed"]
