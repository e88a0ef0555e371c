"""The Mamba-3 mixer, SISO and MIMO: sections 3.1 to 3.4 of arXiv:2603.15569.

    [z, x, B, C, dt, A, trap, angle] = in_proj(u)
    dt     = softplus(dt + dt_bias)
    A      = -max(act(A), A_floor)          act: softplus or heavy_tail
    lambda = sigmoid(trap)                  or fixed: 1/2, or 1 for exponential-Euler
    omega  = pi tanh(angle)
    B, C   = RMSNorm(B), RMSNorm(C)         their biases are added inside the operator, before the rotation
    u'     = out_proj(ssm(x, B, C, dt, A, lambda, omega, ...))
"""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mamba3_jax.checks import check_array, check_choice, check_rank
from mamba3_jax.distributed.rules import constrain, exchanged
from mamba3_jax.layers.conv import CausalConv, check_tail
from mamba3_jax.layers.norm import RMSNorm, rms_norm
from mamba3_jax.layers.parameters import Undecayed, linear, step_size_bias
from mamba3_jax.ops import (
    EULER,
    Implementation,
    Rotation,
    SSMState,
    angular_velocity,
    output,
    rope_frequencies,
    ssm,
    ssm_step,
)

AActivation = Literal["softplus", "heavy_tail"]
BiasInit = Literal["ones", "zeros", "uniform", "symmetric"]
OutputNorm = Literal["none", "before_gate", "after_gate"]


@dataclasses.dataclass(frozen=True)
class Mamba3Config:
    """One mixer. Defaults are the published models'; `a_activation` is the first release's.

    Attributes:
        d_model: width of the residual stream.
        d_state: state size n, even.
        expand: the inner width is expand * d_model.
        head_dim: channels p of a head; divides the inner width.
        ngroups: groups of heads that share B and C; divides the number of heads.
        mimo_rank: rank r of MIMO; None is SISO.
        discretization: "trapezoidal" (lambda from the data), "euler" (lambda = 1), or lambda itself, from 0 to 1.
        rotation: "data_dependent", "rope" (standard, by position) or "none".
        rope_fraction: part of the state that rotates, 0.5 or 1.0.
        angle_bound: bound of omega in radians per unit of time.
        a_activation: "softplus" (first release, state tracking) or "heavy_tail" (newest release).
        A_floor: smallest decay rate |A|.
        dt_min, dt_max: range of the initial step sizes, drawn log-uniformly.
        bc_bias_init: initial B and C biases: "ones", "zeros", "uniform" U(0, 1), "symmetric" U(-1, 1) (table 10a),
            or None for no biases.
        bc_bias_trainable: whether they are trained.
        conv_width: taps of a short causal convolution over x, B and C; 0 is none.
        output_norm: RMSNorm "before_gate" or "after_gate" (table 9), or "none".
        output_norm_grouped: normalise each head by itself, or all heads together.
        implementation, chunk_size: passed to `ops.ssm`.
    """

    d_model: int
    d_state: int = 128
    expand: int = 2
    head_dim: int = 64
    ngroups: int = 1
    mimo_rank: int | None = None
    discretization: Literal["trapezoidal", "euler"] | float = "trapezoidal"
    rotation: Rotation = "data_dependent"
    rope_fraction: float = 0.5
    angle_bound: float = math.pi
    a_activation: AActivation = "softplus"
    A_floor: float = 1e-4
    dt_min: float = 1e-3
    dt_max: float = 0.1
    bc_bias_init: BiasInit | None = "ones"
    bc_bias_trainable: bool = True
    conv_width: int = 0
    output_norm: OutputNorm = "none"
    output_norm_grouped: bool = True
    implementation: Implementation | None = None
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
            raise ValueError(f"d_state: got {self.d_state}; allowed: an even size, because channels turn in pairs")
        if self.mimo_rank is not None and self.mimo_rank < 1:
            raise ValueError(f"mimo_rank: got {self.mimo_rank}; allowed: a positive integer, or None for SISO")
        if self.rope_fraction not in (0.5, 1.0):
            raise ValueError(f"rope_fraction: got {self.rope_fraction}; allowed: 0.5, 1.0")
        if self.rotation != "none" and self.rotated_pairs < 1:
            raise ValueError(f"d_state: got {self.d_state}; allowed: at least 4 for rope_fraction {self.rope_fraction}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size: got {self.chunk_size}; allowed: a positive integer, or None")
        if isinstance(self.discretization, str):
            check_choice("discretization", self.discretization, ("trapezoidal", "euler"))
        elif not 0 <= self.discretization <= 1:
            raise ValueError(
                f"discretization: got {self.discretization}; allowed: 'trapezoidal', 'euler', or lambda from 0 to 1"
            )
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"dt_min: got {self.dt_min} with dt_max {self.dt_max}; allowed: 0 < dt_min <= dt_max")
        if self.A_floor < 0:
            raise ValueError(f"A_floor: got {self.A_floor}; allowed: a number >= 0")
        if self.angle_bound <= 0:
            raise ValueError(f"angle_bound: got {self.angle_bound}; allowed: a positive number of radians")
        if self.conv_width < 0:
            raise ValueError(f"conv_width: got {self.conv_width}; allowed: 0 (none) or the number of taps")
        check_choice("rotation", self.rotation, get_args(Rotation))
        check_choice("a_activation", self.a_activation, get_args(AActivation))
        check_choice("bc_bias_init", self.bc_bias_init, (*get_args(BiasInit), None))
        check_choice("output_norm", self.output_norm, get_args(OutputNorm))
        check_choice("implementation", self.implementation, (*get_args(Implementation), None))

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        return self.d_inner // self.head_dim

    @property
    def rank(self) -> int:
        """r, which is 1 for SISO."""
        return self.mimo_rank or 1

    @property
    def rotated_pairs(self) -> int:
        """s: the pairs of state channels that turn."""
        return 0 if self.rotation == "none" else int(self.d_state * self.rope_fraction) // 2

    @property
    def projection_sizes(self) -> dict[str, int]:
        """The parts of in_proj, in the checkpoint's order."""
        bc = self.rank * self.ngroups * self.d_state
        return dict(
            z=self.d_inner,
            x=self.d_inner,
            B=bc,
            C=bc,
            dt=self.nheads,
            A=self.nheads,
            trap=self.nheads if self.discretization == "trapezoidal" else 0,
            angle=self.rotated_pairs if self.rotation == "data_dependent" else 0,
        )


