"""What experiments/training_throughput.py times: cells, their models, and the steps that train them."""

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from experiments.sweep import memory_available
from mamba3_jax.data.pipeline import DataConfig, TokenBatch, batches, open_data
from mamba3_jax.distributed.mesh import MeshConfig, make_mesh
from mamba3_jax.layers import AttentionConfig, Mamba2Config, Mamba3Config, MixerConfig
from mamba3_jax.models import LMConfig, abstract_model
from mamba3_jax.models.lm import count_parameters
from mamba3_jax.models.presets import LLAMA3_VOCAB_SIZE, MIMO_RANK, SIZES
from mamba3_jax.training.config import TrainConfig
from mamba3_jax.training.flops import train_flops
from mamba3_jax.training.optimizer import PretrainingOptimizerConfig
from mamba3_jax.training.state import Placement, TrainState, abstract_batch, abstract_state, init_state
from mamba3_jax.training.step import StepConfig, compile_train_step

MODELS = ("siso", "mimo", "mamba2", "transformer")
# Not a published size: for the smoke test.
TINY = "tiny"
# Steps before those that count.
WARM = 2
# Tokens whose logits exist at once: 2 GB in float32 over Llama 3's vocabulary.
LOGITS = 4096
# Tokens that go through a model at once at first: as many as 80 GB hold of the 1.5B shape.
AT_ONCE = {"siso": 16384, "mimo": 8192, "mamba2": 8192, "transformer": 16384}
# What the forward kernel of pallas/triton is called in a program.
KERNEL = "ssm_outputs"


class Cell(NamedTuple):
    """One row of the results: a model of a published size's width, b rows of t tokens a step."""

    part: str
    model: str
    size: str
    n_layers: int
    b: int
    t: int

    @property
    def name(self) -> str:
        """What --only matches."""
        return f"{self.part},{self.model},{self.size} layers={self.n_layers} b={self.b} t={self.t}"


class Plan(NamedTuple):
    """Rows that go through the model at once, and StepConfig's remat."""

    rows: int
    remat: str


class Prepared(NamedTuple):
    """A compiled step, where its rows go, what it does, and the bytes of its arguments, outputs and temporaries."""

    run: jax.stages.Compiled
    place: Placement
    step: StepConfig
    plan: Plan
    implementation: str
    peak: int
    compile_s: float


