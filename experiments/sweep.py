"""Many training runs of one small model at once: learning rates and seeds along one vmapped axis, over all devices.

Every run has its own parameters, data and place in the curriculum; only the shapes are shared. A run's data comes from
(seed, step) alone, so that a sweep that was interrupted continues exactly.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mamba3_jax.models import LM, LMConfig
from mamba3_jax.tasks import Batch, Task
from mamba3_jax.training.optimizer import OptimizerConfig, direction, learning_rate


@dataclasses.dataclass(frozen=True)
class CurriculumConfig:
    """Lengths grow in stages; a run enters the next stage when it has solved the one it is in.

    Attributes:
        lengths: the longest row of each stage, increasing.
        gate_accuracy: accuracy on the training data of one interval that ends a stage.
        stage_steps: steps after which a stage ends in any case.
    """

    lengths: tuple[int, ...] = (40, 80, 120, 160)
    gate_accuracy: float = 0.99
    stage_steps: int = 10_000

    def __post_init__(self):
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths: got {list(self.lengths)}; allowed: increasing lengths, at least one")
        if not 0 < self.gate_accuracy <= 1:
            raise ValueError(f"gate_accuracy: got {self.gate_accuracy}; allowed: 0 < gate_accuracy <= 1")
        if self.stage_steps < 1:
            raise ValueError(f"stage_steps: got {self.stage_steps}; allowed: a positive integer")


class Runs(NamedTuple):
    """The state of all runs, along the leading axis of every array: all that a resumed sweep needs."""

    parameters: nnx.State
    optimizer_state: optax.OptState
    stage: Int[Array, " runs"]
    stage_steps: Int[Array, " runs"]
    step: Int[Array, " runs"]


class Metrics(NamedTuple):
    """Of every run, over one interval of steps: mean loss over supervised positions, and accuracy of the answers."""

    loss: Float[Array, " runs"]
    accuracy: Float[Array, " runs"]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of one model on one task, one for each pair of `peaks` (learning rate) and `seeds`."""

    task: Task
    model: LMConfig
    optimizer: OptimizerConfig
    curriculum: CurriculumConfig
    supervision: str
    batch_size: int
    max_steps: int
    peaks: tuple[float, ...]
    seeds: tuple[int, ...]

    def init(self) -> Runs:
        """Fresh runs. Those of one seed start from the same parameters and see the same data."""
        parameters = jax.jit(jax.vmap(lambda key: nnx.state(self._build(key), nnx.Param)))(self.keys("init"))
        optimizer_state = jax.vmap(self._direction().init)(parameters)
        zeros = jnp.zeros(len(self.seeds), jnp.int32)
        return jax.device_put(Runs(parameters, optimizer_state, zeros, zeros, zeros), _sharding(len(self.seeds)))

    def train(self, runs: Runs, steps: int) -> tuple[Runs, Metrics]:
        """Trains all runs for `steps` steps, then moves those that passed their gate to the next stage."""
        return _train(self, steps, self.curriculum.lengths[int(runs.stage.max())], runs)

    def accuracy(self, parameters: nnx.State, batch: Batch) -> Float[Array, " runs"]:
        """Accuracy of every run's answers on one batch."""
        # The rows go to other devices than the runs do, if their numbers have other divisors.
        everywhere = NamedSharding(_sharding(len(batch.tokens)).mesh, PartitionSpec())
        return _accuracy(self, jax.device_put(parameters, everywhere), batch)

    def learning_rates(self, step: int) -> Float[Array, " runs"]:
        """The rate of every run at a step."""
        return learning_rate(self.optimizer, jnp.asarray(self.peaks), jnp.asarray(step), self.max_steps)

    def merge(self, parameters: nnx.State) -> LM:
        """The model of one run's parameters."""
        return nnx.merge(nnx.graphdef(self._abstract()), parameters)

    def one_step(self, run: Runs, peak: Array, key: PRNGKeyArray, size: int) -> tuple[Runs, Metrics]:
        """One optimizer step of one run, on rows padded to `size`."""
        longest = jnp.asarray(self.curriculum.lengths)[run.stage]
        batch = self.task.sample(
            jax.random.fold_in(key, run.step), self.batch_size, longest, size, supervision=self.supervision
        )
        (loss, accuracy), gradient = jax.value_and_grad(self._loss, has_aux=True)(run.parameters, batch)
        updates, optimizer_state = self._direction().update(gradient, run.optimizer_state, run.parameters)
        rate = learning_rate(self.optimizer, peak, run.step, self.max_steps)
        parameters = jax.tree.map(lambda p, u: p - rate * u, run.parameters, updates)
        run = Runs(parameters, optimizer_state, run.stage, run.stage_steps + 1, run.step + 1)
        return run, Metrics(loss, accuracy)

    def _loss(self, parameters: nnx.State, batch: Batch) -> tuple[Array, Array]:
        logits, _ = self.merge(parameters)(batch.tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return jnp.sum(losses * batch.mask) / jnp.sum(batch.mask), answers_correct(logits, batch).mean()

    def _direction(self) -> optax.GradientTransformation:
        return direction(self.optimizer, nnx.state(self._abstract(), nnx.Param))

    def _build(self, key: PRNGKeyArray) -> LM:
        return LM(self.model, rngs=nnx.Rngs(key))

    def _abstract(self) -> LM:
        return nnx.eval_shape(lambda: self._build(jax.random.key(0)))

    def keys(self, purpose: str) -> PRNGKeyArray:
        """A key per run, of its seed; runs of one seed share it."""
        stream = {"init": 0, "data": 1}[purpose]
        return jnp.stack([jax.random.fold_in(jax.random.key(seed), stream) for seed in self.seeds])


def answers_correct(logits: Float[Array, "b t v"], batch: Batch) -> Float[Array, " b"]:
    """1 where the answer, at the last supervised position of a row, is the most likely token of all."""
    last = batch.mask.shape[1] - 1 - jnp.argmax(batch.mask[:, ::-1], axis=1)
    rows = jnp.arange(batch.mask.shape[0])
    return (jnp.argmax(logits[rows, last], axis=-1) == batch.labels[rows, last]).astype(jnp.float32)


@jax.jit(static_argnames=("sweep", "steps", "size"))
def _train(sweep: Sweep, steps: int, size: int, runs: Runs) -> tuple[Runs, Metrics]:
    def train(runs, peaks, keys):
        def body(runs, _):
            return jax.vmap(lambda run, peak, key: sweep.one_step(run, peak, key, size))(runs, peaks, keys)

        return jax.lax.scan(body, runs, length=steps)

    # The runs of each device by themselves: they have nothing to say to each other.
    each = _sharding(len(sweep.seeds))
    runs, metrics = jax.shard_map(
        train,
        mesh=each.mesh,
        in_specs=each.spec,
        out_specs=(each.spec, PartitionSpec(None, *each.spec)),
        check_vma=False,
    )(runs, jnp.asarray(sweep.peaks), sweep.keys("data"))
    metrics = jax.tree.map(lambda m: m.mean(axis=0), metrics)
    done = (metrics.accuracy >= sweep.curriculum.gate_accuracy) | (runs.stage_steps >= sweep.curriculum.stage_steps)
    advance = done & (runs.stage < len(sweep.curriculum.lengths) - 1)
    return runs._replace(
        stage=runs.stage + advance, stage_steps=jnp.where(advance, 0, runs.stage_steps)
    ), metrics


@jax.jit(static_argnames="sweep")
def _accuracy(sweep: Sweep, parameters: nnx.State, batch: Batch) -> Float[Array, " runs"]:
    def correct(parameters, batch):
        def one(parameters):
            logits, _ = sweep.merge(parameters)(batch.tokens)
            return answers_correct(logits, batch)

        # One run after the other: test sets are large, and nothing is gained from holding all runs' activations.
        return jax.lax.map(one, parameters)

    rows = _sharding(len(batch.tokens))
    return jax.shard_map(
        correct,
        mesh=rows.mesh,
        in_specs=(PartitionSpec(), rows.spec),
        out_specs=PartitionSpec(None, *rows.spec),
        check_vma=False,
    )(parameters, batch).mean(axis=1)


def _sharding(n: int) -> NamedSharding:
    """A leading axis of n over the most devices that divide it evenly."""
    count = max(d for d in range(1, jax.device_count() + 1) if n % d == 0)
    return NamedSharding(Mesh(np.array(jax.devices()[:count]), ("each",)), PartitionSpec("each"))
