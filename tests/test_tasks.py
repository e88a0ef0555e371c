"""The generators against evaluators written from the definitions, in Python, on the ids that a model would read."""

import re
from collections import Counter
from functools import cache, reduce
from itertools import permutations

import jax
import numpy as np
import pytest

from mamba3_jax.tasks import TASKS, get_task, modular_arithmetic_brackets, scaled_accuracy

SIZE = 256
BRACKETS = "modular_arithmetic_brackets"
TIMES = BRACKETS + "_times"
ALL = {**TASKS, TIMES: modular_arithmetic_brackets(times=True)}

# One line per task: the answer's id from the ids before it.
ANSWERS = {
    "parity": lambda ids: 1 + ids.count(2) % 2,
    "even_pairs": lambda ids: 1 + sum(a != b for a, b in zip(ids, ids[1:])) % 2,
    "cycle_navigation": lambda ids: 4 + (ids.count(2) - ids.count(3)) % 5,
    "modular_arithmetic": lambda ids: 5 + evaluate(spell(ids, "_+-*=01234")),
    BRACKETS: lambda ids: evaluate(spell(ids, "01234+-*()=_")),
    TIMES: lambda ids: evaluate(spell(ids, "01234+-*()=_")),
    "S3": lambda ids: 1 + shuffle(ids, EVERY_3),
    "S5": lambda ids: 1 + shuffle(ids, EVERY_5),
    "A5": lambda ids: 1 + shuffle(ids, EVEN_5),
    "Z60": lambda ids: 1 + sum(i - 1 for i in ids) % 60,
}
ANSWER_IDS = {
    "parity": [1, 2],
    "even_pairs": [1, 2],
    "cycle_navigation": [4, 5, 6, 7, 8],
    "modular_arithmetic": [5, 6, 7, 8, 9],
    BRACKETS: [0, 1, 2, 3, 4],
    "S3": range(1, 7),
    "A5": range(1, 61),
    "S5": range(1, 121),
    "Z60": range(1, 61),
}
# 99.9% quantiles of chi-square by degrees of freedom; the seeds are fixed, so a test passes or fails for good.
CHI_SQUARE = {
    **{1: 10.8, 2: 13.8, 4: 18.5, 5: 20.5, 8: 26.1, 15: 37.7, 17: 40.8, 18: 42.3, 19: 43.8},
    **{35: 66.6, 36: 68.0, 37: 69.3, 59: 98.3, 119: 172},
}

EVERY_3, EVERY_5 = ["".join(p) for p in permutations("012")], ["".join(p) for p in permutations("01234")]
# A permutation is even if its matrix has determinant 1.
EVEN_5 = [p for p in EVERY_5 if np.linalg.det(np.eye(5)[list(map(int, p))]) > 0]


def spell(ids, alphabet):
    return "".join(alphabet[i] for i in ids)


def shuffle(ids, group):
    """Where the things are in the end, each permutation moving them on from where the ones before left them."""
    return group.index("".join(reduce(lambda now, i: [group[i - 1][int(x)] for x in now], ids, sorted(group[0]))))


def evaluate(text):
    return eval(text.removesuffix("=")) % 5


@cache
def splits(text):
    """Lengths of the left operands by which `text` derives from G(len(text)); a leaf derives by 0, nothing else."""
    if len(text) < 5:
        return (0,) if re.fullmatch(r"-?[0-4]|\(-?[0-4]\)", text) else ()
    if text[0] + text[-1] != "()":
        return ()
    inside = text[1:-1]
    return tuple(i for i, c in enumerate(inside) if c in "+-*" and splits(inside[:i]) and splits(inside[i + 1 :]))


@cache
def compiled(name, batch_size, supervision):
    def sample(key, low, high):
        return ALL[name].sample(key, batch_size, high, SIZE, min_length=low, supervision=supervision)

    return jax.jit(sample)


def draw(name, high=40, low=None, seed=0, supervision="final"):
    low = ALL[name].min_length if low is None else low
    batch_size = 2048 if supervision == "final" else 256
    return jax.tree.map(np.asarray, compiled(name, batch_size, supervision)(jax.random.key(seed), low, high))


def rows(name, batch):
    """The ids of each row without its padding, the answer last."""
    pad = ALL[name].pad_id
    return [row[: np.flatnonzero(row != pad)[-1] + 1].tolist() for row in batch.tokens]


def assert_uniform(values, outcomes):
    count, expected = Counter(values), len(values) / len(outcomes)
    assert set(count) == set(outcomes)
    assert sum((count[x] - expected) ** 2 / expected for x in outcomes) < CHI_SQUARE[len(outcomes) - 1]


@pytest.mark.parametrize("name", ALL)
def test_the_answer_is_right_and_asked_for_once_just_before_it(name):
    for high, checked in ((40, 300), (SIZE, 100)):
        batch = draw(name, high)
        assert (batch.mask.sum(1) == 1).all()
        assert (batch.labels[~batch.mask] == ALL[name].pad_id).all()
        for ids, labels, mask in list(zip(rows(name, batch), batch.labels, batch.mask))[:checked]:
            assert ids[-1] == labels[len(ids) - 2] == ANSWERS[name](ids[:-1])
            assert mask[len(ids) - 2]


