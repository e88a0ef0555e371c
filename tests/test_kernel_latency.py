"""Kernel latency: bytes and operations by hand, timed functions that compute what they say, rows that resume."""

import dataclasses
import functools
import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import kernel_latency, kernel_profile, kernel_programs, measured
from experiments.kernel_latency import SMOKE, Config
from experiments.kernel_programs import Cell, Shape, arrays, cells, counts, flops
from mamba3_jax.ops import ssm, ssm_step

TINY = Config(**SMOKE)
S1 = Shape.parse("b=8 t=2048 h=64")
SMALL = Shape(b=2, t=6, h=2, p=4, n=8, g=1)


def run(folder, *options) -> int:
    return kernel_latency.main(["--smoke", f"--results_dir={folder}", *options])


def stored(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_bytes_and_operations_of_one_layer_by_hand():
    """x, z and y are 128 MiB each, B and C 4 MiB, dt, A and lam 4 MiB, omega 2 MiB; biases 32 KiB each, D 256 bytes."""
    mib = 2**20
    parameters = 2 * 32 * 1024 + 256
    inputs = (2 * 128 + 2 * 4 + 3 * 4 + 2) * mib + parameters
    cell = Cell("forward", "siso", "chunked", S1)
    assert counts(cell, Config()) == (inputs + 128 * mib, 4 * 8 * 2048 * 64 * 64 * 128)
    both = cell._replace(what="forward_backward")
    assert counts(both, Config()) == (3 * inputs + 2 * 128 * mib, 3 * 4 * 8 * 2048 * 64 * 64 * 128)


def test_bytes_of_a_decode_step_by_hand():
    """The state and its copy are nearly all: (128, 64, 64, 128) twice, with k, v and the angle."""
    cell = Cell("decode", "siso", "recurrent", S1._replace(b=128, t=1), state_dtype="bfloat16")
    heads = 128 * 64
    state = heads * (2 * 64 * 128 + 2 * 128 + 2 * 64 + 4 * 32)
    token = heads * (2 * 2 * 64 + 3 * 4) + 128 * (2 * 2 * 128 + 4 * 32) + 2 * 4 * 64 * 128 + 4 * 64
    assert counts(cell, Config()) == (token + heads * 2 * 64 + 2 * state, 4 * heads * 64 * 128)


@pytest.mark.parametrize("what, times", [("forward", 1), ("forward_backward", 3)])
def test_operations_of_attention_by_hand(what, times):
    """Three tokens are six pairs, each with a product and a weighted sum of p numbers."""
    assert flops(what, "attention", Shape(b=1, t=3, h=1, p=5, n=0, g=0), 1) == times * 6 * 2 * 2 * 5


def test_mamba2_and_attention_have_inputs_of_their_own():
    a = arrays("mamba2", SMALL, 1, "bfloat16")
    assert set(a) == {"x", "B", "C", "dt", "A", "D", "dy"} and a["B"].dtype == jnp.bfloat16
    assert {u.shape for u in arrays("attention", SMALL._replace(n=0, g=0), 1, "float32").values()} == {(2, 6, 2, 4)}
    mimo = arrays("mimo", SMALL, 2, "float32")
    assert mimo["mimo_x"].shape == (2, 2, 4) and (mimo["dt"] > 0).all() and (mimo["A"] < 0).all()
    assert len({float(u.ravel()[0]) for u in mimo.values()}) == len(mimo)


def test_cells_of_one_function_are_one_cell():
    """Attention does not depend on n, and a length that is also a shape is not timed twice."""
    config = Config(shapes=("b=1 t=512 h=4 n=64", "b=1 t=512 h=4"), lengths=(512,))
    names = [cell.name for cell in cells(config, "gpu")]
    assert len(names) == len(set(names))
    forward = [name for name in names if name.startswith("forward,")]
    assert sum("attention" in name for name in forward) == 2 and sum("siso" in name for name in forward) == 4


def test_prefill_and_decode_continue_the_prefill():
    """The state after t tokens at once and t steps over the same tokens is that of both in a row."""
    cell = Cell("prefill_decode", "mimo", "chunked", SMALL, "float32", 2)
    program = kernel_programs.program(cell, TINY)
    (a,) = program.arguments()
    y, last, state = jax.jit(program.function)(a)
    twice = {name: jnp.concatenate([u, u], 1) if name in kernel_programs.PER_TOKEN else u for name, u in a.items()}
    expected, final = jax.jit(lambda a: ssm(**a, implementation="recurrent"))(twice)
    np.testing.assert_allclose(y, expected[:, :6], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(last, expected[:, -1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.ssm, final.ssm, rtol=1e-4, atol=1e-4)


def test_errors_are_of_rounding_and_see_a_wrong_gradient(monkeypatch):
    """float32 is right to 1e-5 in every array, and a gradient that is off by a percent shows in its own error alone."""
    cell = Cell("accuracy", "siso", "chunked", SMALL, "float32")
    errors = kernel_latency.errors(cell)
    names = ("x", "B", "C", "dt", "A", "D", "lam", "omega", "z", "B_bias", "C_bias")
    assert set(errors) == {"y", *(f"d{name}" for name in names)} and max(errors.values()) < 1e-5
    gradients = kernel_latency.gradients

    def wrong(model, implementation, a):
        found = gradients(model, implementation, a)
        return found | dict(dA=1.01 * found["dA"]) if implementation == "chunked" else found

    monkeypatch.setattr(kernel_latency, "gradients", wrong)
    errors = kernel_latency.errors(cell)
    assert errors.pop("dA") == pytest.approx(0.01, rel=1e-2) and max(errors.values()) < 1e-5


def test_rows_resume_and_the_report_holds_every_table(tmp_path):
    """Slices by --only add up; what is measured is not measured again; the peers' times stand beside ours."""
    shape = str(Shape.parse(SMOKE["shapes"][0]))
    peers = tmp_path / "peers.jsonl"
    row = dict(peer="other", model="siso", what="forward", shape=shape, dtype="bfloat16", ms=2.5)
    peers.write_text(json.dumps(row) + "\n" + json.dumps(row | dict(ms=None, reason="broke")) + "\n")
    assert run(tmp_path, "--only=ceiling,*") == 0
    assert run(tmp_path, "--only=*,siso,*") == 0
    rows = stored(tmp_path)
    assert run(tmp_path, "--only=*,siso,*") == 0
    assert stored(tmp_path) == rows and len({row["name"] for row in rows}) == len(rows)
    by_what = {row["what"]: row for row in rows}
    assert set(by_what) == {"ceiling", "forward", "forward_backward", "decode", "prefill", "prefill_decode", "accuracy"}
    assert all(row["ms"] > 0 and row["peak_bytes"] > 0 for row in rows if row["what"] != "accuracy")
    assert 1e-4 < by_what["accuracy"]["errors"]["y"] < 2e-2
    assert run(tmp_path, "--measure=false", f"--peers={peers}") == 0
    report = (tmp_path / "report.md").read_text()
    assert "- forward, mimo, chunked: 1 not run" in report and "siso, chunked: " not in report
    for part in (
        "## Forward and backward passes",
        "(table 6)",
        "(table 7)",
        "## Accuracy",
        "| ours | other |",
        "broke",
    ):
        assert part in report
    forward = next(row["ms"] for row in rows if row["what"] == "forward" and row["shape"] == shape)
    assert f"| 2.5 ({2.5 / forward:.2f}x) |" in report
    assert (tmp_path / "latency.png").stat().st_size > 10_000


def test_what_cannot_be_measured_is_said_and_what_failed_is_tried_again(tmp_path, monkeypatch):
    """An implementation that is not written, one that does not fit, and one with a bug: that one fails the command."""

    def ssm_step(*args, **kwargs):
        raise NotImplementedError("no step")

    monkeypatch.setattr(kernel_programs, "ssm_step", ssm_step)
    assert run(tmp_path, "--only=decode,siso,*") == 0
    assert stored(tmp_path)[-1]["reason"] == "not implemented: no step"
    assert "no step" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(kernel_latency, "memory_available", lambda: 1000)
    assert run(tmp_path, "--only=forward,mamba2,*") == 0
    assert stored(tmp_path)[-1]["reason"].startswith("needs ")
    monkeypatch.undo()
    broken = lambda *args, **kwargs: 1 / 0  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(kernel_programs, "ssm_step", broken)
        assert run(tmp_path, "--only=decode,mamba2,*") == 1
    assert stored(tmp_path)[-1]["reason"] == "failed: ZeroDivisionError: division by zero"
    assert run(tmp_path, "--only=decode,mamba2,*") == 0
    assert stored(tmp_path)[-1]["ms"] > 0


def test_decode_steps_of_a_program_follow_one_another_and_its_time_is_that_of_one(monkeypatch):
    cell = Cell("decode", "siso", "recurrent", Shape(2, 1, 2, 8, 8), "float32")
    function, arguments, _, times = kernel_programs.program(cell, Config())
    tokens, state = arguments()
    outputs, final = function(tokens, state)
    for token, y in zip(tokens, outputs, strict=True):
        expected, state = ssm_step(**token, state=state)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), final, state)
    assert times == len(tokens) > 1

    clock = itertools.count(step=0.001)
    monkeypatch.setattr(kernel_latency.time, "perf_counter", lambda: next(clock))
    single = kernel_latency.Prepared(cell._replace(what="forward"), lambda: 0, tuple, 0, times=1)
    ms, calls = kernel_latency._time(single, Config())
    assert kernel_latency._time(single._replace(times=4), Config()) == (ms / 4, calls)


def test_rows_of_other_code_or_settings_are_measured_again(tmp_path):
    """Settings are what a figure depends on; which cells there are is none of them."""
    identity = functools.partial(measured.identity, folders=kernel_latency.CODE)
    assert identity(TINY) == identity(dataclasses.replace(TINY, lengths=(32,)))
    assert identity(TINY) != identity(dataclasses.replace(TINY, repeats=3))
    assert run(tmp_path, "--only=ceiling,copy,*") == 0
    [row] = stored(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row | dict(code="another")) + "\n")
    assert run(tmp_path, "--only=ceiling,copy,*") == 0
    assert len(stored(tmp_path)) == 2 and stored(tmp_path)[-1]["code"] == row["code"]


