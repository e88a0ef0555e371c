"""Perplexity against a full softmax in float64, windows, states, many lengths, memory, and the command."""

import functools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

import mamba3_jax.inference
from mamba3_jax import cli
from mamba3_jax.data import ByteTokenizer
from mamba3_jax.inference import scores
from mamba3_jax.inference.perplexity import (
    TextScore,
    extrapolation,
    nll_by_position,
    perplexity,
    perplexity_with_state,
)
from mamba3_jax.inference.perplexity_report import plot
from mamba3_jax.inference.scores import score
from mamba3_jax.layers import AttentionConfig, Mamba2Config, Mamba3Config
from mamba3_jax.models import LM, LMConfig
from mamba3_jax.models.checkpoint import save_model
from test_layers import randomised, without_type_checks  # noqa: F401, a fixture

# float32 of two layers against itself in another order, and the rounding of a log of a sum of 250 terms.
TOLERANCE = 1e-4
SISO = Mamba3Config(d_model=32, d_state=16, head_dim=16)
# 250 ids, padded to 256: the six that pad are no part of the softmax.
CONFIGS = {
    "siso": LMConfig(SISO, n_layers=2, vocab_size=250, mlp_width=32),
    "mimo, untied": LMConfig(
        Mamba3Config(d_model=32, d_state=16, head_dim=16, mimo_rank=2), 1, 250, tie_embeddings=False
    ),
    "hybrid": LMConfig(SISO, 2, 250, attention=AttentionConfig(32, 2), attention_layers=(1,)),
    "mamba2": LMConfig(Mamba2Config(d_model=32, d_state=16, head_dim=16), 1, 250),
}
TOKENS = np.random.default_rng(1).integers(250, size=150)
JITTED = {}


@functools.cache
def model_of(name: str) -> LM:
    """No two tokens alike, and weights far enough from 0 that the model is sure of some."""
    return randomised(lambda: LM(CONFIGS[name], rngs=nnx.Rngs(0)))[0]


@functools.cache
def log_softmax_from(name: str, start: int) -> np.ndarray:
    """Of the text from a token on, over all logits at once in float64; padded behind, so that it compiles once."""
    graph, parameters = nnx.split(model_of(name))
    run = JITTED.setdefault(name, jax.jit(lambda parameters, tokens: nnx.merge(graph, parameters)(tokens)[0]))
    logits = run(parameters, np.pad(TOKENS[None, start:], [(0, 0), (0, start)]))
    return log_softmax(np.float64(logits[0, :, :250]), axis=1)


def full(name: str, start: int, stop: int) -> np.ndarray:
    """-log p of the tokens start + 1 to stop after those from start on."""
    return -log_softmax_from(name, start)[np.arange(stop - start), TOKENS[start + 1 : stop + 1]]


@pytest.fixture
def few_logits_at_once(monkeypatch):
    """Seven positions of 256 logits; the program is made anew."""
    monkeypatch.setattr(scores, "LOGITS_AT_ONCE", 7 * 256)
    score.clear_cache()
    yield
    score.clear_cache()


@pytest.mark.parametrize("name", ["siso", "mimo, untied"])
def test_scores_are_those_of_a_full_softmax_over_the_true_vocabulary(name, few_logits_at_once):
    tokens = jnp.asarray(TOKENS[:60].reshape(3, 20), jnp.int32)
    logits = np.float64(model_of(name)(tokens)[0])[:, :, :250]
    targets = np.array(jnp.roll(tokens, -1, axis=1))
    # Half of the targets are what greedy decoding takes.
    targets[:, ::2] = logits.argmax(-1)[:, ::2]
    found, cache = score(*nnx.split(model_of(name)), tokens, jnp.asarray(targets))
    expected = np.take_along_axis(log_softmax(logits, axis=-1), targets[:, :, None], -1)[:, :, 0]
    np.testing.assert_allclose(found.log_likelihood, expected, atol=TOLERANCE)
    np.testing.assert_array_equal(found.greedy, targets == logits.argmax(-1))
    assert cache is None