@pytest.mark.parametrize("name", TASKS)
def test_every_position_asks_for_the_answer_to_its_prefix(name):
    batch = draw(name, 60, supervision="every")
    for ids, labels, mask in zip(rows(name, batch), batch.labels, batch.mask):
        asked = range(len(ids) - 1)
        if name == "modular_arithmetic":
            asked = [i for i in asked if ids[i] >= 5 or ids[i] == 4]  # digits and '='
        if name == BRACKETS:
            asked = [i for i in asked if ids[i] <= 4 or ids[i] == 10]  # likewise
        assert np.flatnonzero(mask).tolist() == list(asked)
        assert [labels[i] for i in asked] == [ANSWERS[name](prefix(name, ids[:-1], i + 1)) for i in asked]
        assert (labels[~mask] == ALL[name].pad_id).all()


def prefix(name, ids, length):
    """The first ids, closed if they have brackets: with a 0 for every digit that is still to come."""
    return ids[:length] + [0 if i <= 4 else i for i in ids[length:]] if name == BRACKETS else ids[:length]


@pytest.mark.parametrize("name", ALL)
def test_the_batch_holds_int32_ids_of_the_vocabulary_and_pads_only_after_the_answer(name):
    batch = draw(name)
    assert batch.tokens.dtype == batch.labels.dtype == np.int32 and batch.mask.dtype == bool
    assert batch.tokens.shape == batch.labels.shape == batch.mask.shape == (2048, SIZE)
    assert ((0 <= batch.tokens) & (batch.tokens < ALL[name].vocab_size)).all()
    assert all(ALL[name].pad_id not in ids for ids in rows(name, batch))


@pytest.mark.parametrize("name", ALL)
def test_lengths_are_uniform_on_exactly_the_allowed_ones(name):
    lengths = [len(ids) for ids in rows(name, draw(name, 40))]
    if name == "modular_arithmetic":
        allowed = range(3, 40, 2)
    elif name.startswith(BRACKETS):
        allowed = range(4, 40)  # n = 5..40 counts one pad
    else:
        allowed = range(3, 41)
    assert_uniform(lengths, allowed)


@pytest.mark.parametrize("name", ALL)
def test_equal_bounds_give_one_length(name):
    exact = {"modular_arithmetic": 255, BRACKETS: 255, TIMES: 255}.get(name, 256)
    assert {len(ids) for ids in rows(name, draw(name, 256, 256))} == {exact}


def answers_at_256(name):
    batches = [draw(name, 256, 256, seed) for seed in range(4)]
    return np.concatenate([batch.labels[batch.mask] for batch in batches]).tolist()


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_uniform_at_256_so_that_a_constant_answer_scores_nothing(name):
    answers = answers_at_256(name)
    assert_uniform(answers, ANSWER_IDS[name])
    assert scaled_accuracy(max(Counter(answers).values()) / len(answers), TASKS[name].chance) < 0.02


def test_products_make_zero_a_good_guess():
    assert 0.10 < scaled_accuracy(answers_at_256(TIMES).count(0) / 8192, 1 / 5) < 0.17


@pytest.mark.parametrize(
    "name, outcomes",
    [
        ("parity", (1, 2)),
        ("even_pairs", (1, 2)),
        ("cycle_navigation", (1, 2, 3)),
        ("modular_arithmetic", (1, 2, 3)),
        ("modular_arithmetic", (5, 6, 7, 8, 9)),
        (BRACKETS, (0, 1, 2, 3, 4)),
        ("S5", range(1, 121)),
    ],
)
def test_symbols_are_uniform(name, outcomes):
    questions = [ids[:-1] for ids in rows(name, draw(name))]
    assert_uniform([i for ids in questions for i in ids if i in outcomes], outcomes)


@pytest.mark.parametrize("name, ops", [(BRACKETS, "+-"), (TIMES, "+-*")])
def test_bracketed_expressions_derive_from_the_grammar_with_uniform_splits_and_operators(name, ops):
    length = 24
    texts = [spell(ids[:-1], "01234+-*()=_") for ids in rows(name, draw(name, length + 3, length + 3))]
    assert {len(text) for text in texts} == {length + 1} and {text[-1] for text in texts} == {"="}
    derivations = [splits(text[:-1]) for text in texts]
    assert {len(lengths) for lengths in derivations} == {1}  # derivable, and in one way
    assert_uniform([left for (left,) in derivations], range(1, length - 3))
    assert_uniform([text[1 + left] for text, (left,) in zip(texts, derivations)], ops)


def test_bracketed_expressions_of_every_length_derive_from_the_grammar():
    texts = [spell(ids[:-2], "01234+-*()=_") for ids in rows(BRACKETS, draw(BRACKETS, 60, seed=1))]
    assert all(splits(text) for text in texts)
    assert set(map(len, texts)) == set(range(2, 58))


