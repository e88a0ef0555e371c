"""Whether an imported model can be what its config says: its perplexity on a short text, under both activations of A.

Nothing in a released checkpoint says which activation it was trained with, and a wrong one leaves a model that runs and
is wrong in every layer. A text tells: a published model that has learnt English has a perplexity of some 10 to 40 per
token on plain prose, a table of word frequencies about 1000, and one activation in the other's place loses most of what
was learnt.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mamba3_jax.layers.mamba3 import AActivation
from mamba3_jax.layers.norm import rms_norm
from mamba3_jax.models import LMConfig, abstract_model

TEXT = """The lighthouse stands at the end of a narrow road, where the fields stop and the cliffs begin. In \
winter the wind comes straight from the sea and nobody walks there, but in the summer families bring \
bread and cheese and sit on the grass until the sun goes down. An old man used to keep the lamp. \
Every evening he climbed the stairs, cleaned the glass and lit the flame, and every morning he wrote \
a few words about the weather in a large book. Today a machine does his work, and the book lies in a \
museum in the town, open at the page of his last day. Visitors ask what the weather was like. The \
answer is always the same: it was raining, and the ships came home safely.
"""
# LIMIT and MARGIN are this project's own choice, no published numbers. LIMIT is some four times above what a model of
# English has on this text, and some seven times below a table of word frequencies.
LIMIT = 150
# With random parameters neither activation is right, and the perplexities are 0.1 % apart. Two small layers that
# knew this text by heart, trained with either of them, were 19 to 35 % worse under the other.
MARGIN = 1.1


class Plausibility(NamedTuple):
    """Perplexities per token of the built-in text."""

    chosen: float
    other: float


def measure(config: LMConfig, parameters: dict, tokens: Sequence[int]) -> Plausibility:
    """The perplexity of `tokens` under the config's activation and under the other one."""
    (other,) = set(get_args(AActivation)) - {config.mixer.a_activation}
    changed = dataclasses.replace(config, mixer=dataclasses.replace(config.mixer, a_activation=other))
    return Plausibility(_perplexity(config, parameters, tokens), _perplexity(changed, parameters, tokens))


def complaint(config: LMConfig, found: Plausibility) -> str | None:
    """One line on what speaks against the import, or None."""
    (other,) = set(get_args(AActivation)) - {config.mixer.a_activation}
    values = f"perplexity {found.chosen:.4g} on a short English text, {found.other:.4g} with --a_activation {other}"
    if found.other * MARGIN < found.chosen or (np.isfinite(found.other) and not np.isfinite(found.chosen)):
        return f"{values}; that is probably the one the model was trained with"
    if not found.chosen < LIMIT:
        return f"{values}; a model of English is below {LIMIT}: check a_activation and the tokenizer"
    return None


def _perplexity(config: LMConfig, parameters: dict, tokens: Sequence[int]) -> float:
    """exp of the mean loss of all tokens but the first.

    Block by block: they share one compiled program, and only one is in memory.
    """
    ids = np.asarray(tokens)
    x = jnp.asarray(parameters["embedding"][ids], jnp.float32)[None]
    for i, block in enumerate(abstract_model(config).blocks):
        graph, state = nnx.split(block)
        nnx.replace_by_pure_dict(state, parameters["blocks"][i])
        x = _run_block(graph, state, x)
    x = rms_norm(x, jnp.asarray(parameters["norm"]["weight"]))[0, :-1]
    head = jnp.asarray(parameters["embedding" if config.tie_embeddings else "head"])[: config.vocab_size]
    logits = jnp.einsum("td,vd->tv", x.astype(head.dtype), head, preferred_element_type=jnp.float32)
    losses = jax.nn.logsumexp(logits, axis=-1) - logits[jnp.arange(len(ids) - 1), ids[1:]]
    return float(jnp.exp(losses.mean()))


@functools.partial(jax.jit, static_argnums=0)
def _run_block(graph, state, x):
    return nnx.merge(graph, state)(x, None, None)[0]
