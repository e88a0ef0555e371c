"""config.json of the released checkpoints to and from an LMConfig.

The fields and their defaults are those of MambaConfig, Mamba3 and MHA of https://github.com/state-spaces/mamba. An
unknown field is refused, because what it says cannot be known, and so is a known one that asks for what our model is
not. Three things of ours need more than a name:

    a_activation   is not recorded. heavy_tail came to the official code on 2026-06-02 (c69aaab), the model class that
                   writes "layer": "Mamba3" on 2026-06-10 (b3cae1b): what has this format was trained with heavy_tail.
    dtype          of the computation is not recorded; the embedding's is taken.
    chunk_size     tunes their kernels: where it is what they recommend, ours choose for themselves (None).
"""

import dataclasses
import math
from pathlib import Path

from mamba3_jax.layers import AttentionConfig, Mamba3Config
from mamba3_jax.layers.mamba3 import AActivation
from mamba3_jax.models import LMConfig

RELEASED_ACTIVATION: AActivation = "heavy_tail"
MODEL_FIELDS = dict(
    d_model=2560,
    d_intermediate=0,
    n_layer=64,
    vocab_size=50277,
    ssm_cfg={},
    attn_layer_idx=[],
    attn_cfg={},
    rms_norm=True,
    residual_in_fp32=True,
    fused_add_norm=True,
    pad_vocab_size_multiple=8,
    tie_embeddings=True,
)
MIXER_FIELDS = dict(
    layer="Mamba1",
    d_state=128,
    expand=2,
    headdim=64,
    ngroups=1,
    rope_fraction=0.5,
    dt_min=0.001,
    dt_max=0.1,
    dt_init_floor=1e-4,
    A_floor=1e-4,
    is_outproj_norm=False,
    is_mimo=False,
    mimo_rank=4,
    fuse_pregate_headwise_norm=True,
    chunk_size=64,
    dropout=0.0,
)
ATTENTION_FIELDS = dict(
    num_heads=None,
    num_heads_kv=None,
    head_dim=None,
    mlp_dim=0,
    qkv_proj_bias=True,
    out_proj_bias=True,
    softmax_scale=None,
    causal=False,
    d_conv=0,
    rotary_emb_dim=0,
    rotary_emb_base=10000.0,
    rotary_emb_interleaved=False,
)
# Those whose default is null have no type of their own.
NULLABLE = dict(num_heads=int, num_heads_kv=int, head_dim=int, softmax_scale=float)
MAX_NUMBER = 2**31
# The only values with which our model computes what the official one does. Fields of the tables above that are neither
# here nor read below say how, not what, the official code computes, or how it initialises.
NEEDED = {
    "rms_norm": True,
    "ssm_cfg.layer": "Mamba3",
    "attn_cfg.mlp_dim": 0,
    "attn_cfg.causal": True,
    "attn_cfg.rotary_emb_interleaved": False,
}
# The same the other way: fields of ours that the format has no word for.
EXPRESSIBLE = dict(
    discretization="trapezoidal",
    rotation="data_dependent",
    angle_bound=math.pi,
    conv_width=0,
    output_norm_grouped=True,
)


