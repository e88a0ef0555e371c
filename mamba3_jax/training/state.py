"""The state of a training run, and where its arrays live.

`shardings` is the one place that says on which devices state and batches are; everything else asks it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from mamba3_jax.data.pipeline import DataConfig, TokenBatch
from mamba3_jax.distributed.rules import parameter_shardings, spec, ways
from mamba3_jax.layers import AttentionConfig
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
    batch: NamedSharding


def shardings(model: LMConfig, optimizer: OptimizerConfig, mesh: Mesh) -> Shardings:
    """As distributed/rules.py says; the mesh may be of devices that are not there."""
    state = parameter_shardings(mesh, _abstract(model, optimizer))
    return Shardings(state, NamedSharding(mesh, spec("batch", "time")))


def abstract_state(model: LMConfig, optimizer: OptimizerConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state."""
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        _abstract(model, optimizer),
        shardings(model, optimizer, mesh).state,
    )


def abstract_batch(data: DataConfig, mesh: Mesh) -> TokenBatch:
    """Shapes, dtypes and shardings of a step's rows."""
    sharding = NamedSharding(mesh, spec("batch", "time"))
    ids, mask = (
        jax.ShapeDtypeStruct((data.batch_size, data.context), dtype, sharding=sharding) for dtype in ("int32", "bool")
    )
    return TokenBatch(ids, ids, ids, mask)


def init_state(
    model: LMConfig, optimizer: OptimizerConfig, mesh: Mesh, *, seed: int, parameters: nnx.State | None = None
) -> TrainState:
    """The state before the first step.

    Args:
        model, optimizer: their configurations.
        mesh: where it lives.
        seed: of the initial parameters, which are the same on every mesh.
        parameters: those to start from instead, whole on every process; they become float32.
    """
    out = shardings(model, optimizer, mesh).state
    if parameters is None:
        return jax.jit(lambda key: _fresh(model, optimizer, _draw(model, key)), out_shardings=out)(jax.random.key(seed))

    def cut(whole, sharding):
        whole = np.asarray(whole)
        # Copies, because a step donates its state.
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: np.array(whole[index], np.float32))

    master = jax.tree.map(cut, parameters, out.parameters)
    return jax.jit(lambda p: _fresh(model, optimizer, p), out_shardings=out)(master)


def check_divides(mesh: Mesh, model: LMConfig, data: DataConfig, accumulation: int = 1) -> None:
    """Raises ValueError, in one line, if the mesh cuts rows, time or heads into parts that are not equal."""
    copies = accumulation * ways(mesh, "batch")
    if data.batch_size % copies:
        raise ValueError(
            f"data.batch_size: got {data.batch_size}; allowed: a multiple of {copies}, "
            f"accumulation={accumulation} times the mesh's slices x data x fsdp"
        )
    if data.context % ways(mesh, "time"):
        raise ValueError(f"mesh.sequence: got {ways(mesh, 'time')}; allowed: a divisor of data.context={data.context}")
    for mixer in dict.fromkeys(model.mixers):
        heads = mixer.n_heads if isinstance(mixer, AttentionConfig) else mixer.nheads
        if heads % ways(mesh, "heads"):
            raise ValueError(f"mesh.tensor: got {ways(mesh, 'heads')}; allowed: a divisor of the {heads} heads")
        groups = getattr(mixer, "ngroups", 1)
        if groups % ways(mesh, "heads") and ways(mesh, "heads") % groups:
            raise ValueError(
                f"mesh.tensor: got {ways(mesh, 'heads')}; allowed: a divisor or a multiple of ngroups={groups}"
            )


class Placement:
    """Puts the rows of a batch on the devices.

    Attributes:
        rows: those of each batch that the devices of this process hold, in rising order. Several processes may hold the
            same ones, each the part that its devices have along `tensor` or `sequence`.
    """

    def __init__(self, data: DataConfig, mesh: Mesh):
        self._shape = data.batch_size, data.context
        self._sharding = NamedSharding(mesh, spec("batch", "time"))
        held = self._sharding.addressable_devices_indices_map(self._shape).values()
        self.rows = np.unique(np.concatenate([np.arange(data.batch_size)[rows] for rows, _ in held]))

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """The global batch, from this process's rows of it."""

        def place(mine):
            def part(index):
                rows, tokens = index
                at = np.searchsorted(self.rows, np.arange(self._shape[0])[rows])
                return mine[at, tokens]

            return jax.make_array_from_callback(self._shape, self._sharding, part)

        return jax.tree.map(place, batch)


def _draw(model: LMConfig, key: Array) -> nnx.State:
    return nnx.state(LM(model, rngs=nnx.Rngs(key)), nnx.Param)


def _fresh(model: LMConfig, optimizer: OptimizerConfig, parameters: nnx.State) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(parameters, direction(optimizer, parameters).init(parameters), zero, zero, zero)


def _abstract(model: LMConfig, optimizer: OptimizerConfig) -> TrainState:
    return jax.eval_shape(lambda: _fresh(model, optimizer, _draw(model, jax.random.key(0))))
