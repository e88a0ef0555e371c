"""`mamba3 generate`: what it prints, what it resumes, and its one-line errors."""

import io
import json

import jax
import numpy as np
import pytest
from flax import nnx

from mamba3_jax.cli import main
from mamba3_jax.data import ByteTokenizer
from mamba3_jax.inference import Sampling, generate, generate_command
from mamba3_jax.layers import Mamba3Config
from mamba3_jax.models import LM, LMConfig
from mamba3_jax.models.checkpoint import load_model, save_model

CONFIG = LMConfig(Mamba3Config(d_model=32, d_state=16, head_dim=16), n_layers=2, vocab_size=256)
PROMPT = "The Å of"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with a model whose bytes are mostly ASCII."""
    path = tmp_path_factory.mktemp("run")
    model = LM(CONFIG, rngs=nnx.Rngs(0))
    embedding = np.array(model.embedding[...])
    embedding[127:] *= -1
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    save_model(path / "model", CONFIG, parameters | {"embedding": 5 * embedding})
    return path


def text_of(run, prompt: str, n: int, seed: int = 0, **sampling) -> str:
    ids = list(prompt.encode())
    tokens = generate(load_model(run), [ids], max_new_tokens=n, sampling=Sampling(**sampling), seed=seed).tokens[0]
    return ByteTokenizer().decode(tokens)


def test_it_prints_what_generate_draws(run, capsys):
    """As it arrives or at the end."""
    expected = text_of(run, PROMPT, 20, seed=3, temperature=0.8, top_k=50)
    options = ["--prompt", PROMPT, "--max_new_tokens=20", "--seed=3", "--temperature=0.8", "--top_k=50"]
    for stream in ("true", "false"):
        assert main(["generate", str(run), *options, f"--stream={stream}"]) == 0
        out, err = capsys.readouterr()
        assert out == expected + "\n" and err == ""


def test_text_is_printed_slice_by_slice(run, monkeypatch):
    """Eight bytes at a time, and flushed."""

    class Terminal(io.StringIO):
        flushed = []

        def flush(self):
            self.flushed.append(self.getvalue())

    monkeypatch.setattr("sys.stdout", Terminal())
    assert main(["generate", str(run), "--prompt", PROMPT, "--max_new_tokens=20", "--temperature=0"]) == 0
    expected = text_of(run, PROMPT, 20, temperature=0)
    grown = [len(text) for text in Terminal.flushed]
    assert len(set(grown)) >= 3 and Terminal.flushed[-1] == expected + "\n"
    assert Terminal.flushed[0] == expected[: grown[0]]


def test_the_prompt_may_come_from_stdin(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert main(["generate", str(run), "--prompt", "-", "--max_new_tokens=5"]) == 0
    assert capsys.readouterr().out == text_of(run, PROMPT, 5) + "\n"


def test_prompts_of_a_file_are_json_lines(run, capsys, tmp_path):
    """Prompt i draws with seed + i."""
    prompts = ["a", "a", "longer ü"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    assert main(["generate", str(run), "--prompts_file", f"{tmp_path}/prompts.txt", "--max_new_tokens=6"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [dict(prompt=p, text=text_of(run, p, 6, seed=i)) for i, p in enumerate(prompts)]
    assert lines[0]["text"] != lines[1]["text"]


def test_a_stop_ends_the_text_and_is_not_printed(run, capsys):
    expected = text_of(run, PROMPT, 30)
    stop = next(c for c in expected[5:] if c.isascii())
    before = expected[: expected.index(stop)]
    for option in (f"--stop={stop}", f"--stop_ids=[{ord(stop)}]"):
        assert main(["generate", str(run), "--prompt", PROMPT, "--max_new_tokens=30", option]) == 0
        assert capsys.readouterr().out == before + "\n"


def test_the_tokenizer_s_mark_of_an_end_ends_the_text(run, capsys, monkeypatch):
    """By itself, and with further stops beside it; `--max_new_tokens` alone ended the texts above."""
    expected = text_of(run, PROMPT, 30)
    first, second = list(dict.fromkeys(c for c in expected if c.isascii()))[2:4]

    class Marked(ByteTokenizer):
        end = ord(second)

    monkeypatch.setattr(generate_command, "load_tokenizer", lambda directory: Marked())
    for options, mark in (([], second), ([f"--stop={first}"], first), ([f"--stop_ids=[{ord(first)}]"], first)):
        assert main(["generate", str(run), "--prompt", PROMPT, "--max_new_tokens=30", *options]) == 0
        assert capsys.readouterr().out == expected[: expected.index(mark)] + "\n"
    # A stop that does not come leaves the mark in force.
    absent = next(i for i in range(127) if chr(i) not in expected)
    assert main(["generate", str(run), "--prompt", PROMPT, "--max_new_tokens=30", f"--stop_ids=[{absent}]"]) == 0
    assert capsys.readouterr().out == expected[: expected.index(second)] + "\n"


def test_a_saved_conversation_goes_on(run, capsys, tmp_path):
    """By itself, and with a further prompt; with the seed it began with."""
    path = f"{tmp_path}/state.npz"
    first = ["generate", str(run), "--prompt", PROMPT, "--max_new_tokens=10", "--seed=4", "--save_state", path]
    assert main(first) == 0
    begun = capsys.readouterr().out.removesuffix("\n")
    model, tokenizer = load_model(run), ByteTokenizer()
    start = generate(model, [tokenizer.encode(PROMPT)], max_new_tokens=10, seed=4)
    assert begun == tokenizer.decode(start.tokens[0])
    for more in ([], ["--prompt", " and"]):
        assert main(["generate", str(run), "--resume", path, "--max_new_tokens=10", *more]) == 0
        further = [tokenizer.encode("".join(more[1:]))]
        expected = generate(model, further, state=start.state, max_new_tokens=10).tokens[0]
        assert capsys.readouterr().out == tokenizer.decode(expected) + "\n"


def test_stats_are_one_line_on_stderr(run, capsys):
    assert main(["generate", str(run), "--prompt", PROMPT, "--max_new_tokens=20", "--stats=true"]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "9 prompt tokens read in" in err and "20 new tokens, the first 8 after" in err and "tokens/s" in err


def test_a_reader_that_leaves_early_is_told_that_no_state_is_saved(run, capsys, tmp_path, monkeypatch):
    """And leaves quietly, by way of the command's own handling, where none was asked for."""

    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    line, path = [str(run), "--prompt", PROMPT, "--max_new_tokens=5"], tmp_path / "state.npz"
    assert main(["generate", *line, "--save_state", str(path)]) == 1
    error = capsys.readouterr().err
    assert error == f"save_state: {path} is not written, because the text was cut short\n" and not path.exists()
    with pytest.raises(BrokenPipeError):
        generate_command.main(line)
    assert capsys.readouterr().err == ""


