"""The models that experiments compare: Mamba-3 with its options, and the baselines, all as `--model.*` options."""

import dataclasses
from typing import Literal, get_args

from mamba3_jax.checks import check_choice
from mamba3_jax.layers import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, Mamba3Config, MixerConfig
from mamba3_jax.models import LMConfig
from mamba3_jax.ops import Rotation

Mixer = Literal["mamba3", "mamba2", "gated_deltanet", "attention"]
Dtype = Literal["float32", "bfloat16"]
MIXERS: dict[str, type] = {
    "mamba3": Mamba3Config,
    "mamba2": Mamba2Config,
    "gated_deltanet": GatedDeltaNetConfig,
    "attention": AttentionConfig,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig(Mamba3Config):
    """`n_layers` blocks of one mixer. A baseline takes the options that it has by the same name, and no other.

    Attributes:
        rotation, conv_width: as the mixer has them; None is the mixer's own default.
        mixer: which layer mixes the tokens.
        n_layers: blocks.
        mlp_width: hidden width of each block's MLP; 0 is none.
        n_heads: attention's heads.
        dtype: dtype of the matrix products, "float32" or "bfloat16"; parameters are float32.
    """

    rotation: Rotation | None = None
    conv_width: int | None = None
    mixer: Mixer = "mamba3"
    n_layers: int = 1
    mlp_width: int = 0
    n_heads: int = 1
    dtype: Dtype = "float32"

    def __post_init__(self):
        check_choice("mixer", self.mixer, get_args(Mixer))
        check_choice("dtype", self.dtype, get_args(Dtype))
        own = {field.name: field.default for field in dataclasses.fields(MIXERS[self.mixer])}
        for name in ("rotation", "conv_width"):
            if getattr(self, name) is None and name in own:
                object.__setattr__(self, name, own[name])
        if self.mixer == "mamba3":
            super().__post_init__()
            check_choice("implementation", self.implementation, ("recurrent", "chunked", None))
        if self.n_layers < 1:
            raise ValueError(f"n_layers: got {self.n_layers}; allowed: a positive integer")
        for field in dataclasses.fields(self):
            if field.name not in own.keys() | COMMON and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name}: got {getattr(self, field.name)} with mixer {self.mixer!r}, which has no such "
                    f"option; allowed: {field.default}"
                )
        self.mixer_config()

    def mixer_config(self) -> MixerConfig:
        """The mixer's own configuration, without the options of other mixers."""
        kind = MIXERS[self.mixer]
        names = {field.name for field in dataclasses.fields(self)}
        if kind is AttentionConfig:
            # Its heads share out d_model: the head size of a grid is that of a state.
            names -= {"head_dim"}
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind) if f.name in names})

    def lm(self, vocab_size: int) -> LMConfig:
        """The whole model over a vocabulary."""
        return LMConfig(self.mixer_config(), self.n_layers, vocab_size, self.mlp_width, dtype=self.dtype)


# Options of the model, not of its mixer; and sizes of a state, which attention has none of but shares in a grid.
COMMON = {"mixer", "n_layers", "mlp_width", "dtype", "d_state", "head_dim"}
