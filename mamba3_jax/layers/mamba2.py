"""The Mamba-2 mixer, arXiv:2405.21060: the baseline that Mamba-3 starts from.

    z = z_proj(u)    x, B, C = silu(conv(xBC_proj(u)))    dt = softplus(dt_proj(u) + dt_bias)    A = -exp(A_log)
    y = out_proj(RMSNorm(ssd(x, B, C, dt, A) * silu(z)))        the norm over the heads of a group

Its SSD, h_t = exp(dt A) h_{t-1} + dt B_t x_t^T with y_t = C_t^T h_t + D x_t, is exactly this library's operator with
lambda = 1 (exponential-Euler), no rotation and no biases; table 1 of arXiv:2603.15569.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mamba3_jax.checks import check_array, check_rank
from mamba3_jax.layers.conv import CausalConv, check_tail
from mamba3_jax.layers.mamba3 import MixerState
from mamba3_jax.layers.norm import rms_norm
from mamba3_jax.layers.parameters import Undecayed, linear, log_decay_rate, step_size_bias
from mamba3_jax.ops import EULER, SSMState, ssm


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """One mixer. Defaults are the published models'.

    Attributes:
        d_model: width of the residual stream.
        d_state: state size n, even.
        expand: the inner width is expand * d_model.
        head_dim: channels p of a head; divides the inner width.
        ngroups: groups of heads that share B and C; divides the number of heads.
        conv_width: taps of the causal convolution over x, B and C; 0 leaves only its silu.
        dt_min, dt_max: range of the initial step sizes, drawn log-uniformly.
        A_min, A_max: range of the initial decay rates |A|, drawn uniformly.
        chunk_size: passed to `ops.ssm`.
    """

    d_model: int
    d_state: int = 128
    expand: int = 2
    head_dim: int = 64
    ngroups: int = 1
    conv_width: int = 4
    dt_min: float = 1e-3
    dt_max: float = 0.1
    A_min: float = 1.0
    A_max: float = 16.0
    chunk_size: int | None = None

    def __post_init__(self):
        for name in ("d_model", "d_state", "expand", "head_dim", "ngroups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        if self.d_inner % self.head_dim:
            raise ValueError(f"head_dim: got {self.head_dim}; allowed: a divisor of the inner width {self.d_inner}")
        if self.nheads % self.ngroups:
            raise ValueError(f"ngroups: got {self.ngroups}; allowed: a divisor of the {self.nheads} heads")
        if self.d_state % 2:
            raise ValueError(f"d_state: got {self.d_state}; allowed: an even size, as ops.ssm takes it")
        if self.conv_width < 0:
            raise ValueError(f"conv_width: got {self.conv_width}; allowed: 0 (none) or the number of taps")
        for low, high in (("dt_min", "dt_max"), ("A_min", "A_max")):
            if not 0 < getattr(self, low) <= getattr(self, high):
                given = f"{low}: got {getattr(self, low)} with {high} {getattr(self, high)}"
                raise ValueError(f"{given}; allowed: 0 < {low} <= {high}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size: got {self.chunk_size}; allowed: a positive integer, or None")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        return self.d_inner // self.head_dim


class Mamba2(nnx.Module):
    """The mixer; see the module's docstring for the equations and `Mamba2Config` for the options."""

    def __init__(
        self, config: Mamba2Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, residual_branches: int = 1
    ):
        d, h = config.d_model, config.nheads
        channels = config.d_inner + 2 * config.ngroups * config.d_state
        self.config = config
        self.z_proj = linear(d, config.d_inner, rngs=rngs, dtype=dtype)
        self.xBC_proj = linear(d, channels, rngs=rngs, dtype=dtype)
        # At least float32, because the step sizes are summed over the whole sequence.
        self.dt_proj = linear(d, h, rngs=rngs, dtype=jnp.promote_types(dtype, jnp.float32))
        if config.conv_width:
            self.conv = CausalConv(channels, config.conv_width, rngs=rngs)
        self.dt_bias = Undecayed(step_size_bias(rngs.params(), h, config.dt_min, config.dt_max))
        self.A_log = Undecayed(log_decay_rate(rngs.params(), h, config.A_min, config.A_max))
        self.D = Undecayed(jnp.ones(h))
        self.norm_weight = Undecayed(jnp.ones((config.ngroups, config.d_inner // config.ngroups)))
        self.out_proj = linear(config.d_inner, d, rngs=rngs, dtype=dtype, residual_branches=residual_branches)

    def __call__(
        self,
        u: Float[Array, "b t d"],
        state: MixerState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], MixerState]:
        """Mixes whole sequences; `state` continues them, `segment_ids` keeps packed documents apart (see `ops.ssm`)."""
        cfg = self.config
        b, t, _ = check_rank("u", u, "b t d")
        check_array("u", u, "b t d", dict(b=b, t=t, d=cfg.d_model))
        if state is None:
            state = self.empty_state(b)
        check_tail(state.conv, cfg.conv_width)
        xBC, tail = self.xBC_proj(u), None
        if cfg.conv_width:
            xBC, tail = self.conv(xBC, state.conv, segment_ids)
        else:
            xBC = jax.nn.silu(xBC)
        x, B, C = jnp.split(xBC, [cfg.d_inner, cfg.d_inner + cfg.ngroups * cfg.d_state], axis=-1)
        dt = jax.nn.softplus(self.dt_proj(u) + self.dt_bias[...][None, None])
        y, ssm_state = ssm(
            x=x.reshape(b, t, cfg.nheads, cfg.head_dim),
            B=B.reshape(b, t, 1, cfg.ngroups, cfg.d_state),
            C=C.reshape(b, t, 1, cfg.ngroups, cfg.d_state),
            dt=dt,
            A=jnp.broadcast_to(-jnp.exp(self.A_log[...]).astype(dt.dtype), dt.shape),
            lam=EULER,
            D=self.D[...],
            rotation="none",
            initial_state=state.ssm,
            segment_ids=segment_ids,
            chunk_size=cfg.chunk_size,
        )
        y = y.reshape(b, t, cfg.d_inner).astype(dt.dtype) * jax.nn.silu(self.z_proj(u).astype(dt.dtype))
        y = rms_norm(y.reshape(b, t, cfg.ngroups, -1), self.norm_weight[...]).reshape(b, t, cfg.d_inner)
        return self.out_proj(y.astype(u.dtype)), MixerState(ssm_state, tail)

    def step(self, u: Float[Array, "b d"], state: MixerState) -> tuple[Float[Array, "b d"], MixerState]:
        """One decode step."""
        y, state = self(u[:, None], state)
        return y[:, 0], state

    def empty_state(self, b: int) -> MixerState:
        """The state before the first token of `b` sequences."""
        cfg = self.config
        empty = SSMState.zeros(b, cfg.nheads, cfg.head_dim, cfg.d_state)
        return MixerState(empty, self.conv.empty_tail(b) if cfg.conv_width else None)
