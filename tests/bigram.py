"""The baseline that a language model has to beat: the next token from the one before it, counted and smoothed."""

import numpy as np
from jaxtyping import Float, Int

DISCOUNT = 0.75


class Bigram:
    """Interpolated Kneser-Ney: doi.org/10.1109/ICASSP.1995.479394.

    p(b | a) = max(c(a, b) - D, 0) / c(a) + D n(a) / c(a) q(b)      n(a): different tokens seen after a
    q(b)     = (m(b) + 1) / (sum m + v)                             m(b): different tokens seen before b
    """

    def __init__(self, vocab_size: int):
        self.counts = np.zeros((vocab_size, vocab_size), np.int64)

    def count(self, tokens: Int[np.ndarray, " n"], targets: Int[np.ndarray, " n"]) -> None:
        """Adds pairs of a token and its next."""
        np.add.at(self.counts, (tokens, targets), 1)

    def probabilities(self) -> Float[np.ndarray, "v v"]:
        """p(b | a) in row a; q where a was never seen."""
        seen = self.counts > 0
        before = seen.sum(0)
        q = (before + 1) / (before.sum() + len(before))
        total = self.counts.sum(1, keepdims=True)
        kept = np.maximum(self.counts - DISCOUNT, 0) / np.maximum(total, 1)
        rest = DISCOUNT * seen.sum(1, keepdims=True) / np.maximum(total, 1)
        return np.where(total > 0, kept + rest * q, q)

    def perplexity(self, tokens: Int[np.ndarray, " n"], targets: Int[np.ndarray, " n"]) -> float:
        """exp of the mean of -log p(target | token)."""
        return float(np.exp(-np.mean(np.log(self.probabilities()[tokens, targets]))))