@pytest.mark.parametrize("name", ALL)
def test_a_key_fixes_the_batch_and_another_key_changes_it(name):
    first, again, other = draw(name, seed=0), draw(name, seed=0), draw(name, seed=1)
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(again)))
    assert (first.tokens != other.tokens).any()


def test_rows_do_not_depend_on_the_size_they_are_padded_to_nor_on_64_bit_mode():
    with jax.enable_x64(True):  # one compilation for all
        sample_all = jax.jit(lambda key: {name: TASKS[name].sample(key, 2048, 40, size=41) for name in TASKS})
        batches = sample_all(jax.random.key(0))
    for name, batch in batches.items():
        pairs = zip(jax.tree.leaves(batch), jax.tree.leaves(draw(name)))
        assert all(x.dtype == y.dtype and (x == y[:, :41]).all() for x, y in pairs)


def test_a_traced_maximum_does_not_recompile():
    traces = []

    @jax.jit
    def sample(key, step, max_length):
        traces.append(1)
        return TASKS["parity"].sample(jax.random.fold_in(key, step), 8, max_length, size=160)

    for step, max_length in enumerate((40, 80, 160)):
        batch = sample(jax.random.key(0), step, max_length)
        assert (batch.tokens != 0).sum(1).max() <= max_length
    assert len(traces) == 1


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("parity", {"size": 39}, "size: got 39; allowed: at least max_length=40"),
        ("parity", {"min_length": 2}, "min_length: got 2 with task 'parity'; allowed: at least 3"),
        (BRACKETS, {"min_length": 3}, f"min_length: got 3 with task '{BRACKETS}'; allowed: at least 5"),
        ("parity", {"min_length": 41}, "max_length: got 40 with task 'parity'; allowed: at least min_length=41"),
        ("parity", {"batch_size": 0}, "batch_size: got 0; allowed: a positive integer"),
        ("parity", {"supervision": "last"}, "supervision: got 'last'; allowed: 'final', 'every'"),
        (TIMES, {"supervision": "every"}, f"supervision: got 'every' with task '{TIMES}'; allowed: 'final'"),
    ],
)
def test_errors_name_the_argument_what_came_and_what_is_allowed(name, arguments, message):
    arguments = {"batch_size": 4, "max_length": 40, "size": 40, **arguments}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ALL[name].sample(jax.random.key(0), **arguments)


@pytest.mark.parametrize("name", ["parity", "modular_arithmetic", BRACKETS])
def test_the_rows_of_a_pair_are_rows_whose_lengths_add_up_to_the_same(name):
    """Taken apart again, each is right, and the lengths of all are uniform; one answer of each is supervised."""
    task, high, size = ALL[name], 20, 32
    batch = jax.jit(lambda key: task.sample_pairs(key, 4096, high, size))(jax.random.key(0))
    batch = jax.tree.map(np.asarray, batch)
    lengths, totals = [], set()
    for tokens, labels, mask, scored, ids in zip(*batch):
        first = int((ids == 0).sum())
        assert (ids == (np.arange(size) >= first)).all() and (mask == scored).all() and mask.sum() == 2
        both = []
        for part in (slice(0, first), slice(first, size)):
            row = tokens[part][: np.flatnonzero(tokens[part] != task.pad_id)[-1] + 1].tolist()
            (asked,) = np.flatnonzero(mask[part])
            assert row[-1] == labels[part][asked] == ANSWERS[name](row[:-1]) and asked == len(row) - 2
            both.append(len(row) + (name == BRACKETS))  # whose length counts one pad
        lengths += both
        totals.add(sum(both))
    low = task.min_length
    possible = range(low, high + 1, 2) if name == "modular_arithmetic" else range(low, high + 1)
    assert len(totals) == 1 and totals.pop() <= low + high
    assert_uniform(lengths[::2], possible)
    assert_uniform(lengths[1::2], possible)


@pytest.mark.parametrize("argument, value", [("batch_size", 3), ("size", 42)])
def test_pairs_that_cannot_be_are_refused(argument, value):
    options = dict(batch_size=4, max_length=40, size=43) | {argument: value}
    with pytest.raises(ValueError, match=f"^{argument}: got {value}; allowed: "):
        ALL["parity"].sample_pairs(jax.random.key(0), **options)


def test_tasks_are_found_by_name():
    assert set(TASKS) == set(ANSWER_IDS)
    assert all(get_task(name).name == name for name in TASKS)
    with pytest.raises(ValueError, match=r"^name: got 'chess'; allowed: 'parity', .*'needle', .*$"):
        get_task("chess")


def test_scaled_accuracy_is_0_at_chance_1_when_perfect_and_not_clipped():
    assert scaled_accuracy(1.0, 1 / 5) == 1
    assert scaled_accuracy(1 / 5, 1 / 5) == 0
    assert scaled_accuracy(0.0, 1 / 2) == -1
