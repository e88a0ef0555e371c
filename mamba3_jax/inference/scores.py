"""How likely given tokens are under a model, without a (b, t, vocabulary) array: the head takes few positions at once.

The softmax is over the true vocabulary, without the entries that pad it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mamba3_jax.models import LM, Cache

# Logits held at once, in numbers: 256 MB of float32.
LOGITS_AT_ONCE = 2**26


class Scores(NamedTuple):
    """Of every target token.

    Attributes:
        log_likelihood: log p(target) in nats.
        greedy: whether the target is what greedy decoding takes.
    """

    log_likelihood: Float[Array, "b t"]
    greedy: Bool[Array, "b t"]


@functools.partial(jax.jit, static_argnums=0)
def score(
    graph: nnx.GraphDef,
    parameters: nnx.State,
    tokens: Int[Array, "b t"],
    targets: Int[Array, "b t"],
    cache: Cache | None = None,
) -> tuple[Scores, Cache | None]:
    """Scores targets[i, j] after tokens[i, :j + 1], and after what `cache` has read. Compiles once for each shape.

    Args:
        graph, parameters: nnx.split of the model.
        tokens: ids below vocab_size.
        targets: ids below vocab_size.
        cache: what an earlier call returned, or `LM.empty_cache`; None starts from nothing and returns None.
    """
    model = nnx.merge(graph, parameters)
    x, after = model.hidden(tokens, cache)
    return _score_targets(model, x, targets), None if cache is None else after


def _score_targets(model: LM, x: Float[Array, "b t d"], targets: Int[Array, "b t"]) -> Scores:
    """The head and the softmax, some positions after the other."""
    shape, vocab = targets.shape, model.config.vocab_size
    size = max(1, min(targets.size, LOGITS_AT_ONCE // model.config.padded_vocab_size))
    pieces = -(-targets.size // size)

    def in_pieces(a: Array) -> Array:
        a = a.reshape(targets.size, *a.shape[2:])
        a = jnp.pad(a, [(0, pieces * size - targets.size)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(pieces, size, *a.shape[1:])

    def score_piece(piece):
        x, targets = piece
        logits = model.logits(x[None])[0, :, :vocab]
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=1), targets == jnp.argmax(logits, axis=1)

    scores = jax.lax.map(score_piece, (in_pieces(x), in_pieces(targets)))
    return Scores(*(a.ravel()[: targets.size].reshape(shape) for a in scores))
