"""The language model as a model class of lm-evaluation-harness (the extra `eval`), named "mamba3" there.

    lm_eval.simple_evaluate(model=Mamba3LM(model, tokenizer), tasks=["lambada_openai"])

Requests are sorted by length and padded on the right to a power of two, which changes nothing because the model is
causal: so few shapes compile, and a result depends neither on the batch size nor on the order of the requests, up to
rounding. What a task draws at random depends on the order, because a request's place in it is its seed.
"""

import dataclasses
import difflib
import itertools
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import lm_eval
import numpy as np
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table, simple_parse_args_string

from mamba3_jax.data import Tokenizer, check_vocabulary, load_tokenizer
from mamba3_jax.data.tokenizer import single_token
from mamba3_jax.inference.decoding import Stream
from mamba3_jax.inference.progress import progress
from mamba3_jax.inference.sampling import Sampling
from mamba3_jax.inference.scores import score
from mamba3_jax.models import LM
from mamba3_jax.models.checkpoint import load_model, model_directory

# Rows are at least so long, so that short requests do not compile for every power of two.
SHORTEST = 32
# What a document starts with in the tokenizers of published models that do not say it themselves. The first of them
# that is one token is taken; bytes have none, and a line break stands before their documents.
BEGIN_MARKS = ("<|begin_of_text|>", "<s>", "<|endoftext|>", "</s>", "\n")
# The class' options that may come as model_args, and what they are.
MODEL_ARGS = dict.fromkeys(("max_length", "batch_size", "max_gen_toks", "prefix_token", "seed"), int)
MODEL_ARGS |= dict(add_bos_token=bool)