def model_config(cell: Cell) -> LMConfig:
    """The cell's model in bfloat16. The peer's has no MLPs, a head of its own and A as in the newest release."""
    tiny = cell.size == TINY
    d, mlp, mimo_mlp = (32, 64, 64) if tiny else (SIZES[cell.size][i] for i in (0, 2, 3))
    sizes = dict(d_model=d, d_state=16, head_dim=16) if tiny else dict(d_model=d)
    siso = Mamba3Config(**sizes)

    def lm(mixer: MixerConfig, mlp_width: int, **options) -> LMConfig:
        vocabulary = 256 if tiny else LLAMA3_VOCAB_SIZE
        return LMConfig(mixer, cell.n_layers, vocabulary, mlp_width, dtype="bfloat16", **options)

    if cell.part == "peer":
        return lm(Mamba3Config(**sizes, a_activation="heavy_tail"), 0, tie_embeddings=False)
    match cell.model:
        case "siso":
            return lm(siso, mlp)
        case "mimo":
            return lm(Mamba3Config(**sizes, mimo_rank=MIMO_RANK), mimo_mlp)
        case "mamba2":
            return lm(Mamba2Config(**sizes), mlp)
        case "transformer":
            # The MLP is wider by what attention's 4 d^2 parameters are fewer than SISO's, so that layers are as large.
            wider = (sum(siso.projection_sizes.values()) + siso.d_inner - 4 * d) // 3
            return lm(AttentionConfig(d_model=d, n_heads=d // siso.head_dim), mlp + wider)
    raise ValueError(f"model: got {cell.model!r}; allowed: {', '.join(MODELS)}")


def plans(cell: Cell) -> list[Plan]:
    """Ways to take a step, the fastest first: keeping activations, and computing them again, a third more work.

    All rows of "lengths" go at once, if that fits, so that nothing but their length differs.
    """
    first = cell.b if cell.part == "lengths" else max(1, AT_ONCE[cell.model] // cell.t)
    rows = [r for r in dict.fromkeys((min(first, cell.b), max(1, first // 2))) if cell.b % r == 0] or [1]
    return [*(Plan(r, "none") for r in rows), Plan(rows[0], "blocks")]


def prepare(cell: Cell) -> Prepared:
    """The cell's step, compiled by the first plan that fits.

    Raises:
        MemoryError: none does.
    """
    needed = []
    for plan in plans(cell):
        step = StepConfig(
            model_config(cell), PretrainingOptimizerConfig(), steps=1000, accumulation=cell.b // plan.rows,
            remat=plan.remat, loss_chunk=max(1, LOGITS // plan.rows),
        )  # fmt: skip
        prepared = compiled(step, plan, cell.b, cell.t)
        if prepared.peak <= memory_available():
            return prepared
        needed.append(f"{prepared.peak / 1e9:.0f} GB ({plan.rows} rows at once, remat {plan.remat})")
    raise MemoryError(f"needs {', '.join(needed)} of the {memory_available() / 1e9:.0f} GB there")


def compiled(step: StepConfig, plan: Plan, b: int, t: int) -> Prepared:
    """A step of b rows of t tokens, without arrays."""
    began = time.perf_counter()
    mesh, rows = make_mesh(MeshConfig()), DataConfig(context=t, batch_size=b)
    state = abstract_state(step.model, step.optimizer, mesh)
    lowered = compile_train_step(step, mesh).lower(state, abstract_batch(rows, mesh))
    run = lowered.compile()
    seconds = time.perf_counter() - began
    m = run.memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    chosen = "xla" if isinstance(step.model.mixer, AttentionConfig) else "chunked"
    implementation = "triton" if KERNEL in lowered.as_text() else chosen
    return Prepared(run, Placement(rows, mesh), step, plan, implementation, peak, seconds)


def start(step: StepConfig, seed: int | None = None) -> TrainState:
    """A new run's state; without a seed its weights are drawn by a generator that compiles fast."""
    with jax.default_prng_impl("rbg" if seed is None else "threefry2x32"):
        return init_state(step.model, step.optimizer, make_mesh(MeshConfig()), seed=seed or 0)


def steps(prepared: Prepared, state: TrainState, rows: Iterator[TokenBatch]) -> Iterator[float]:
    """The loss of each step, which has ended when it is given."""
    for batch in rows:
        state, metrics = prepared.run(state, prepared.place(batch))
        yield float(metrics.loss)


def measure(cell: Cell, prepared: Prepared, count: int) -> dict:
    """A cell's figures: the seconds of `count` steps, and what they are compared with.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    model = prepared.step.model
    times, began = [], time.perf_counter()
    batch = random_batch(cell.b, cell.t, model.vocab_size)
    for loss in steps(prepared, start(prepared.step), itertools.repeat(batch, WARM + count)):
        times.append(time.perf_counter() - began)
        if not np.isfinite(loss):
            raise FloatingPointError(f"loss: got {loss} at step {len(times)}; allowed: a finite one")
    seconds = np.diff(times)[WARM - 1 :]
    return dict(
        s=statistics.median(seconds),
        slowest_s=float(max(seconds)),
        tokens=cell.b * cell.t,
        flops=train_flops(model, cell.t),
        parameters=count_parameters(abstract_model(model)),
        loss=loss,
        **describe(prepared),
    )


def describe(prepared: Prepared) -> dict:
    """How a step is taken, of its row."""
    figures = dict(implementation=prepared.implementation, rows_at_once=prepared.plan.rows, remat=prepared.plan.remat)
    return figures | dict(peak_bytes=prepared.peak, compile_s=round(prepared.compile_s, 1))


def random_batch(b: int, t: int, vocab_size: int) -> TokenBatch:
    """Rows of one document each."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (b, t + 1), np.int32)
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], np.zeros((b, t), np.int32), np.ones((b, t), bool))


def losses(training: TrainConfig) -> dict:
    """A run's loss at every step, with its seed and data, and how a step was taken."""
    data = open_data(training.data)
    step = StepConfig.of(training, training.model.lm(data.vocab_size))
    b, t = training.data.batch_size, training.data.context
    with jax.default_matmul_precision("highest" if step.model.dtype == "float32" else "default"):
        prepared = compiled(step, Plan(b, training.remat), b, t)
    with contextlib.closing(batches(data, "train", seed=training.seed)) as rows:
        taken = steps(prepared, start(step, training.seed), itertools.islice(rows, training.steps))
        return dict(losses=[round(loss, 6) for loss in taken], tokens=b * t, **describe(prepared))
