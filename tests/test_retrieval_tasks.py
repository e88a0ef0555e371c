"""Recall and language tasks against their definitions, written again in Python on the ids that a model would read."""

import math
import re
from collections import Counter
from functools import cache
from itertools import combinations, permutations
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.tasks import (
    MQAR_SETTINGS,
    RETRIEVAL_TASKS,
    TASKS,
    Batch,
    accuracy,
    get_task,
    induction_heads,
    mqar,
    needle,
    pydoc_bytes,
    selective_copying,
    word_problem,
)
from mamba3_jax.tasks.pydoc_bytes import text_of, topics_of_splits, windows
from mamba3_jax.tasks.task import distinct_integers, uniform_integers

# What is tested, and a length for it.
CASES = {
    "mqar_4": (mqar(4), 64),
    "mqar_8": (mqar(8), 128),
    "mqar_16": (mqar(16), 256),
    "mqar_64": (mqar(64), 512),
    "mqar_16_zeros": (mqar(16, noise=False), 256),
    "mqar, as many pairs as keys": (mqar(7, vocab_size=16), 28),
    "selective_copying": (selective_copying(), 128),
    "selective_copying, no noise": (selective_copying(8, vocab_size=5), 16),
    "induction_heads": (induction_heads(), 256),
    "needle": (needle(), 64),
    "needle at 0.3": (needle(0.3), 64),
    "pydoc_bytes_train": (pydoc_bytes("train"), 100),
    "pydoc_bytes_test": (pydoc_bytes("test"), 100),
}


def check_mqar(ids, asked, task):
    pairs, half = task.min_length // 4, task.vocab_size // 2
    keys, values = ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2]
    assert len(set(keys)) == len(set(values)) == pairs
    assert all(1 <= key < half for key in keys) and all(half <= value < 2 * half for value in values)
    assert len(asked) == pairs and {ids[i] for i in asked} == set(keys)
    for i, label in asked.items():
        assert i >= 2 * pairs and i % 2 == 0
        assert label == values[keys.index(ids[i])]


def check_selective_copying(ids, asked, task):
    count, marker = task.min_length // 2, task.vocab_size - 1
    context, end = ids[:-count], ids[-count:]
    data = [i for i in context if i != 0]
    assert end == [marker] * count and marker not in context
    assert asked == dict(zip(range(len(context), len(ids)), data, strict=True))


def check_induction_heads(ids, asked, task):
    assert ids.count(0) == 2 and ids[-1] == 0
    assert asked == {len(ids) - 1: ids[ids.index(0) + 1]}


def check_needle(ids, asked, task):
    filler, keys, values = (
        [i for i, symbol in enumerate(task.symbols) if re.fullmatch(kind + r"\d+", symbol)] for kind in "fkv"
    )
    (i,) = (i for i, token in enumerate(ids) if token == 1)
    key, value = ids[i + 1 : i + 3]
    assert key in keys and value in values
    assert ids[-2:] == [2, key]
    assert all(token in filler for token in ids[:i] + ids[i + 3 : -2])
    assert asked == {len(ids) - 1: value}


def check_pydoc_bytes(ids, asked, task):
    assert list(asked) == list(range(len(ids)))
    labels = list(asked.values())
    assert ids[1:] == labels[:-1]
    assert bytes([*ids, labels[-1]]) in text_of(task.name.removeprefix("pydoc_bytes_")).tobytes()


CHECKS = {
    "mqar": check_mqar,
    "selective_copying": check_selective_copying,
    "induction_heads": check_induction_heads,
    "needle": check_needle,
    "pydoc_bytes": check_pydoc_bytes,
}


@cache
def sampler(task, batch_size, size):
    def sample(key, low, high):
        return task.sample(key, batch_size, high, size, min_length=low)

    return jax.jit(sample)


def draw(task, high, low=None, rows=256, seed=0, size=None):
    low = high if low is None else low
    return jax.tree.map(np.asarray, sampler(task, rows, size or high)(jax.random.key(seed), low, high))


