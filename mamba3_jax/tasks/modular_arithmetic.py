"""Modular arithmetic without brackets: the value mod 5 of digit (op digit)* with op in {+, -, *}.

Ids: 0 pad, 1 '+', 2 '-', 3 '*', 4 '=', 5..9 = digits 0..4. A row is the expression, '=', and the answer 5 + value; '*'
binds tighter than '+' and '-', which associate to the left; digits and operators are uniform. With k-1 digits the row
has n = 2k-1 tokens, always odd: k ~ U{(min+1)//2 .. (max+1)//2}.

Source: Grazzi et al. 2025 (arXiv:2411.12537); Mamba-3 (arXiv:2603.15569), table 5b and appendix D.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from mamba3_jax.tasks.task import Task, append_answer, uniform_integers

MODULUS = 5
PAD, PLUS, MINUS, TIMES, EQUALS, DIGIT_0 = 0, 1, 2, 3, 4, 5


def _prefix_values(ops: Int[Array, " k"], digits: Int[Array, " k"]) -> Int[Array, " k"]:
    """Values mod 5 of the prefixes of op_0 digit_0 op_1 digit_1 ..., where op_0 is '+'."""

    def read(carry, op_and_digit):
        total, term = carry  # the finished terms, and the product still open
        op, digit = op_and_digit
        times = op == TIMES
        total = jnp.where(times, total, total + term) % MODULUS
        term = jnp.where(times, term * digit, jnp.where(op == MINUS, -digit, digit)) % MODULUS
        return (total, term), (total + term) % MODULUS

    zero = jnp.zeros((), digits.dtype)
    # Unrolled, since each trip is a kernel launch on a GPU: 256 rows of 80 digits take 1.5 ms by ones, 0.2 by eights.
    _, values = jax.lax.scan(read, (zero, zero), (ops, digits), unroll=8)
    return values


def _row(key: PRNGKeyArray, n: Int[Array, ""], size: int) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
    position = jnp.arange(size)
    is_digit = position % 2 == 0
    bits = jax.random.bits(key, (size,), jnp.uint32)
    symbols = jnp.where(is_digit, DIGIT_0 + uniform_integers(bits, MODULUS), PLUS + uniform_integers(bits, 3))
    digits = symbols[0::2] - DIGIT_0
    ops = jnp.concatenate([jnp.full((1,), PLUS), symbols[1::2]])[: digits.size]
    values = _prefix_values(ops, digits)

    has_value = is_digit | (position == n - 2)
    answers = jnp.where(has_value, DIGIT_0 + jnp.repeat(values, 2)[:size], PAD)
    symbols = jnp.where(position == n - 2, EQUALS, symbols)
    return append_answer(symbols, answers, n, PAD)


MODULAR_ARITHMETIC = Task(
    name="modular_arithmetic",
    symbols=("_", "+", "-", "*", "=", "0", "1", "2", "3", "4"),
    pad_id=PAD,
    chance=1 / 5,
    min_length=3,
    lengths="odd",
    every=True,
    row=_row,
)
