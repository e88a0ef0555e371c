"""The adapter to the harness: log-likelihoods against a full softmax, generation, order, batches; tasks offline."""

import json
import math
import os

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

# Read by the libraries as they are imported: no test asks the network for a data set.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
lm_eval = pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mamba3_jax import cli  # noqa: E402
from mamba3_jax.data import ByteTokenizer, load_tokenizer  # noqa: E402
from mamba3_jax.inference import Sampling, Stream, generate, harness, scores  # noqa: E402
from mamba3_jax.inference.harness import Mamba3LM, check_tasks, evaluate  # noqa: E402
from mamba3_jax.layers import Mamba3Config  # noqa: E402
from mamba3_jax.models import LM, LMConfig  # noqa: E402
from mamba3_jax.models.checkpoint import save_model  # noqa: E402
from test_layers import randomised  # noqa: E402

# float32 sums over 70 tokens of two layers, against float64 of the same logits in another batch.
TOLERANCE = 2e-4
CONFIG = LMConfig(Mamba3Config(d_model=32, d_state=16, head_dim=16), n_layers=2, vocab_size=256)
LONGEST = 70
NEWLINE = 10


@pytest.fixture(scope="module")
def model() -> LM:
    return randomised(lambda: LM(CONFIG, rngs=nnx.Rngs(0)))[0]


@pytest.fixture(scope="module")
def log_p(model):
    """(context, continuation) in bytes -> its log-likelihood and whether it is greedy, from all logits in float64."""
    graph, parameters = nnx.split(model)
    run = jax.jit(lambda parameters, tokens: nnx.merge(graph, parameters)(tokens)[0])

    def measure(context: bytes, continuation: bytes) -> tuple[float, bool]:
        tokens = list(context + continuation)
        logits = np.float64(run(parameters, np.pad(tokens, (0, 400 - len(tokens)))[None].astype(np.int32))[0])
        rows = logits[len(context) - 1 : len(tokens) - 1]
        chosen = np.arange(len(continuation)), list(continuation)
        return float(log_softmax(rows, axis=1)[chosen].sum()), bool((rows.argmax(1) == list(continuation)).all())

    return measure


def ask(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


# Longer than what is read, and not the same everywhere.
LONG = "".join(chr(32 + i * i % 95) for i in range(300))
PAIRS = [
    ("The sky is", " blue"),
    ("", "Once"),
    ("Two and two are ", "four, and three and three are six, as everybody knows."),
    ("é", "à"),
    (LONG, " the end"),
    ("a", "long continuation, longer than what is read of a context: " + "so " * 20),
    ("A question of the usual length?", " yes"),
    ("A question of the usual length?", " no"),
]


def assert_same(found: list, expected: list) -> None:
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], atol=TOLERANCE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.fixture(scope="module")
def expected(log_p, model) -> list[tuple[float, bool]]:
    """Of PAIRS: an empty context is a line break, a space goes to the continuation, long contexts lose their start."""
    read = []
    for context, continuation in PAIRS:
        moved = context[len(context.rstrip()) :]
        context, continuation = (context.rstrip() or "\n").encode(), (moved + continuation).encode()
        room = max(LONGEST, len(continuation)) + 1 - len(continuation)
        read.append(log_p(context[-room:], continuation))
    return read


def test_log_likelihoods_are_those_of_a_full_softmax(model, expected, log_p):
    found = Mamba3LM(model, ByteTokenizer(), max_length=LONGEST).loglikelihood(ask("loglikelihood", *PAIRS))
    assert_same(found, expected)
    # What the model would write itself is greedy, and one byte of it is enough to tell.
    prompt = list(b"The sky is")
    (written,) = generate(model, [prompt], max_new_tokens=5, sampling=Sampling(temperature=0.0)).tokens
    tokens = [(None, prompt, written), (None, prompt, written[:4] + [(written[4] + 1) % 256])]
    (_, yes), (_, no) = Mamba3LM(model, ByteTokenizer())._loglikelihood_tokens(tokens)
    assert yes and not no


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_log_likelihood_depends_neither_on_the_batch_nor_on_the_order(model, expected, batch_size):
    order = np.random.default_rng(batch_size).permutation(len(PAIRS))
    adapter = Mamba3LM(model, ByteTokenizer(), max_length=LONGEST, batch_size=batch_size)
    found = adapter.loglikelihood(ask("loglikelihood", *[PAIRS[i] for i in order]))
    assert_same(found, [expected[i] for i in order])