def check_row(task, tokens, labels, mask, n):
    asked = {int(i): int(labels[i]) for i in np.flatnonzero(mask)}
    assert (labels[~mask] == task.pad_id).all() and (tokens[n:] == task.pad_id).all()
    check = next(check for name, check in CHECKS.items() if task.name.startswith(name))
    check(tokens[:n].tolist(), asked, task)


def assert_distributed(values, probabilities):
    """Pearson's test at 99.9%; the seeds are fixed, so a test passes or fails for good."""
    count, freedom = Counter(values), len(probabilities) - 1
    assert set(count) <= set(probabilities)
    statistic = sum((count[x] - len(values) * p) ** 2 / (len(values) * p) for x, p in probabilities.items())
    # Wilson and Hilferty's approximation of the quantile.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def assert_uniform(values, outcomes):
    assert_distributed(values, dict.fromkeys(outcomes, 1 / len(outcomes)))


@pytest.mark.parametrize("case", CASES)
def test_rows_of_one_length_ask_what_the_definition_says(case):
    task, n = CASES[case]
    batch = draw(task, n)
    assert batch.tokens.dtype == batch.labels.dtype == np.int32 and batch.mask.dtype == bool
    assert batch.tokens.shape == batch.labels.shape == batch.mask.shape == (256, n)
    assert ((0 <= batch.tokens) & (batch.tokens < task.vocab_size)).all()
    for row in zip(*batch[:3]):
        check_row(task, *row, n)


@pytest.mark.parametrize("case", ["mqar_4", "selective_copying", "induction_heads", "needle", "pydoc_bytes_test"])
def test_rows_of_varied_lengths_ask_what_the_definition_says(case):
    task, high = CASES[case]
    batch = draw(task, high, low=task.min_length, size=high + 5)
    lengths = set()
    for tokens, labels, mask in zip(*batch[:3]):
        n = int(np.flatnonzero((tokens != task.pad_id) | mask)[-1]) + 1
        check_row(task, tokens, labels, mask, n)
        lengths.add(n)
    assert task.min_length <= min(lengths) < task.min_length + 8 and high - 8 < max(lengths) <= high
    assert len(lengths) > 30


@pytest.mark.parametrize("case", CASES)
def test_a_key_fixes_the_rows_and_another_key_changes_them_all(case):
    task, n = CASES[case]
    first, again, other = draw(task, n), draw(task, n), draw(task, n, seed=1)
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(again)))
    assert (first.tokens != other.tokens).any(axis=1).all()


def test_rows_do_not_depend_on_the_size_they_are_padded_to_nor_on_64_bit_mode():
    with jax.enable_x64(True):  # one compilation for all
        sample_all = jax.jit(
            lambda key: {case: task.sample(key, 256, n, n + 9, min_length=n) for case, (task, n) in CASES.items()}
        )
        batches = sample_all(jax.random.key(0))
    for case, batch in batches.items():
        task, n = CASES[case]
        assert (batch.tokens[:, n:] == task.pad_id).all() and not batch.mask[:, n:].any()
        pairs = zip(jax.tree.leaves(batch), jax.tree.leaves(draw(task, n)))
        assert all(x.dtype == y.dtype and (x[:, :n] == y).all() for x, y in pairs)


def test_integers_are_drawn_as_long_multiplication_says_for_any_count():
    words = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    words[:2] = 0, 2**32 - 1
    for count in (1, 3, 2**16 - 1, 2**16, 2**16 + 1, 2**20, 10**9, 2**31 - 1):
        drawn = np.asarray(uniform_integers(jnp.asarray(words), count))
        assert drawn.tolist() == [int(word) * count >> 32 for word in words]


@pytest.mark.parametrize("k, count", [(1, 1), (1, 9), (2, 2), (8, 8), (64, 64), (64, 70), (64, 4095)])
def test_distinct_integers_are_those_of_the_shuffle_step_by_step(k, count):
    words = np.random.default_rng(k + count).integers(0, 2**32, (50, k), dtype=np.uint32)
    for row, drawn in zip(words, np.asarray(jax.jit(jax.vmap(lambda w: distinct_integers(w, count)))(words))):
        places = list(range(count))
        for i, word in enumerate(row):
            j = i + (int(word) * (count - i) >> 32)
            places[i], places[j] = places[j], places[i]
        assert drawn.tolist() == places[:k]


