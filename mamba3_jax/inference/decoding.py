"""Text from a model: prompts in, tokens out, with a state of fixed size in between.

The device runs two compiled functions: `reading.read`, one program per size of a piece, and `_decode`, a loop that
draws up to SLICE tokens of every row. Both are compiled anew for another model, batch size or kind of sampling, and not
for other prompts, seeds, numbers of tokens or temperatures; attention's slots, which come in multiples of SLOTS, are
part of the program. The host dispatches a slice before it reads the one before, so that the device need not wait.

A state is always one token behind: it has read all tokens of a row but the last, `pending`, which the next step reads.
"""

import dataclasses
import functools
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, UInt

from mamba3_jax.checks import check_choice, check_ids
from mamba3_jax.inference.reading import Prompt, keep, merge, pieces, read, split
from mamba3_jax.inference.sampling import Filters, Sampling, sample
from mamba3_jax.layers import AttentionState, MixerState
from mamba3_jax.models import LM, Cache, LMConfig, abstract_model

SLICE = 32  # tokens of a call of the device's loop at most; a stream asks for fewer
STREAM_SLICE = 8
# Tokens of one call of a prefill: of a row, and of all rows, whose activations must fit beside the model.
PIECE, PIECE_OF_ALL = 2048, 2**16
SLOTS = 256  # attention's caches come in multiples of so many tokens, each a program of its own
SEEDS = 2**31
NOTHING = -1  # in place of a token of a row that has ended

StateDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class GenerationState:
    """What continues the rows of a batch, without their tokens.

    Attributes:
        cache: the model's, after all tokens of a row but the last.
        pending: that last token.
        seen: which tokens a row has had, for the repetition penalty; over the true vocabulary.
        position: tokens that a row has had; they pick the random numbers of the next.
        seed: row i draws with seed + i.
    """

    cache: Cache
    pending: Int[Array, " b"]
    seen: Bool[Array, "b v"]
    position: Int[Array, " b"]
    seed: int


@dataclasses.dataclass(frozen=True)
class Generated:
    """New tokens of every row, a stop token included, and the state after them."""

    tokens: list[list[int]]
    state: GenerationState


def generate(
    model: LM,
    prompts: Sequence[Prompt] | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] = (),
    seed: int | None = None,
    state: GenerationState | None = None,
    state_dtype: StateDtype = "float32",
) -> Generated:
    """Continues every prompt by up to max_new_tokens.

    A row's tokens are those that it would get alone, with its own seed, up to the rounding of another batch size. N
    tokens and then N more from the state are the 2 N of one call. Repeating a call repeats its tokens.

    Args:
        model: its matrix products are in its own dtype.
        prompts: token ids of every row, of any lengths; None, or an empty row, goes on where `state` ended.
        max_new_tokens: of each row.
        sampling: how tokens are drawn.
        stop_tokens: each ends the row that draws it.
        seed: row i draws with seed + i; None is the state's seed, or 0.
        state: of a call before; it stays usable.
        state_dtype: of the SSM states while decoding. On GPUs bfloat16 halves the bytes of a step.

    Raises:
        ValueError: an empty prompt, one that is no row of ids of the vocabulary, a state of another model or batch, a
            number that is not allowed.
    """
    stream = Stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        seed=seed,
        state=state,
        state_dtype=state_dtype,
        slice_tokens=SLICE,
    )
    slices = list(stream)
    return Generated([list(itertools.chain(*rows)) for rows in zip(*slices)], stream.state)


