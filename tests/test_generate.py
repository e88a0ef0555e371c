"""Generation: greedy against the full pass, batches against single prompts, pieces, continuations, stops, programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba3_jax.inference import Generated, Sampling, Stream, decoding, generate, prefill
from mamba3_jax.inference.decoding import _decode
from mamba3_jax.inference.reading import pieces, read
from mamba3_jax.layers import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, Mamba3Config
from mamba3_jax.models import LM, LMConfig
from test_layers import assert_names, randomised, without_type_checks  # noqa: F401, a fixture

V = 20  # padded to 32 in the logits
SISO = Mamba3Config(d_model=32, d_state=16, head_dim=16)
MIMO = Mamba3Config(d_model=32, d_state=16, head_dim=16, mimo_rank=2, conv_width=3, output_norm="before_gate")
ATTENTION = AttentionConfig(d_model=32, n_heads=4, n_kv_heads=2, rotary_dim=4, conv_width=3)
CONFIGS = {
    "siso": LMConfig(SISO, n_layers=2, vocab_size=V, mlp_width=64),
    "mimo": LMConfig(MIMO, n_layers=2, vocab_size=V, tie_embeddings=False),
    "hybrid": LMConfig(SISO, n_layers=2, vocab_size=V, attention=ATTENTION, attention_layers=(1,)),
    "mamba2": LMConfig(Mamba2Config(d_model=32, d_state=16, head_dim=16), n_layers=2, vocab_size=V),
    "gdn": LMConfig(GatedDeltaNetConfig(d_model=32, d_state=16, head_dim=16), n_layers=2, vocab_size=V),
}
GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=1.5, top_p=0.95, repetition_penalty=1.1)
N = 12


@functools.cache
def build(name: str) -> LM:
    return randomised(lambda: LM(CONFIGS[name], rngs=nnx.Rngs(0)))[0]


def draw(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, length).tolist() for length in lengths]


PROMPTS = draw(19, 1, 24)


@functools.cache
def drawn(name: str) -> Generated:
    return generate(build(name), PROMPTS, max_new_tokens=N, sampling=DRAWN, seed=5)


@functools.cache
def stepper(name: str):
    graph, parameters = nnx.split(build(name))
    step = jax.jit(lambda p, pending, cache: nnx.merge(graph, p).step(pending, cache)[0])
    return lambda state: np.asarray(step(parameters, state.pending, state.cache))[:, :V]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_the_argmax_of_the_full_pass(name):
    """Of every row alone, which is also what a batch of different lengths promises."""
    model = build(name)
    got = generate(model, PROMPTS, max_new_tokens=N, sampling=GREEDY)
    texts = [prompt + tokens for prompt, tokens in zip(PROMPTS, got.tokens)]
    rows = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(rows, texts):
        row[: len(text)] = text  # padding after a text changes nothing before it
    graph, parameters = nnx.split(model)
    logits = jax.jit(lambda p: nnx.merge(graph, p)(jnp.asarray(rows))[0])(parameters)
    best = np.argmax(logits[:, :, :V], axis=-1)
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, got.tokens)):
        assert len(tokens) == N
        assert tokens == best[row, len(prompt) - 1 : len(prompt) - 1 + N].tolist()
    assert len({tuple(tokens) for tokens in got.tokens}) == 3


@pytest.mark.parametrize("name", ["siso", "hybrid"])
def test_a_row_draws_what_its_prompt_draws_alone(name):
    """With its own seed, which is the batch's plus the row."""
    for row, prompt in enumerate(PROMPTS):
        alone = generate(build(name), [prompt], max_new_tokens=N, sampling=DRAWN, seed=5 + row)
        assert alone.tokens[0] == drawn(name).tokens[row]


def test_seeds_reproduce_and_differ():
    again = generate(build("siso"), PROMPTS, max_new_tokens=N, sampling=DRAWN, seed=5)
    other = generate(build("siso"), PROMPTS, max_new_tokens=N, sampling=DRAWN, seed=50)
    assert again.tokens == drawn("siso").tokens
    assert all(a != b for a, b in zip(again.tokens, other.tokens))