def test_few_lengths_compile(model):
    scores.score.clear_cache()
    pairs = [("x" * n, " y") for n in range(1, 120)]
    Mamba3LM(model, ByteTokenizer(), batch_size=16).loglikelihood(ask("loglikelihood", *pairs))
    # 32, 64 and 128 tokens.
    assert scores.score._cache_size() == 3


def test_a_rolling_log_likelihood_scores_every_token_once(model, log_p):
    text = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all."
    adapter = Mamba3LM(model, ByteTokenizer(), max_length=30, batch_size=2)
    short, empty, long = adapter.loglikelihood_rolling(ask("loglikelihood_rolling", (text[:9],), ("",), (text,)))
    assert empty == 0 and short == pytest.approx(log_p(b"\n", text[:9].encode())[0], abs=TOLERANCE)
    # Windows of 30: the last is full as well, and scores only what the others have not.
    raw = text.encode()
    parts = [(b"\n", raw[:30]), (raw[29:30], raw[30:60]), (raw[len(raw) - 31 : 60], raw[60:])]
    assert long == pytest.approx(sum(log_p(*part)[0] for part in parts), abs=TOLERANCE)


def written_by(model: LM, contexts: list[str], count: int) -> list[str]:
    """What greedy decoding writes after the contexts."""
    prompts = [ByteTokenizer().encode(context[-LONGEST:]) or [NEWLINE] for context in contexts]
    rows = generate(model, prompts, max_new_tokens=count, sampling=Sampling(temperature=0.0)).tokens
    return [ByteTokenizer().decode(tokens) for tokens in rows]


def test_generation_stops_at_the_first_of_its_strings_and_keeps_the_order(model):
    contexts = ["The sky is", "", "Two and two are four, and then", "Ice", LONG]
    full = written_by(model, contexts, 40)
    assert full[4] != written_by(model, [LONG[:LONGEST]], 40)[0]
    # Strings that the first two texts hold, so that they end there, wherever the others end.
    until = [full[0][5:7], full[1][11:13]]
    options = [dict(until=until, max_gen_toks=40), dict(until=[], max_gen_toks=12)]
    requests = [(context, options[i % 2]) for i, context in enumerate(contexts)]
    adapter = Mamba3LM(model, ByteTokenizer(), max_length=LONGEST, batch_size=2)
    found = adapter.generate_until(ask("generate_until", *requests))
    for i, (text, whole) in enumerate(zip(found, full)):
        ends = [whole.find(mark) for mark in until if mark in whole]
        assert text == (whole[:12] if i % 2 else whole[: min(ends, default=len(whole))])
    assert len(found[0]) <= 5 < len(full[0])


@pytest.fixture
def slices(monkeypatch) -> list[int]:
    """Grows by 1 with every slice of new tokens that the adapter reads."""
    read = []

    class Counted(Stream):
        def __iter__(self):
            for rows in super().__iter__():
                read.append(1)
                yield rows

    monkeypatch.setattr(harness, "Stream", Counted)
    return read


