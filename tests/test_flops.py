"""Analytic FLOPs against counts by hand and against the compiler's."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mamba3_jax.layers import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, Mamba3Config
from mamba3_jax.models import LM, LMConfig, preset
from mamba3_jax.models.lm import count_parameters
from mamba3_jax.training.flops import forward_flops, mixer_flops, peak_flops, train_flops

BY_HAND = {
    # d 64, inner 128, 2 heads of 64, n 16: z, x 128 each, B, C 16 each, dt, A, trap 2 each, 4 angles
    "siso": (
        Mamba3Config(d_model=64, d_state=16),
        2 * 64 * (128 + 128 + 16 + 16 + 2 + 2 + 2 + 4) + 2 * 128 * 64 + 4 * 2 * 64 * 16,
    ),
    # Rank 4: four times B and C, four times the mixing.
    "mimo": (
        Mamba3Config(d_model=64, d_state=16, mimo_rank=4),
        2 * 64 * (128 + 128 + 64 + 64 + 2 + 2 + 2 + 4) + 2 * 128 * 64 + 4 * 4 * 2 * 64 * 16,
    ),
    # The convolution is over x, B and C.
    "mamba2": (
        Mamba2Config(d_model=64, d_state=16),
        2 * 64 * (128 + 128 + 16 + 16 + 2) + 2 * 128 * 64 + 4 * 128 * 16 + 2 * 4 * (128 + 16 + 16),
    ),
    # q and k of 2 heads, v, z, and a and b of each head
    "gated_deltanet": (
        GatedDeltaNetConfig(d_model=64, d_state=16),
        2 * 64 * (32 + 32 + 128 + 128 + 4) + 2 * 128 * 64 + 6 * 128 * 16 + 2 * 4 * (32 + 32 + 128),
    ),
    # 4 query heads and 2 of keys and values; 10 tokens: 5.5 seen on average, twice 2 multiply-adds a channel
    "attention": (
        AttentionConfig(d_model=64, n_heads=4, n_kv_heads=2),
        2 * 64 * (64 + 32 + 32) + 2 * 64 * 64 + 5.5 * 2 * 2 * 64,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_mixers_by_hand(name):
    config, expected = BY_HAND[name]
    assert mixer_flops(config, 10) == expected


def test_model_by_hand():
    """Every block's mixer and MLP (its width rounded up), the head over the padded vocabulary; three times to train."""
    attention = BY_HAND["attention"][0]
    config = LMConfig(BY_HAND["siso"][0], 3, vocab_size=250, mlp_width=100, attention=attention, attention_layers=(1,))
    blocks = 2 * BY_HAND["siso"][1] + BY_HAND["attention"][1] + 3 * 2 * 64 * 3 * 128
    assert forward_flops(config, 10) == blocks + 2 * 64 * 256
    assert train_flops(config, 10) == 3 * forward_flops(config, 10)


@pytest.mark.parametrize("name", ["mamba3-siso-1.5b", "mamba3-mimo-1.5b"])
def test_large_models_need_about_6_flops_per_parameter_and_token(name):
    """The rest is mixing, which is little at this size."""
    config = preset(name)
    parameters = count_parameters(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))
    assert 1 < train_flops(config, 2048) / (6 * parameters) < 1.1


@pytest.mark.parametrize("name", BY_HAND)
def test_the_compiler_counts_as_many(name):
    """Within 3 %, of a model in which projections outweigh what is not counted; of one chunk: loops count once."""
    small = dict(d_model=512, d_state=8, head_dim=256, expand=1)
    mixer = {
        "siso": lambda: Mamba3Config(**small),
        "mimo": lambda: Mamba3Config(**small, mimo_rank=2),
        "mamba2": lambda: Mamba2Config(**small),
        "gated_deltanet": lambda: GatedDeltaNetConfig(**small),
        "attention": lambda: AttentionConfig(d_model=512, n_heads=4),
    }[name]()
    config = LMConfig(mixer, n_layers=2, vocab_size=2048, mlp_width=1024)
    graph, parameters = nnx.split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((4, 8), jnp.int32)
    compiled = jax.jit(lambda p, tokens: nnx.merge(graph, p)(tokens)[0]).lower(parameters, tokens).compile()
    counted = compiled.cost_analysis()["flops"] / tokens.size
    assert counted == pytest.approx(forward_flops(config, 8), rel=0.03)


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    # Of one device: JAX counts the two cores of a chip.
    assert peak_flops("TPU7x") == 2307e12 / 2
    assert peak_flops("cpu") is None
