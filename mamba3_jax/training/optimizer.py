"""AdamW with a decay mask, a warm-up and a schedule, usable with one learning rate or a vmapped axis of them."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from mamba3_jax.checks import check_choice
from mamba3_jax.layers import Undecayed

Schedule = Literal["cosine", "constant"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; see `learning_rate` for the schedule.

    Attributes:
        weight_decay: decoupled, on matrices only: not on norms, biases, dt_bias and D.
        b1, b2, eps: Adam's.
        clip_norm: largest global gradient norm.
        warmup_steps: steps of linear warm-up from 0.
        schedule: "cosine" to `end_learning_rate` at the last step, or "constant".
        end_learning_rate: where the cosine ends.
    """

    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    warmup_steps: int = 500
    schedule: Schedule = "cosine"
    end_learning_rate: float = 1e-6

    SCHEDULES: ClassVar[tuple[str, ...]] = ("cosine", "constant")

    def __post_init__(self):
        for name in ("weight_decay", "warmup_steps", "end_learning_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a number >= 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: 0 <= {name} < 1")
        for name in ("eps", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a number > 0")
        check_choice("schedule", self.schedule, self.SCHEDULES)


@dataclasses.dataclass(frozen=True)
class PretrainingOptimizerConfig(OptimizerConfig):
    """AdamW as language models are trained with it: appendix D.2 of arXiv:2405.21060, which the paper follows.

    Attributes:
        b2, end_learning_rate: as `OptimizerConfig`'s.
        schedule: "cosine", "constant", or "wsd": constant until the last `decay_fraction` of the steps, then linear to
            `end_learning_rate`.
        peak_learning_rate: after the warm-up.
        decay_fraction: part of all steps in which "wsd" decays.
    """

    b2: float = 0.95
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    end_learning_rate: float = 1e-5
    peak_learning_rate: float = 1e-3
    decay_fraction: float = 0.1

    SCHEDULES: ClassVar[tuple[str, ...]] = ("cosine", "constant", "wsd")

    def __post_init__(self):
        super().__post_init__()
        if self.peak_learning_rate <= 0:
            raise ValueError(f"peak_learning_rate: got {self.peak_learning_rate}; allowed: a number > 0")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction: got {self.decay_fraction}; allowed: 0 < decay_fraction <= 1")


def learning_rate(
    config: OptimizerConfig, peak: Float[Array, "..."], step: Int[Array, ""], total_steps: int
) -> Float[Array, "..."]:
    """The rate of step `step` (from 0): linear to `peak` over the warm-up, then as the schedule says."""
    warm = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return peak * warm
    if config.schedule == "wsd":
        decay_steps = max(1, round(config.decay_fraction * total_steps))
        left = jnp.clip((total_steps - step) / decay_steps, 0.0, 1.0)
        return jnp.where(warm < 1, peak * warm, config.end_learning_rate + (peak - config.end_learning_rate) * left)
    progress = jnp.clip((step - config.warmup_steps) / max(1, total_steps - config.warmup_steps), 0.0, 1.0)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return jnp.where(warm < 1, peak * warm, config.end_learning_rate + (peak - config.end_learning_rate) * cosine)


def direction(config: OptimizerConfig, parameters: nnx.State) -> optax.GradientTransformation:
    """AdamW without its learning rate: add -learning_rate times its updates to the parameters."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(parameters)),
    )


def decay_mask(parameters: nnx.State) -> nnx.State:
    """True for every parameter that weight decay applies to."""
    return jax.tree.map(
        lambda variable: not isinstance(variable, Undecayed),
        parameters,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
