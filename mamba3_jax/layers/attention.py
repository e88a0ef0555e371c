"""Causal softmax attention with RoPE or without positions: the Transformer baseline, and the hybrids' other layer.

    q, k, v = conv(qkv_proj(u))                                            conv: the hybrids' short one, or none
    y_i = out_proj(sum_{j <= i} softmax_j(q_i . k_j / sqrt(p)) v_j)        over the tokens j of i's document

RoPE (arXiv:2104.09864) turns the channel pairs (i, i + m/2) of the first m channels of q and k by their position.
Scores depend on differences of positions only, so packed documents need no reset. With grouped queries
(arXiv:2305.13245) h/g query heads share a key and a value head.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mamba3_jax.checks import check_array, check_choice, check_rank, check_segment_ids
from mamba3_jax.distributed.rules import constrain, cutting_mesh, ways
from mamba3_jax.layers.conv import CausalConv, check_tail
from mamba3_jax.layers.parameters import linear
from mamba3_jax.ops import rope_frequencies
from mamba3_jax.ops.discretization import document_starts
from mamba3_jax.ops.rotation import rotate

AttentionRotation = Literal["rope", "none"]
# Scores of one call of the softmax at most, of all heads of a device: 1 GiB in float32.
SCORES = 2**28


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """One mixer.

    Attributes:
        d_model: width of the residual stream.
        n_heads: query heads h.
        n_kv_heads: key and value heads g, a divisor of n_heads; None is one per query head.
        head_dim: channels p of a head; None divides d_model among the heads.
        rotation: "rope", or "none" for no positions (NoPE).
        rotary_dim: leading channels of a head that turn, an even number; None is all of them.
        rope_base: base of RoPE's frequencies; pair i turns by rope_base^(-2i/rotary_dim) radians per token.
        conv_width: taps of a short causal convolution over q, k and v; 0 is none.
        qkv_bias, out_bias: whether the projections have biases.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    rotation: AttentionRotation = "rope"
    rotary_dim: int | None = None
    rope_base: float = 10000.0
    conv_width: int = 0
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self):
        for name in ("d_model", "n_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        for name in ("n_kv_heads", "head_dim", "rotary_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer, or None")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads: got {self.n_heads}; allowed: a divisor of d_model {self.d_model}, or a head_dim"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads: got {self.n_kv_heads}; allowed: a divisor of the {self.n_heads} heads")
        check_choice("rotation", self.rotation, get_args(AttentionRotation))
        if self.rotation == "rope" and self.rotary_dim is None and self.p % 2:
            raise ValueError(f"n_heads: got {self.n_heads}, heads of size {self.p}; allowed: an even size")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.p):
            raise ValueError(f"rotary_dim: got {self.rotary_dim}; allowed: an even number up to the head's {self.p}")
        if self.rope_base <= 0:
            raise ValueError(f"rope_base: got {self.rope_base}; allowed: a positive number")
        if self.conv_width < 0:
            raise ValueError(f"conv_width: got {self.conv_width}; allowed: 0 (none) or the number of taps")

    @property
    def p(self) -> int:
        """Channels of a head."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """g."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def rotated_pairs(self) -> int:
        """Pairs of channels that turn."""
        if self.rotation == "none":
            return 0
        return (self.p if self.rotary_dim is None else self.rotary_dim) // 2


class AttentionState(NamedTuple):
    """All m tokens so far. It grows with every call, so that every size compiles anew; `AttentionBuffer` does not.

    Attributes:
        k: keys, rotated by their positions.
        v: values.
        position: position of the next token.
        first: index of the first key of the document that is still open; the next token sees no earlier one.
        conv: the convolution's last inputs, if it has one.
    """

    k: Float[Array, "b m g p"]
    v: Float[Array, "b m g p"]
    position: Int[Array, " b"]
    first: Int[Array, " b"]
    conv: Float[Array, "b w d"] | None

    def reserve(self, tokens: int) -> "AttentionBuffer":
        """The same in a buffer with room for that many tokens more; not under `jax.jit`."""
        missing = int(jnp.max(self.position)) + tokens - self.k.shape[1]
        pad = [(0, 0), (0, max(missing, 0)), (0, 0), (0, 0)]
        return AttentionBuffer(*self)._replace(k=jnp.pad(self.k, pad), v=jnp.pad(self.v, pad))


class AttentionBuffer(AttentionState):
    """The tokens so far in the first of m slots, whose number stays: one compiled program decodes them all.

    A token beyond the last slot is the caller's mistake, and overwrites it.
    """


