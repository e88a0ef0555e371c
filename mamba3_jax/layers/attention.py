"""Causal softmax attention with RoPE or without positions: the Transformer baseline.

    y_i = out_proj(sum_{j <= i} softmax_j(q_i . k_j / sqrt(p)) v_j)        over the tokens j of i's document

RoPE (arXiv:2104.09864) turns the channel pairs (i, i + p/2) of q and k by their position. Scores depend on differences
of positions only, so packed documents need no reset. With grouped queries (arXiv:2305.13245) h/g query heads share a
key and a value head.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mamba3_jax.checks import check_array, check_choice, check_rank, check_segment_ids
from mamba3_jax.layers.parameters import linear
from mamba3_jax.ops import rope_frequencies
from mamba3_jax.ops.discretization import document_starts
from mamba3_jax.ops.rotation import rotate

AttentionRotation = Literal["rope", "none"]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """One mixer.

    Attributes:
        d_model: width of the residual stream.
        n_heads: query heads h; divides d_model into heads of size p.
        n_kv_heads: key and value heads g, a divisor of n_heads; None is one per query head.
        rotation: "rope", or "none" for no positions (NoPE).
        rope_base: base of RoPE's frequencies; pair i turns by rope_base^(-2i/p) radians per token.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int | None = None
    rotation: AttentionRotation = "rope"
    rope_base: float = 10000.0

    def __post_init__(self):
        for name in ("d_model", "n_heads", "kv_heads"):
            if getattr(self, name) < 1:
                field = name.replace("kv_heads", "n_kv_heads")
                raise ValueError(f"{field}: got {getattr(self, name)}; allowed: a positive integer")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads: got {self.n_heads}; allowed: a divisor of d_model {self.d_model}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads: got {self.n_kv_heads}; allowed: a divisor of the {self.n_heads} heads")
        check_choice("rotation", self.rotation, get_args(AttentionRotation))
        if self.rotation == "rope" and self.head_dim % 2:
            raise ValueError(f"n_heads: got {self.n_heads}, heads of size {self.head_dim}; allowed: an even size")
        if self.rope_base <= 0:
            raise ValueError(f"rope_base: got {self.rope_base}; allowed: a positive number")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """g."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads


class AttentionState(NamedTuple):
    """All m tokens so far. It has exactly their size, so that it grows with every call and every size compiles anew.

    Attributes:
        k: keys, rotated by their positions.
        v: values.
        position: position of the next token.
        first: index of the first key of the document that is still open; the next token sees no earlier one.
    """

    k: Float[Array, "b m g p"]
    v: Float[Array, "b m g p"]
    position: Int[Array, " b"]
    first: Int[Array, " b"]


class Attention(nnx.Module):
    """The mixer; see the module's docstring for the equations and `AttentionConfig` for the options."""

    def __init__(
        self, config: AttentionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, residual_branches: int = 1
    ):
        d, width = config.d_model, (config.n_heads + 2 * config.kv_heads) * config.head_dim
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.qkv_proj = linear(d, width, rngs=rngs, dtype=dtype)
        self.out_proj = linear(d, d, rngs=rngs, dtype=dtype, residual_branches=residual_branches)

    def __call__(
        self,
        u: Float[Array, "b t d"],
        state: AttentionState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], AttentionState]:
        """Mixes whole sequences; `state` continues them, `segment_ids` keeps packed documents apart (see `ops.ssm`)."""
        cfg = self.config
        b, t, d = check_rank("u", u, "b t d")
        check_array("u", u, "b t d", dict(b=b, t=t, d=cfg.d_model))
        if t == 0:
            raise ValueError("u: got t=0 tokens; allowed: at least 1")
        check_segment_ids(segment_ids, dict(b=b, t=t))
        if state is None:
            state = self.empty_state(b)
        q, k, v = self._project(u, state.position)
        mask, first = _visible(state, t, segment_ids)
        k = jnp.concatenate([state.k.astype(k.dtype), k], axis=1)
        v = jnp.concatenate([state.v.astype(v.dtype), v], axis=1)
        y = jax.nn.dot_product_attention(*(a.astype(self.dtype) for a in (q, k, v)), mask=mask)
        state = AttentionState(k, v, position=state.position + t, first=first)
        return self.out_proj(y.reshape(b, t, d).astype(u.dtype)), state

    def step(self, u: Float[Array, "b d"], state: AttentionState) -> tuple[Float[Array, "b d"], AttentionState]:
        """One decode step."""
        y, state = self(u[:, None], state)
        return y[:, 0], state

    def empty_state(self, b: int) -> AttentionState:
        """The state before the first token of `b` sequences, without a key."""
        empty = jnp.zeros((b, 0, self.config.kv_heads, self.config.head_dim))
        start = jnp.zeros(b, jnp.int32)
        return AttentionState(empty, empty, position=start, first=start)

    def _project(self, u: Float[Array, "b t d"], position: Int[Array, " b"]) -> list[Float[Array, "b t _ p"]]:
        """q, k and v in at least float32, q and k rotated."""
        cfg, (b, t, _) = self.config, u.shape
        qkv = self.qkv_proj(u).reshape(b, t, -1, cfg.head_dim)
        qkv = qkv.astype(jnp.promote_types(qkv.dtype, jnp.float32))
        q, k, v = jnp.split(qkv, [cfg.n_heads, cfg.n_heads + cfg.kv_heads], axis=2)
        if cfg.rotation == "rope":
            turn = rope_frequencies(cfg.head_dim, cfg.head_dim // 2, cfg.rope_base).astype(qkv.dtype)
            positions = position[:, None] + jnp.arange(t, dtype=position.dtype)[None]
            angle = positions[:, :, None, None].astype(qkv.dtype) * turn[None, None, None]
            q, k = rotate(q, angle), rotate(k, angle)
        return [q, k, v]


def _visible(
    state: AttentionState, t: int, segment_ids: Int[Array, "b t"] | None
) -> tuple[Bool[Array, "b 1 t mt"], Int[Array, " b"]]:
    """Which of the m + t keys each token sees, from its document's first one to its own, and the new state's first."""
    m = state.k.shape[1]
    own, keys = m + jnp.arange(t, dtype=jnp.int32), jnp.arange(m + t, dtype=jnp.int32)
    first = jnp.broadcast_to(state.first[:, None], (state.first.shape[0], t))
    if segment_ids is not None:
        first = jax.lax.cummax(jnp.where(document_starts(segment_ids), own[None], first), axis=1)
    mask = (keys[None, None] >= first[..., None]) & (keys[None, None] <= own[None, :, None])
    return mask[:, None], first[:, -1]
