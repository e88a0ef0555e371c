"""Synthetic tasks, drawn in plain JAX: `get_task("parity").sample(key, 256, max_length=40, size=160)`.

TASKS are those of state tracking, whose rows have any length; RETRIEVAL_TASKS those of recall from the context, usually
of one length: `get_task("mqar_64").sample(key, 256, max_length=512, size=512, min_length=512)`. TEXT_TASKS predict a
text: they train on one of its splits and hold out the others.
"""

from mamba3_jax.checks import check_choice
from mamba3_jax.tasks.cycle_navigation import CYCLE_NAVIGATION
from mamba3_jax.tasks.even_pairs import EVEN_PAIRS
from mamba3_jax.tasks.induction_heads import induction_heads
from mamba3_jax.tasks.modular_arithmetic import MODULAR_ARITHMETIC
from mamba3_jax.tasks.modular_arithmetic_brackets import modular_arithmetic_brackets
from mamba3_jax.tasks.mqar import STANDARD_SETTINGS as MQAR_SETTINGS
from mamba3_jax.tasks.mqar import mqar
from mamba3_jax.tasks.needle import needle
from mamba3_jax.tasks.parity import PARITY
from mamba3_jax.tasks.pydoc_bytes import pydoc_bytes
from mamba3_jax.tasks.selective_copying import selective_copying
from mamba3_jax.tasks.task import Batch, Task, accuracy, scaled_accuracy, unscaled_accuracy
from mamba3_jax.tasks.word_problem import GROUPS, word_problem

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        PARITY,
        MODULAR_ARITHMETIC,
        modular_arithmetic_brackets(),
        CYCLE_NAVIGATION,
        EVEN_PAIRS,
        *map(word_problem, GROUPS),
    )
}

RETRIEVAL_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(mqar(pairs) for _, pairs in MQAR_SETTINGS),
        *(mqar(pairs, noise=False) for _, pairs in MQAR_SETTINGS),
        selective_copying(),
        induction_heads(),
        needle(),
    )
}

TEXT_TASKS: dict[str, Task] = {task.name: task for task in (pydoc_bytes("train"),)}

__all__ = [
    "MQAR_SETTINGS",
    "RETRIEVAL_TASKS",
    "TASKS",
    "TEXT_TASKS",
    "Batch",
    "Task",
    "accuracy",
    "get_task",
    "induction_heads",
    "modular_arithmetic_brackets",
    "mqar",
    "needle",
    "pydoc_bytes",
    "scaled_accuracy",
    "selective_copying",
    "unscaled_accuracy",
    "word_problem",
]


def get_task(name: str) -> Task:
    """The registered task of that name; raises ValueError for any other."""
    tasks = TASKS | RETRIEVAL_TASKS | TEXT_TASKS
    check_choice("name", name, tuple(tasks))
    return tasks[name]
