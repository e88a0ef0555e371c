"""State tracking: can a model keep a running state far beyond its training length? Table 5b of arXiv:2603.15569.

    mamba3 experiment state_tracking --config configs/state_tracking/parity_cpu.yaml

One model on one task, also of those that are not the table's (recall, text); experiments/table_5b.py runs all of the
table. See experiments/cell.py for what a run leaves.
"""

from experiments import cell
from experiments.cell import Config
from experiments.command import flatten, parse, to_dict
from experiments.models import ModelConfig
from mamba3_jax.tasks import TASKS

# The paper's, log-spaced from 1e-4 to 1e-2.
MODEL = dict(d_model=64, d_state=64, head_dim=64)
LEARNING_RATES = (1e-4, 1.9e-4, 3.7e-4, 7.2e-4, 1.4e-3, 2.7e-3, 5.2e-3, 1e-2)


def protocol(task: str) -> Config:
    """The paper's settings (appendix D); where it is silent, this project's defaults."""
    return Config(
        model=ModelConfig(**MODEL, n_layers=1 if task == "parity" else 3),
        task=task,
        learning_rates=LEARNING_RATES,
    )


# What appendix D states. Of the rest, `protocol` has this project's defaults.
STATED = (
    *("task", "supervision", "model.d_model", "model.n_layers", "model.d_state", "curriculum.lengths"),
    *("curriculum.stage_steps", "learning_rates", "batch_size", "max_steps"),
)
# How a run is watched and seeded, not how it is trained.
FREE = (
    *("seed", "n_seeds", "evaluate_every", "validation_rows", "test_rows"),
    *("exact_lengths", "uniform_from", "curve_lengths", "model.implementation", "model.chunk_size"),
)
OPEN = "the protocol leaves it open, this project's default is {}"
# The paper trains both widths, and other models beside Mamba-3.
ALSO_ALLOWED = {
    "model.d_model": (32,),
    "model.rotation": ("rope", "none"),
}


def deviations(config: Config) -> list[str]:
    """Every setting that differs from the protocol, one line each."""
    ours, papers = flatten(to_dict(config)), flatten(to_dict(protocol(config.task)))
    if config.model.mixer != "mamba3":
        # A baseline as its own authors have it: with its convolution, and without the options that it has not.
        own = ModelConfig(**MODEL | dict(mixer=config.model.mixer, n_layers=config.model.n_layers))
        papers |= {f"model.{key}": value for key, value in to_dict(own).items()}
    return [
        f"`{key}` is {value}; " + (f"the protocol has {papers[key]}" if key in STATED else OPEN.format(papers[key]))
        for key, value in ours.items()
        if key not in FREE and value != papers[key] and value not in ALSO_ALLOWED.get(key, ())
    ]


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    command = parse("state_tracking", Config, argv)
    cell.use_all_cores()
    # The other tasks are not the paper's: there is no protocol to deviate from.
    return cell.execute(command, deviations(command.config) if command.config.task in TASKS else None)
