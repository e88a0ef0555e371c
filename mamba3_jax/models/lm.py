"""The language model: embeddings, pre-norm blocks of mixer and MLP (Llama layout), final norm, head.

The residual stream is float32 whatever the compute dtype; section 3.4 of arXiv:2603.15569.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mamba3_jax.checks import check_array, check_choice, check_rank
from mamba3_jax.layers import AnyMixerState, MixerConfig, RMSNorm, SwiGLU, build_mixer

Cache = tuple[AnyMixerState, ...]
EMBEDDING_STD = 0.02


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A stack of equal blocks, of Mamba-3 or of a baseline.

    Attributes:
        mixer: every block's mixer, whose type picks the layer; its d_model is the model's.
        n_layers: blocks.
        vocab_size: tokens; rounded up to `vocab_multiple` in the embedding and in the logits.
        mlp_width: hidden width of the MLP, rounded up to a multiple of 128; 0 is no MLP.
        tie_embeddings: whether the head is the embedding.
        vocab_multiple: what the vocabulary is padded to a multiple of.
        dtype: dtype of the matrix products, "float32" or "bfloat16". Parameters are float32.
    """

    mixer: MixerConfig
    n_layers: int
    vocab_size: int
    mlp_width: int = 0
    tie_embeddings: bool = True
    vocab_multiple: int = 16
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("n_layers", "vocab_size", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        if self.mlp_width < 0:
            raise ValueError(f"mlp_width: got {self.mlp_width}; allowed: 0 (no MLP) or a positive width")
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm2(x)) if there is an MLP."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        d, dtype = config.mixer.d_model, jnp.dtype(config.dtype)
        branches = config.n_layers * (2 if config.mlp_width else 1)
        self.dtype = dtype
        self.has_mlp = config.mlp_width > 0
        self.norm = RMSNorm(d)
        self.mixer = build_mixer(config.mixer, rngs=rngs, dtype=dtype, residual_branches=branches)
        if config.mlp_width:
            self.norm2 = RMSNorm(d)
            self.mlp = SwiGLU(d, config.mlp_width, rngs=rngs, dtype=dtype, residual_branches=branches)

    def __call__(
        self, x: Float[Array, "b t d"], state: AnyMixerState | None, segment_ids: Int[Array, "b t"] | None
    ) -> tuple[Float[Array, "b t d"], AnyMixerState]:
        mixed, state = self.mixer(self.norm(x).astype(self.dtype), state, segment_ids)
        x = x + mixed.astype(x.dtype)
        if self.has_mlp:
            x = x + self.mlp(self.norm2(x).astype(self.dtype)).astype(x.dtype)
        return x, state


class LM(nnx.Module):
    """Tokens to logits."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        d = config.mixer.d_model
        self.config = config
        shape = (config.padded_vocab_size, d)
        self.embedding = nnx.Param(EMBEDDING_STD * jax.random.normal(rngs.params(), shape))
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.n_layers)])
        self.norm = RMSNorm(d)
        if not config.tie_embeddings:
            self.head = nnx.Param(EMBEDDING_STD * jax.random.normal(rngs.params(), shape))

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        cache: Cache | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t v"], Cache]:
        """Logits after every token (float32, over the padded vocabulary), and the cache to continue from.

        Args:
            tokens: ids below vocab_size.
            cache: what an earlier call returned; None starts from nothing. A call in pieces equals one call.
            segment_ids: document of each token, non-decreasing along t; documents do not see each other.
        """
        x, states = self.hidden(tokens, cache, segment_ids)
        return self.logits(x), states

    def hidden(
        self, tokens: Int[Array, "b t"], cache: Cache | None = None, segment_ids: Int[Array, "b t"] | None = None
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """What the head reads, for those who need the logits of few tokens only; arguments as in a call."""
        b, t = check_rank("tokens", tokens, "b t")
        check_array("tokens", tokens, "b t", dict(b=b, t=t), kind=jnp.integer)
        if cache is not None and len(cache) != len(self.blocks):
            raise ValueError(f"cache: got {len(cache)} layers; allowed: the model's {len(self.blocks)}")
        x = self.embedding[...][tokens]
        states = []
        for i, block in enumerate(self.blocks):
            x, state = block(x, None if cache is None else cache[i], segment_ids)
            states.append(state)
        return self.norm(x), tuple(states)

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """The head, on what `hidden` returns."""
        head = (self.embedding if self.config.tie_embeddings else self.head)[...]
        dtype = jnp.dtype(self.config.dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum("btd,vd->btv", x.astype(dtype), head.astype(dtype), preferred_element_type=wide)

    def step(self, tokens: Int[Array, " b"], cache: Cache) -> tuple[Float[Array, "b v"], Cache]:
        """One decode step: the logits after one more token of every sequence."""
        logits, cache = self(tokens[:, None], cache)
        return logits[:, 0], cache

    def empty_cache(self, b: int) -> Cache:
        """The cache before the first token of `b` sequences. Only attention's grows with the tokens that follow."""
        return tuple(block.mixer.empty_state(b) for block in self.blocks)


def count_parameters(model: nnx.Module) -> int:
    """Numbers in all parameters of a model, or of its abstract form."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