ERRORS = {
    "no prompt": ([], "prompt: got none; allowed: a text, or --prompts_file, or --resume"),
    "two prompts": (["--prompt=a", "--prompts_file=f"], "prompt: got one and a prompts_file; allowed: one of them"),
    "empty": (["--prompt="], "prompts: got an empty one in row 0; allowed: at least one token"),
    "top_p": (["--prompt=a", "--top_p=2"], "top_p: got 2.0; allowed: above 0 and up to 1, or None"),
    "stop": (["--prompt=a", "--stop=ab"], "stop: got 'ab', 2 tokens; allowed: the text of one token, or --stop_ids"),
    "stop_ids": (["--prompt=a", "--stop_ids=[256]"], "stop_tokens: got 256; allowed: 0 to 255"),
    "tokens": (["--prompt=a", "--max_new_tokens=0"], "max_new_tokens: got 0; allowed: a positive integer"),
    "no such file": (["--prompts_file=none.txt"], "prompts_file: got none.txt (No such file or directory); allowed:"),
    "no such state": (["--resume=none.npz"], "state: got none.npz (No such file or directory); allowed:"),
    "no such folder": (["--prompt=a", "--save_state=none/a.npz"], "save_state: got 'none/a.npz'; allowed: a file in a"),
    "option": (["--prompt=a", "--temprature=1"], "temprature"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_mistake_is_one_line(case, run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, message = ERRORS[case]
    with pytest.raises(SystemExit) as end:
        main(["generate", str(run), *options])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1
    assert message in err if case == "option" else err.startswith(message)


def test_a_line_of_the_prompts_file_ends_at_its_newline_alone(run, capsys, tmp_path):
    """Not at the other characters that Python counts as ends of lines."""
    (tmp_path / "prompts.txt").write_text("a\x0cb\n\u2028c\n", encoding="utf-8")
    assert main(["generate", str(run), f"--prompts_file={tmp_path}/prompts.txt", "--max_new_tokens=2"]) == 0
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert [json.loads(line)["prompt"] for line in lines] == ["a\x0cb", "\u2028c"]


def test_an_empty_line_or_another_directory_is_one_line(run, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\n\nb\n")
    for argv, message in (
        ([str(run), f"--prompts_file={tmp_path}/prompts.txt"], "prompts_file: got an empty line 2 in"),
        ([str(tmp_path), "--prompt=a"], f"model: got {tmp_path}, without model.yaml"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["generate", *argv])
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.startswith(message) and err.count("\n") == 1


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, capsys):
    config = LMConfig(CONFIG.mixer, n_layers=1, vocab_size=100)
    model = LM(config, rngs=nnx.Rngs(0))
    save_model(tmp_path / "small", config, jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    with pytest.raises(SystemExit) as end:
        main(["generate", f"{tmp_path}/small", "--prompt=a"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"tokenizer: got 256 ids for the model in {tmp_path}/small; allowed: at")
