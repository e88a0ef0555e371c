"""Flax NNX layers."""

from mamba3_jax.layers.attention import Attention, AttentionBuffer, AttentionConfig, AttentionState
from mamba3_jax.layers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig, GatedDeltaNetState
from mamba3_jax.layers.mamba2 import Mamba2, Mamba2Config
from mamba3_jax.layers.mamba3 import Mamba3, Mamba3Config, MixerState
from mamba3_jax.layers.mixers import AnyMixerState, Mixer, MixerConfig, build_mixer
from mamba3_jax.layers.mlp import SwiGLU
from mamba3_jax.layers.norm import RMSNorm
from mamba3_jax.layers.parameters import Undecayed

__all__ = [
    "AnyMixerState",
    "Attention",
    "AttentionBuffer",
    "AttentionConfig",
    "AttentionState",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "GatedDeltaNetState",
    "Mamba2",
    "Mamba2Config",
    "Mamba3",
    "Mamba3Config",
    "Mixer",
    "MixerConfig",
    "MixerState",
    "RMSNorm",
    "SwiGLU",
    "Undecayed",
    "build_mixer",
]
