"""`mamba3 generate MODEL --prompt TEXT`: text from a model, on the terminal as it arrives.

    mamba3 generate runs/tiny --prompt "Once upon" --top_p 0.9 --stats true
    mamba3 generate runs/tiny --prompt - < story.txt                              the prompt from stdin
    mamba3 generate runs/tiny --prompts_file prompts.txt                          one JSON line per line of the file
    mamba3 generate runs/tiny --prompt "My name is Ada." --save_state ada.npz     and on, later, without the first text:
    mamba3 generate runs/tiny --resume ada.npz --prompt " My name is"
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from mamba3_jax.command import INTERRUPTED, fail, parse
from mamba3_jax.data import TextStream, Tokenizer, check_vocabulary, load_tokenizer
from mamba3_jax.inference.decoding import StateDtype, Stream, prefill
from mamba3_jax.inference.sampling import Sampling
from mamba3_jax.inference.saved_state import load_state, save_state
from mamba3_jax.models.checkpoint import load_model, model_directory


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What to continue, and how.

    Attributes:
        model: a model directory, or a run directory that holds one.
        prompt: text to continue, as it is; "-" reads stdin.
        prompts_file: prompts instead, one a line, continued as one batch.
        max_new_tokens: of each prompt.
        temperature: 0 takes the most likely token, 1 draws from the model's distribution.
        top_k: draw from the k most likely tokens only.
        top_p: draw from the fewest most likely tokens that have this much probability together.
        min_p: draw from the tokens with at least this part of the largest probability.
        repetition_penalty: above 1 makes tokens less likely that the text has had.
        stop: text of one token that ends a continuation, as the tokenizer's mark of an end always does; neither is
            printed.
        stop_ids: token ids that do the same.
        seed: prompt i draws with seed + i; default 0, or the resumed state's.
        save_state: file to write the state to, after the last token.
        resume: file of a state to go on from; a prompt is then what comes next.
        stream: print text as it arrives, for a single prompt.
        stats: tokens, times and speed on stderr, at the end.
        dtype: "float32" or "bfloat16" matrix products; default the model's.
        state_dtype: of the SSM states while decoding, "float32" or "bfloat16".
    """

    model: str
    prompt: str | None = None
    prompts_file: str | None = None
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: str | None = None
    stop_ids: tuple[int, ...] = ()
    seed: int | None = None
    save_state: str | None = None
    resume: str | None = None
    stream: bool = True
    stats: bool = False
    dtype: str | None = None
    state_dtype: StateDtype = "float32"

    def __post_init__(self):
        if (self.prompt is not None) + (self.prompts_file is not None) > 1:
            raise ValueError("prompt: got one and a prompts_file; allowed: one of them")
        if self.prompt is None and self.prompts_file is None and self.resume is None:
            raise ValueError("prompt: got none; allowed: a text, or --prompts_file, or --resume")
        # Found out before the tokens, not after them.
        if self.save_state is not None and (
            not Path(self.save_state).name or not Path(self.save_state).absolute().parent.is_dir()
        ):
            raise ValueError(f"save_state: got {self.save_state!r}; allowed: a file in a folder that exists")

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    config = parse("generate", GenerateConfig, argv, positional="model")
    try:
        return _run(config)
    except (ValueError, NotImplementedError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print(flush=True)
        _tell_unsaved(config)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the text has seen enough of it, but a state was asked for as well.
        if config.save_state is None:
            raise
        _tell_unsaved(config)
        return 1


def _tell_unsaved(config: GenerateConfig) -> None:
    if config.save_state is not None:
        print(f"save_state: {config.save_state} is not written, because the text was cut short", file=sys.stderr)


def _run(config: GenerateConfig) -> int:
    started = time.perf_counter()
    sampling = config.sampling
    directory = model_directory(Path(config.model))
    tokenizer = load_tokenizer(directory)
    texts = _prompts(config)
    model = load_model(directory, config.dtype)
    check_vocabulary(tokenizer, model.config, directory)
    end = () if tokenizer.end is None else (tokenizer.end,)
    stop_tokens = [*end, *config.stop_ids, *_stop_token(config.stop, tokenizer)]
    state = None if config.resume is None else load_state(Path(config.resume), model)
    prompts = None if texts is None else [tokenizer.encode(text) for text in texts]
    loaded = time.perf_counter()
    state = prefill(model, prompts, state=state, seed=config.seed)
    jax.block_until_ready(state.cache)
    read = time.perf_counter()
    stream = Stream(
        model,
        state=state,
        max_new_tokens=config.max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        state_dtype=config.state_dtype,
    )
    b = len(state.pending)
    clock = _Clock()
    pieces = _text(clock.watch(stream), tokenizer, stop_tokens, b)
    if b == 1 and config.stream:
        for (piece,) in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
    else:
        whole = ["".join(row) for row in zip(*pieces)]
        if b == 1:
            print(whole[0])
        else:
            for i, text in enumerate(whole):
                print(json.dumps(dict(prompt=None if texts is None else texts[i], text=text), ensure_ascii=False))
    if config.save_state is not None:
        save_state(Path(config.save_state), model, stream.state)
    if config.stats:
        count = sum(map(len, prompts or []))
        line = f"model loaded in {loaded - started:.1f} s; {count} prompt tokens read in {read - loaded:.2f} s; {clock}"
        print(line, file=sys.stderr)
    return 0


class _Clock:
    """Counts a stream's tokens and takes its time, the first slice's, which compiles, apart."""

    def __init__(self):
        self._counts: list[int] = []
        self._times = [time.perf_counter()]

    def watch(self, stream: Stream) -> Iterator[list[list[int]]]:
        for rows in stream:
            self._counts.append(sum(map(len, rows)))
            self._times.append(time.perf_counter())
            yield rows

    def __str__(self) -> str:
        first = self._times[1] - self._times[0]
        text = f"{sum(self._counts)} new tokens, the first {self._counts[0]} after {first:.2f} s"
        rest = sum(self._counts[1:])
        return text + (f", the others at {rest / (self._times[-1] - self._times[1]):.0f} tokens/s" if rest else "")


def _prompts(config: GenerateConfig) -> list[str] | None:
    """The texts; None where a state goes on by itself."""
    if config.prompts_file is None:
        if config.prompt is None:
            return None
        return [sys.stdin.read() if config.prompt == "-" else config.prompt]
    try:
        # Other characters that Python counts as ends of lines may stand in a prompt.
        lines = Path(config.prompts_file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"prompts_file: got {config.prompts_file} ({reason}); allowed: a text file") from None
    for number, line in enumerate(lines, 1):
        if not line:
            raise ValueError(f"prompts_file: got an empty line {number} in {config.prompts_file}; allowed: a prompt")
    return lines


def _stop_token(text: str | None, tokenizer: Tokenizer) -> list[int]:
    if text is None:
        return []
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise ValueError(f"stop: got {text!r}, {len(ids)} tokens; allowed: the text of one token, or --stop_ids")
    return ids


def _text(
    slices: Iterator[list[list[int]]], tokenizer: Tokenizer, stop_tokens: list[int], b: int
) -> Iterator[list[str]]:
    """The text of every slice and row, in the end what was held back; without the stop tokens."""
    decoders = [TextStream(tokenizer) for _ in range(b)]
    for rows in slices:
        yield [decoder.feed([i for i in row if i not in stop_tokens]) for decoder, row in zip(decoders, rows)]
    yield [decoder.finish() for decoder in decoders]