@pytest.mark.parametrize("name, piece", [("siso", 7), ("siso", 4), ("mimo", 4), ("hybrid", 4), ("gdn", 4)])
def test_pieces_read_what_one_call_reads(name, piece):
    """Also where a row has no token for the first piece, and where it ends pieces before another."""
    prompts = draw(23, 5, 1)
    whole, cut = (prefill(build(name), prompts, piece=size) for size in (32, piece))
    np.testing.assert_allclose(stepper(name)(cut), stepper(name)(whole), rtol=1e-5, atol=1e-5)
    for a, b in ((cut.pending, whole.pending), (cut.seen, whole.seen), (cut.position, whole.position)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("limits, width", [(dict(PIECE=4), 4), (dict(PIECE_OF_ALL=16), 4), (dict(PIECE_OF_ALL=2), 1)])
def test_long_prompts_are_read_in_pieces_and_more_rows_in_smaller_ones(limits, width, monkeypatch):
    """Three rows count as four; at least one token of each is read at a time."""
    widths = set()

    def watched(*args, **options):
        for piece in pieces(*args, **options):
            widths.add(piece.tokens.shape[1])
            yield piece

    prompts = draw(23, 5, 1)
    whole = prefill(build("siso"), prompts)
    monkeypatch.setattr(decoding, "pieces", watched)
    for name, limit in limits.items():
        monkeypatch.setattr(decoding, name, limit)
    cut = prefill(build("siso"), prompts)
    assert max(widths) == width
    np.testing.assert_allclose(stepper("siso")(cut), stepper("siso")(whole), rtol=1e-5, atol=1e-5)


def test_attention_has_room_for_what_is_drawn(monkeypatch):
    """Past several multiples of its slots: where a prompt is read, where tokens are drawn, and from a state on."""
    expected = drawn("hybrid").tokens
    monkeypatch.setattr(decoding, "SLOTS", 8)
    first = generate(build("hybrid"), PROMPTS, max_new_tokens=3, sampling=DRAWN, seed=5)
    second = generate(build("hybrid"), state=first.state, max_new_tokens=N - 3, sampling=DRAWN)
    assert [a + b for a, b in zip(first.tokens, second.tokens)] == expected
    # 24 tokens of the longest prompt, and all but the last of the new ones.
    (slots,) = (layer.k.shape[1] for layer in second.state.cache if hasattr(layer, "position"))
    assert slots % 8 == 0 and 24 + N - 1 <= slots < 256


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("size", [1, 7, 16, 64, 2048])
def test_pieces_hold_every_token_once_and_have_few_sizes(size, continues):
    """Two sizes for a new prompt, three for one that goes on; only a row's first piece is padded, on the left."""
    prompts = draw(0, 1, 15, 16, 64, 300, 2047, 2048, 4097)
    read_tokens: list[list[int]] = [[] for _ in prompts]
    sizes = set()
    for piece in pieces(prompts, size, continues):
        sizes.add(piece.tokens.shape[1])
        for row in np.flatnonzero(piece.rows):
            tokens = piece.tokens[row]
            if piece.segment_ids is not None:
                assert not continues and not read_tokens[row]
                tokens = tokens[piece.segment_ids[row] == 1]
                assert np.all(np.diff(piece.segment_ids[row]) >= 0)
            read_tokens[row].extend(tokens.tolist())
    assert read_tokens == prompts
    assert len(sizes) <= (3 if continues else 2) and max(sizes) <= size


@pytest.mark.parametrize("name", ["siso", "mimo", "hybrid", "mamba2", "gdn"])
def test_halves_are_the_whole(name):
    """N tokens, then N more from the state, are 2 N of one call; the state can be used twice."""
    model = build(name)
    whole = generate(model, PROMPTS, max_new_tokens=2 * N, sampling=DRAWN, seed=5)
    first = drawn(name)
    for _ in range(2):
        second = generate(model, state=first.state, max_new_tokens=N, sampling=DRAWN)
        assert [a + b for a, b in zip(first.tokens, second.tokens)] == whole.tokens
    np.testing.assert_array_equal(second.state.position, [len(prompt) + 2 * N for prompt in PROMPTS])


@pytest.mark.parametrize("name", ["siso", "hybrid"])
def test_a_conversation_goes_on_without_its_tokens(name):
    """Answers to further prompts of different lengths, one of them empty, are those to the whole conversations."""
    model, further = build(name), draw(2, 70, 0, seed=1)
    talks = [prompt + answer + more for prompt, answer, more in zip(PROMPTS, drawn(name).tokens, further)]
    got = generate(model, further, state=drawn(name).state, max_new_tokens=N, sampling=DRAWN)
    expected = generate(model, talks, max_new_tokens=N, sampling=DRAWN, seed=5)
    assert got.tokens == expected.tokens
    np.testing.assert_array_equal(got.state.seen, expected.state.seen)


@pytest.mark.parametrize("name", ["siso", "hybrid"])
def test_a_stop_token_ends_its_row_and_no_other(name):
    """The row keeps it and goes on after it as if the others had ended there, too."""
    model, plain = build(name), drawn(name)
    stop = plain.tokens[1][3]
    expected = [t[: t.index(stop) + 1] if stop in t else t for t in plain.tokens]
    assert len({len(tokens) for tokens in expected}) > 1
    got = generate(model, PROMPTS, max_new_tokens=N, sampling=DRAWN, seed=5, stop_tokens=[stop])
    assert got.tokens == expected
    np.testing.assert_array_equal(got.state.position, [len(p) + len(t) for p, t in zip(PROMPTS, expected)])
    more = generate(model, state=got.state, max_new_tokens=4, sampling=DRAWN)
    talks = [prompt + tokens for prompt, tokens in zip(PROMPTS, expected)]
    assert more.tokens == generate(model, talks, max_new_tokens=4, sampling=DRAWN, seed=5).tokens


def test_a_batch_ends_with_its_last_row():
    model, prompt = build("siso"), PROMPTS[:1]
    tokens = generate(model, prompt, max_new_tokens=60, sampling=DRAWN, seed=5).tokens[0]
    stop = tokens[-1]
    end = tokens.index(stop) + 1
    slices = list(Stream(model, prompt, max_new_tokens=10_000, sampling=DRAWN, seed=5, stop_tokens=[stop]))
    assert sum((rows[0] for rows in slices), []) == tokens[:end]
    assert len(slices) == -(-end // 8)


def test_a_stream_is_what_generate_collects():
    stream = Stream(build("siso"), PROMPTS, max_new_tokens=N, sampling=DRAWN, seed=5, slice_tokens=5)
    with pytest.raises(RuntimeError, match="state: got a stream that has not ended"):
        stream.state
    slices = list(stream)
    assert [[len(row) for row in rows] for rows in slices] == [[5] * 3, [5] * 3, [2] * 3]
    assert [sum(rows, []) for rows in zip(*slices)] == drawn("siso").tokens
    for a, b in zip(jax.tree.leaves(stream.state.cache), jax.tree.leaves(drawn("siso").state.cache), strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_values_compile_nothing():
    """Prompts of other lengths, another seed, other numbers of the filters, other stops, another number of tokens."""
    model, programs = build("siso"), lambda: (_decode._cache_size(), read._cache_size())
    options = dict(sampling=dataclasses.replace(DRAWN, top_k=4), stop_tokens=[3])
    generate(model, draw(14, 3, 2), max_new_tokens=5, seed=1, **options)
    before = programs()
    options = dict(sampling=Sampling(0.7, top_k=4, top_p=0.5, repetition_penalty=1.3), stop_tokens=[1, 2])
    generate(model, draw(7, 16, 9), max_new_tokens=40, seed=2, **options)
    list(Stream(model, draw(3, 3, 3), max_new_tokens=9, slice_tokens=2, **options))
    assert programs() == before


def test_padding_of_the_vocabulary_is_never_drawn():
    """Even where its logits are the largest."""
    model = nnx.clone(build("mimo"))
    head = np.array(model.head[...])
    head[V:] = 100 * head[:1] * np.sign(head[:1])
    model.head[...] = jnp.asarray(head)
    tokens = np.array(generate(model, PROMPTS, max_new_tokens=N, sampling=Sampling(5.0)).tokens)
    assert tokens.min() >= 0 and tokens.max() < V and len(np.unique(tokens)) > 3


def test_a_bfloat16_state_is_near_the_float32_one():
    """The SSM states only: angles are sums over the whole text."""
    for dtype in ("float32", "bfloat16"):
        got = generate(build("siso"), PROMPTS, max_new_tokens=2, sampling=GREEDY, state_dtype=dtype)
        for layer in got.state.cache:
            assert layer.ssm.angle.dtype == jnp.float32
            assert {a.dtype for a in layer.ssm._replace(angle=layer.ssm.k)} == {jnp.dtype(dtype)}
        logits = stepper("siso")(got.state)
        if dtype == "float32":
            expected = logits
    error = np.abs(logits - expected).max()
    assert 0 < error < 2e-2 * np.abs(expected).max()


def _generate(**changes):
    options = dict(model=build("siso"), prompts=[[1, 2]], max_new_tokens=1)
    return generate(**options | changes)


ERRORS = {
    "no prompt": (dict(prompts=[]), "prompts", "got none", "at least one"),
    "empty prompt": (dict(prompts=[[1], []]), "prompts", "got an empty one in row 1", "at least one token"),
    "large id": (dict(prompts=[[1], [2, V]]), "prompts", f"got id {V} in row 1", "0 to 19"),
    "negative id": (dict(prompts=[[-1]]), "prompts", "got id -1 in row 0", "0 to 19"),
    "rows that are ids": (dict(prompts=[1, 2]), "prompts", "got int64 of shape () in row 0", "integers of shape (t,)"),
    "a row of rows": (dict(prompts=[[1], [[2]]]), "prompts", "got int64 of shape (1, 1) in row 1", "integers of sh"),
    "uneven rows": (dict(prompts=[[1, [2]]]), "prompts", "got object of shape (2,) in row 0", "integers of shape"),
    "floats": (dict(prompts=[[1.9, 2.9]]), "prompts", "got float64 of shape (2,) in row 0", "integers of shape (t,)"),
    "bytes": (dict(prompts=[b"abc"]), "prompts", "got |S3 of shape () in row 0", "integers of shape (t,)"),
    "half a token": (dict(max_new_tokens=2.5), "max_new_tokens", "got 2.5", "a positive integer"),
    "no tokens": (dict(max_new_tokens=0), "max_new_tokens", "got 0", "a positive integer"),
    "stop": (dict(stop_tokens=[V]), "stop_tokens", f"got {V}", "0 to 19"),
    "seed": (dict(seed=-1), "seed", "got -1", "0 to"),
    "state_dtype": (dict(state_dtype="float16"), "state_dtype", "got 'float16'", "'float32', 'bfloat16'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_bad_argument_is_named(case, without_type_checks):  # noqa: F811
    changes, name, given, allowed = ERRORS[case]
    with pytest.raises(ValueError) as error:
        _generate(**changes)
    assert_names(str(error.value), name, given, allowed)


def test_a_state_of_something_else_is_refused():
    state = prefill(build("siso"), [[1, 2], [3]])
    with pytest.raises(ValueError) as error:
        _generate(state=state)
    assert_names(str(error.value), "state", "got one of 2 rows", "1, as there are prompts")
    for other in ("mimo", "hybrid", "gdn"):
        with pytest.raises(ValueError) as error:
            _generate(model=build(other), prompts=None, state=state)
        assert_names(str(error.value), "state", "got one of another model", "of this model's layers and sizes")
