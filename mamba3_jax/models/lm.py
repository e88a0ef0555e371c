"""The language model: embeddings, pre-norm blocks of mixer and MLP (Llama layout), final norm, head.

The residual stream is float32 whatever the compute dtype; section 3.4 of arXiv:2603.15569.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mamba3_jax.checks import check_array, check_choice, check_rank
from mamba3_jax.distributed.rules import constrain, gathered
from mamba3_jax.layers import AnyMixerState, Attention, AttentionConfig, MixerConfig, RMSNorm, SwiGLU, build_mixer

Cache = tuple[AnyMixerState, ...]
EMBEDDING_STD = 0.02


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A stack of blocks, of Mamba-3 or of a baseline, some of them with attention in a hybrid.

    Attributes:
        mixer: the blocks' mixer, whose type picks the layer; its d_model is the model's.
        n_layers: blocks.
        vocab_size: tokens; rounded up to `vocab_multiple` in the embedding and in the logits.
        mlp_width: hidden width of the MLP, rounded up to a multiple of 128; 0 is no MLP.
        tie_embeddings: whether the head is the embedding.
        vocab_multiple: what the vocabulary is padded to a multiple of.
        dtype: dtype of the matrix products, "float32" or "bfloat16". New parameters are float32.
        attention: the mixer of the hybrid's other blocks; None is no hybrid.
        attention_layers: which blocks those are, counted from 0, in rising order.
    """

    mixer: MixerConfig
    n_layers: int
    vocab_size: int
    mlp_width: int = 0
    tie_embeddings: bool = True
    vocab_multiple: int = 16
    dtype: str = "float32"
    attention: AttentionConfig | None = None
    attention_layers: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("n_layers", "vocab_size", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        if self.mlp_width < 0:
            raise ValueError(f"mlp_width: got {self.mlp_width}; allowed: 0 (no MLP) or a positive width")
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if (self.attention is None) != (not self.attention_layers):
            raise ValueError(
                f"attention_layers: got {self.attention_layers} with attention {self.attention}; "
                "allowed: both, or neither"
            )
        layers = self.attention_layers
        if list(layers) != sorted(set(layers)) or not all(0 <= i < self.n_layers for i in layers):
            raise ValueError(
                f"attention_layers: got {self.attention_layers}; "
                f"allowed: different layers from 0 to {self.n_layers - 1}, in rising order"
            )
        if self.attention is not None and self.attention.d_model != self.mixer.d_model:
            raise ValueError(
                f"attention: got d_model {self.attention.d_model}; allowed: {self.mixer.d_model}, as mixer"
            )

    @property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """Every block's."""
        return tuple(self.attention if i in self.attention_layers else self.mixer for i in range(self.n_layers))

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm2(x)) if there is an MLP."""

    def __init__(self, config: LMConfig, mixer: MixerConfig, *, rngs: nnx.Rngs):
        d, dtype = config.mixer.d_model, jnp.dtype(config.dtype)
        branches = config.n_layers * (2 if config.mlp_width else 1)
        self.dtype = dtype
        self.has_mlp = config.mlp_width > 0
        self.norm = RMSNorm(d)
        self.mixer = build_mixer(mixer, rngs=rngs, dtype=dtype, residual_branches=branches)
        if config.mlp_width:
            self.norm2 = RMSNorm(d)
            self.mlp = SwiGLU(d, config.mlp_width, rngs=rngs, dtype=dtype, residual_branches=branches)

    def __call__(
        self, x: Float[Array, "b t d"], state: AnyMixerState | None, segment_ids: Int[Array, "b t"] | None
    ) -> tuple[Float[Array, "b t d"], AnyMixerState]:
        mixed, state = self.mixer(self.norm(x).astype(self.dtype), state, segment_ids)
        return constrain(self._add(x, mixed), "batch", "time", None), state

    def step(self, x: Float[Array, "b d"], state: AnyMixerState) -> tuple[Float[Array, "b d"], AnyMixerState]:
        """One decode step."""
        mixed, state = self.mixer.step(self.norm(x).astype(self.dtype), state)
        return self._add(x, mixed), state

    def _add(self, x: Float[Array, "*shape d"], mixed: Float[Array, "*shape d"]) -> Float[Array, "*shape d"]:
        x = x + mixed.astype(x.dtype)
        if self.has_mlp:
            x = x + self.mlp(self.norm2(x).astype(self.dtype)).astype(x.dtype)
        return x


class LM(nnx.Module):
    """Tokens to logits."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        d = config.mixer.d_model
        self.config = config
        shape = (config.padded_vocab_size, d)
        self.embedding = nnx.Param(EMBEDDING_STD * jax.random.normal(rngs.params(), shape))
        self.blocks = nnx.List([Block(config, mixer, rngs=rngs) for mixer in config.mixers])
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
        if cache is not None:
            self._check_cache(cache)
        # Rows are cut along fsdp, and so is the matrix: what was looked up is exchanged, which is less than the matrix.
        x = constrain(self._embed(tokens), "copies", "time", "embed")
        x = constrain(x, "batch", "time", None)
        states = []
        for i, block in enumerate(self.blocks):
            x, state = block(x, None if cache is None else cache[i], segment_ids)
            states.append(state)
        return self.norm(x), tuple(states)

    def logits(self, x: Float[Array, "*shape d"]) -> Float[Array, "*shape v"]:
        """The head, on what `hidden` returns."""
        head = (self.embedding if self.config.tie_embeddings else self.head)[...]
        dtype = jnp.dtype(self.config.dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum("...d,vd->...v", x.astype(dtype), gathered(head.astype(dtype)), preferred_element_type=wide)

    def step(self, tokens: Int[Array, " b"], cache: Cache) -> tuple[Float[Array, "b v"], Cache]:
        """One decode step: the logits after one more token of every sequence."""
        check_array("tokens", tokens, "b", dict(b=check_rank("tokens", tokens, "b")[0]), kind=jnp.integer)
        self._check_cache(cache)
        x = self._embed(tokens)
        states = []
        for block, state in zip(self.blocks, cache):
            x, state = block.step(x, state)
            states.append(state)
        return self.logits(self.norm(x)), tuple(states)

    def empty_cache(self, b: int, capacity: int | None = None) -> Cache:
        """The cache before the first token of `b` sequences.

        Only attention's grows with the tokens that follow. With a `capacity` it has slots for that many tokens and
        keeps its size, so that all decode steps are one compiled program.
        """
        mixers = [block.mixer for block in self.blocks]
        return tuple(m.empty_state(b, capacity) if isinstance(m, Attention) else m.empty_state(b) for m in mixers)

    def _embed(self, tokens: Int[Array, "*shape"]) -> Float[Array, "*shape d"]:
        """The residual stream's start, in at least float32 whatever the embedding is stored in."""
        x = self.embedding[...][tokens]
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def _check_cache(self, cache: Cache) -> None:
        if len(cache) != len(self.blocks):
            raise ValueError(f"cache: got {len(cache)} layers; allowed: the model's {len(self.blocks)}")


def abstract_model(config: LMConfig) -> LM:
    """The model with shapes and dtypes in place of arrays."""
    return nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))


def count_parameters(model: nnx.Module) -> int:
    """Numbers in all parameters of a model, or of its abstract form."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
