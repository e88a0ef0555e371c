"""Perplexity of a text: sliding windows, the state carried through, and windows of many lengths (figure 4's layout).

    nll = -mean_i log p(x_i | the tokens before x_i that the model read)        perplexity = exp(nll)

The text's first token has nothing before it and is not scored; every other one is scored exactly once. The softmax is
over the true vocabulary, without the entries that pad it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from mamba3_jax.checks import check_ids
from mamba3_jax.inference.progress import progress
from mamba3_jax.inference.scores import score
from mamba3_jax.models import LM

# Tokens that one call reads where the caller does not say.
TOKENS_PER_CALL = 2**14


@dataclasses.dataclass(frozen=True)
class TextScore:
    """How well a text is predicted.

    Attributes:
        nll: -log p of every scored token in nats, in the text's order; the first is that of the second token.
        windows: for each window, how many of them it scored.
    """

    nll: Float[np.ndarray, " tokens"]
    windows: Int[np.ndarray, " windows"]

    @property
    def mean(self) -> float:
        """nats per token."""
        return float(self.nll.mean(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """exp(mean); inf where that is more than a float holds."""
        try:
            return math.exp(self.mean)
        except OverflowError:
            return math.inf

    @property
    def standard_error(self) -> float | None:
        """Of the mean, taking windows as independent and tokens within one as not; None of a single window.

        The mean is a ratio of sums over windows, of their nll s_k and their tokens n_k, hence
        K/(K-1) sum_k (s_k - mean n_k)^2 / N^2.
        """
        count = self.windows.size
        if count < 2:
            return None
        starts = np.cumsum(self.windows) - self.windows
        residuals = np.add.reduceat(self.nll.astype(np.float64), starts) - self.mean * self.windows
        return float(np.sqrt(count / (count - 1) * np.sum(residuals**2)) / self.nll.size)

    def bits_per_byte(self, bytes_scored: int) -> float:
        """Bits for each of the bytes that the scored tokens stand for."""
        return self.mean * self.nll.size / math.log(2) / bytes_scored


def perplexity(
    model: LM,
    tokens: Sequence[int] | Int[np.ndarray, " n"],
    *,
    context: int = 2048,
    stride: int | None = None,
    batch_size: int | None = None,
) -> TextScore:
    """Sliding windows of `context` tokens, each starting from an empty state.

    Window k reads the tokens k stride ... k stride + context - 1 and scores what follows each of the last `stride`;
    the first window scores what follows any. So every scored token has at least context - stride + 1 tokens before it
    in its window, save in the first window. The last window is shorter.

    Args:
        model: the model.
        tokens: ids of the text.
        context: tokens of a window.
        stride: tokens from one window's start to the next; None is half of `context`, `context` is no overlap.
        batch_size: windows per call; None reads about 16384 tokens per call.

    Raises:
        ValueError: fewer than two tokens, not ids of the vocabulary, or a context, stride or batch_size out of range.
    """
    tokens = _checked(model, tokens)
    _check_positive("context", context)
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride: got {stride}; allowed: from 1 to the context, {context}")
    scored = tokens.size - 1
    width = min(context, scored)
    starts = np.arange(0, max(1, scored - width + stride), stride)
    rows = starts[:, None] + np.arange(width + 1)
    inside = rows[:, 1:] <= scored
    inside[1:, : width - stride] = False
    nll = _nll_of_rows(model, tokens[np.minimum(rows, scored)], batch_size, "perplexity")
    return TextScore(nll[inside], inside.sum(1))


def perplexity_with_state(model: LM, tokens: Sequence[int] | Int[np.ndarray, " n"], *, piece: int = 2048) -> TextScore:
    """The whole text as one sequence, read in pieces with the state carried: every token has all before it as context.

    Memory does not grow with the text, save for attention's, which holds it all. The windows of the result are pieces.

    Args:
        model: the model.
        tokens: ids of the text.
        piece: tokens per call.

    Raises:
        ValueError: as `perplexity`.
    """
    tokens = _checked(model, tokens)
    _check_positive("piece", piece)
    scored = tokens.size - 1
    piece = min(piece, scored)
    count = -(-scored // piece)
    padded = np.pad(tokens, (0, count * piece + 1 - tokens.size))
    split = nnx.split(model)
    cache = model.empty_cache(1, capacity=count * piece)
    nll = []
    for start in progress(range(0, count * piece, piece), "perplexity"):
        inputs, targets = padded[None, start : start + piece], padded[None, start + 1 : start + piece + 1]
        scores, cache = score(*split, inputs, targets, cache)
        nll.append(-np.asarray(scores.log_likelihood[0]))
    counts = np.full(count, piece)
    counts[-1] -= count * piece - scored
    return TextScore(np.concatenate(nll)[:scored], counts)


def extrapolation(
    model: LM,
    tokens: Sequence[int] | Int[np.ndarray, " n"],
    lengths: Sequence[int],
    *,
    batch_size: int | None = None,
) -> dict[int, TextScore]:
    """Windows of exactly each length that do not overlap, each starting from an empty state, all of one text.

    Every length scores the same tokens: as many whole windows of the longest as the text has.

    Args:
        model: the model.
        tokens: ids of the text.
        lengths: tokens of a window; each divides the longest.
        batch_size: windows of the longest per call, and as many tokens of the others; None: about 16384 tokens.

    Raises:
        ValueError: a text shorter than the longest window and one token, or another bad argument.
    """
    tokens = _checked(model, tokens)
    check_lengths(lengths)
    longest = max(lengths)
    count = (tokens.size - 1) // longest
    if not count:
        raise ValueError(
            f"lengths: got {longest} with a text of {tokens.size} tokens; allowed: at most {tokens.size - 1}"
        )
    results = {}
    for length in sorted(lengths):
        rows = np.arange(0, count * longest, length)[:, None] + np.arange(length + 1)
        size = batch_size and batch_size * (longest // length)
        nll = _nll_of_rows(model, tokens[rows], size, f"length {length}")
        results[length] = TextScore(nll.ravel(), np.full(len(rows), length))
    return results


def check_lengths(lengths: Sequence[int]) -> None:
    """Raises ValueError unless they are different, positive, and divide the longest."""
    good = lengths and min(lengths) > 0 and len(set(lengths)) == len(lengths)
    if not good or any(max(lengths) % length for length in lengths):
        raise ValueError(f"lengths: got {list(lengths)}; allowed: different positive divisors of the longest of them")


class PositionBin(NamedTuple):
    """Mean nll in nats of the tokens that follow `first` to `last` tokens of context, and its standard error."""

    first: int
    last: int
    nll: float
    standard_error: float | None


def nll_by_position(result: TextScore) -> list[PositionBin]:
    """Of windows of one length: the nll against the tokens read, in bins of half an octave; errors by windows."""
    length = int(result.windows[0])
    table = result.nll.reshape(-1, length).astype(np.float64)
    lasts = np.unique(np.minimum(np.rint(2 ** (np.arange(2 * math.log2(length) + 2) / 2)).astype(int), length))
    bins = []
    for first, last in zip(np.append(1, lasts[:-1] + 1).tolist(), lasts.tolist()):
        means = table[:, first - 1 : last].mean(1)
        error = float(means.std(ddof=1) / math.sqrt(means.size)) if means.size > 1 else None
        bins.append(PositionBin(first, last, float(means.mean()), error))
    return bins


def _nll_of_rows(
    model: LM, rows: Int[np.ndarray, "rows t"], batch_size: int | None, what: str
) -> Float[np.ndarray, "rows _"]:
    """-log p of every token of each row but its first; all calls have one shape."""
    if batch_size is None:
        batch_size = max(1, TOKENS_PER_CALL // (rows.shape[1] - 1))
    _check_positive("batch_size", batch_size)
    batch_size = min(batch_size, len(rows))
    split = nnx.split(model)
    nll = []
    for start in progress(range(0, len(rows), batch_size), what):
        batch = rows[start : start + batch_size]
        kept = len(batch)
        batch = np.pad(batch, [(0, batch_size - kept), (0, 0)])
        scores, _ = score(*split, batch[:, :-1], batch[:, 1:])
        nll.append(-np.asarray(scores.log_likelihood[:kept]))
    return np.concatenate(nll)


def _checked(model: LM, tokens: Sequence[int] | Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    ids = check_ids("tokens", tokens, model.config.vocab_size)
    if ids.size < 2:
        raise ValueError(f"tokens: got {ids.size}; allowed: at least 2, because the first one is not scored")
    return ids.astype(np.int32)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: got {value}; allowed: a positive integer")