class MixerState(NamedTuple):
    """What a mixer carries between calls: the operator's state, and the convolution's last inputs if it has one."""

    ssm: SSMState
    conv: Float[Array, "b w d"] | None


class Mamba3(nnx.Module):
    """The mixer; see the module's docstring for the equations and `Mamba3Config` for the options."""

    def __init__(
        self, config: Mamba3Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, residual_branches: int = 1
    ):
        h, r, p, n = config.nheads, config.rank, config.head_dim, config.d_state
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.in_proj = linear(config.d_model, sum(config.projection_sizes.values()), rngs=rngs, dtype=dtype)
        self.dt_bias = Undecayed(step_size_bias(rngs.params(), h, config.dt_min, config.dt_max))
        self.D = Undecayed(jnp.ones(h))
        self.B_norm, self.C_norm = RMSNorm(n), RMSNorm(n)
        if config.bc_bias_init is not None:
            self.B_bias = Undecayed(_initial_bias(config.bc_bias_init, rngs.params(), (h, r, n)))
            self.C_bias = Undecayed(_initial_bias(config.bc_bias_init, rngs.params(), (h, r, n)))
        if config.mimo_rank is not None:
            self.mimo_x = nnx.Param(jnp.full((h, r, p), 1 / r))
            self.mimo_z = nnx.Param(jnp.ones((h, r, p)))
            self.mimo_o = nnx.Param(jnp.full((h, r, p), 1 / r))
        if config.conv_width:
            sizes = config.projection_sizes
            self.conv = CausalConv(sizes["x"] + sizes["B"] + sizes["C"], config.conv_width, rngs=rngs)
        if config.output_norm != "none":
            self.norm_weight = Undecayed(jnp.ones((h, p)))
        self.out_proj = linear(
            config.d_inner, config.d_model, rngs=rngs, dtype=dtype, residual_branches=residual_branches
        )

    def __call__(
        self,
        u: Float[Array, "b t d"],
        state: MixerState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], MixerState]:
        """Mixes whole sequences; `state` continues them, `segment_ids` keeps packed documents apart (see `ops.ssm`)."""
        b, t, _ = check_rank("u", u, "b t d")
        check_array("u", u, "b t d", dict(b=b, t=t, d=self.config.d_model))
        operator = functools.partial(ssm, segment_ids=segment_ids, chunk_size=self.config.chunk_size)
        past = dict(initial_state=None if state is None else state.ssm)
        return self._mix(u, self._project(u), state, operator, past, segment_ids)

    def step(self, u: Float[Array, "b d"], state: MixerState) -> tuple[Float[Array, "b d"], MixerState]:
        """One decode step."""
        (b, _) = check_rank("u", u, "b d")
        check_array("u", u, "b d", dict(b=b, d=self.config.d_model))
        u = u[:, None]
        y, state = self._mix(u, self._project_token(u), state, _step_with_time, dict(state=state.ssm))
        return y[:, 0], state

    def _mix(self, u, parts, state, operator, past, segment_ids=None):
        """From the parts of in_proj to the mixer's output and its next state."""
        cfg = self.config
        tail = None
        if state is not None:
            check_tail(state.conv, cfg.conv_width)
        if cfg.conv_width:
            tail = self.conv.empty_tail(u.shape[0]) if state is None else state.conv
            tail = self._convolve(parts, tail, segment_ids)
        inputs = self._operator_inputs(parts)
        z = self._heads(parts["z"])
        mimo = {}
        if cfg.mimo_rank is not None:
            mimo = dict(mimo_x=self.mimo_x[...], mimo_z=self.mimo_z[...], mimo_o=self.mimo_o[...])
        fused = cfg.output_norm == "none"
        if not fused:
            mimo_z, mimo_o = mimo.pop("mimo_z", None), mimo.pop("mimo_o", None)
        y, ssm_state = operator(
            **inputs,
            **mimo,
            **past,
            D=self.D[...],
            z=z if fused else None,
            rotation=cfg.rotation,
            implementation=cfg.implementation,
        )
        if not fused:
            y = self._norm_and_gate(y, z, mimo_z, mimo_o)
        y = constrain(y.reshape(*u.shape[:2], cfg.d_inner).astype(u.dtype), "batch", "time", "heads")
        return self.out_proj(y), MixerState(ssm_state, tail)

    def empty_state(self, b: int) -> MixerState:
        """The state before the first token of `b` sequences."""
        cfg = self.config
        empty = SSMState.zeros(b, cfg.nheads, cfg.head_dim, cfg.d_state, cfg.rank, cfg.rotated_pairs)
        return MixerState(empty, self.conv.empty_tail(b) if cfg.conv_width else None)

    def dynamics(self, u: Float[Array, "b t d"]) -> dict[str, Array | float | None]:
        """dt, A, lam and omega as `ops.ssm` takes them, from the mixer's input."""
        inputs = self._operator_inputs(self._project(u))
        return {name: inputs[name] for name in ("dt", "A", "lam", "omega")}

    def _project(self, u):
        """in_proj(u) in its parts. The kernel is cut, not the product: z and x come out contiguous, without a copy."""
        sizes = self.config.projection_sizes
        u = u.astype(self.dtype)
        kernel = self.in_proj.kernel[...].astype(self.dtype)
        z, x, rest = jnp.split(kernel, [sizes["z"], sizes["z"] + sizes["x"]], axis=1)
        names = list(sizes)[2:]
        ends = np.cumsum([sizes[name] for name in names])[:-1]
        # The small parts keep the product's float32: dt and the angles are summed over the whole sequence.
        rest = jnp.matmul(u, exchanged(rest, None), preferred_element_type=self._wide(u))
        z, x = (constrain(u @ exchanged(part, "heads"), "batch", "time", "heads") for part in (z, x))
        return dict(z=z, x=x) | dict(zip(names, jnp.split(rest, ends, axis=-1)))

    def _project_token(self, u):
        """The same of one token, where the kernel is the larger array: the product is cut."""
        u = u.astype(self.dtype)
        product = jnp.matmul(u, self.in_proj.kernel[...].astype(self.dtype), preferred_element_type=self._wide(u))
        sizes = self.config.projection_sizes
        parts = dict(zip(sizes, jnp.split(product, np.cumsum(list(sizes.values()))[:-1], axis=-1)))
        return parts | {name: parts[name].astype(u.dtype) for name in ("z", "x")}

    def _convolve(self, parts, tail, segment_ids):
        names = ("x", "B", "C")
        sizes = [parts[name].shape[-1] for name in names]
        joined = jnp.concatenate([parts[name].astype(parts["x"].dtype) for name in names], -1)
        joined, tail = self.conv(joined, tail, segment_ids)
        parts |= dict(zip(names, jnp.split(joined, [sizes[0], sizes[0] + sizes[1]], axis=-1)))
        return tail

    def _operator_inputs(self, parts) -> dict[str, Array | float | None]:
        cfg = self.config
        wide = self._wide(parts["x"])
        dt, A, trap, angle = (parts[name].astype(wide) for name in ("dt", "A", "trap", "angle"))
        lam = {"trapezoidal": jax.nn.sigmoid(trap), "euler": EULER}.get(cfg.discretization, cfg.discretization)
        omega = {
            "data_dependent": angular_velocity(angle, cfg.angle_bound)[:, :, None],
            "rope": rope_frequencies(cfg.d_state, cfg.rotated_pairs),
            "none": None,
        }[cfg.rotation]
        b, t = dt.shape[:2]
        shape = (b, t, cfg.rank, cfg.ngroups, cfg.d_state)
        return dict(
            x=self._heads(parts["x"]),
            # Normalised in float32, then as narrow as x: every head of a group reads them again.
            B=self.B_norm(parts["B"].reshape(shape)).astype(parts["x"].dtype),
            C=self.C_norm(parts["C"].reshape(shape)).astype(parts["x"].dtype),
            dt=self._step_size(dt),
            A=-jnp.maximum(_decay_rate(A, cfg.a_activation), cfg.A_floor),
            lam=lam,
            omega=omega,
            B_bias=self._bias("B_bias"),
            C_bias=self._bias("C_bias"),
        )

    def _step_size(self, raw: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
        return jax.nn.softplus(raw.astype(self._wide(raw)) + self.dt_bias[...][None, None])

    def _bias(self, name: str):
        if self.config.bc_bias_init is None:
            return None
        bias = getattr(self, name)[...]
        return bias if self.config.bc_bias_trainable else jax.lax.stop_gradient(bias)

    def _norm_and_gate(self, y, z, mimo_z, mimo_o):
        """Table 9. With MIMO every rank is normalised and gated by itself, then the ranks are contracted."""
        cfg = self.config
        o = y if cfg.mimo_rank is not None else y[:, :, None]
        axis = -1 if cfg.output_norm_grouped else (-2, -1)
        if cfg.output_norm == "before_gate":
            o = output.gate(rms_norm(o, self.norm_weight[...], axis), z, mimo_z)
        else:
            o = rms_norm(output.gate(o, z, mimo_z), self.norm_weight[...], axis)
        return o[:, :, 0] if mimo_o is None else output.reduce_ranks(o, mimo_o)

    def _heads(self, u: Float[Array, "b t _"]) -> Float[Array, "b t h p"]:
        return u.reshape(*u.shape[:2], self.config.nheads, self.config.head_dim)

    @staticmethod
    def _wide(u: Array) -> jnp.dtype:
        return jnp.promote_types(u.dtype, jnp.float32)


def _step_with_time(*, x, B, C, dt, A, lam, omega, z, **weights):
    """`ssm_step` on arrays with a time axis of one token, as the layer makes them."""
    per_token = omega is not None and omega.ndim > 1
    y, state = ssm_step(
        **{name: a[:, 0] for name, a in dict(x=x, B=B, C=C, dt=dt, A=A).items()},
        lam=lam if isinstance(lam, float) else lam[:, 0],
        omega=omega[:, 0] if per_token else omega,
        z=None if z is None else z[:, 0],
        **weights,
    )
    return y[:, None], state


def _decay_rate(raw: Float[Array, "b t h"], activation: AActivation) -> Float[Array, "b t h"]:
    """|A| before the floor. heavy_tail: 1 + u for u >= 0, 1/(1 - u) below."""
    if activation == "softplus":
        return jax.nn.softplus(raw)
    return jnp.where(raw >= 0, 1 + raw, 1 / (1 - jnp.minimum(raw, 0)))


def _initial_bias(init: BiasInit, key: Array, shape: tuple[int, ...]) -> Array:
    match init:
        case "ones":
            return jnp.ones(shape)
        case "zeros":
            return jnp.zeros(shape)
        case "uniform":
            return jax.random.uniform(key, shape)
        case "symmetric":
            return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