class Attention(nnx.Module):
    """The mixer; see the module's docstring for the equations and `AttentionConfig` for the options."""

    def __init__(
        self, config: AttentionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, residual_branches: int = 1
    ):
        d, width = config.d_model, (config.n_heads + 2 * config.kv_heads) * config.p
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.qkv_proj = linear(d, width, rngs=rngs, dtype=dtype, use_bias=config.qkv_bias)
        if config.conv_width:
            self.conv = CausalConv(width, config.conv_width, rngs=rngs, silu=False)
        self.out_proj = linear(
            config.n_heads * config.p,
            d,
            rngs=rngs,
            dtype=dtype,
            residual_branches=residual_branches,
            use_bias=config.out_bias,
        )

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
        check_tail(state.conv, cfg.conv_width)
        q, k, v, tail = self._project(u, state, segment_ids)
        k, v = _append(state, state.k, k), _append(state, state.v, v)
        own, first = _visible(state, t, segment_ids)
        y = _attend(q, k, v, own, first)
        state = state._replace(k=k, v=v, position=state.position + t, first=first[:, -1], conv=tail)
        return self.out_proj(y.reshape(b, t, -1).astype(u.dtype)), state

    def step(self, u: Float[Array, "b d"], state: AttentionState) -> tuple[Float[Array, "b d"], AttentionState]:
        """One decode step."""
        y, state = self(u[:, None], state)
        return y[:, 0], state

    def empty_state(self, b: int, capacity: int | None = None) -> AttentionState:
        """Before the first token of `b` sequences: a buffer for `capacity` tokens, or (None) a state that grows."""
        cfg, kind = self.config, AttentionState if capacity is None else AttentionBuffer
        slots = jnp.zeros((b, capacity or 0, cfg.kv_heads, cfg.p), self.dtype)
        start = jnp.zeros(b, jnp.int32)
        tail = self.conv.empty_tail(b) if cfg.conv_width else None
        return kind(slots, slots, position=start, first=start, conv=tail)

    def _project(self, u, state, segment_ids):
        """q, k and v, q and k rotated in at least float32, and the convolution's new tail."""
        cfg, (b, t, _) = self.config, u.shape
        qkv, tail = self.qkv_proj(u), None
        if cfg.conv_width:
            qkv, tail = self.conv(qkv, state.conv, segment_ids)
        qkv = qkv.reshape(b, t, -1, cfg.p)
        qkv = qkv.astype(jnp.promote_types(qkv.dtype, jnp.float32))
        q, k, v = jnp.split(qkv, [cfg.n_heads, cfg.n_heads + cfg.kv_heads], axis=2)
        if cfg.rotated_pairs:
            turning = 2 * cfg.rotated_pairs
            turn = rope_frequencies(turning, cfg.rotated_pairs, cfg.rope_base).astype(qkv.dtype)
            positions = state.position[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
            angle = positions[:, :, None, None].astype(qkv.dtype) * turn[None, None, None]
            q, k = (jnp.concatenate([rotate(a[..., :turning], angle), a[..., turning:]], axis=-1) for a in (q, k))
        # Every query sees the keys of all devices.
        q, k, v = (
            constrain(a.astype(self.dtype), "batch", time, "heads", None)
            for a, time in ((q, "time"), (k, None), (v, None))
        )
        return q, k, v, tail


def _append(
    state: AttentionState, past: Float[Array, "b m g p"], new: Float[Array, "b t g p"]
) -> Float[Array, "b _ g p"]:
    """The new tokens' keys or values after the past ones: in their slots, or as slots of their own."""
    if not isinstance(state, AttentionBuffer):
        return jnp.concatenate([past, new], axis=1)
    return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(past, new, state.position, 0)


def _visible(
    state: AttentionState, t: int, segment_ids: Int[Array, "b t"] | None
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """The slots that each token sees: its own, the last one, and the first one, where its document begins."""
    own = state.position[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
    first = jnp.broadcast_to(state.first[:, None], own.shape)
    if segment_ids is not None:
        first = jax.lax.cummax(jnp.where(document_starts(segment_ids), own, first), axis=1)
    return own, first


def _attend(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b m g p"],
    v: Float[Array, "b m g p"],
    own: Int[Array, "b t"],
    first: Int[Array, "b t"],
) -> Float[Array, "b t h p"]:
    """Softmax attention over slots `first` to `own`, of so many tokens at a time that their scores fit."""
    b, t, h, _ = q.shape
    slots = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None]

    def some(block):
        q, own, first = block
        mask = (slots >= first[..., None]) & (slots <= own[..., None])
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])

    mesh = cutting_mesh()
    devices = 1 if mesh is None else ways(mesh, "batch") * ways(mesh, "heads")
    at_once = max(1, devices * SCORES // (b * h * k.shape[1]))
    if at_once >= t:
        return some((q, own, first))

    def in_blocks(a):
        # Tokens that only fill the last block see slot 0, so that no softmax is of nothing.
        a = jnp.pad(a, [(0, 0), (0, -t % at_once)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(b, -1, at_once, *a.shape[2:]), 1, 0)

    y = jax.lax.map(jax.checkpoint(some), (in_blocks(q), in_blocks(own), in_blocks(first)))
    return jnp.moveaxis(y, 0, 1).reshape(b, -1, *q.shape[2:])[:, :t]