class Stream:
    """The tokens of `generate` as they arrive: iterates once, over the new tokens of every row, a few at a time.

    Arguments and errors as there; `slice_tokens`, up to 32, is how many a row gets at a time.
    """

    def __init__(
        self,
        model: LM,
        prompts: Sequence[Prompt] | None = None,
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        stop_tokens: Sequence[int] = (),
        seed: int | None = None,
        state: GenerationState | None = None,
        state_dtype: StateDtype = "float32",
        slice_tokens: int = STREAM_SLICE,
    ):
        if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}; allowed: a positive integer")
        if not 1 <= slice_tokens <= SLICE:
            raise ValueError(f"slice_tokens: got {slice_tokens}; allowed: 1 to {SLICE}")
        check_choice("state_dtype", state_dtype, ("float32", "bfloat16"))
        v = model.config.vocab_size
        for token in stop_tokens:
            if not 0 <= token < v:
                raise ValueError(f"stop_tokens: got {token}; allowed: 0 to {v - 1}")
        state = prefill(model, prompts, state=state, seed=seed)
        b = state.pending.shape[0]
        self._model = split(model)
        self._stop_tokens = list(stop_tokens)
        self._stops = jnp.asarray(np.isin(np.arange(v), self._stop_tokens))
        self._filters = sampling.filters()
        self._seed = state.seed
        self._slice_tokens = slice_tokens
        self._remaining = max_new_tokens
        cache = _own(_reserve(state.cache, max_new_tokens), state_dtype)
        # Where all rows end together none has to be kept while others go on.
        ended = _own(cache, state_dtype) if stop_tokens and b > 1 else None
        self._rows = _Rows(cache, ended, state.pending, state.seen, state.position, done=jnp.zeros(b, bool))
        self._finished = False

    @property
    def state(self) -> GenerationState:
        """The state after the last token, once the iteration has ended.

        Raises:
            RuntimeError: before.
        """
        if not self._finished:
            raise RuntimeError("state: got a stream that has not ended; allowed: after its last tokens")
        rows = self._rows
        cache = rows.cache if rows.ended is None else _keep(rows.done, rows.ended, rows.cache)
        return GenerationState(cache, rows.pending, rows.seen, rows.position, self._seed)

    def __iter__(self) -> Iterator[list[list[int]]]:
        ended = np.zeros(len(self._rows.pending), bool)
        waiting = deque()
        while self._remaining or waiting:
            if self._remaining:
                waiting.append(self._dispatch())
            if len(waiting) == 2 or not self._remaining:
                tokens = np.asarray(waiting.popleft())
                ended |= np.isin(tokens, self._stop_tokens).any(axis=1)
                if ended.all():
                    # A slice that is under way ends at once.
                    self._remaining = 0
                    waiting.clear()
                yield [row[row != NOTHING].tolist() for row in tokens]
        self._finished = True

    def _dispatch(self) -> Int[Array, "b t"]:
        limit = min(self._slice_tokens, self._remaining)
        self._remaining -= limit
        self._rows, tokens = _decode(*self._model, self._rows, np.uint32(self._seed), self._filters, self._stops, limit)
        return tokens


