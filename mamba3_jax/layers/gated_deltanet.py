"""The Gated DeltaNet mixer, section 3.4 of arXiv:2412.06464.

    q, k, v = silu(conv(qkv_proj(u)))              z = z_proj(u)              a, b = rate_proj(u)
    q, k    = q / (|q| sqrt(n)), k / |k|           per head
    alpha   = exp(-exp(A_log) softplus(a + dt_bias))
    beta    = 2 sigmoid(b)                         or sigmoid(b), without negative eigenvalues
    y       = out_proj(RMSNorm(gated_delta_rule(q, k, v, alpha, beta)) * silu(z))

With |k| = 1 a token's transition alpha (I - beta k k^T) has the eigenvalue alpha (1 - beta) along k: below 0 only where
beta exceeds 1, which state tracking needs (arXiv:2411.12537).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mamba3_jax.checks import check_array, check_rank
from mamba3_jax.distributed.rules import constrain
from mamba3_jax.layers.conv import CausalConv, check_tail
from mamba3_jax.layers.norm import RMSNorm
from mamba3_jax.layers.parameters import Undecayed, linear, log_decay_rate, step_size_bias
from mamba3_jax.ops.delta_rule import CHUNK_SIZE, gated_delta_rule

# The initial decays: the step size log-uniformly as Mamba-2's, the rate |A| uniformly from (almost) 0, as released.
DT_RANGE = (1e-3, 0.1)
A_RANGE = (1e-4, 16.0)
# Added to a squared length, so that a zero key stays zero; the released implementation's value.
LENGTH_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig:
    """One mixer.

    Attributes:
        d_model: width of the residual stream.
        d_state: size n of a head's keys and queries.
        expand: the inner width is expand * d_model.
        head_dim: size p of a head's values; divides the inner width.
        conv_width: taps of the causal convolution over q, k and v; 0 leaves only its silu.
        negative_eigenvalues: beta in (0, 2) instead of (0, 1).
        chunk_size: largest chunk of the operator; None takes its default.
    """

    d_model: int
    d_state: int = 128
    expand: int = 2
    head_dim: int = 64
    conv_width: int = 4
    negative_eigenvalues: bool = True
    chunk_size: int | None = None

    def __post_init__(self):
        for name in ("d_model", "d_state", "expand", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        if self.d_inner % self.head_dim:
            raise ValueError(f"head_dim: got {self.head_dim}; allowed: a divisor of the inner width {self.d_inner}")
        if self.conv_width < 0:
            raise ValueError(f"conv_width: got {self.conv_width}; allowed: 0 (none) or the number of taps")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size: got {self.chunk_size}; allowed: a positive integer, or None")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        return self.d_inner // self.head_dim


class GatedDeltaNetState(NamedTuple):
    """What the mixer carries between calls: the operator's state, and the convolution's last inputs if it has one."""

    delta: Float[Array, "b h p n"]
    conv: Float[Array, "b w d"] | None


class GatedDeltaNet(nnx.Module):
    """The mixer; see the module's docstring for the equations and `GatedDeltaNetConfig` for the options."""

    def __init__(
        self, config: GatedDeltaNetConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, residual_branches: int = 1
    ):
        d, h = config.d_model, config.nheads
        channels = 2 * h * config.d_state + config.d_inner
        self.config = config
        self.qkv_proj = linear(d, channels, rngs=rngs, dtype=dtype)
        self.z_proj = linear(d, config.d_inner, rngs=rngs, dtype=dtype)
        # At least float32, because the decays are summed over the whole sequence.
        self.rate_proj = linear(d, 2 * h, rngs=rngs, dtype=jnp.promote_types(dtype, jnp.float32))
        if config.conv_width:
            self.conv = CausalConv(channels, config.conv_width, rngs=rngs)
        self.dt_bias = Undecayed(step_size_bias(rngs.params(), h, *DT_RANGE))
        self.A_log = Undecayed(log_decay_rate(rngs.params(), h, *A_RANGE))
        self.norm = RMSNorm(config.head_dim)
        self.out_proj = linear(config.d_inner, d, rngs=rngs, dtype=dtype, residual_branches=residual_branches)

    def __call__(
        self,
        u: Float[Array, "b t d"],
        state: GatedDeltaNetState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], GatedDeltaNetState]:
        """Mixes whole sequences; `state` continues them, `segment_ids` keeps packed documents apart (see `ops.ssm`)."""
        cfg = self.config
        b, t, _ = check_rank("u", u, "b t d")
        check_array("u", u, "b t d", dict(b=b, t=t, d=cfg.d_model))
        if state is None:
            state = self.empty_state(b)
        check_tail(state.conv, cfg.conv_width)
        qkv, tail = self.qkv_proj(u), None
        if cfg.conv_width:
            qkv, tail = self.conv(qkv, state.conv, segment_ids)
        else:
            qkv = jax.nn.silu(qkv)
        q, k, v = jnp.split(qkv, [cfg.nheads * cfg.d_state, 2 * cfg.nheads * cfg.d_state], axis=-1)
        a, b_raw = jnp.split(self.rate_proj(u), 2, axis=-1)
        o, delta = gated_delta_rule(
            q=_normalise(self._heads(q), cfg.d_state**-0.5),
            k=_normalise(self._heads(k)),
            v=self._heads(v),
            log_alpha=-jnp.exp(self.A_log[...])[None, None] * jax.nn.softplus(a + self.dt_bias[...][None, None]),
            beta=(2 if cfg.negative_eigenvalues else 1) * jax.nn.sigmoid(b_raw),
            initial_state=state.delta,
            segment_ids=segment_ids,
            chunk_size=cfg.chunk_size or CHUNK_SIZE,
        )
        y = self.norm(o.astype(a.dtype)) * jax.nn.silu(self._heads(self.z_proj(u)).astype(a.dtype))
        return self.out_proj(y.reshape(b, t, cfg.d_inner).astype(u.dtype)), GatedDeltaNetState(delta, tail)

    def step(self, u: Float[Array, "b d"], state: GatedDeltaNetState) -> tuple[Float[Array, "b d"], GatedDeltaNetState]:
        """One decode step."""
        y, state = self(u[:, None], state)
        return y[:, 0], state

    def empty_state(self, b: int) -> GatedDeltaNetState:
        """The state before the first token of `b` sequences."""
        cfg = self.config
        empty = jnp.zeros((b, cfg.nheads, cfg.head_dim, cfg.d_state))
        return GatedDeltaNetState(empty, self.conv.empty_tail(b) if cfg.conv_width else None)

    def _heads(self, u: Float[Array, "b t _"]) -> Float[Array, "b t h _"]:
        # Time is whole, because the operator scans all of it.
        return constrain(u.reshape(*u.shape[:2], self.config.nheads, -1), "batch", None, "heads", None)


def _normalise(u: Float[Array, "b t h n"], length: float = 1.0) -> Float[Array, "b t h n"]:
    """u scaled to the length, computed in at least float32."""
    wide = u.astype(jnp.promote_types(u.dtype, jnp.float32))
    scale = length * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + LENGTH_EPS)
    return (wide * scale).astype(u.dtype)
