"""Drawing tokens: frequencies against probabilities computed from the definitions, and the options' errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.inference.sampling import Sampling, sample
from test_layers import assert_names, without_type_checks  # noqa: F401, a fixture

V = 12
DRAWS = 20_000
LOGITS = np.float32([1.3, -0.4, 2.1, 0.7, -2.5, 1.9, 0.2, -1.1, 2.6, -0.9, 0.5, 1.1])
SEEN = np.isin(np.arange(V), [1, 2, 8])
# Upper 0.1 % points of chi-square with 1 to 11 degrees of freedom.
CHI_SQUARE = [10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88, 29.59, 31.26]
CASES = {
    "as they are": Sampling(),
    "cold": Sampling(temperature=0.5),
    "hot": Sampling(temperature=3),
    "top-k": Sampling(top_k=4),
    "top-k of more than there are": Sampling(top_k=100),
    "top-p": Sampling(top_p=0.8),
    "top-p of the first": Sampling(top_p=0.01),
    "top-p of all": Sampling(top_p=1),
    "min-p": Sampling(min_p=0.1),
    "min-p of none": Sampling(min_p=0),
    "penalty": Sampling(repetition_penalty=1.8),
    "favour": Sampling(repetition_penalty=0.6),
    "top-p, then min-p": Sampling(top_p=0.75, min_p=0.4),
    "all": Sampling(temperature=1.4, top_k=9, top_p=0.9, min_p=0.15, repetition_penalty=1.3),
}


def draw(sampling: Sampling, logits=LOGITS, seen=SEEN, n: int = DRAWS, seed: int = 0) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), n)
    rows = (jnp.broadcast_to(jnp.asarray(a), (n, len(a))) for a in (logits, seen))
    logits, seen = rows
    return np.asarray(jax.jit(sample)(logits, keys, seen, sampling.filters()))


def probabilities(sampling: Sampling) -> np.ndarray:
    """By the definitions, in float64, token by token."""
    logits = np.float64(LOGITS)
    for i in np.flatnonzero(SEEN):
        logits[i] = (
            logits[i] / sampling.repetition_penalty if logits[i] > 0 else logits[i] * sampling.repetition_penalty
        )
    p = np.exp(logits / sampling.temperature)
    order = sorted(range(V), key=lambda i: -p[i])
    kept = order if sampling.top_k is None else order[: sampling.top_k]
    if sampling.top_p is not None:
        total, mass, first = sum(p[i] for i in kept), 0.0, []
        for i in kept:
            if mass < sampling.top_p:
                first.append(i)
            mass += p[i] / total
        kept = first
    if sampling.min_p is not None:
        kept = [i for i in kept if p[i] >= sampling.min_p * p[kept[0]]]
    result = np.zeros(V)
    result[kept] = p[kept]
    return result / result.sum()


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_the_probabilities(name):
    """Chi-square at 0.1 %, with a fixed seed; what has probability 0 is never drawn."""
    expected = probabilities(CASES[name]) * DRAWS
    counts = np.bincount(draw(CASES[name]), minlength=V)
    possible = expected > 0
    assert not counts[~possible].any()
    statistic = np.sum((counts - expected)[possible] ** 2 / expected[possible])
    degrees = possible.sum() - 1
    assert statistic <= (CHI_SQUARE[degrees - 1] if degrees else 0)


def test_the_cases_differ_in_what_they_leave():
    """So that the frequencies above tell the filters apart."""
    left = {name: int((probabilities(sampling) > 0).sum()) for name, sampling in CASES.items()}
    assert left["top-k"] == 4 and left["top-p of the first"] == 1
    assert 4 < left["top-p"] < V and left["min-p"] not in (left["top-p"], V)
    assert left["all"] < 9


def test_a_case_tells_top_p_before_min_p_from_the_other_order():
    """Min-p first would leave less probability in the tail, and top-p then fewer tokens."""
    sampling = CASES["top-p, then min-p"]
    p = probabilities(Sampling())
    p[p < sampling.min_p * p.max()] = 0
    order = np.argsort(-p)
    more_likely = np.cumsum(p[order] / p.sum()) - p[order] / p.sum()
    other = set(order[more_likely < sampling.top_p])
    assert other < set(np.flatnonzero(probabilities(sampling)))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0, top_k=3, top_p=0.5, min_p=0.9)])
def test_temperature_0_takes_the_largest(sampling):
    assert set(draw(sampling, n=100)) == {8}


def test_greedy_feels_the_penalty():
    """2.6 / 1.5 and 2.1 / 1.5 are below 1.9, which was not seen."""
    assert set(draw(Sampling(temperature=0, repetition_penalty=1.5), n=3)) == {5}


def test_a_penalty_lowers_a_negative_logit():
    logits, seen = np.float32([-1.0, -1.2, -9.0]), np.array([True, False, False])
    assert set(draw(Sampling(temperature=0, repetition_penalty=1.5), logits, seen, n=3)) == {1}


def test_a_tiny_temperature_is_greedy():
    """Without overflow: 1e-30 would send logits beyond float32."""
    assert set(draw(Sampling(temperature=1e-30), n=100)) == {8}


@pytest.mark.parametrize("name", ["as they are", "top-k", "top-p", "all"])
def test_a_row_depends_on_its_own_key_only(name):
    filters = CASES[name].filters()
    keys = jax.random.split(jax.random.key(3), 50)
    logits, seen = (jnp.broadcast_to(jnp.asarray(a), (50, V)) for a in (LOGITS, SEEN))
    together = sample(logits, keys, seen, filters)
    others = jax.random.normal(jax.random.key(4), (10, V)).at[4].set(LOGITS)
    other_keys = jax.random.key_data(jax.random.split(jax.random.key(9), 10))
    for row in (0, 7, 49):
        mixed_keys = jax.random.wrap_key_data(other_keys.at[4].set(jax.random.key_data(keys)[row]))
        assert sample(others, mixed_keys, seen[:10], filters)[4] == together[row]
    assert len(np.unique(together)) > 2


def test_only_needed_steps_are_compiled():
    """A vocabulary is sorted for top-p only."""
    filters = [Sampling(temperature=t, min_p=0.1).filters() for t in (0, 1)] + [Sampling(top_p=0.5).filters()]
    args = jnp.zeros((2, V)), jax.random.split(jax.random.key(0), 2), jnp.zeros((2, V), bool)
    sorts = ["sort" in str(jax.make_jaxpr(sample)(*args, f)) for f in filters]
    assert sorts == [False, False, True]


ERRORS = [
    ("temperature", -0.1, "0 (greedy) or a positive number"),
    ("temperature", float("nan"), "0 (greedy) or a positive number"),
    ("temperature", float("inf"), "0 (greedy) or a positive number"),
    ("top_k", 0, "a positive integer, or None"),
    ("top_p", 0.0, "above 0 and up to 1, or None"),
    ("top_p", 1.1, "above 0 and up to 1, or None"),
    ("min_p", -0.1, "from 0 to 1, or None"),
    ("min_p", 1.5, "from 0 to 1, or None"),
    ("repetition_penalty", 0.0, "a positive number"),
]


@pytest.mark.parametrize("field, value, allowed", ERRORS)
def test_a_bad_option_is_named(field, value, allowed, without_type_checks):  # noqa: F811
    with pytest.raises(ValueError) as error:
        Sampling(**{field: value})
    assert_names(str(error.value), field, f"got {value}", allowed)
