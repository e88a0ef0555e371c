"""The published sizes: section 4 and appendix D of arXiv:2603.15569, SISO and MIMO of rank 4.

d_state 128, head dim 64, expand 2, rope fraction 0.5, one group; tied embeddings over the Llama-3.1 vocabulary.
MIMO's MLP is narrower, so that both have the same number of parameters.
"""

from typing import NamedTuple

from mamba3_jax.checks import check_choice
from mamba3_jax.layers import Mamba3Config
from mamba3_jax.models.lm import LMConfig

LLAMA3_VOCAB_SIZE = 128256
MIMO_RANK = 4


class _Size(NamedTuple):
    d_model: int
    n_layers: int
    siso_mlp_width: int
    mimo_mlp_width: int


SIZES = {
    "180m": _Size(768, 12, 1500, 1264),
    "440m": _Size(1024, 24, 2048, 1792),
    "880m": _Size(1536, 24, 3072, 2800),
    "1.5b": _Size(2048, 24, 4096, 3824),
}

PRESETS = tuple(f"mamba3-{kind}-{size}" for kind in ("siso", "mimo") for size in SIZES)


def preset(name: str, *, vocab_size: int = LLAMA3_VOCAB_SIZE, dtype: str = "bfloat16") -> LMConfig:
    """The configuration of a published model, for example "mamba3-mimo-440m".

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    check_choice("name", name, PRESETS)
    _, kind, key = name.split("-")
    size = SIZES[key]
    mimo = kind == "mimo"
    return LMConfig(
        mixer=Mamba3Config(d_model=size.d_model, mimo_rank=MIMO_RANK if mimo else None),
        n_layers=size.n_layers,
        vocab_size=vocab_size,
        mlp_width=size.mimo_mlp_width if mimo else size.siso_mlp_width,
        dtype=dtype,
    )
