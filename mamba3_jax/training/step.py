"""One optimizer step, and one batch of validation, as compiled functions of arrays.

    loss      = sum(nll) / count + z_loss * sum(z) / count           over all rows of the step
    update    = AdamW(clip(gradient)) * learning_rate(step)          skipped where loss or gradient is not finite

With `accumulation` = k the rows are cut in k parts whose gradients are added in float32; `count` is that of the whole
step, so that the result is that of one large batch, to rounding.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mamba3_jax.data.pipeline import TokenBatch
from mamba3_jax.distributed.mesh import under
from mamba3_jax.distributed.rules import constrain
from mamba3_jax.models import LM, LMConfig, abstract_model
from mamba3_jax.models.lm import AnyMixerState, Block
from mamba3_jax.training.config import Remat, TrainConfig
from mamba3_jax.training.loss import LossSums, cross_entropy
from mamba3_jax.training.optimizer import PretrainingOptimizerConfig, direction, learning_rate
from mamba3_jax.training.state import TrainState, shardings


class StepMetrics(NamedTuple):
    """Of one step.

    Attributes:
        loss: mean cross-entropy in nats per target, without the z-loss.
        gradient_norm: global, before clipping.
        learning_rate: that of the step.
        finite: whether the update was made.
        skipped, skipped_in_row: as `TrainState`'s, after the step.
    """

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step depends on; see `TrainConfig` for the options."""

    model: LMConfig
    optimizer: PretrainingOptimizerConfig
    steps: int
    accumulation: int = 1
    remat: Remat = "none"
    z_loss: float = 0.0
    loss_chunk: int = 512

    @classmethod
    def of(cls, config: TrainConfig, model: LMConfig) -> "StepConfig":
        """Of a run that trains this model."""
        options = (config.optimizer, config.steps, config.accumulation, config.remat, config.z_loss, config.loss_chunk)
        return cls(model, *options)


class Rematerialised(nnx.Module):
    """A block that keeps its input only, and computes the rest again in the backward pass."""

    def __init__(self, block: Block):
        self.block = block

    def __call__(
        self, x: Float[Array, "b t d"], state: AnyMixerState | None, segment_ids: Int[Array, "b t"] | None
    ) -> tuple[Float[Array, "b t d"], AnyMixerState]:
        graph, parameters = nnx.split(self.block)

        @jax.checkpoint
        def call(parameters, x, state, segment_ids):
            return nnx.merge(graph, parameters)(x, state, segment_ids)

        return call(parameters, x, state, segment_ids)


def compile_train_step(
    config: StepConfig, mesh: Mesh
) -> Callable[[TrainState, TokenBatch], tuple[TrainState, StepMetrics]]:
    """train_step(state, batch) -> (state, metrics), jitted for the mesh; the state that goes in is donated."""
    graph = _graph(config.model)
    where = shardings(config.model, config.optimizer, mesh)

    def train_step(state: TrainState, batch: TokenBatch) -> tuple[TrainState, StepMetrics]:
        count = jnp.maximum(1, jnp.sum(batch.mask))

        def objective(parameters, rows):
            sums = _sums(config, nnx.merge(graph, parameters), rows)
            return (sums.nll + config.z_loss * sums.z) / count, sums.nll / count

        def value_and_gradient(parameters, rows):
            value, gradient = jax.value_and_grad(objective, has_aux=True)(parameters, rows)
            # Cut like the parameters as soon as it is there, so that no device sums all of it.
            return value, jax.lax.with_sharding_constraint(gradient, where.state.parameters)

        (total, loss), gradient = _accumulate(value_and_gradient, state.parameters, batch, config.accumulation)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        transformation = direction(config.optimizer, state.parameters)
        updates, optimizer_state = transformation.update(gradient, state.optimizer_state, state.parameters)
        peak = jnp.float32(config.optimizer.peak_learning_rate)
        rate = learning_rate(config.optimizer, peak, state.step, config.steps)
        parameters = jax.tree.map(lambda p, u: p - rate * u, state.parameters, updates)
        parameters, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (parameters, optimizer_state),
            (state.parameters, state.optimizer_state),
        )
        skipped = state.skipped + ~finite
        in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
        state = TrainState(parameters, optimizer_state, state.step + 1, skipped, in_row)
        return state, StepMetrics(loss, norm, rate, finite, skipped, in_row)

    return jax.jit(
        under(mesh, train_step),
        donate_argnums=0,
        in_shardings=(where.state, where.batch),
        out_shardings=(where.state, None),
    )


def compile_evaluation(config: StepConfig, mesh: Mesh) -> Callable[[nnx.State, TokenBatch], LossSums]:
    """evaluate(parameters, batch) -> the sums of the batch's targets, jitted for the mesh."""
    graph = _graph(config.model)
    where = shardings(config.model, config.optimizer, mesh)

    def evaluate(parameters: nnx.State, batch: TokenBatch) -> LossSums:
        return _sums(config, nnx.merge(graph, parameters), batch)

    return jax.jit(under(mesh, evaluate), in_shardings=(where.state.parameters, where.batch))


def _sums(config: StepConfig, model: LM, batch: TokenBatch) -> LossSums:
    if config.remat == "blocks":
        model.blocks = nnx.List([Rematerialised(block) for block in model.blocks])
    x, _ = model.hidden(batch.tokens, None, batch.segment_ids)
    return cross_entropy(
        model.logits, x, batch.targets, batch.mask, vocab_size=config.model.vocab_size, chunk=config.loss_chunk
    )


def _accumulate(value_and_gradient, parameters: nnx.State, batch: TokenBatch, parts: int):
    """((objective, loss), gradient) of the whole batch, one part after the other."""
    if parts == 1:
        return value_and_gradient(parameters, batch)

    def body(total, rows):
        return jax.tree.map(jnp.add, total, value_and_gradient(parameters, rows)), None

    # Every part has rows of the whole batch's length, so that rows spread over devices stay where they are.
    split = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), batch)
    split = jax.tree.map(lambda a: constrain(a, None, "batch", "time"), split)
    zero = jnp.zeros((), jnp.float32)
    start = ((zero, zero), jax.tree.map(jnp.zeros_like, parameters))
    return jax.lax.scan(body, start, split)[0]


def _graph(model: LMConfig) -> nnx.GraphDef:
    return nnx.split(abstract_model(model), nnx.Param)[0]
