"""`mamba3 eval MODEL`: the perplexity of a text, or tasks of lm-evaluation-harness.

    mamba3 eval MODEL --perplexity FILE [--context 2048 --stride 1024 | --carry_state true]
    mamba3 eval MODEL --perplexity FILE --lengths '[1024,2048,4096]' [--trained_length 2048]
    mamba3 eval MODEL --tasks lambada_openai,hellaswag [--limit 100] [--num_fewshot 5] [--include_path DIR]
"""

import dataclasses
import time
from pathlib import Path

from mamba3_jax.command import fail, parse, results_folder
from mamba3_jax.data import ByteTokenizer, Tokenizer, check_vocabulary, load_tokenizer
from mamba3_jax.inference import perplexity_report
from mamba3_jax.inference.perplexity import (
    TextScore,
    check_lengths,
    extrapolation,
    perplexity,
    perplexity_with_state,
)
from mamba3_jax.inference.reports import command_line, environment, on_terminal, read_text, write
from mamba3_jax.models import LM
from mamba3_jax.models.checkpoint import load_model, model_directory

# Rows per call of the harness where the user does not say.
HARNESS_ROWS = 8
# Options that mean nothing without another one.
NEEDS = dict(stride="perplexity", carry_state="perplexity", lengths="perplexity", trained_length="lengths")
NEEDS |= dict(limit="tasks", num_fewshot="tasks", include_path="tasks", add_bos_token="tasks")
# And with another one.
EXCLUDES = dict(context="lengths", batch_size="carry_state")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What to evaluate, and on what.

    Attributes:
        model: a model directory, or a run directory that holds one.
        perplexity: text file to score, UTF-8.
        context: tokens of a window, of a piece with carry_state, and that the harness reads at most.
        stride: tokens from one window to the next; None is half of the context.
        carry_state: reads the text as one sequence, with all of it before a token as its context.
        lengths: perplexity at each of these context lengths instead, on the same tokens.
        trained_length: marked in the figure of lengths.
        tasks: names of the harness' tasks, with commas between them.
        limit: examples of each task; None is all.
        num_fewshot: examples in the prompt; None is what each task says.
        include_path: folder of further tasks.
        add_bos_token: whether texts of tasks begin with the tokenizer's mark of a beginning; None is its own default.
        batch_size: rows per call; None takes about 16384 tokens per call, and 8 rows for tasks.
        results_dir: folder for report.md and summary.json; None only prints.
    """

    model: Path
    perplexity: Path | None = None
    context: int = 2048
    stride: int | None = None
    carry_state: bool = False
    lengths: tuple[int, ...] = ()
    trained_length: int | None = None
    tasks: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: Path | None = None
    add_bos_token: bool | None = None
    batch_size: int | None = None
    results_dir: Path | None = None

    def __post_init__(self):
        if (self.perplexity is None) == (self.tasks is None):
            raise ValueError(f"perplexity: got {self.perplexity} with tasks {self.tasks}; allowed: one of the two")
        for name in ("context", "stride", "trained_length", "limit", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot: got {self.num_fewshot}; allowed: 0 or more")
        if self.stride is not None and self.stride > self.context:
            raise ValueError(f"stride: got {self.stride}; allowed: at most the context, {self.context}")
        if self.lengths:
            check_lengths(self.lengths)
        if (self.stride is not None) + self.carry_state + bool(self.lengths) > 1:
            raise ValueError("lengths: got more than one of stride, carry_state and lengths; allowed: one of them")
        for name, other in EXCLUDES.items():
            if getattr(self, name) != getattr(type(self), name) and getattr(self, other):
                raise ValueError(f"{name}: got {getattr(self, name)} with {other}; allowed: without {other}")
        for name, needed in NEEDS.items():
            if getattr(self, name) != getattr(type(self), name) and not getattr(self, needed):
                raise ValueError(f"{name}: got {getattr(self, name)} without {needed}; allowed: with {needed}")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ValueError(f"include_path: got {self.include_path}; allowed: a folder")


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    config = parse("eval", EvalConfig, argv, positional="model")
    try:
        _evaluate(config, command_line(["eval", *argv]))
    except (ValueError, NotImplementedError) as error:
        fail(str(error))
    return 0


def _evaluate(config: EvalConfig, command: str) -> None:
    # What can be wrong without the model is looked at before it is read.
    if config.tasks is not None:
        harness, tasks = _import_harness(), [name.strip() for name in config.tasks.split(",")]
        manager = harness.TaskManager(include_path=config.include_path)
        harness.check_tasks(tasks, manager)
    else:
        text = read_text("perplexity", config.perplexity)
    directory = model_directory(config.model)
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    check_vocabulary(tokenizer, model.config, directory)
    folder = None if config.results_dir is None else results_folder(config.results_dir)
    began = time.perf_counter()
    summary, scores, tables = dict(command=command, model=str(config.model)), {}, []
    if config.tasks is not None:
        options = dict(max_length=config.context, batch_size=config.batch_size or HARNESS_ROWS)
        options |= dict(add_bos_token=config.add_bos_token)
        adapter = harness.Mamba3LM(model, tokenizer, **options)
        results, tables = harness.evaluate(adapter, tasks, manager, config.limit, config.num_fewshot)
        summary |= results
    else:
        found, scores = _perplexity(config, model, tokenizer, text)
        summary |= dict(text=str(config.perplexity), vocab_size=model.config.vocab_size, **found)
    summary |= dict(seconds=round(time.perf_counter() - began, 1), **environment())
    report = perplexity_report.report(summary) if config.tasks is None else _harness_report(summary, tables)
    print(on_terminal(report))
    if folder is not None:
        figures = {"perplexity.png": perplexity_report.plot(scores, config.trained_length)} if scores else {}
        write(folder, report, summary, figures)
        print(f"report: {folder / 'report.md'}")


def _perplexity(config: EvalConfig, model: LM, tokenizer: Tokenizer, text: str) -> tuple[dict, dict[int, TextScore]]:
    """What the summary says of the text, and the scores of each length if lengths were asked for."""
    tokens = tokenizer.encode(text)
    if config.lengths:
        scores = extrapolation(model, tokens, config.lengths, batch_size=config.batch_size)
        scored = next(iter(scores.values())).nll.size
        size = _bytes(tokenizer, tokens[1 : 1 + scored])
        by_length = {length: perplexity_report.values(score, size) for length, score in scores.items()}
        return dict(lengths=by_length, scored_tokens=scored, trained_length=config.trained_length), scores
    if config.carry_state:
        score = perplexity_with_state(model, tokens, piece=config.context)
        how = f"the state carried through, in pieces of {config.context} tokens"
    else:
        stride = max(1, config.context // 2) if config.stride is None else config.stride
        score = perplexity(model, tokens, context=config.context, stride=stride, batch_size=config.batch_size)
        how = f"windows of {config.context} tokens, {stride} apart"
    return dict(score=perplexity_report.values(score, _bytes(tokenizer, tokens[1:])), how=how), {}


def _bytes(tokenizer: Tokenizer, tokens: list[int]) -> int:
    """Bytes that the tokens stand for; off by a few where they begin or end within a character."""
    return len(tokens) if isinstance(tokenizer, ByteTokenizer) else len(tokenizer.decode(tokens).encode())


def _import_harness():
    """The adapter, which needs the harness."""
    try:
        from mamba3_jax.inference import harness
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ValueError("tasks: got no lm-evaluation-harness; run: uv sync --extra eval") from None
    return harness


def _harness_report(summary: dict, tables: list[str]) -> str:
    lines = ["# lm-evaluation-harness", "", f"    {summary['command']}", "", *tables]
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    lm_eval = f"lm_eval {summary['lm_eval']}"
    return "\n".join([*lines, f"{summary['seconds']:.1f} s on {summary['device']}; {versions}, {lm_eval}.", ""])
