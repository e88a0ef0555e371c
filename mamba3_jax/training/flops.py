"""Floating-point operations of a model, from its configuration alone, and what a device can do at most.

A multiply and an add are 2. Matrix products and what mixes tokens count; norms, gates and activations do not. Mixing
counts as the definition of the layer needs it, not as an implementation does it, so that no choice of a chunk size can
raise the utilisation:

    a matrix of m x n numbers, per token      2 m n
    Mamba-3 and Mamba-2, per head             4 r p n           h += v k^T, and h q
    Gated DeltaNet, per head                  6 p n             S k, S += u k^T, and S q
    attention, per head                       2 p (t + 1)       q k^T and P v, of the (t + 1) / 2 tokens seen on average
    a convolution of w taps, per channel      2 w

The backward pass costs twice the forward pass. What rematerialisation computes again does not count.
"""

from mamba3_jax.layers import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, Mamba3Config, MixerConfig
from mamba3_jax.layers.mlp import WIDTH_MULTIPLE
from mamba3_jax.models import LMConfig
from pallas.tpu.chips import CHIPS

# Dense bfloat16 matrix products per second of one device, from the vendors' data sheets; keys as JAX names devices.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
} | {kind: chip.bf16_flops for chip in CHIPS.values() for kind in chip.device_kinds}


def forward_flops(config: LMConfig, context: int) -> int:
    """Per token, in rows of `context` tokens that are one document each."""
    d = config.mixer.d_model
    width = -(-config.mlp_width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    mlp = 2 * d * 3 * width
    head = 2 * d * config.padded_vocab_size
    return sum(mixer_flops(mixer, context) + mlp for mixer in config.mixers) + head


def train_flops(config: LMConfig, context: int) -> int:
    """Per token, forward and backward."""
    return 3 * forward_flops(config, context)


def mixer_flops(config: MixerConfig, context: int) -> int:
    """Of one mixer, forward, per token."""
    d = config.d_model
    match config:
        case Mamba3Config():
            sizes, heads = config.projection_sizes, config.nheads
            projections = d * sum(sizes.values()) + config.d_inner * d
            convolved = sizes["x"] + sizes["B"] + sizes["C"]
            mixing = 4 * config.rank * heads * config.head_dim * config.d_state
        case Mamba2Config():
            convolved = config.d_inner + 2 * config.ngroups * config.d_state
            projections = d * (config.d_inner + convolved + config.nheads) + config.d_inner * d
            mixing = 4 * config.d_inner * config.d_state
        case GatedDeltaNetConfig():
            convolved = 2 * config.nheads * config.d_state + config.d_inner
            projections = d * (convolved + config.d_inner + 2 * config.nheads) + config.d_inner * d
            mixing = 6 * config.d_inner * config.d_state
        case AttentionConfig():
            convolved = (config.n_heads + 2 * config.kv_heads) * config.p
            projections = d * convolved + config.n_heads * config.p * d
            mixing = 2 * config.n_heads * config.p * (context + 1)
        case _:
            raise TypeError(f"config: got {type(config).__name__}; allowed: a mixer's config")
    return 2 * projections + mixing + 2 * config.conv_width * convolved


def peak_flops(device_kind: str) -> float | None:
    """Of one device, per second; None where it is not known."""
    return PEAK_FLOPS.get(device_kind)
