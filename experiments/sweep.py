"""Many training runs of one small model at once: learning rates and seeds along one vmapped axis, over all devices.

Every run has its own parameters, data and place in the curriculum; only the shapes are shared. A run's data comes from
(seed, step) alone, so that a sweep that was interrupted continues exactly.
"""

import dataclasses
import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mamba3_jax.models import LM, LMConfig, abstract_model
from mamba3_jax.tasks import Batch, Task, accuracy
from mamba3_jax.training.optimizer import OptimizerConfig, direction, learning_rate

# Rows are padded to a multiple of this many tokens, which matrix units like.
WIDTH_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class CurriculumConfig:
    """Lengths grow in stages; a run enters the next stage when it has solved the one it is in.

    Attributes:
        lengths: the longest row of each stage, increasing.
        gate_accuracy: accuracy on the training data of one interval that ends a stage.
        stage_steps: steps after which a stage ends in any case.
        exact: whether all rows of a stage have its full length, instead of any length up to it.
    """

    lengths: tuple[int, ...] = (40, 80, 120, 160)
    gate_accuracy: float = 0.99
    stage_steps: int = 10_000
    exact: bool = False

    def __post_init__(self):
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths: got {list(self.lengths)}; allowed: increasing lengths, at least one")
        if not 0 < self.gate_accuracy <= 1:
            raise ValueError(f"gate_accuracy: got {self.gate_accuracy}; allowed: 0 < gate_accuracy <= 1")
        if self.stage_steps < 1:
            raise ValueError(f"stage_steps: got {self.stage_steps}; allowed: a positive integer")

    def longest(self, stage: int) -> int:
        """The longest row that the arrays of a stage hold: the last length, halved as often as the stage's allows.

        A few sizes for however many stages, because each size is a compilation.
        """
        length = self.lengths[-1]
        while length % 2 == 0 and length // 2 >= self.lengths[stage]:
            length //= 2
        return length


