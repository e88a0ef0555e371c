"""Every sequence mixer behind one name. They share Mamba3's interface: call, step and empty_state."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mamba3_jax.layers.attention import Attention, AttentionConfig, AttentionState
from mamba3_jax.layers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig, GatedDeltaNetState
from mamba3_jax.layers.mamba2 import Mamba2, Mamba2Config
from mamba3_jax.layers.mamba3 import Mamba3, Mamba3Config, MixerState

Mixer = Mamba3 | Mamba2 | GatedDeltaNet | Attention
MixerConfig = Mamba3Config | Mamba2Config | GatedDeltaNetConfig | AttentionConfig
AnyMixerState = MixerState | GatedDeltaNetState | AttentionState

MIXERS = {Mamba3Config: Mamba3, Mamba2Config: Mamba2, GatedDeltaNetConfig: GatedDeltaNet, AttentionConfig: Attention}


def build_mixer(
    config: MixerConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, residual_branches: int = 1
) -> Mixer:
    """The mixer that the type of its config names.

    Raises:
        TypeError: not a mixer's config.
    """
    if type(config) not in MIXERS:
        allowed = ", ".join(known.__name__ for known in MIXERS)
        raise TypeError(f"config: got {type(config).__name__}; allowed: {allowed}")
    return MIXERS[type(config)](config, rngs=rngs, dtype=dtype, residual_branches=residual_branches)
