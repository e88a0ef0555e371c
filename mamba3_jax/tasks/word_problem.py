"""Word problems of finite groups: what is the product of a sequence of group elements?

Ids: 0 pad, 1 + element. A row of n ~ U{3..max} tokens is n-1 uniform elements and their product. The groups:

    S3, S5  all permutations of 3 and 5 things; 6 and 120 elements. S3 is solvable, S5 is not
    A5      the even permutations of 5 things; 60 elements, the smallest group that is not solvable
    Z60     0..59 under addition mod 60: commutative, as many answers as A5, and hence its control

Elements are numbered from the identity, 0: permutations p, written p(0) p(1) ..., in lexicographic order. They multiply
in the order of reading, the first acting first: (p q)(x) = q(p(x)). The permutations say what happens to the state.

Source: Liu et al. 2023 (arXiv:2210.10749) and Merrill et al. 2024 (arXiv:2404.08819). Merrill et al. prove that an SSM
of fixed depth with diagonal transitions, complex ones included, solves A5 and S5 at all lengths only if TC0 = NC1.
"""

from functools import cache, partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from mamba3_jax.checks import check_choice
from mamba3_jax.tasks.task import Task, append_answer, uniform_integers

PAD, ELEMENT_0 = 0, 1
GROUPS = ("S3", "A5", "S5", "Z60")


def _permutations(group: str) -> list[tuple[int, ...]]:
    def is_even(p):
        return sum(p[i] > p[j] for j in range(len(p)) for i in range(j)) % 2 == 0

    return [p for p in permutations(range(int(group[1:]))) if group[0] == "S" or is_even(p)]


@cache
def _group(group: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the elements, and the id of the product of each with each."""
    if group == "Z60":
        element = np.arange(60)
        return tuple(map(str, element)), (element[:, None] + element[None, :]) % 60
    elements = _permutations(group)
    number = {p: i for i, p in enumerate(elements)}
    products = [[number[tuple(q[x] for x in p)] for q in elements] for p in elements]
    return tuple("".join(map(str, p)) for p in elements), np.array(products)


def _row(
    key: PRNGKeyArray, n: Int[Array, ""], size: int, group: str
) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
    _, products = _group(group)
    table = jnp.asarray(products, jnp.int32)
    elements = uniform_integers(jax.random.bits(key, (size,), jnp.uint32), len(products))
    running = jax.lax.associative_scan(lambda p, q: table.at[p, q].get(mode="promise_in_bounds"), elements)
    return append_answer(ELEMENT_0 + elements, ELEMENT_0 + running, n, PAD)


@cache
def word_problem(group: str) -> Task:
    """The word problem of "S3", "A5", "S5" or "Z60"; raises ValueError for any other group."""
    check_choice("group", group, GROUPS)
    names, _ = _group(group)
    return Task(
        name=group,
        symbols=("_", *names),
        pad_id=PAD,
        chance=1 / len(names),
        min_length=3,
        lengths="all",
        every=True,
        row=partial(_row, group=group),
    )