def test_the_logits_of_all_positions_are_never_held():
    config = LMConfig(SISO, n_layers=1, vocab_size=50000)
    graph, parameters = nnx.split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))
    tokens = np.zeros((4, 2048), np.int32)
    held = score.lower(graph, parameters, tokens, tokens).compile().memory_analysis().temp_size_in_bytes
    all_logits = tokens.size * 50000 * 4
    assert held < 3 * 4 * scores.LOGITS_AT_ONCE < all_logits / 2


@pytest.mark.parametrize(
    "context, stride, windows", [(40, 13, 10), (40, 40, 4), (50, 1, 100), (149, 149, 1), (150, 9, 1), (4000, None, 1)]
)
def test_each_token_is_scored_once_with_the_context_that_is_promised(context, stride, windows):
    result = perplexity(model_of("siso"), TOKENS, context=context, stride=stride, batch_size=4)
    assert result.nll.shape == (149,) and result.windows.sum() == 149 and result.windows.size == windows
    step = stride or context // 2
    for i in (1, 2, context // 2, context, context + 1, context + step, 100, 139, 149):
        if i > 149:
            continue
        # The first window that reads as far as the token before i.
        start = max(0, -(-(i - context) // step)) * step
        assert start == 0 or i - start > context - step
        np.testing.assert_allclose(result.nll[i - 1], full("siso", start, i)[-1], atol=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_with_the_state_carried_every_token_has_the_whole_text_before_it(name):
    result = perplexity_with_state(model_of(name), TOKENS, piece=44)
    np.testing.assert_allclose(result.nll, full(name, 0, 149), atol=TOLERANCE)
    np.testing.assert_array_equal(result.windows, [44, 44, 44, 17])
    assert result.perplexity == pytest.approx(math.exp(full(name, 0, 149).mean()), rel=TOLERANCE)


def test_all_lengths_score_the_same_tokens_in_windows_of_exactly_that_length():
    score.clear_cache()
    results = extrapolation(model_of("siso"), TOKENS, [64, 16, 32], batch_size=1)
    assert list(results) == [16, 32, 64] and score._cache_size() == 3
    for length, result in results.items():
        expected = [full("siso", start, start + length) for start in range(0, 128, length)]
        np.testing.assert_allclose(result.nll, np.concatenate(expected), atol=TOLERANCE)
        np.testing.assert_array_equal(result.windows, [length] * (128 // length))


def test_bins_of_positions_cover_each_position_once():
    nll = np.random.default_rng(0).random((5, 100))
    bins = nll_by_position(TextScore(nll.ravel(), np.full(5, 100)))
    assert [b.first for b in bins] == [1, *(b.last + 1 for b in bins[:-1])] and bins[-1].last == 100
    for b in bins:
        means = nll[:, b.first - 1 : b.last].mean(1)
        assert b.nll == pytest.approx(means.mean()) and b.standard_error == pytest.approx(means.std(ddof=1) / 5**0.5)


def test_the_standard_error_is_that_of_the_windows_means():
    rng = np.random.default_rng(0)
    nll = rng.random((40, 1)) + 0.01 * rng.random((40, 25))
    equal = TextScore(nll.ravel(), np.full(40, 25))
    assert equal.standard_error == pytest.approx(nll.mean(1).std(ddof=1) / 40**0.5)
    assert TextScore(nll.ravel(), np.array([1000])).standard_error is None
    # Of windows of unequal size: the jackknife, which knows nothing of the formula.
    sizes = np.tile([10, 40], 20)
    uneven = TextScore(nll.ravel(), sizes)
    parts = np.split(nll.ravel(), np.cumsum(sizes)[:-1])
    left_out = [np.concatenate(parts[:k] + parts[k + 1 :]).mean() for k in range(40)]
    assert uneven.standard_error == pytest.approx(np.sqrt(39 * np.var(left_out)), rel=0.1)


def test_bits_per_byte():
    assert TextScore(np.array([1.0, 2.0, 3.0]), np.array([3])).bits_per_byte(12) == pytest.approx(0.5 / math.log(2))


def test_a_perplexity_beyond_floats_is_infinite():
    assert TextScore(np.array([700.0, 730.0]), np.array([2])).perplexity == math.inf


ERRORS = {
    "one token": ([3], {}, "tokens: got 1; allowed: at least 2"),
    "an id out of range": ([3, 4, 250], {}, "tokens: got id 250 at token 2; allowed: 0 to 249"),
    "an id that is 5 in 32 bits": ([3, 2**32 + 5], {}, "tokens: got id 4294967301 at token 1; allowed: 0 to 249"),
    "floats": (TOKENS / 2, {}, "tokens: got float64 of shape .150,.; allowed: integers of shape"),
    "rows": ([[3, 4]], {}, "tokens: got int64 of shape .1, 2.; allowed: integers of shape"),
    "no context": (TOKENS, dict(context=0), "context: got 0; allowed: a positive integer"),
    "a stride over the context": (TOKENS, dict(context=8, stride=9), "stride: got 9; allowed: from 1 to the context"),
    "no batch": (TOKENS, dict(batch_size=0), "batch_size: got 0; allowed: a positive integer"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_bad_argument_is_named(case, without_type_checks):  # noqa: F811
    tokens, options, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        perplexity(model_of("siso"), tokens, **options)


def test_bad_lengths_are_named():
    with pytest.raises(ValueError, match=r"lengths: got \[48, 32\]; allowed: different positive divisors"):
        extrapolation(model_of("siso"), TOKENS, [48, 32])
    with pytest.raises(ValueError, match="lengths: got 256 with a text of 150 tokens; allowed: at most 149"):
        extrapolation(model_of("siso"), TOKENS, [256])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model of bytes, and a text with characters of several bytes."""
    folder = tmp_path_factory.mktemp("model")
    config = LMConfig(SISO, n_layers=1, vocab_size=256)
    model, _ = randomised(lambda: LM(config, rngs=nnx.Rngs(0)))
    save_model(folder / "model", config, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    (folder / "text").write_text("Übung macht den Meister. " * 12)
    return folder, model


def test_the_command_reports_the_perplexity(directory, tmp_path, capsys):
    folder, model = directory
    tokens = ByteTokenizer().encode((folder / "text").read_text())
    line = ["eval", str(folder / "model"), "--perplexity", str(folder / "text"), "--results_dir", str(tmp_path)]
    expected = {
        ("--context", "64", "--stride", "16"): perplexity(model, tokens, context=64, stride=16),
        ("--context", "100", "--carry_state", "true"): perplexity_with_state(model, tokens, piece=100),
    }
    for options, result in expected.items():
        assert cli.main([*line, *options]) == 0
        found = json.loads((tmp_path / "summary.json").read_text())["score"]
        assert found["perplexity"] == pytest.approx(result.perplexity, rel=TOLERANCE)
        assert found["tokens"] == len(tokens) - 1 == 26 * 12 - 1
        # Of bytes, each token is one.
        assert found["bits_per_byte"] == pytest.approx(result.mean / math.log(2), rel=TOLERANCE)
        assert f"perplexity {result.perplexity:.4g} +- " in capsys.readouterr().out
        assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "report.md"}


def test_the_command_sweeps_lengths(directory, tmp_path):
    folder, _ = directory
    line = ["eval", str(folder / "model"), "--perplexity", str(folder / "text"), "--results_dir", str(tmp_path)]
    assert cli.main([*line, "--lengths", "[16,64]", "--trained_length", "32"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "report.md", "perplexity.png"}
    summary, report = json.loads((tmp_path / "summary.json").read_text()), (tmp_path / "report.md").read_text()
    assert summary["scored_tokens"] == 256 and f"    {summary['command']}\n" in report
    for length, windows in (("16", 16), ("64", 4)):
        assert summary["lengths"][length]["windows"] == windows
        row = next(row for row in report.splitlines() if row.startswith(f"| {length} "))
        assert f" {summary['lengths'][length]['perplexity']:.4f} " in row


def test_the_figure_names_its_axes_and_marks_the_trained_length():
    results = extrapolation(model_of("siso"), TOKENS, [16, 32], batch_size=1)
    left, right = plot(results, 16).axes
    assert left.get_xlabel() == "context length, tokens" and "perplexity" in left.get_ylabel()
    assert "tokens" in right.get_xlabel() and "nats per token" in right.get_ylabel()
    assert all(axis.get_legend().get_texts()[0].get_text() == "trained at 16 tokens" for axis in (left, right))
    assert all(axis.get_legend() is None for axis in plot(results, None).axes)
    np.testing.assert_allclose(left.lines[0].get_ydata(), [result.perplexity for result in results.values()])


BAD_COMMANDS = {
    "nothing to evaluate": ([], "perplexity: got None with tasks None; allowed: one of the two"),
    "no such file": (["--perplexity", "{}/none"], "perplexity: got {}/none (No such file or directory); allowed: a"),
    "a folder": (["--perplexity", "{}"], "perplexity: got {} (Is a directory); allowed: a text file"),
    "an empty file": (["--perplexity", "{}/empty"], "perplexity: got {}/empty, which is empty; allowed: a text file"),
    "one token": (["--perplexity", "{}/one"], "tokens: got 1; allowed: at least 2"),
    "not text": (["--perplexity", "{}/binary"], "perplexity: got {}/binary (byte 1 is not UTF-8); allowed: a text"),
    "too short": (["--perplexity", "{}/one", "--lengths", "[64]"], "tokens: got 1; allowed: at least 2"),
    "two ways": (["--perplexity", "{}/one", "--stride", "8", "--carry_state", "true"], "lengths: got more than one"),
    "an option of tasks": (
        ["--perplexity", "{}/one", "--limit", "8"],
        "limit: got 8 without tasks; allowed: with tasks",
    ),
    "an option of texts": (
        ["--tasks", "a", "--stride", "8"],
        "stride: got 8 without perplexity; allowed: with perplex",
    ),
    "an option of lengths": (
        ["--perplexity", "{}/one", "--trained_length", "8"],
        "trained_length: got 8 without lengths; allowed: with lengths",
    ),
    "a context beside lengths": (
        ["--perplexity", "{}/one", "--lengths", "[64]", "--context", "8"],
        "context: got 8 with lengths; allowed: without lengths",
    ),
    "a batch of one sequence": (
        ["--perplexity", "{}/one", "--carry_state", "true", "--batch_size", "8"],
        "batch_size: got 8 with carry_state; allowed: without carry_state",
    ),
    "an unknown option": (["--perplexity", "{}/one", "--strid", "8"], "allowed: model, perplexity, context, stride"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_input_is_one_line(case, directory, tmp_path, capsys):
    options, message = BAD_COMMANDS[case]
    for name, content in (("empty", b""), ("one", b"a"), ("binary", b"a\xff")):
        (tmp_path / name).write_bytes(content)
    options = [option.format(tmp_path) for option in options]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", str(directory[0] / "model"), *options])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and message.format(tmp_path) in error


def test_tasks_without_the_harness_say_how_to_get_it(directory, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mamba3_jax.inference.harness", raising=False)
    monkeypatch.delattr(mamba3_jax.inference, "harness", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", str(directory[0] / "model"), "--tasks", "lambada_openai"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "tasks: got no lm-evaluation-harness; run: uv sync --extra eval\n"
