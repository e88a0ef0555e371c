"""Cycle navigation: where on a cycle of five places does a walk from place 0 end?

Ids: 0 pad, moves 1 = stay, 2 = one forward, 3 = one back, answers 4..8 = 4 + place. A row of n ~ U{3..max} tokens
is n-1 uniform moves and the answer, 4 + (sum of moves mod 5).

Source: the formal-language tasks that Grazzi et al. 2025 (arXiv:2411.12537) and Mamba-3 (arXiv:2603.15569, appendix D)
draw parity and arithmetic from, after Delétang et al. 2023 (arXiv:2207.02098).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from mamba3_jax.tasks.task import Task, append_answer, uniform_integers

PLACES = 5
PAD, STAY, PLACE_0 = 0, 1, 4


def _row(key: PRNGKeyArray, n: Int[Array, ""], size: int) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
    move = uniform_integers(jax.random.bits(key, (size,), jnp.uint32), 3)
    step = jnp.where(move == 2, -1, move)
    return append_answer(STAY + move, PLACE_0 + jnp.cumsum(step) % PLACES, n, PAD)


CYCLE_NAVIGATION = Task(
    name="cycle_navigation",
    symbols=("_", "stay", "+1", "-1", "at 0", "at 1", "at 2", "at 3", "at 4"),
    pad_id=PAD,
    chance=1 / 5,
    min_length=3,
    lengths="all",
    every=True,
    row=_row,
)
