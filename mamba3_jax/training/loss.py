"""Cross-entropy over a large vocabulary, some tokens of every row after the other.

    nll = sum over the mask of -log p(target)        z = sum over the mask of log(sum exp(logits))^2

The (b, t, vocabulary) logits never exist: those of one chunk of tokens do, and are computed again in the backward pass.
Of k chunks each has every k-th token, so that devices among which a row's time is cut have a part of every chunk. The
softmax is over the true vocabulary, without the entries that pad it. z-loss: section 5 of arXiv:2204.02311 (PaLM).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mamba3_jax.checks import check_array, check_rank
from mamba3_jax.distributed.rules import constrain

# Added to the scores of entries that pad the vocabulary: finite, so that its product with 0 is 0.
PADDING = -1e30


class LossSums(NamedTuple):
    """Sums over the targets that count, in nats (nll) and nats squared (z), and how many they are."""

    nll: Float[Array, ""]
    z: Float[Array, ""]
    count: Int[Array, ""]


def cross_entropy(
    logits: Callable[[Float[Array, "b c d"]], Float[Array, "b c v"]],
    x: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    *,
    vocab_size: int,
    chunk: int,
) -> LossSums:
    """The sums over rows of any length.

    Args:
        logits: the head, `LM.logits`.
        x: what the head reads, `LM.hidden`'s.
        targets: ids below vocab_size; anything where the mask is false.
        mask: which targets count.
        vocab_size: of the head's entries, those that are tokens.
        chunk: tokens of every row whose logits exist at once.
    """
    b, t, _ = check_rank("x", x, "b t d")
    check_array("targets", targets, "b t", dict(b=b, t=t), kind=jnp.integer)
    check_array("mask", mask, "b t", dict(b=b, t=t), kind=jnp.bool_)
    chunks = -(-t // chunk)
    size = -(-t // chunks)

    def split(a: Array) -> Array:
        a = jnp.pad(a, [(0, 0), (0, chunks * size - t)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(b, size, chunks, *a.shape[2:]), 2, 0)

    @jax.checkpoint
    def body(sums, piece):
        x, targets, mask = piece
        scores = constrain(logits(constrain(x, "batch", "time", None)), "batch", "time", "vocab")
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        # Masks, where a slice or an index would gather a vocabulary that is cut over devices. They are made of a vector
        # that follows the piece: all else JAX moves out of the loop, and keeps as arrays of the logits' size.
        token = jnp.arange(scores.shape[-1], dtype=targets.dtype)[None, None] + 0 * targets[:1, :1, None]
        if vocab_size < scores.shape[-1]:
            scores += jnp.where(token < vocab_size, 0.0, PADDING).astype(scores.dtype)
        normaliser = jax.nn.logsumexp(scores, axis=-1)
        chosen = jnp.sum(scores * (token == targets[..., None]), axis=-1)
        nll, z = jnp.where(mask, normaliser - chosen, 0), jnp.where(mask, normaliser**2, 0)
        return (sums[0] + jnp.sum(nll), sums[1] + jnp.sum(z)), None

    zero = jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
    (nll, z), _ = jax.lax.scan(body, (zero, zero), (split(x), split(targets), split(mask)))
    return LossSums(nll, z, jnp.sum(mask))