class Runs(NamedTuple):
    """The state of all runs, along the leading axis of every array: all that a resumed sweep needs."""

    parameters: nnx.State
    optimizer_state: optax.OptState
    stage: Int[Array, " runs"]
    stage_steps: Int[Array, " runs"]
    step: Int[Array, " runs"]
    failed: Bool[Array, " runs"]


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

        def draw(key):
            return nnx.state(LM(self.model, rngs=nnx.Rngs(key)), nnx.Param)

        parameters = jax.jit(jax.vmap(draw))(self.keys("init"))
        optimizer_state = jax.vmap(self._direction().init)(parameters)
        zeros = jnp.zeros(len(self.seeds), jnp.int32)
        runs = Runs(parameters, optimizer_state, zeros, zeros, zeros, zeros.astype(bool))
        return jax.device_put(runs, _sharding(len(self.seeds)))

    def train(self, runs: Runs, steps: int) -> tuple[Runs, Metrics]:
        """Trains all runs for `steps` steps, then moves those that passed their gate to the next stage.

        A run whose loss or gradient is not finite fails: it keeps the parameters it had, and disturbs no other.
        """
        stage = int(jnp.where(runs.failed, 0, runs.stage).max())
        run = _compiled(self, steps, self.curriculum.longest(stage))
        return run(jax.device_put(runs, _sharding(len(self.seeds))))

    def evaluate(self, parameters: nnx.State, batch: Batch) -> Metrics:
        """Every run's accuracy and loss on one batch."""
        # The rows go to other devices than the runs do, if their numbers have other divisors.
        everywhere = NamedSharding(_sharding(len(batch.tokens)).mesh, PartitionSpec())
        return _evaluate(self, jax.device_put(parameters, everywhere), batch)

    def memory_needed(self, steps: int) -> int:
        """Bytes on each device while the longest rows train, as the compiler counts them."""
        memory = _compiled(self, steps, self.curriculum.lengths[-1]).memory_analysis()
        return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes

    def learning_rates(self, step: int) -> Float[Array, " runs"]:
        """The rate of every run at a step."""
        return learning_rate(self.optimizer, jnp.asarray(self.peaks), jnp.asarray(step), self.max_steps)

    def merge(self, parameters: nnx.State) -> LM:
        """The model of one run's parameters."""
        return nnx.merge(_abstract(self.model)[0], parameters)

    def one_step(self, run: Runs, peak: Array, key: PRNGKeyArray, longest: int) -> tuple[Runs, Metrics]:
        """One optimizer step of one run, in arrays for rows of up to `longest` tokens."""
        batch = self._training_batch(run.stage, jax.random.fold_in(key, run.step), longest)
        (loss, correct), gradient = jax.value_and_grad(self._loss, has_aux=True)(run.parameters, batch)
        updates, optimizer_state = self._direction().update(gradient, run.optimizer_state, run.parameters)
        rate = learning_rate(self.optimizer, peak, run.step, self.max_steps)
        parameters = jax.tree.map(lambda p, u: p - rate * u, run.parameters, updates)
        failed = run.failed | ~jnp.isfinite(loss + optax.tree.norm(gradient))
        trained = jax.tree.map(
            lambda new, old: jnp.where(failed, old, new),
            (parameters, optimizer_state),
            (run.parameters, run.optimizer_state),
        )
        return Runs(*trained, run.stage, run.stage_steps + 1, run.step + 1, failed), Metrics(loss, correct)

    def _training_batch(self, stage: Int[Array, ""], key: PRNGKeyArray, longest: int) -> Batch:
        length = jnp.asarray(self.curriculum.lengths)[stage]
        if self.curriculum.exact:
            return self.task.sample(key, self.batch_size, length, longest, length, self.supervision)
        size = -(-(self.task.min_length + longest) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        return self.task.sample_pairs(key, self.batch_size, length, size, self.supervision)

    def _loss(self, parameters: nnx.State, batch: Batch) -> tuple[Array, Array]:
        model = self.merge(parameters)
        x, _ = model.hidden(batch.tokens, None, batch.segment_ids)
        x, batch = self._asked(x, batch)
        logits = model.logits(x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return jnp.sum(losses * batch.mask) / jnp.sum(batch.mask), accuracy(logits, batch)

    def _asked(self, x: Float[Array, "b t d"], batch: Batch) -> tuple[Float[Array, "b k d"], Batch]:
        """Only the supervised positions, where every row has as many: logits elsewhere are most of a step's cost."""
        if self.task.answers is None or self.supervision == "every":
            return x, batch
        rows = 1 if batch.segment_ids is None else 2
        _, where = jax.lax.top_k(batch.mask.astype(jnp.int32), rows * self.task.answers)

        def take(a):
            return jnp.take_along_axis(a, where, axis=1)

        x = jnp.take_along_axis(x, where[..., None], axis=1)
        return x, Batch(take(batch.tokens), take(batch.labels), take(batch.mask), take(batch.scored))

    def _direction(self) -> optax.GradientTransformation:
        return direction(self.optimizer, _abstract(self.model)[1])

    def keys(self, purpose: str) -> PRNGKeyArray:
        """A key per run, of its seed; runs of one seed share it."""
        stream = {"init": 0, "data": 1}[purpose]
        return jnp.stack([jax.random.fold_in(jax.random.key(seed), stream) for seed in self.seeds])


@functools.lru_cache(maxsize=8)
def _abstract(model: LMConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A model's structure and the shapes of its parameters; cached, because a trace asks often and tracing is slow."""
    return nnx.split(abstract_model(model), nnx.Param)


# As many as a curriculum has sizes; those of the sweep before it are let go.
@functools.lru_cache(maxsize=8)
def _compiled(sweep: Sweep, steps: int, longest: int) -> jax.stages.Compiled:
    each = _sharding(len(sweep.seeds))
    runs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=each), jax.eval_shape(sweep.init))
    return _train.lower(sweep, steps, longest, runs).compile()


@jax.jit(static_argnames=("sweep", "steps", "longest"))
def _train(sweep: Sweep, steps: int, longest: int, runs: Runs) -> tuple[Runs, Metrics]:
    def train(runs, peaks, keys):
        def body(runs, _):
            return jax.vmap(lambda run, peak, key: sweep.one_step(run, peak, key, longest))(runs, peaks, keys)

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
    advance = done & ~runs.failed & (runs.stage < len(sweep.curriculum.lengths) - 1)
    return runs._replace(
        stage=runs.stage + advance, stage_steps=jnp.where(advance, 0, runs.stage_steps)
    ), metrics


@jax.jit(static_argnames="sweep")
def _evaluate(sweep: Sweep, parameters: nnx.State, batch: Batch) -> Metrics:
    def evaluate(parameters, batch):
        # One run after the other: test sets are large, and nothing is gained from holding all runs' activations.
        losses, correct = jax.lax.map(lambda one: sweep._loss(one, batch), parameters)
        return jax.lax.pmean(Metrics(losses, correct), "each")

    rows = _sharding(len(batch.tokens))
    return jax.shard_map(
        evaluate, mesh=rows.mesh, in_specs=(PartitionSpec(), rows.spec), out_specs=PartitionSpec(), check_vma=False
    )(parameters, batch)


def memory_available() -> int:
    """Bytes that one device can hold."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    # The CPU's devices share the machine's memory.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(jax.local_devices())


def check_memory(sweep: Sweep, steps: int) -> None:
    """Raises ValueError, naming what to lower, when the longest rows of a sweep would not fit."""
    needed, available = sweep.memory_needed(steps), memory_available()
    if needed > available:
        raise ValueError(
            f"batch_size: got {sweep.batch_size} for {len(sweep.seeds)} runs at once on rows of "
            f"{sweep.curriculum.lengths[-1]} tokens, which needs {needed:,} bytes on each device; allowed: what fits "
            f"the {available:,} bytes there; lower batch_size, n_seeds, the number of learning_rates or --processes"
        )


def _sharding(n: int) -> NamedSharding:
    """A leading axis of n over the most devices that divide it evenly."""
    count = max(d for d in range(1, jax.device_count() + 1) if n % d == 0)
    return NamedSharding(Mesh(np.array(jax.devices()[:count]), ("each",)), PartitionSpec("each"))