class Generation(NamedTuple):
    """What the requests of one batch have in common."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling


@register_model("mamba3")
class Mamba3LM(TemplateLM):
    """A model and its tokenizer.

    Args:
        model: the model.
        tokenizer: of the model's vocabulary.
        max_length: tokens of context that scoring reads at most; longer contexts lose their beginning. A continuation
            is never cut, because the model itself has no limit.
        batch_size: requests per call.
        max_gen_toks: new tokens where a task does not say.
        prefix_token: what an empty context is; None takes the tokenizer's mark of a beginning, or a line break.
        add_bos_token: whether texts begin with the tokenizer's mark of a beginning; None does what its tokenizer.json
            does. A text that holds the mark already gets no other, and nor does what follows an empty context. As in
            the harness' own class of Hugging Face models, a rolling log-likelihood then scores the mark as well.
        seed: of sampling, for the tasks that ask for it; request i of those of one kind draws with seed + i.

    Raises:
        ValueError: a tokenizer with more ids than the model, a number that is not positive, no prefix, or one that
            is no id of the model.
    """

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        *,
        max_length: int = 2048,
        batch_size: int = 8,
        max_gen_toks: int = 256,
        prefix_token: int | None = None,
        add_bos_token: bool | None = None,
        seed: int = 0,
    ):
        super().__init__()
        for name, value in dict(max_length=max_length, batch_size=batch_size, max_gen_toks=max_gen_toks).items():
            if value < 1:
                raise ValueError(f"{name}: got {value}; allowed: a positive integer")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"tokenizer: got {tokenizer.vocab_size} ids; allowed: at most the model's {model.config.vocab_size}"
            )
        self.model, self.text, self.seed = model, tokenizer, seed
        self.max_length, self.batch_size, self.max_gen_toks = max_length, batch_size, max_gen_toks
        self._split = nnx.split(model)
        begin = tokenizer.prefix[0] if tokenizer.prefix else single_token(tokenizer.encode, BEGIN_MARKS)
        self._prefix = begin if prefix_token is None else prefix_token
        if self._prefix is None:
            raise ValueError("prefix_token: got None with a tokenizer without a mark of a beginning; allowed: an id")
        if not 0 <= self._prefix < model.config.vocab_size:
            raise ValueError(f"prefix_token: got {self._prefix}; allowed: 0 to {model.config.vocab_size - 1}")
        self._mark = tokenizer.decode([self._prefix])
        self._special = list(tokenizer.prefix) or [self._prefix]
        self._add_special = bool(tokenizer.prefix) if add_bos_token is None else add_bos_token

    @classmethod
    def from_directory(cls, pretrained: str, **options) -> "Mamba3LM":
        """The model of a model or run directory; `device` is JAX's own choice."""
        options.pop("device", None)
        options = {name: _option(name, value) for name, value in options.items()}
        directory = model_directory(Path(pretrained))
        model, tokenizer = load_model(directory), load_tokenizer(directory)
        check_vocabulary(tokenizer, model.config, directory)
        return cls(model, tokenizer, **options)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "Mamba3LM":
        """The harness' model_args: `pretrained`, a directory, and any option of the class."""
        further = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls.from_directory(**arg_dict, **further)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "Mamba3LM":
        """The same from "pretrained=DIR,max_length=4096"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int | None:
        return self.text.end

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Token ids; None begins the text with special tokens as the class was told, unless it begins so already."""
        if add_special_tokens is None:
            add_special_tokens = self._add_special and not string.startswith(self._mark)
        return (self._special if add_special_tokens else []) + self.text.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole documents, in the harness' own windows of `max_length`: each token once."""
        parts, owners = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self._prefix, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, windows):
                parts.append((None, context, continuation))
                owners.append(i)
        totals = np.zeros(len(requests))
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(parts, disable_tqdm)):
            totals[i] += value
        for request, total in zip(requests, totals.tolist()):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding writes it) of each continuation, in the order of the requests."""
        kept = [_read(context, continuation, self.max_length) for _, context, continuation in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for batch in _show(_buckets([len(ids) - 1 for ids in kept], self.batch_size), "scoring", disable_tqdm):
            width = _bucket(len(kept[batch[0]]) - 1)
            rows = np.zeros((self.batch_size, width + 1), np.int32)
            for row, i in enumerate(batch):
                rows[row, : len(kept[i])] = kept[i]
            scores, _ = score(*self._split, rows[:, :-1], rows[:, 1:])
            values, greedy = (np.asarray(a) for a in scores)
            for row, i in enumerate(batch):
                key, _, continuation = requests[i]
                end = len(kept[i]) - 1
                scored = slice(end - len(continuation), end)
                results[i] = float(values[row, scored].sum(dtype=np.float64)), bool(greedy[row, scored].all())
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, results[i])
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """New text after each context, up to the first of its `until` strings, which is left out.

        A context keeps its last `max_length` tokens; the new ones come on top, because the state does not grow.
        """
        prompts, kinds = [], {}
        for i, request in enumerate(requests):
            context, options = request.args
            prompts.append(self.tok_encode(context)[-self.max_length :] or [self._prefix])
            kinds.setdefault(_generation(options, self.max_gen_toks), []).append(i)
        batches = []
        for kind, members in kinds.items():
            if kind.sampling.temperature == 0:
                groups = _buckets([len(prompts[i]) for i in members], self.batch_size)
            else:  # Row i of a batch draws with its seed + i, so that neighbours must stay together.
                groups = itertools.batched(range(len(members)), self.batch_size)
            batches.extend((kind, [members[k] for k in group], self.seed + group[0]) for group in groups)
        results = [""] * len(requests)
        for kind, batch, seed in _show(batches, "generating", disable_tqdm):
            texts = self._generate(kind, [prompts[i] for i in batch], seed)
            for i, text in zip(batch, texts):
                results[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return results

    def _generate(self, kind: Generation, prompts: list[list[int]], seed: int) -> list[str]:
        """Stops as soon as every text holds one of the strings that end it."""
        tokens, texts = [[] for _ in prompts], [""] * len(prompts)
        # The last batch is filled up, so that all have the shape that is compiled.
        rows = prompts + prompts[-1:] * (self.batch_size - len(prompts))
        for new in Stream(
            self.model,
            rows,
            max_new_tokens=kind.max_new_tokens,
            sampling=kind.sampling,
            stop_tokens=() if self.text.end is None else (self.text.end,),
            seed=seed,
        ):
            for ids, more in zip(tokens, new):
                ids.extend(more)
            texts = [self.text.decode([t for t in ids if t != self.text.end]) for ids in tokens]
            if kind.until and all(any(mark in text for mark in kind.until) for text in texts):
                break
        return [_cut(text, kind.until) for text in texts]


def check_tasks(names: Sequence[str], manager: TaskManager) -> None:
    """Raises ValueError, with names like it, for a task that the harness does not know."""
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5) or ["a task, group or tag of the harness"]
            raise ValueError(f"tasks: got {name!r}; allowed: {', '.join(near)}")


def evaluate(
    model: Mamba3LM,
    tasks: Sequence[str],
    manager: TaskManager,
    limit: int | None = None,
    num_fewshot: int | None = None,
    bootstrap_iters: int = 100000,
) -> tuple[dict, list[str]]:
    """Runs tasks; returns the results as plain values, and the harness' own tables of them.

    Args:
        model: the model.
        tasks: names that `check_tasks` passes.
        manager: knows the tasks.
        limit: examples of each task; None is all.
        num_fewshot: examples in the prompt; None is what each task says.
        bootstrap_iters: resamples of the metrics that have no formula for their standard error.

    Raises:
        ValueError: a task's data cannot be had, or it asks for a kind of decoding that is not here.
    """
    try:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=bootstrap_iters,
            log_samples=False,
        )
    except OSError as error:  # what `datasets` raises where it cannot reach or find a data set
        raise ValueError(f"tasks: got {','.join(tasks)} ({' '.join(str(error).split())}); allowed: data that is there")
    columns = [column for column in ("results", "groups") if results.get(column)]
    values = dict(
        tasks={name: {k: _plain(v) for k, v in metrics.items()} for name, metrics in results["results"].items()},
        examples={name: count["effective"] for name, count in results["n-samples"].items()},
        num_fewshot=dict(results["n-shot"]),
        lm_eval=version("lm_eval"),
    )
    return values, [make_table(results, column) for column in columns]


def _plain(value):
    return value.item() if isinstance(value, np.generic) else value


def _option(name: str, value) -> int | bool | None:
    """An option of MODEL_ARGS; the harness' command line may give a number as text."""
    if name not in MODEL_ARGS:
        raise ValueError(f"model_args: got {name}={value}; allowed: pretrained, {', '.join(MODEL_ARGS)}")
    kind = MODEL_ARGS[name]
    if kind is int and isinstance(value, str) and value.removeprefix("-").isdecimal():
        value = int(value)
    may_be_none = name in ("prefix_token", "add_bos_token")
    if type(value) is not kind and not (value is None and may_be_none):
        raise ValueError(f"{name}: got {value!r}; allowed: a {kind.__name__}{' or None' if may_be_none else ''}")
    return value