def test_mqar_keys_and_values_are_uniform_without_replacement():
    tokens = draw(mqar(2, vocab_size=10), 8, rows=4096).tokens
    assert_uniform([(a, b) for a, b in tokens[:, [0, 2]].tolist()], list(permutations(range(1, 5), 2)))
    assert_uniform([(a, b) for a, b in tokens[:, [1, 3]].tolist()], list(permutations(range(5, 10), 2)))


def test_mqar_queries_follow_the_power_law_and_the_rest_is_uniform_on_the_whole_vocabulary():
    task, n, pairs = mqar(4, vocab_size=32), 64, 4
    batch = draw(task, n, rows=4096)
    weight = [0.01 * i ** (0.01 - 1) for i in range(1, (n - 2 * pairs) // 2 + 1)]
    p = [w / sum(weight) for w in weight]
    gaps = [
        [next(i for i in np.flatnonzero(mask) if tokens[i] == key) // 2 - pairs for key in tokens[[0, 2]]]
        for tokens, mask in zip(batch.tokens, batch.mask)
    ]
    assert_distributed([first for first, _ in gaps], dict(enumerate(p)))
    second = {j: sum(p[i] * p[j] / (1 - p[i]) for i in range(len(p)) if i != j) for j in range(len(p))}
    assert_distributed([second for _, second in gaps], second)
    filler = batch.tokens[:, 2 * pairs :][~batch.mask[:, 2 * pairs :]]
    assert_uniform(filler.tolist(), range(32))


def test_mqar_without_noise_is_the_same_row_with_zeros_in_its_place():
    noisy, zeros = (draw(mqar(4, vocab_size=32, noise=noise), 64) for noise in (True, False))
    meant = noisy.mask | (np.arange(64) < 2 * 4)
    np.testing.assert_array_equal(zeros.tokens, np.where(meant, noisy.tokens, 0))
    assert (zeros.labels == noisy.labels).all() and (zeros.mask == noisy.mask).all()


def test_mqar_settings_are_those_of_zoology():
    assert MQAR_SETTINGS == ((64, 4), (128, 8), (256, 16), (512, 64))
    for _, pairs in MQAR_SETTINGS:
        for name, task in ((f"mqar_{pairs}", mqar(pairs)), (f"mqar_{pairs}_zeros", mqar(pairs, noise=False))):
            assert get_task(name) is task is get_task(task.name)  # one object, so that jit knows it again
            assert task.vocab_size == 8192


def test_selective_copying_places_and_data_are_uniform():
    count, context = 3, 6
    batch = draw(selective_copying(count, vocab_size=6), context + count, rows=4096)
    places = [tuple(np.flatnonzero(row).tolist()) for row in batch.tokens[:, :context]]
    assert_uniform(places, list(combinations(range(context), count)))
    assert_uniform(batch.labels[:, context:].ravel().tolist(), range(1, 5))


def test_selective_copying_has_the_published_size():
    task = selective_copying()
    batch = draw(task, 4112, rows=4)
    assert task.vocab_size == 16 and task.chance == 1 / 14
    assert (np.count_nonzero(batch.tokens[:, :4096], axis=1) == 16).all() and (batch.mask.sum(axis=1) == 16).all()


def test_induction_heads_places_answers_and_tokens_are_uniform():
    n = 16
    batch = draw(induction_heads(), n, rows=4096)
    assert_uniform([row.index(0) for row in batch.tokens.tolist()], range(n - 2))
    assert_uniform(batch.labels[:, -1].tolist(), range(1, 16))
    assert_uniform([i for i in batch.tokens.ravel().tolist() if i], range(1, 16))


def test_induction_heads_rows_of_a_million_tokens():
    task, n = induction_heads(), 2**20
    for tokens, labels, mask in zip(*draw(task, n, rows=2)[:3]):
        check_row(task, tokens, labels, mask, n)


def test_needle_depths_answers_keys_and_filler_are_uniform():
    n = 24
    batch = draw(needle(), n, rows=4096)
    places = [row.index(1) for row in batch.tokens.tolist()]
    assert_uniform(places, range(n - 4))
    assert_uniform(batch.labels[:, -1].tolist(), range(51, 67))
    assert_uniform(batch.tokens[:, -1].tolist(), range(35, 51))
    assert_uniform([i for i in batch.tokens.ravel().tolist() if 3 <= i < 35], range(3, 35))


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_needle_lies_at_its_depth_at_every_length(depth):
    for n in (5, 6, 15, 64):
        tokens = draw(needle(depth), n, rows=8, size=64).tokens
        place = math.floor(depth * (n - 5) + 0.5)  # filler tokens before it
        assert (tokens[:, place] == 1).all()


def test_splits_are_disjoint_whole_topics_that_cover_the_corpus_byte_for_byte():
    names = topics_of_splits()
    assert list(names) == ["train", "validation", "test"]
    assert sorted(name for split in names.values() for name in split) == sorted(topics)
    for split in names:
        assert text_of(split).tobytes() == "".join(topics[name] for name in sorted(names[split])).encode()
    total = sum(text_of(split).size for split in names)
    assert total == len("".join(topics.values()).encode())
    for split, share in (("train", 0.90), ("validation", 0.05), ("test", 0.05)):
        assert abs(text_of(split).size / total - share) < 0.01
        assert 0 not in text_of(split)  # the pad


def test_splits_share_no_paragraph():
    paragraphs = [
        {" ".join(p.split()) for name in names for p in topics[name].split("\n\n")}
        for names in topics_of_splits().values()
    ]
    for one, other in combinations(paragraphs, 2):
        assert max(map(len, one & other)) < 100


def test_windows_start_uniformly():
    text, n = text_of("test").tobytes(), 100
    batch = draw(pydoc_bytes("test"), n, rows=2048)
    starts = [text.index(bytes(row)) for row in batch.tokens.astype(np.uint8)]
    assert_uniform([start * 20 // (len(text) - n) for start in starts], range(20))


@pytest.mark.parametrize("length", [1000, 24_000, 10**6])
def test_windows_ask_for_every_byte_of_the_split_but_the_first_once(length):
    text = text_of("test")
    batch = windows("test", length)
    assert batch.tokens.shape == (math.ceil((text.size - 1) / length), length)
    tokens, labels, mask = (np.asarray(x) for x in batch[:3])
    assert mask.sum() == text.size - 1
    assert (labels[mask] == text[1:]).all() and (tokens[mask] == text[:-1]).all()
    assert (tokens[~mask] == 0).all() and (labels[~mask] == 0).all()


@pytest.mark.parametrize(
    "task, answers",
    [
        (mqar(1, vocab_size=16), range(8, 16)),
        (selective_copying(4, vocab_size=8), range(1, 7)),
        (induction_heads(vocab_size=5), range(1, 5)),
        (needle(0.5, fillers=1, keys=1, values=3), range(5, 8)),
        *((word_problem(group), range(1, 1 + size)) for group, size in [("S3", 6), ("A5", 60), ("Z60", 60)]),
    ],
    ids=lambda x: x.name if hasattr(x, "name") else "",
)
def test_chance_is_that_of_a_guess_among_uniform_answers(task, answers):
    batch = draw(task, 2 * task.min_length, rows=4096)
    assert task.chance == 1 / len(answers)
    first = batch.labels[np.arange(4096), batch.mask.argmax(axis=1)]
    assert_uniform(first.tolist(), answers)


def test_word_problems_multiply_in_the_order_of_reading():
    symbols, products = word_problem("S3").symbols, {}
    batch = draw(word_problem("S3"), 3)
    for p, q, r in batch.tokens:
        products[symbols[p], symbols[q]] = symbols[r]
    assert len(products) == 36
    assert products["102", "021"] == "201"  # 0 -> 1 -> 2, 1 -> 0 -> 0, 2 -> 2 -> 1
    assert products["021", "102"] == "120"


def test_accuracy_is_the_fraction_of_scored_positions_that_are_right():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 12, 16)).astype(np.float32)
    labels, scored = logits.argmax(-1), rng.random((64, 12)) < 0.5
    labels[rng.random((64, 12)) < 0.4] = 0
    batch = Batch(*(jnp.asarray(a) for a in (np.zeros_like(labels), labels, np.ones_like(scored), scored)))
    right = [logits[i, j].argmax() == labels[i, j] for i, j in zip(*np.nonzero(scored))]
    assert 0.4 < np.mean(right) < 0.8
    np.testing.assert_allclose(accuracy(jnp.asarray(logits), batch), np.mean(right), rtol=1e-6)


@pytest.mark.parametrize("task", [get_task("parity"), mqar(2, vocab_size=16)], ids=lambda task: task.name)
def test_scored_are_the_last_or_all_of_the_supervised_positions(task):
    batch = task.sample(jax.random.key(0), 32, 16, 16, supervision="every")
    mask, scored = np.asarray(batch.mask), np.asarray(batch.scored)
    if task.scored == "all":
        np.testing.assert_array_equal(scored, mask)
    else:
        last = 15 - mask[:, ::-1].argmax(1)
        assert np.all(scored.sum(1) == 1) and np.all(scored[np.arange(32), last]) and mask.sum() > scored.sum()


def test_every_answer_is_supervised_whichever_supervision_is_asked_for():
    for task in (mqar(2, vocab_size=16), selective_copying(4)):
        sample = jax.jit(lambda key: [task.sample(key, 4, 16, 16, supervision=name) for name in ("final", "every")])
        final, every = sample(jax.random.key(0))
        assert all((x == y).all() for x, y in zip(jax.tree.leaves(final), jax.tree.leaves(every)))


def test_registries_name_their_tasks():
    of_mqar = {f"mqar_{pairs}{filler}" for pairs in (4, 8, 16, 64) for filler in ("", "_zeros")}
    assert set(RETRIEVAL_TASKS) == of_mqar | CHECKS.keys() - {"mqar", "pydoc_bytes"}
    assert not set(RETRIEVAL_TASKS) & set(TASKS)
    assert all(get_task(name).name == name for name in RETRIEVAL_TASKS)
    assert all(task.pad_id < task.vocab_size for task in RETRIEVAL_TASKS.values())


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: mqar(0), "pairs: got 0 with vocab_size=8192; allowed: 1 to 4095"),
        (lambda: mqar(8, vocab_size=16), "pairs: got 8 with vocab_size=16; allowed: 1 to 7"),
        (lambda: selective_copying(0), "data_tokens: got 0; allowed: a positive integer"),
        (lambda: selective_copying(vocab_size=3), "vocab_size: got 3; allowed: at least 4"),
        (lambda: induction_heads(2), "vocab_size: got 2; allowed: at least 3"),
        (lambda: needle(1.5), "depth: got 1.5; allowed: 0 to 1, or None"),
        (lambda: needle(values=1), "values: got 1; allowed: at least 2"),
        (lambda: word_problem("S4"), "group: got 'S4'; allowed: 'S3', 'A5', 'S5', 'Z60'"),
        (lambda: pydoc_bytes("all"), "split: got 'all'; allowed: 'train', 'validation', 'test'"),
        (lambda: windows("dev", 8), "split: got 'dev'; allowed: 'train', 'validation', 'test'"),
        (lambda: windows("test", 0), "length: got 0; allowed: a positive integer"),
        (
            lambda: mqar(4).sample(jax.random.key(0), 2, 15, 15),
            "max_length: got 15 with task 'mqar_4'; allowed: at least min_length=16",
        ),
        (
            lambda: pydoc_bytes("test").sample(jax.random.key(0), 2, 8, size=10**6),
            f"size: got 1000000 with the test split; allowed: at most {text_of('test').size - 1}",
        ),
    ],
)
def test_errors_name_the_argument_what_came_and_what_is_allowed(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value) == message