def prefill(
    model: LM,
    prompts: Sequence[Prompt] | None,
    *,
    state: GenerationState | None = None,
    seed: int | None = None,
    piece: int | None = None,
) -> GenerationState:
    """Reads prompts and draws nothing. Arguments and errors as `generate`.

    `piece` is the tokens of a row that one call reads at most; None is 2048, and fewer for more than 32 rows.
    """
    v = model.config.vocab_size
    if state is None:
        prompts = _checked(prompts, v, may_be_empty=False)
        first = GenerationState(*_nothing(model.config, len(prompts)), seed=0)
        unread = [prompt[:-1] for prompt in prompts]
    else:
        _check_state(model, state)
        b = state.pending.shape[0]
        prompts = _checked([()] * b if prompts is None else prompts, v, may_be_empty=True)
        if len(prompts) != b:
            raise ValueError(f"state: got one of {b} rows; allowed: {len(prompts)}, as there are prompts")
        first = state
        last = np.asarray(state.pending)
        unread = [np.concatenate([last[i : i + 1], prompt])[:-1] for i, prompt in enumerate(prompts)]
    if seed is not None and not 0 <= seed < SEEDS:
        raise ValueError(f"seed: got {seed}; allowed: 0 to {SEEDS - 1}")
    if piece is not None and piece < 1:
        raise ValueError(f"piece: got {piece}; allowed: a positive integer, or None")
    piece = piece or max(1, min(PIECE, PIECE_OF_ALL // (1 << (len(prompts) - 1).bit_length())))
    cache = _read(model, first.cache, list(pieces(unread, piece, continues=state is not None)))
    seen = np.zeros(first.seen.shape, bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    return GenerationState(
        cache,
        pending=jnp.asarray([p[-1] if len(p) else q for p, q in zip(prompts, np.asarray(first.pending))], jnp.int32),
        seen=first.seen | seen,
        position=first.position + np.array([len(prompt) for prompt in prompts], np.int32),
        seed=first.seed if seed is None else seed,
    )


def _check_state(model: LM, state: GenerationState) -> None:
    """Raises ValueError for a state that is not one of this model's sizes."""
    expected = _sizes(model.empty_cache(1, capacity=0))
    if _sizes(state.cache) != expected or state.seen.shape[1] != model.config.vocab_size:
        raise ValueError("state: got one of another model; allowed: of this model's layers and sizes")


class _Rows(NamedTuple):
    """What a slice hands to the next: a `GenerationState`, which rows have ended, and their caches when they did."""

    cache: Cache
    ended: Cache | None
    pending: Int[Array, " b"]
    seen: Bool[Array, "b v"]
    position: Int[Array, " b"]
    done: Bool[Array, " b"]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="rows")
def _decode(
    config: LMConfig,
    parameters: dict,
    rows: _Rows,
    seed: UInt[Array, ""],
    filters: Filters,
    stops: Bool[Array, " v"],
    limit: Int[Array, ""] | int,
) -> tuple[_Rows, Int[Array, "b t"]]:
    """Up to `limit` tokens of every row that has not ended, and NOTHING for the others."""
    model = merge(config, parameters)
    b, v = rows.seen.shape
    seeds = seed + jnp.arange(b, dtype=jnp.uint32)

    def step(carry):
        i, rows, tokens = carry
        logits, cache = model.step(rows.pending, rows.cache)
        cache = jax.tree.map(lambda new, old: new.astype(old.dtype), cache, rows.cache)
        drawn = sample(logits[:, :v], _keys(seeds, rows.position), rows.seen, filters)
        ends = ~rows.done & stops[drawn]
        ended = rows.ended
        if ended is not None:
            # Read only in the few steps in which a row ends; the others update their cache in place, as without it.
            ended = jax.lax.cond(jnp.any(ends), lambda old: keep(ends, cache, old), lambda old: old, ended)
        pending = jnp.where(rows.done, rows.pending, drawn)
        new = _Rows(
            cache,
            ended,
            pending,
            seen=rows.seen.at[jnp.arange(b), pending].set(True),
            position=rows.position + ~rows.done,
            done=rows.done | ends,
        )
        return i + 1, new, tokens.at[:, i].set(jnp.where(rows.done, NOTHING, drawn))

    start = (jnp.int32(0), rows, jnp.full((b, SLICE), NOTHING, jnp.int32))
    _, rows, tokens = jax.lax.while_loop(lambda carry: (carry[0] < limit) & ~jnp.all(carry[1].done), step, start)
    return rows, tokens


def _keys(seeds: UInt[Array, " b"], position: Int[Array, " b"]) -> Key[Array, " b"]:
    """A row's random numbers depend on its seed and on how many tokens it has had, on nothing else."""
    return jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(seeds, position)


_keep = jax.jit(keep)


def _read(model: LM, cache: Cache, calls: list) -> Cache:
    """The cache after all calls, in buffers of its own, which may be donated."""
    slots = sum((call.rows * call.tokens.shape[1] for call in calls), np.zeros(1, int)).max()
    cache = _own(_reserve(cache, int(slots)), "float32")
    config, parameters = split(model)
    for call in calls:
        # Without rows to keep the old state is not needed beside the new one.
        cache = read(config, parameters, cache, call._replace(rows=None) if call.rows.all() else call)
    return cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nothing(config: LMConfig, b: int) -> tuple[Cache, Int[Array, " b"], Bool[Array, "b v"], Int[Array, " b"]]:
    """The arrays of a `GenerationState` before the first token."""
    nothing = jnp.zeros(b, jnp.int32)
    return abstract_model(config).empty_cache(b, capacity=0), nothing, jnp.zeros((b, config.vocab_size), bool), nothing


def _checked(prompts: Sequence[Prompt] | None, v: int, may_be_empty: bool) -> list[Int[np.ndarray, " _"]]:
    """Prompts as arrays of ids of the vocabulary."""
    if prompts is None or len(prompts) == 0:
        raise ValueError("prompts: got none; allowed: at least one, or the state of earlier ones")
    checked = [check_ids("prompts", prompt, v, f" in row {row}") for row, prompt in enumerate(prompts)]
    for row, prompt in enumerate(checked):
        if prompt.size == 0 and not may_be_empty:
            raise ValueError(f"prompts: got an empty one in row {row}; allowed: at least one token")
    return checked


def _reserve(cache: Cache, tokens: int) -> Cache:
    """The cache with slots for so many tokens more where it has attention."""

    def grow(state):
        if not isinstance(state, AttentionState):
            return state
        used = int(jnp.max(state.position))
        return state.reserve(math.ceil((used + tokens) / SLOTS) * SLOTS - used)

    return tuple(grow(state) for state in cache)


@functools.partial(jax.jit, static_argnames="dtype")
def _own(cache: Cache, dtype: StateDtype) -> Cache:
    """A copy, which may be donated, with SSM states of a dtype; angles are sums over the whole text: always float32."""

    def cast(state):
        if not isinstance(state, MixerState):
            return state
        return state._replace(ssm=state.ssm.map(lambda a: a.astype(dtype))._replace(angle=state.ssm.angle))

    return jax.tree.map(jnp.copy, tuple(cast(state) for state in cache))


def _sizes(cache: Cache) -> list[tuple]:
    """What caches of one model have in common: kinds and shapes, without rows and slots."""

    def sizes(state):
        slotted = {id(a) for a in (state.k, state.v)} if isinstance(state, AttentionState) else ()
        return type(state).__name__, [a.shape[2 if id(a) in slotted else 1 :] for a in jax.tree.leaves(state)]

    return [sizes(state) for state in cache]
