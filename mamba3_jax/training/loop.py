"""A training run from its first step, or its newest checkpoint, to its model: `train`.

A checkpoint holds the state, the data iterator's state, and the metrics of the interval that is not logged yet; lines
of metrics.jsonl that were written after it are dropped when it is restored. So a run that was killed at any moment
writes, in the end, the bytes of one that was not. What depends on time goes to timing.jsonl.

Of several processes each runs this, with its own rows of every batch; what they write and where they stop is common.
"""

import contextlib
import itertools
import math

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mamba3_jax.data.corpus import VALIDATION
from mamba3_jax.data.pipeline import BatchIterator, Data, TokenBatch, batches
from mamba3_jax.distributed.processes import anywhere, is_first, wait_for_all, whole
from mamba3_jax.models.checkpoint import MODEL, save_model
from mamba3_jax.training.config import TrainConfig
from mamba3_jax.training.flops import train_flops
from mamba3_jax.training.interrupts import interrupts
from mamba3_jax.training.metrics import Clock, finite, line_of, plot_loss, progress
from mamba3_jax.training.run_directory import RunDirectory
from mamba3_jax.training.state import Placement, abstract_state, init_state
from mamba3_jax.training.step import StepConfig, StepMetrics, compile_evaluation, compile_train_step
from mamba3_jax.training.tensorboard import TensorBoard

TIMING = "timing.jsonl"
PLOT = "loss.png"
PROFILE = "profile"


class TrainingStopped(Exception):
    """The run cannot go on; its last good checkpoint is kept. One line."""