def _read(context: list[int], continuation: list[int], max_length: int) -> list[int]:
    """The tokens of a request: the continuation, and before it what fits of the context, at least one token."""
    return (context + continuation)[-max(max_length, len(continuation)) - 1 :]


def _bucket(length: int) -> int:
    """The power of two that a length is padded to."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def _buckets(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of one bucket each, longest first: what does not fit into memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [
        list(batch)
        for _, members in itertools.groupby(order, key=lambda i: _bucket(lengths[i]))
        for batch in itertools.batched(members, batch_size)
    ]


def _show(steps: list, what: str, silent: bool):
    return steps if silent else progress(steps, what)


def _generation(options: dict, max_gen_toks: int) -> Generation:
    """The harness' keywords of generation; those of a kind of decoding that is not here are refused."""
    options = normalize_gen_kwargs(options, max_gen_toks)
    if options.get("num_beams") == 1:  # tasks say so, and mean no beam search
        del options["num_beams"]
    until = tuple(mark for mark in options.pop("until") if mark)
    new, sample = options.pop("max_gen_toks"), options.pop("do_sample")
    temperature = options.pop("temperature", 1.0)
    known = {field.name for field in dataclasses.fields(Sampling)} - {"temperature"}
    if not set(options) <= known:
        raise ValueError(f"generation_kwargs: got {sorted(set(options) - known)}; allowed: {sorted(known)}")
    if not sample:
        return Generation(until, new, Sampling(temperature=0.0))
    return Generation(until, new, Sampling(temperature=temperature, **options))


def _cut(text: str, until: tuple[str, ...]) -> str:
    return text[: min((text.find(mark) for mark in until if mark in text), default=len(text))]