def test_generation_reads_on_until_the_last_text_of_a_batch_has_ended(model, slices):
    contexts = ["The sky is", "Ice"]
    full = written_by(model, contexts, 64)
    ends = [5, 20]
    until = [whole[end : end + 3] for whole, end in zip(full, ends)]
    last = max(min(whole.find(mark) + 3 for mark in until if mark in whole) for whole in full)
    Mamba3LM(model, ByteTokenizer(), batch_size=2).generate_until(
        ask("generate_until", *[(context, dict(until=until, max_gen_toks=64)) for context in contexts])
    )
    # A slice has 8 tokens, here bytes.
    assert len(slices) == -(-last // 8) < 8


def test_the_mark_of_an_end_ends_a_text(model, slices):
    """And is not part of it."""
    (tokens,) = generate(model, [list(b"The sky is")], max_new_tokens=64, sampling=Sampling(temperature=0.0)).tokens
    end = next(i for i in range(5, 30) if tokens[i] not in tokens[:i])

    class Marked(ByteTokenizer):
        pass

    Marked.end = tokens[end]
    adapter = Mamba3LM(model, Marked(), batch_size=1)
    assert adapter.eot_token_id == tokens[end]
    found = adapter.generate_until(ask("generate_until", ("The sky is", dict(until=[], max_gen_toks=64))))
    assert found == [ByteTokenizer().decode(tokens[:end])]
    assert len(slices) == end // 8 + 1


def test_sampling_is_what_the_task_asks_for_and_repeats(model):
    adapter = Mamba3LM(model, ByteTokenizer())
    options = dict(until=["\0"], max_gen_toks=16, do_sample=True, temperature=1.5, top_p=0.9)
    first, second = (adapter.generate_until(ask("generate_until", *[("Ice is", options)] * 3)) for _ in range(2))
    assert first == second and len(set(first)) == 3
    # A temperature without do_sample is one to sample with; do_sample: false overrules it.
    unsaid = {name: value for name, value in options.items() if name != "do_sample"}
    assert adapter.generate_until(ask("generate_until", *[("Ice is", unsaid)] * 3)) == first
    greedy = [written_by(model, ["Ice is"], 16)[0].split("\0")[0]]
    for said in (dict(do_sample=False), dict(do_sample=False, num_beams=1)):
        assert adapter.generate_until(ask("generate_until", ("Ice is", options | said))) == greedy != first[:1]
    without = dict(until=["\0"], max_gen_toks=16)
    assert adapter.generate_until(ask("generate_until", ("Ice is", without))) == greedy
    with pytest.raises(ValueError, match=r"generation_kwargs: got \['num_beams'\]; allowed: \['min_p', 'repe"):
        adapter.generate_until(ask("generate_until", ("a", dict(until=["b"], num_beams=4))))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_is_drawn_depends_on_a_request_s_place_and_not_on_the_batch(model, batch_size):
    """With greedy requests in between, which have seeds of no use, and contexts of different lengths."""
    drawn = dict(until=[], max_gen_toks=12, do_sample=True, temperature=1.5)
    contexts = ["Ice is", "Two and two are four, and then " * 2, "Ice is", "", "The sky"]
    requests = [request for context in contexts for request in ((context, drawn), (context, dict(max_gen_toks=3)))]
    found = Mamba3LM(model, ByteTokenizer(), batch_size=batch_size, seed=7).generate_until(
        ask("generate_until", *requests)
    )
    for i, context in enumerate(contexts):
        prompt = [ByteTokenizer().encode(context) or [NEWLINE]]
        alone = generate(model, prompt, max_new_tokens=12, sampling=Sampling(temperature=1.5), seed=7 + i).tokens
        assert found[2 * i] == ByteTokenizer().decode(alone[0])
    assert found[0] != found[4]


class Words:
    """A tokenizer whose tokens do not end where contexts do, and which has marks of a beginning and an end."""

    vocab_size = 200
    pieces = ("<|begin_of_text|>", "<|end_of_text|>", "new", "er", "newer", " ", "w")
    prefix = ()
    end = 1

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            piece = max((piece for piece in self.pieces if text.startswith(piece)), key=len)
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return ids

    def decode(self, ids) -> str:
        return "".join(self.pieces[i] if i < len(self.pieces) else "?" for i in ids)


def test_contexts_and_continuations_are_encoded_together_and_marks_are_found(model):
    adapter, asked = Mamba3LM(model, Words()), []
    assert (adapter.prefix_token_id, adapter.eot_token_id) == (0, 1)
    adapter._loglikelihood_tokens = lambda requests, **_: asked.extend(requests)
    adapter.loglikelihood(ask("loglikelihood", ("new", " er"), ("new ", "er"), ("new", "er"), ("", "newer")))
    # Of "new" + "er" the joint encoding has one token, and what is left after the context's one is nothing.
    assert [tokens for _, *tokens in asked] == [[[2], [5, 3]], [[2], [5, 3]], [[2], []], [[0], [4]]]
    assert Mamba3LM(model, Words())._loglikelihood_tokens(asked[2:3]) == [(0.0, True)]


@pytest.fixture(scope="module")
def begins_itself(tmp_path_factory):
    """The directory of a tokenizer.json with a mark before every text, which no list of marks has."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    words = ["?", "<bos>", "the", "sky", "is", "blue"]
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "?"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.add_special_tokens(["<bos>"])
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    folder = tmp_path_factory.mktemp("bos")
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("add_bos_token, begin", [(None, [1]), (True, [1]), (False, [])])
def test_texts_begin_as_the_tokenizer_has_it_or_as_the_user_says(
    model, begins_itself, monkeypatch, add_bos_token, begin
):
    """In all three kinds of requests, as the harness' class of Hugging Face models does it."""
    adapter = Mamba3LM(model, load_tokenizer(begins_itself), add_bos_token=add_bos_token)
    assert adapter.prefix_token_id == 1
    asked, prompts = [], []
    monkeypatch.setattr(
        adapter, "_loglikelihood_tokens", lambda requests, *_, **__: asked.extend(requests) or [(0, True)]
    )
    adapter.loglikelihood(ask("loglikelihood", ("the sky is", " blue"), ("<bos> the", " sky"), ("", "the sky")))
    # A mark in the text is not doubled, and an empty context is one.
    assert [tokens for _, *tokens in asked] == [[begin + [2, 3, 4], [5]], [[1, 2], [3]], [[1], [2, 3]]]
    asked.clear()
    adapter.loglikelihood_rolling(ask("loglikelihood_rolling", ("the sky",)))
    assert [tokens for _, *tokens in asked] == [[[1], begin + [2, 3]]]
    monkeypatch.setattr(adapter, "_generate", lambda kind, rows, seed: prompts.extend(rows) or [""] * len(rows))
    adapter.generate_until(ask("generate_until", *[(text, dict(until=[])) for text in ("the sky", "<bos> the", "")]))
    assert prompts == [begin + [2, 3], [1, 2], [1]]


@pytest.mark.parametrize("add_bos_token, begin", [(None, []), (True, [NEWLINE]), (False, [])])
def test_a_tokenizer_that_puts_nothing_before_a_text_can_be_told_to(model, add_bos_token, begin):
    adapter = Mamba3LM(model, ByteTokenizer(), add_bos_token=add_bos_token)
    assert adapter.tok_encode("a") == begin + [97]
    assert adapter.tok_encode("a", add_special_tokens=False) == [97]
    assert adapter.tok_encode("a", add_special_tokens=True) == [NEWLINE, 97]


def test_bad_arguments_are_named(model):
    for options, message in (
        (dict(max_length=0), "max_length: got 0; allowed: a positive integer"),
        (dict(batch_size=0), "batch_size: got 0; allowed: a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            Mamba3LM(model, ByteTokenizer(), **options)
    small = LM(LMConfig(CONFIG.mixer, n_layers=1, vocab_size=100), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="tokenizer: got 256 ids; allowed: at most the model's 100"):
        Mamba3LM(small, ByteTokenizer())


DOCUMENTS = [
    dict(question="The sky is", choices=["blue", "made of stone"], answer=0),
    dict(question="Two and two are", choices=["five", "four", "a number that nobody has seen"], answer=1),
    dict(question="Ice is", choices=["hot", "cold"], answer=1),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
PERPLEXITY = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
COPY = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def tasks(tmp_path, model):
    """A folder with three tasks of the harness, one of each kind of request, and their data.

    The text that is to be written after a question is what the model does write, but for the last one.
    """
    data = tmp_path / "documents.json"
    written = [text.split("\n")[0] for text in written_by(model, [d["question"] for d in DOCUMENTS], 4)]
    written[-1] += "."
    data.write_text("\n".join(json.dumps(d | dict(written=text)) for d, text in zip(DOCUMENTS, written)))
    for name, text in dict(tiny_choice=CHOICE, tiny_perplexity=PERPLEXITY, tiny_copy=COPY).items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(TASK.format(name=name, data=data, cache=tmp_path / "cache") + text)
    return tmp_path


def accuracy(log_p) -> float:
    """The harness puts a space before a choice."""
    right = 0
    for document in DOCUMENTS:
        values = [log_p(document["question"].encode(), f" {choice}".encode())[0] for choice in document["choices"]]
        right += int(np.argmax(values)) == document["answer"]
    return right / len(DOCUMENTS)


def bits_per_byte(log_p) -> float:
    questions = [document["question"].encode() for document in DOCUMENTS]
    return -sum(log_p(b"\n", q)[0] for q in questions) / sum(map(len, questions)) / math.log(2)


def test_the_harness_runs_its_tasks_on_the_model(model, tasks, log_p):
    manager = TaskManager(include_path=tasks, include_defaults=False)
    names = ["tiny_choice", "tiny_perplexity", "tiny_copy"]
    check_tasks(names, manager)
    results, tables = evaluate(Mamba3LM(model, ByteTokenizer()), names, manager, bootstrap_iters=0)
    assert results["tasks"]["tiny_choice"]["acc,none"] == pytest.approx(accuracy(log_p))
    assert results["tasks"]["tiny_perplexity"]["bits_per_byte,none"] == pytest.approx(bits_per_byte(log_p), abs=1e-4)
    assert results["tasks"]["tiny_copy"]["exact_match,none"] == pytest.approx(2 / 3)
    assert results["examples"] == dict.fromkeys(names, 3) and json.loads(json.dumps(results)) == results
    assert all(name in tables[0] for name in names)
    limited, _ = evaluate(Mamba3LM(model, ByteTokenizer()), names[:1], manager, limit=2, bootstrap_iters=0)
    assert limited["examples"] == {"tiny_choice": 2}


def test_the_harness_makes_the_model_from_its_name(model, tmp_path):
    save_model(tmp_path / "m", CONFIG, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    made = lm_eval.api.registry.get_model("mamba3").create_from_arg_string(
        f"pretrained={tmp_path / 'm'},max_length=99,add_bos_token=True",
        dict(batch_size="2", max_batch_size=None, device="cpu"),
    )
    assert isinstance(made, Mamba3LM) and (made.max_length, made.batch_size) == (99, 2)
    assert made.tok_encode("a") == [NEWLINE, 97]
    made = Mamba3LM.create_from_arg_string(f"pretrained={tmp_path / 'm'},max_length=99")
    pairs = ask("loglikelihood", *PAIRS[:2])
    assert_same(made.loglikelihood(pairs), Mamba3LM(model, ByteTokenizer(), max_length=99).loglikelihood(pairs))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            "dtype=float32",
            "model_args: got dtype=float32; allowed: pretrained, max_length, batch_size, max_gen_toks, pre",
        ),
        ("batch_size=auto", "batch_size: got 'auto'; allowed: a int"),
        ("max_length=1.5", "max_length: got 1.5; allowed: a int"),
        ("seed=None", "seed: got None; allowed: a int"),
        ("prefix_token=yes", "prefix_token: got 'yes'; allowed: a int or None"),
        ("prefix_token=-1", f"prefix_token: got -1; allowed: 0 to {CONFIG.vocab_size - 1}"),
        (f"prefix_token={CONFIG.vocab_size}", f"prefix_token: got {CONFIG.vocab_size}; allowed: 0 to "),
        ("add_bos_token=1", "add_bos_token: got 1; allowed: a bool or None"),
    ],
)
def test_a_bad_option_of_the_harness_is_one_line(options, message, model, tmp_path):
    save_model(tmp_path / "m", CONFIG, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    with pytest.raises(ValueError) as error:
        Mamba3LM.create_from_arg_string(f"pretrained={tmp_path / 'm'},{options}")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.fixture
def without_the_harness_own_tasks(monkeypatch):
    """Its index of 14,000 tasks takes a quarter of a minute."""
    monkeypatch.setattr(harness, "TaskManager", lambda include_path: TaskManager(None, include_path, False))


def test_the_command_runs_two_tasks(model, tasks, tmp_path, log_p, capsys, without_the_harness_own_tasks):
    save_model(tmp_path / "m", CONFIG, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    line = ["eval", str(tmp_path / "m"), "--tasks", "tiny_choice, tiny_copy", "--include_path", str(tasks)]
    line += ["--add_bos_token", "false"]
    assert cli.main([*line, "--results_dir", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["tasks"]["tiny_choice"]["acc,none"] == pytest.approx(accuracy(log_p))
    report = (tmp_path / "out" / "report.md").read_text()
    assert report in capsys.readouterr().out and "|tiny_copy" in report.replace(" ", "")
    assert f"    {summary['command']}\n" in report


def test_an_option_of_tasks_without_tasks_is_one_line(tmp_path, capsys):
    for option in ("--add_bos_token=false", "--num_fewshot=0"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["eval", str(tmp_path), "--perplexity", "text.txt", option])
        name, value = option.removeprefix("--").split("=")
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1
        assert f"{name}: got {value.capitalize()} without tasks; allowed: with tasks" in error


def test_an_unknown_task_lists_near_matches(tasks, tmp_path, capsys, without_the_harness_own_tasks):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", str(tmp_path / "m"), "--tasks", "tiny_choise", "--include_path", str(tasks)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error == "tasks: got 'tiny_choise'; allowed: tiny_choice, tiny_copy\n"


def test_data_that_is_not_there_is_one_line(model, tasks):
    (tasks / "documents.json").unlink()
    manager = TaskManager(include_path=tasks, include_defaults=False)
    with pytest.raises(ValueError, match=r"tasks: got tiny_choice \(.*documents.json.*; allowed: data that is there"):
        evaluate(Mamba3LM(model, ByteTokenizer()), ["tiny_choice"], manager)
