"""State-tracking tasks, drawn in plain JAX: `get_task("parity").sample(key, 256, max_length=40, size=160)`."""

from mamba3_jax.tasks.cycle_navigation import CYCLE_NAVIGATION
from mamba3_jax.tasks.even_pairs import EVEN_PAIRS
from mamba3_jax.tasks.modular_arithmetic import MODULAR_ARITHMETIC
from mamba3_jax.tasks.modular_arithmetic_brackets import modular_arithmetic_brackets
from mamba3_jax.tasks.parity import PARITY
from mamba3_jax.tasks.task import Batch, Task, scaled_accuracy

TASKS: dict[str, Task] = {
    task.name: task
    for task in (PARITY, MODULAR_ARITHMETIC, modular_arithmetic_brackets(), CYCLE_NAVIGATION, EVEN_PAIRS)
}

__all__ = ["TASKS", "Batch", "Task", "get_task", "modular_arithmetic_brackets", "scaled_accuracy"]


def get_task(name: str) -> Task:
    """The registered task of that name; raises ValueError for any other."""
    if name not in TASKS:
        raise ValueError(f"name must be one of {', '.join(map(repr, TASKS))}, got {name!r}")
    return TASKS[name]
