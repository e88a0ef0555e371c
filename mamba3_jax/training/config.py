"""The configuration of `mamba3 train`: model, data, optimizer, and what is done how often."""

import dataclasses
from typing import Any, Literal, get_args

import yaml

from mamba3_jax.checks import check_choice
from mamba3_jax.data.pipeline import DataConfig
from mamba3_jax.distributed.mesh import MeshConfig
from mamba3_jax.layers import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, Mamba3Config
from mamba3_jax.models import LMConfig
from mamba3_jax.training.optimizer import PretrainingOptimizerConfig

Remat = Literal["none", "blocks"]
# What may differ between a run and its resumption, because none of it changes a number, or of the mesh no more than the
# order of sums does; and data.workers.
FREE = ("run_dir", "profile_steps", "tensorboard", "mesh", "cluster")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A language model, whose mixer is the one that has options here; with attention beside another one, a hybrid.

    Attributes:
        mamba3, mamba2, gated_deltanet: options of the mixer, at least d_model; one of them, or only `attention`.
        attention: options of attention: the mixer, or that of a hybrid's `attention_layers`.
        attention_layers: which blocks of a hybrid those are, counted from 0.
        n_layers: blocks.
        mlp_width: hidden width of each block's MLP; 0 is none.
        tie_embeddings: whether the head is the embedding.
        vocab_size: tokens; None is the data's.
        dtype: of the matrix products; parameters, gradients and optimizer are float32 in any case.
    """

    mamba3: Mamba3Config | None = None
    mamba2: Mamba2Config | None = None
    gated_deltanet: GatedDeltaNetConfig | None = None
    attention: AttentionConfig | None = None
    attention_layers: tuple[int, ...] = ()
    n_layers: int = 2
    mlp_width: int = 0
    tie_embeddings: bool = True
    vocab_size: int | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        given = [name for name in MIXERS if getattr(self, name) is not None]
        if len([name for name in given if name != "attention"]) > 1 or not given:
            raise ValueError(
                f"model: got {' and '.join(given) or 'no mixer'}; "
                f"allowed: options of one of {', '.join(MIXERS)}, or of one with attention for a hybrid"
            )
        self.lm(1 if self.vocab_size is None else self.vocab_size)

    def lm(self, vocab_size: int) -> LMConfig:
        """The model over a vocabulary of that many tokens."""
        mixers = [self.mamba3, self.mamba2, self.gated_deltanet]
        mixer = next((mixer for mixer in mixers if mixer is not None), None)
        return LMConfig(
            mixer=self.attention if mixer is None else mixer,
            n_layers=self.n_layers,
            vocab_size=vocab_size,
            mlp_width=self.mlp_width,
            tie_embeddings=self.tie_embeddings,
            dtype=self.dtype,
            attention=None if mixer is None else self.attention,
            attention_layers=self.attention_layers,
        )


MIXERS = ("mamba3", "mamba2", "gated_deltanet", "attention")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        run_dir: where it is written, on a mounted file system; the same directory resumes.
        model: the model.
        steps: optimizer steps.
        data: tokens, rows of a step and their length.
        optimizer: AdamW and its schedule.
        accumulation: parts that a step's rows are cut in, one after the other, to save memory.
        remat: "blocks" computes each block again in the backward pass, to save memory; "none" does not.
        z_loss: weight of the mean of log(sum exp(logits))^2, which keeps logits near normalised.
        loss_chunk: tokens of every row whose logits exist at once.
        log_every: steps between two lines of metrics.
        eval_every: steps between two validations; the last step has one in any case.
        eval_batches: at most so many batches of the validation split; None is all of it.
        checkpoint_every: steps between two checkpoints.
        max_nonfinite: steps without a finite loss and gradient, one after the other, that end the run.
        seed: of the initial parameters and of the data's order.
        init_from: model directory, or run directory that has one, whose weights the run starts from.
        profile_steps: "a:b" writes a trace of the steps from a to before b, counted from 0.
        tensorboard: whether the numbers of metrics.jsonl and timing.jsonl also go to TensorBoard, with its extra.
        mesh: how many devices share the work, and how.
        cluster: whether this is one process of several that JAX finds: of a TPU pod, or under Slurm, MPI or Kubernetes.
    """

    run_dir: str
    model: ModelConfig
    steps: int
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: PretrainingOptimizerConfig = dataclasses.field(default_factory=PretrainingOptimizerConfig)
    accumulation: int = 1
    remat: Remat = "none"
    z_loss: float = 0.0
    loss_chunk: int = 512
    log_every: int = 10
    eval_every: int = 1000
    eval_batches: int | None = None
    checkpoint_every: int = 1000
    max_nonfinite: int = 10
    seed: int = 0
    init_from: str | None = None
    profile_steps: str | None = None
    tensorboard: bool = False
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    cluster: bool = False

    def __post_init__(self):
        if "://" in self.run_dir:
            raise ValueError(f"run_dir: got {self.run_dir}; allowed: a folder of a mounted file system")
        names = ("steps", "accumulation", "loss_chunk", "log_every", "eval_every", "checkpoint_every", "max_nonfinite")
        for name in (*names, *(["eval_batches"] if self.eval_batches is not None else [])):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        if self.z_loss < 0:
            raise ValueError(f"z_loss: got {self.z_loss}; allowed: a number >= 0")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed: got {self.seed}; allowed: 0 to {(1 << 32) - 1}")
        check_choice("remat", self.remat, get_args(Remat))
        if self.data.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation: got {self.accumulation}; allowed: a divisor of data.batch_size={self.data.batch_size}"
            )
        self.profiled  # noqa: B018  (raises where it is malformed)

    @property
    def profiled(self) -> range:
        """The steps that are traced."""
        if self.profile_steps is None:
            return range(0)
        first, _, end = self.profile_steps.partition(":")
        if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
            raise ValueError(f"profile_steps: got {self.profile_steps!r}; allowed: 'a:b' with a < b")
        return range(int(first), int(end))

    @property
    def text(self) -> str:
        """As YAML, without what a resumption may change; `--config` reads it."""
        values = dataclasses.asdict(self)
        del values["data"]["workers"]
        return yaml.safe_dump({k: _plain(v) for k, v in values.items() if k not in FREE}, sort_keys=False)


def fixed(text: str) -> str:
    """Of a run's text what its resumption may not change: all but data.path, since data are told by their checksum."""
    try:
        values = yaml.safe_load(text)
        del values["data"]["path"]
    except (yaml.YAMLError, KeyError, TypeError):
        return text
    return yaml.safe_dump(values, sort_keys=False)


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