def test_rows_of_other_code_stay_in_the_report_which_says_so(tmp_path):
    assert run(tmp_path, "--only=decode,siso,*") == 0
    rows = [row | dict(code="another") for row in stored(tmp_path)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(tmp_path, "--only=ceiling,copy,*") == 0
    text = (tmp_path / "report.md").read_text()
    assert f"Code: {stored(tmp_path)[-1]['code']}; measured with earlier code: Mamba-3 SISO, XLA, recurrent." in text
    assert "## A decode step" in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--shapes=['b=1 t=0 h=2']"], "shapes: got 'b=1 t=0 h=2'"),
        (["--shapes=['b=1 t=8']"], "shapes: got 'b=1 t=8'"),
        (["--shapes=[]"], "shapes: got []"),
        (["--lengths=[0]"], "lengths: got [0]"),
        (["--decode_n=[6]"], "decode_n: got [6]"),
        (["--repeats=0"], "repeats: got 0"),
        (["--state_dtypes=[float16]"], "state_dtypes: got 'float16'"),
        (["--only=nothing"], "only: got 'nothing'"),
        (["--measure=false"], "measure: got false"),
        (["--peers=/nowhere"], "peers: got /nowhere"),
    ],
)
def test_bad_options_end_with_one_line(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        kernel_latency.main([f"--results_dir={tmp_path / 'results'}", *options])
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1 and message in lines[0] and "allowed: " in lines[0]


PEER = dict(peer="a", model="siso", what="forward", shape="b=1", dtype="float32", ms=1.0)


@pytest.mark.parametrize(
    "line",
    ["[1]", "{", '{"peer": "a"}', *(json.dumps(PEER | bad) for bad in (dict(ms="1"), dict(model="m"), dict(what="w")))],
)
def test_a_bad_line_of_peers_is_refused(tmp_path, capsys, line):
    (tmp_path / "peers.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit):
        run(tmp_path, f"--peers={tmp_path / 'peers.jsonl'}")
    assert capsys.readouterr().err.startswith("peers: got ")


def test_time_by_kernel_is_that_of_a_gpus_streams():
    """Means over calls; copies of a kernel are one, what is not ours is XLA's; only streams count."""

    def line(name, **events):
        return SimpleNamespace(
            name=name, events=[SimpleNamespace(name=k, duration_ns=ns) for k, times in events.items() for ns in times]
        )

    streams = [
        line("Stream #13(Compute)", ssm_states=(1e6, 3e6), ssm_states__1=(2e6, 2e6), loop_add_fusion=(1e5, 1e5)),
        line("Stream #14(MemcpyD2D)", MemcpyD2D=(2e5, 2e5)),
        line("XLA Ops", ssm_states=(9e9,)),
    ]
    planes = [
        SimpleNamespace(name="/host:CPU", lines=[line("Stream of words", ssm_states=(9e9,))]),
        SimpleNamespace(name="/device:GPU:0", lines=streams),
    ]
    found = kernel_profile.by_kernel(planes, calls=2)
    assert list(found) == ["ssm_states", "XLA"]
    assert found["ssm_states"] == pytest.approx((4.0, 2.0)) and found["XLA"] == pytest.approx((0.3, 2.0))


def test_the_profiler_runs_where_there_is_no_gpu():
    add = jax.jit(lambda u: u + 1)
    assert kernel_profile.kernels(lambda: add(jnp.ones(3))) == {}


def test_the_report_says_which_kernels_take_the_time(tmp_path):
    assert run(tmp_path, "--only=forward*,siso,*") == 0
    assert "By kernel" not in (tmp_path / "report.md").read_text()
    rows = stored(tmp_path)
    rows[0]["kernels"] = dict(ssm_outputs=[0.347, 1.0], XLA=[0.038, 8.0])
    rows[1]["kernels"] = dict(ssm_outputs=[0.348, 1.0])
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(tmp_path, "--measure=false") == 0
    text = (tmp_path / "report.md").read_text()
    assert "| ssm_outputs | XLA |" in text
    assert "| 0.347 (1) | 0.038 (8) |" in text and "| 0.348 (1) |  |" in text
