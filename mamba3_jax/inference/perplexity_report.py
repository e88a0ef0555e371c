"""Perplexity as a table, a figure in the layout of figure 4 of arXiv:2603.15569, and plain values."""

import math

import numpy as np
from matplotlib.figure import Figure

from mamba3_jax.inference.perplexity import PositionBin, TextScore, nll_by_position
from mamba3_jax.inference.reports import table


def values(score: TextScore, bytes_scored: int) -> dict[str, float | int | None]:
    """A score for summary.json; nll in nats per token."""
    return dict(
        perplexity=score.perplexity,
        nll=score.mean,
        nll_standard_error=score.standard_error,
        bits_per_byte=score.bits_per_byte(bytes_scored),
        tokens=int(score.nll.size),
        windows=int(score.windows.size),
    )


def sentence(summary: dict) -> str:
    """The result of one score in one line."""
    score = summary["score"]
    return (
        f"perplexity {score['perplexity']:.4g}{_error(score, score['perplexity'])}: "
        f"{score['nll']:.4f}{_error(score)} nats per token, {score['bits_per_byte']:.4f} bits per byte, "
        f"on {score['tokens']} tokens of {summary['text']} ({summary['how']})"
    )


def length_table(summary: dict) -> str:
    """Perplexity against the length of the windows."""
    head = ("context, tokens", "perplexity", "standard error", "nats per token", "standard error", "windows")
    rows = []
    for length, score in summary["lengths"].items():
        error = score["nll_standard_error"]
        errors = ("-", "-") if error is None else (f"{error * score['perplexity']:.2g}", f"{error:.2g}")
        rows.append(
            (length, f"{score['perplexity']:.4f}", errors[0], f"{score['nll']:.4f}", errors[1], score["windows"])
        )
    return table(head, rows)


def report(summary: dict) -> str:
    """report.md."""
    lines = ["# Perplexity", "", f"    {summary['command']}", ""]
    if "score" in summary:
        lines += [sentence(summary) + "."]
    else:
        tokens, vocabulary = summary["scored_tokens"], summary["vocab_size"]
        lines += [
            f"{tokens} tokens of {summary['text']}, the same at every length, in windows of exactly that length which "
            f"do not overlap and each start from an empty state. Softmax over {vocabulary} tokens.",
            "",
            length_table(summary),
            "",
            "![perplexity against context length, and nll against position](perplexity.png)",
        ]
    lines += ["", "Standard errors take windows, or pieces of the one sequence, as independent draws."]
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    return "\n".join([*lines, f"{summary['seconds']:.1f} s on {summary['device']}; {versions}.", ""])


def plot(scores: dict[int, TextScore], trained_length: int | None) -> Figure:
    """Left: perplexity against the context length. Right: nll against the position in the longest windows."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = sorted(scores)
    perplexities = np.array([scores[length].perplexity for length in lengths])
    errors = [scores[length].standard_error or 0.0 for length in lengths]
    left.errorbar(lengths, perplexities, 2 * perplexities * errors, color="black", marker="o", capsize=3)
    left.set(xlabel="context length, tokens", ylabel="perplexity (2 standard errors)")
    left.set_title("windows of one length, the same text")
    left.set_xscale("log", base=2)
    left.set_xticks(lengths, [f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in lengths])
    left.minorticks_off()
    bins = nll_by_position(scores[lengths[-1]])
    centres = [math.sqrt(b.first * b.last) for b in bins]
    right.errorbar(centres, [b.nll for b in bins], [2 * _number(b) for b in bins], color="black", marker="o",
                   markersize=4, capsize=2)  # fmt: skip
    right.set(xlabel="tokens of context (bins of half an octave)", ylabel="-log p, nats per token")
    right.set_title(f"windows of {lengths[-1]} tokens")
    right.set_xscale("log", base=2)
    if trained_length is not None:
        for axis in (left, right):
            axis.axvline(trained_length, color="0.5", linestyle="--", label=f"trained at {trained_length} tokens")
            axis.legend()
    return figure


def _number(position_bin: PositionBin) -> float:
    return position_bin.standard_error or 0.0


def _error(score: dict, scale: float = 1.0) -> str:
    error = score["nll_standard_error"]
    return "" if error is None else f" +- {scale * error:.2g}"