class Run:
    """A run in progress.

    Args:
        config: the command's.
        mesh: of all processes' devices, which share the work.
        data: opened.
        directory: the run's; its newest checkpoint is continued.
        parameters: those that a new run starts from; None draws them.

    Raises:
        ValueError: the checkpoint is of another model, or of other data.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        data: Data,
        directory: RunDirectory,
        parameters: nnx.State | None = None,
    ):
        self.config, self.mesh, self.data, self.directory = config, mesh, data, directory
        self.model = config.model.lm(config.model.vocab_size or data.vocab_size)
        step = StepConfig.of(config, self.model)
        self._train_step, self._evaluate = compile_train_step(step, mesh), compile_evaluation(step, mesh)
        self._place = Placement(config.data, mesh)
        self._iterator = self._batches("train")
        # Metrics of the steps since the last line: of the last one perhaps still on the device.
        self._pending: list[dict] = []
        self._in_flight: StepMetrics | None = None
        restored = directory.restore(abstract_state(self.model, config.optimizer, mesh), self._accept)
        if restored is None:
            self.state = init_state(self.model, config.optimizer, mesh, seed=config.seed, parameters=parameters)
        else:
            self.state, extra = restored
            self._pending = extra["pending"]
        self.step = self._saved = int(self.state.step)
        self._skipped_in_row = int(self.state.skipped_in_row)
        tokens = config.data.batch_size * config.data.context
        self._clock = Clock(tokens, train_flops(self.model, config.data.context), mesh.devices.flatten().tolist())
        self._compiled = False
        self._board = TensorBoard(directory.path, self.step) if config.tensorboard and is_first() else None

    def advance(self) -> str | None:
        """One step, and what is due after it; its line if there is one.

        Raises:
            TrainingStopped: too many steps in a row were not finite, or the data cannot be read.
        """
        self._profile()
        with self._clock.waiting():
            batch = self._place(self._next(self._iterator))
        self.state, metrics = self._train_step(self.state, batch)
        self._receive()
        self._in_flight = metrics
        self.step += 1
        if not self._compiled:
            jax.block_until_ready(metrics)
            self._compiled = True
            self._clock.restart()
        else:
            self._clock.step()
        line = self._report()
        if self._is_due(self.config.checkpoint_every):
            self.save()
        return line

    def save(self) -> None:
        """Starts to write a checkpoint, unless there is one or the last steps were not finite."""
        self._receive()
        if self.step == self._saved or self._skipped_in_row:
            return
        self._saved = self.step
        # A copy: it is written while the run goes on.
        extra = dict(data=self._iterator.get_state(), pending=list(self._pending))
        self.directory.save(self.step, self.state, extra)
        self._clock.restart()

    def close(self) -> None:
        """Ends the data's workers, and waits until the checkpoints are on disk."""
        self._iterator.close()
        self.directory.close()
        if self._board is not None:
            self._board.close()

    def finish(self) -> None:
        """Writes the model and the plot, each whole or not at all."""
        path = self.directory.path
        parameters = jax.tree.map(whole, nnx.to_pure_dict(self.state.parameters))
        if is_first():
            plot_loss(self.directory.metrics(), path / PLOT)
            if not (path / MODEL).exists():
                save_model(path / MODEL, self.model, parameters, self.data.tokenizer_path)
        wait_for_all("have a model")

    def validate(self) -> dict[str, float | None]:
        """Mean loss in nats per target over the validation split, and perplexity; None where not finite.

        Raises:
            TrainingStopped: the data cannot be read.
        """
        nll, count = 0.0, 0
        with contextlib.closing(self._batches(VALIDATION)) as iterator:
            batches_read = iter(lambda: self._next(iterator), None)
            for batch in itertools.islice(batches_read, self.config.eval_batches):
                sums = jax.device_get(self._evaluate(self.state.parameters, self._place(batch)))
                nll, count = nll + float(sums.nll), count + int(sums.count)
        loss = nll / max(1, count)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return dict(validation_loss=finite(loss), validation_perplexity=finite(perplexity))

    def _accept(self, extra: dict) -> None:
        """Continues a checkpoint's data."""
        try:
            self._iterator.set_state(extra["data"])
        except ValueError as error:
            raise ValueError(
                f"data.path: got {self.config.data.path} ({error}); allowed: the data that the run began with"
            ) from error

    def _batches(self, split: str) -> BatchIterator:
        return batches(self.data, split, seed=self.config.seed, rows=self._place.rows)

    def _next(self, iterator: BatchIterator) -> TokenBatch | None:
        """None at its end."""
        try:
            return next(iterator, None)
        except ValueError as error:
            raise TrainingStopped(str(error)) from error

    def _receive(self) -> None:
        """Takes the metrics of the step before from the device, while the next one runs there."""
        if self._in_flight is None:
            return
        metrics, self._in_flight = jax.device_get(self._in_flight), None
        self._skipped_in_row = int(metrics.skipped_in_row)
        self._pending.append(
            dict(
                loss=float(metrics.loss) if metrics.finite else None,
                gradient_norm=float(metrics.gradient_norm) if metrics.finite else None,
                learning_rate=float(metrics.learning_rate),
                skipped=int(metrics.skipped),
            )
        )
        if self._skipped_in_row >= self.config.max_nonfinite:
            kept = self.directory.latest_step
            kept = "no checkpoint" if kept is None else f"the checkpoint of step {kept}"
            raise TrainingStopped(
                f"loss: got {self._skipped_in_row} steps in a row without a finite one, until step {self.step}; "
                f"allowed: max_nonfinite - 1; kept: {kept}"
            )

    def _report(self) -> str | None:
        """The record of the steps since the last one, in the files; its line."""
        log, evaluate = self._is_due(self.config.log_every), self._is_due(self.config.eval_every)
        if not (log or evaluate):
            return None
        self._receive()
        record, timing = dict(step=self.step), {}
        if log:
            timing = self._clock.read()
            record |= self._interval()
            self.directory.log(dict(step=self.step) | timing, TIMING)
        if evaluate and VALIDATION in self.data.splits:
            record |= self.validate()
        self.directory.log(record)
        if self._board is not None:
            self._board.log(record | timing)
        self._clock.restart()
        return line_of(record, timing, self.config.steps)

    def _interval(self) -> dict:
        """Means over the steps that were not skipped, and the last step's rate."""
        pending, self._pending = self._pending, []
        means = {}
        for name in ("loss", "gradient_norm"):
            values = [metrics[name] for metrics in pending if metrics[name] is not None]
            means[name] = float(np.mean(values)) if values else None
        rows = self.config.data.batch_size * self.config.data.context
        last = {name: pending[-1][name] for name in ("learning_rate", "skipped")}
        return means | last | dict(tokens=self.step * rows)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _profile(self) -> None:
        """Starts the trace before its first step; ends it when its last one is done."""
        steps = self.config.profiled if is_first() else range(0)
        if steps and self.step == steps.start:
            jax.profiler.start_trace(self.directory.path / PROFILE)
        if steps and self.step == steps.stop:
            self.end_profile()

    def end_profile(self) -> None:
        """Ends the trace when the step that runs is done."""
        jax.block_until_ready(self.state)
        with contextlib.suppress(RuntimeError):  # there is none
            jax.profiler.stop_trace()


def train(run: Run) -> None:
    """Trains to the last step and writes the model.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, of any process, after the step in progress was saved.
        TrainingStopped: as `Run.advance`.
    """
    stopped, stopped_anywhere = False, anywhere()
    try:
        with interrupts() as stop, progress(run.config.steps, run.step) as show:
            while run.step < run.config.steps and not (stopped := stopped_anywhere(bool(stop))):
                line = run.advance()
                show(run.step, line)
            if run.config.profile_steps:
                run.end_profile()
            if stopped:
                run.save()
                raise KeyboardInterrupt
    finally:
        run.close()
    run.finish()
