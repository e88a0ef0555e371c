"""The state of a training run, and where its arrays live.

`shardings` is the one place that says on which devices state and batches are; everything else asks it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, Int

from mamba3_jax.data.pipeline import TokenBatch
from mamba3_jax.models import LM, LMConfig
from mamba3_jax.training.optimizer import OptimizerConfig, direction


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        parameters: the master weights, float32.
        optimizer_state: AdamW's, float32.
        step: steps so far, with the skipped ones.
        skipped: steps so far whose loss or gradient was not finite.
        skipped_in_row: those since the last finite one.
    """

    parameters: nnx.State
    optimizer_state: optax.OptState
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


class Shardings(NamedTuple):
    """Of every array of the state, and of every array of a batch."""

    state: TrainState
    batch: Sharding


def shardings(model: LMConfig, optimizer: OptimizerConfig) -> Shardings:
    """Everything on the first device."""
    device = SingleDeviceSharding(jax.local_devices()[0])
    return Shardings(jax.tree.map(lambda _: device, _abstract(model, optimizer)), device)


def abstract_state(model: LMConfig, optimizer: OptimizerConfig) -> TrainState:
    """Shapes, dtypes and shardings of a state."""
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        _abstract(model, optimizer),
        shardings(model, optimizer).state,
    )


def init_state(
    model: LMConfig, optimizer: OptimizerConfig, *, seed: int, parameters: nnx.State | None = None
) -> TrainState:
    """The state before the first step.

    Args:
        model, optimizer: their configurations.
        seed: of the initial parameters.
        parameters: those to start from instead; they become float32.
    """
    out = shardings(model, optimizer).state
    if parameters is None:
        return jax.jit(lambda key: _fresh(model, optimizer, _draw(model, key)), out_shardings=out)(jax.random.key(seed))
    # Copies, because a step donates its state.
    master = jax.tree.map(lambda p: jnp.array(p, jnp.float32), parameters)
    return jax.jit(lambda p: _fresh(model, optimizer, p), out_shardings=out)(master)


def place(batch: TokenBatch, sharding: Sharding) -> TokenBatch:
    """A batch of this process's rows on the devices."""
    return jax.device_put(batch, sharding)


def _draw(model: LMConfig, key: Array) -> nnx.State:
    return nnx.state(LM(model, rngs=nnx.Rngs(key)), nnx.Param)


def _fresh(model: LMConfig, optimizer: OptimizerConfig, parameters: nnx.State) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(parameters, direction(optimizer, parameters).init(parameters), zero, zero, zero)


def _abstract(model: LMConfig, optimizer: OptimizerConfig) -> TrainState:
    return jax.eval_shape(lambda key: _fresh(model, optimizer, _draw(model, key)), jax.random.key(0))