def config_from_released(fields: dict, file: Path, *, a_activation: AActivation, dtype: str) -> LMConfig:
    """The config of what config.json describes.

    Args:
        fields: the JSON object.
        file: where it was, for messages.
        a_activation, dtype: what it does not say; see the module's docstring.

    Raises:
        ValueError: an unknown field, a wrong value, or one that our model does not compute; one line that names file
            and field.
    """
    model = _fields(fields, MODEL_FIELDS, file, "")
    mixer = _fields(model["ssm_cfg"], MIXER_FIELDS, file, "ssm_cfg.")
    heads = _fields(model["attn_cfg"], ATTENTION_FIELDS, file, "attn_cfg.")
    hybrid = bool(model["attn_layer_idx"])
    for prefix, part in ({"": model, "ssm_cfg.": mixer} | ({"attn_cfg.": heads} if hybrid else {})).items():
        for name, value in part.items():
            needed = NEEDED.get(f"{prefix}{name}", value)
            if value != needed:
                raise ValueError(f"{file}: {prefix}{name}: got {value!r}; allowed: {needed!r}")
    try:
        return LMConfig(
            mixer=_mixer(mixer, model["d_model"], a_activation),
            n_layers=model["n_layer"],
            vocab_size=model["vocab_size"],
            mlp_width=model["d_intermediate"],
            tie_embeddings=model["tie_embeddings"],
            vocab_multiple=model["pad_vocab_size_multiple"],
            dtype=dtype,
            attention=_attention(heads, model["d_model"]) if hybrid else None,
            attention_layers=tuple(sorted(model["attn_layer_idx"])),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def config_to_released(config: LMConfig) -> dict:
    """config.json of a model.

    Raises:
        ValueError: a model that the format cannot describe, in one line that names the field of ours.
    """
    mixer = config.mixer
    if not isinstance(mixer, Mamba3Config):
        raise ValueError(f"mixer: got {type(mixer).__name__}; allowed: Mamba3Config, the released format has no other")
    for name, needed in EXPRESSIBLE.items():
        if getattr(mixer, name) != needed:
            raise ValueError(f"mixer.{name}: got {getattr(mixer, name)!r}; the released format has {needed!r} only")
    if mixer.output_norm == "after_gate":
        raise ValueError("mixer.output_norm: got 'after_gate'; the released format has 'none' and 'before_gate' only")
    if mixer.bc_bias_init is None:
        raise ValueError("mixer.bc_bias_init: got None; the released format has models with biases only")
    return dict(
        d_model=mixer.d_model,
        d_intermediate=config.mlp_width,
        n_layer=config.n_layers,
        vocab_size=config.vocab_size,
        ssm_cfg=_mixer_fields(mixer),
        attn_layer_idx=list(config.attention_layers),
        attn_cfg={} if config.attention is None else _attention_fields(config.attention),
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        pad_vocab_size_multiple=config.vocab_multiple,
        tie_embeddings=config.tie_embeddings,
    )


def unrecorded(config: LMConfig, reread: LMConfig) -> list[str]:
    """The fields, with their values, that a config has lost after it went out and came back."""
    lost = []
    for part in ("mixer", "attention"):
        before, after = getattr(config, part), getattr(reread, part)
        if before is not None:
            fields = ((f.name, getattr(before, f.name), getattr(after, f.name)) for f in dataclasses.fields(before))
            lost += [f"{part}.{name}={value!r}" for name, value, other in fields if value != other]
    return lost + [f"dtype={config.dtype!r}"] * (config.dtype != reread.dtype)


def _fields(given: dict, defaults: dict, file: Path, prefix: str) -> dict:
    """The given fields over the official defaults, each of them known and of its default's type."""
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise ValueError(f"{file}: {prefix}{unknown[0]}: got an unknown field; allowed: {', '.join(defaults)}")
    for name, value in given.items():
        if not _fits(value, NULLABLE.get(name, type(defaults[name]))) and not (value is None and name in NULLABLE):
            kind = NULLABLE[name].__name__ + " or null" if name in NULLABLE else type(defaults[name]).__name__
            raise ValueError(f"{file}: {prefix}{name}: got {_shown(value)}; allowed: a {kind}")
    return defaults | given


def _fits(value: object, kind: type) -> bool:
    """Whether it is of the kind, a number finite and no larger than an array's axis may be."""
    if kind is list:
        return isinstance(value, list) and all(_fits(item, int) for item in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < MAX_NUMBER  # false for NaN
    return type(value) is kind and (kind is not int or abs(value) < MAX_NUMBER)


def _shown(value: object) -> str:
    """For a message; of what may be large, its type."""
    return type(value).__name__ if isinstance(value, list | dict) else f"{value!r:.80}"


def _recommended_chunk_size(rank: int) -> int:
    """The official module's recommendation: 64 tokens, of all ranks together."""
    return max(64 // rank, 1)


def _mixer(fields: dict, d_model: int, a_activation: AActivation) -> Mamba3Config:
    rank = fields["mimo_rank"] if fields["is_mimo"] else None
    chunk_size = fields["chunk_size"]
    return Mamba3Config(
        d_model=d_model,
        d_state=fields["d_state"],
        expand=fields["expand"],
        head_dim=fields["headdim"],
        ngroups=fields["ngroups"],
        mimo_rank=rank,
        rope_fraction=fields["rope_fraction"],
        a_activation=a_activation,
        A_floor=fields["A_floor"],
        dt_min=fields["dt_min"],
        dt_max=fields["dt_max"],
        output_norm="before_gate" if fields["is_outproj_norm"] else "none",
        chunk_size=None if chunk_size == _recommended_chunk_size(max(rank or 1, 1)) else chunk_size,
    )


def _mixer_fields(config: Mamba3Config) -> dict:
    fields = dict(
        layer="Mamba3",
        d_state=config.d_state,
        expand=config.expand,
        headdim=config.head_dim,
        ngroups=config.ngroups,
        rope_fraction=config.rope_fraction,
        dt_min=config.dt_min,
        dt_max=config.dt_max,
        A_floor=config.A_floor,
        is_outproj_norm=config.output_norm == "before_gate",
        is_mimo=config.mimo_rank is not None,
        chunk_size=config.chunk_size or _recommended_chunk_size(config.rank),
    )
    return fields if config.mimo_rank is None else fields | dict(mimo_rank=config.mimo_rank)


def _attention(fields: dict, d_model: int) -> AttentionConfig:
    turning = fields["rotary_emb_dim"]
    config = AttentionConfig(
        d_model=d_model,
        n_heads=fields["num_heads"] or 0,
        n_kv_heads=fields["num_heads_kv"],
        head_dim=fields["head_dim"],
        rotation="rope" if turning else "none",
        rotary_dim=turning or None,
        rope_base=fields["rotary_emb_base"],
        conv_width=fields["d_conv"],
        qkv_bias=fields["qkv_proj_bias"],
        out_bias=fields["out_proj_bias"],
    )
    if fields["softmax_scale"] not in (None, config.p**-0.5):
        scale = f"{config.p**-0.5:g}, which is 1/sqrt(head_dim), or null"
        raise ValueError(f"attn_cfg.softmax_scale: got {fields['softmax_scale']}; allowed: {scale}")
    return dataclasses.replace(config, rotary_dim=None) if turning == config.p else config


def _attention_fields(config: AttentionConfig) -> dict:
    fields = dict(
        num_heads=config.n_heads,
        num_heads_kv=config.n_kv_heads,
        head_dim=config.head_dim,
        causal=True,
        d_conv=config.conv_width,
        rotary_emb_dim=2 * config.rotated_pairs,
        rotary_emb_base=config.rope_base,
        qkv_proj_bias=config.qkv_bias,
        out_proj_bias=config.out_bias,
    )
    return {name: value for name, value in fields.items() if value is not None}
