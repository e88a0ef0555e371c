"""Modular arithmetic with brackets: the value mod 5 of a fully bracketed random expression.

Ids: 0..4 digits, 5 '+', 6 '-', 7 '*', 8 '(', 9 ')', 10 '=', 11 pad. A row is an expression of exactly L = n-3 tokens,
'=', the answer, and one pad that n counts; n ~ U{5..max}. The expression is G(L):

    G(1) = d    G(2) = -d    G(3) = (d)    G(4) = (-d)    G(L) = (G(l) op G(L-3-l)) with l ~ U{1..L-4}

with digits d uniform and op uniform over + and -; the option `times` adds '*'.

Without '*' the value is a sum of digits, each with the sign that the minuses before its brackets give it, and so a
prefix has one as well: that of the expression whose later digits are 0. It is the running answer at digits and '='.

Source: Grazzi et al. 2025 (arXiv:2411.12537); Mamba-3 (arXiv:2603.15569), table 5b and appendix D. That the paper ran
without '*' is inferred: with it, always answering 0 scores 13 at length 256, above the paper's failing models.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt32

from mamba3_jax.tasks.task import Task, uniform_integers

MODULUS = 5
PLUS, MINUS, TIMES, OPEN, CLOSE, EQUALS, PAD = 5, 6, 7, 8, 9, 10, 11
SHORTEST_PAIR = 5  # G(L) holds two expressions from here on


def _twice(step: Callable) -> Callable:
    """Two levels of the tree per trip of a loop: on a GPU the host checks each trip, and a batch takes half as long."""
    return lambda state: step(step(state))


def _split(words: UInt32[Array, " size"], span: Int[Array, " size"]) -> Int[Array, " size"]:
    """Length of the left operand of G(span), from the random word at its opening bracket."""
    return 1 + uniform_integers(words, jnp.maximum(span - (SHORTEST_PAIR - 1), 1))


class _Nodes(NamedTuple):
    """The innermost G that each position belongs to: its start, its span (0 outside the expression), and whether an
    odd number of its ancestors are right operands of a minus.
    """

    start: Int[Array, " size"]
    span: Int[Array, " size"]
    negated: Bool[Array, " size"]


def _nodes(words: UInt32[Array, " size"], length: Int[Array, ""], ops: int) -> _Nodes:
    """Where every position is in the tree, by the random words of a row.

    Every position descends from the root at once. No stack is needed: a pair has its own opening bracket, hence its own
    word to draw its split from, as its operator has, and a position needs only those of the pair that it is in.
    """
    position = jnp.arange(words.size)

    def descend(carry):
        (start, span, negated), _ = carry
        left = _split(words.at[start].get(mode="promise_in_bounds"), span)
        op = start + 1 + left
        pair = span >= SHORTEST_PAIR
        in_left = pair & (start < position) & (position < op)
        in_right = pair & (op < position) & (position < start + span - 1)
        minus = _operator(words.at[op].get(mode="clip"), ops) == MINUS
        start = jnp.where(in_left, start + 1, jnp.where(in_right, op + 1, start))
        span = jnp.where(in_left, left, jnp.where(in_right, span - 3 - left, span))
        return _Nodes(start, span, negated ^ (in_right & minus)), jnp.any(in_left | in_right)

    outside = position >= length
    root = _Nodes(jnp.zeros_like(position), jnp.where(outside, 0, length), jnp.zeros_like(outside))
    nodes, _ = jax.lax.while_loop(lambda carry: carry[1], _twice(descend), (root, jnp.array(True)))
    return nodes


def _operator(words: UInt32[Array, " size"], ops: int) -> Int[Array, " size"]:
    """The operator that a word draws, one of so many."""
    return PLUS + uniform_integers(words, ops)


def _value(symbols: Int[Array, " size"], left: Int[Array, " size"], span: Int[Array, " size"]) -> Int[Array, ""]:
    """Value mod 5 of the expression; `left` (operand) and `span` are lengths in the G starting there, 0 where none."""
    position = jnp.arange(symbols.size)
    op = symbols.at[position + 1 + left].get(mode="clip")
    digit = symbols.at[position + span // 2].get(mode="clip")
    unknown = -1
    leaf = jnp.where(span % 2 == 0, -digit, digit) % MODULUS  # the even spans, 2 and 4, are the ones with a minus
    pair = span >= SHORTEST_PAIR

    def reduce(value):
        x, y = jnp.roll(value, -1), value.at[position + 2 + left].get(mode="clip")
        result = jnp.where(op == PLUS, x + y, jnp.where(op == MINUS, x - y, x * y)) % MODULUS
        return jnp.where(pair & (x >= 0) & (y >= 0), result, value)

    value = jnp.where((0 < span) & ~pair, leaf, unknown)
    return jax.lax.while_loop(lambda value: value[0] == unknown, _twice(reduce), value)[0]


def _row(
    key: PRNGKeyArray, n: Int[Array, ""], size: int, times: bool
) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
    # One word per position suffices: a position is a pair's start, an operator or a digit, and never two of them.
    words = jax.random.bits(key, (size,), jnp.uint32)
    position, length = jnp.arange(size), n - 3
    ops = 3 if times else 2
    start, span, negated = _nodes(words, length, ops)
    offset, pair = position - start, span >= SHORTEST_PAIR
    bracketed, is_digit = span >= 3, (0 < span) & ~pair & (offset == span // 2)

    inner = jnp.where(pair, _operator(words, ops), jnp.where(is_digit, uniform_integers(words, MODULUS), MINUS))
    symbols = jnp.where(bracketed & (offset == 0), OPEN, jnp.where(bracketed & (offset == span - 1), CLOSE, inner))

    end = position == length
    if times:
        answers = jnp.where(end, _value(symbols, _split(words, span), jnp.where(offset == 0, span, 0)), PAD)
    else:
        minus = negated ^ (span % 2 == 0)  # the even spans, 2 and 4, are the ones with a minus of their own
        digits = jnp.where(is_digit, jnp.where(minus, -symbols, symbols), 0)
        answers = jnp.where(is_digit | end, jnp.cumsum(digits) % MODULUS, PAD)
    last = jnp.max(jnp.where(end, answers, 0))
    after = jnp.where(end, EQUALS, jnp.where(position == length + 1, last, PAD))
    return jnp.where(position < length, symbols, after), answers


def modular_arithmetic_brackets(times: bool = False) -> Task:
    """The task without '*', as registered, or with it: then 0 is a better guess than `chance`, which stays 1/5."""
    return Task(
        name="modular_arithmetic_brackets_times" if times else "modular_arithmetic_brackets",
        symbols=("0", "1", "2", "3", "4", "+", "-", "*", "(", ")", "=", "_"),
        pad_id=PAD,
        chance=1 / 5,
        min_length=5,
        lengths="all",
        every=not times,
        row=partial(_row, times=times),
    )
