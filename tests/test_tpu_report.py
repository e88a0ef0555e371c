"""Bytes counted in optimised HLO, by hand; and the report of tpu_compile, of rows that were not compiled here."""

import json

import pytest

from experiments import tpu_compile, tpu_programs
from experiments.tpu_compile import Cell, Config, cells, failures, predicted, render
from experiments.tpu_hlo import Program
from mamba3_jax.cli import main
from pallas.tpu.chips import CHIPS

# A copy of 64 channels, which lie on 128 lanes; a loop of 5 steps whose fusion reads one row of 4 and overwrites one of
# 5; an array on the chip; a kernel.
HLO = """HloModule jit_f, is_scheduled=true

%slices (param_0: f32[4,8,128], param_1: s32[]) -> f32[1,8,128] {
  %param_0 = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,8,128}
}

%body (arg: (s32[], f32[4,8,128], f32[5,8,128])) -> (s32[], f32[4,8,128], f32[5,8,128]) {
  %arg = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}, f32[5,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%arg), index=0
  %in = f32[4,8,128]{2,1,0:T(8,128)} get-tuple-element(%arg), index=1
  %out = f32[5,8,128]{2,1,0:T(8,128)} get-tuple-element(%arg), index=2
  %row = f32[1,8,128]{2,1,0:T(8,128)S(1)} fusion(%in, %i), kind=kLoop, calls=%slices
  %new = f32[5,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%out, %row, %i, %i, %i)
  ROOT %next = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}, f32[5,8,128]{2,1,0:T(8,128)}) tuple(%i, %in, %new)
}

%condition (arg.1: (s32[], f32[4,8,128], f32[5,8,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}, f32[5,8,128]{2,1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %steps = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%j, %steps), direction=LT
}

ENTRY %main (x: bf16[2,16,64], in: f32[4,8,128]) -> f32[5,8,128] {
  %x = bf16[2,16,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %in.1 = f32[4,8,128]{2,1,0:T(8,128)} parameter(1)
  %turned = bf16[2,16,64]{1,2,0:T(8,128)(2,1)} copy(%x)
  %kernel = f32[5,8,128]{2,1,0:T(8,128)} custom-call(%turned), custom_call_target="tpu_custom_call"
  %start = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}, f32[5,8,128]{2,1,0:T(8,128)}) tuple(%kernel, %in.1, %kernel)
  %loop = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}, f32[5,8,128]{2,1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[5,8,128]{2,1,0:T(8,128)} get-tuple-element(%loop), index=2
}
"""  # noqa: E501  (as the compiler prints it)


def test_bytes_as_they_lie_in_memory_and_as_often_as_they_move():
    program = Program.parse(HLO)
    x = 2 * 16 * 128 * 2  # as it came, on 128 lanes
    turned = 2 * 64 * 128 * 2  # 16 tokens on 128 lanes
    row = 8 * 128 * 4
    # A step of the loop reads one row of its input into the chip, and writes it from there: in place.
    assert program.bytes() == (x + turned) + (turned + 5 * row) + 5 * row


def test_copies_of_large_arrays_are_found():
    program = Program.parse(HLO)
    assert program.moves(2 * 16 * 64) == ["copy turned"]
    assert not program.moves(2 * 16 * 64 + 1)


def row(cell: Cell, **figures) -> dict:
    return dict(name=cell.name, **cell._asdict() | dict(shape=str(cell.shape)), **figures)


FIGURES = dict(compile_seconds=3.0, arguments=10**9, outputs=10**9, temporaries=10**8, vmem={"ssm_tpu_forward": 2**22})


@pytest.fixture
def rows():
    found = []
    for cell in cells(Config(chips=("v5e",), shapes=("b=8 t=2048 h=64",), peer=None)):
        if cell.what.startswith("schedule"):
            kernels = ["decode"] if "decode" in cell.what else ["forward", "backward"]
            found.append(row(cell, bundles={f"ssm_tpu_{kernel}": 800 for kernel in kernels}))
        else:
            ours = cell.implementation == "tpu"
            found.append(row(cell, **FIGURES, hbm_bytes=(1 if ours else 3) * 10**9, moves=[] if ours else ["copy a"]))
    return found


def test_every_generation_and_pass_has_its_cells():
    found = cells(Config())
    ours = {(cell.chip, cell.what, cell.r, cell.shape.h) for cell in found if cell.implementation == "tpu"}
    for chip in CHIPS:
        for what in ("forward", "forward_backward", "decode"):
            assert {(chip, what, r, h) for r in (1, 4) for h in (24, 32, 48, 64)} <= ours
    assert len({cell.name for cell in found}) == len(found)


def test_the_report_has_the_ratio_and_the_predictions(rows):
    text = render(dict(command="mamba3", jax="0", libtpu="0", rows=rows))
    assert "| ours, chunked XLA | 3.00 | 3.00 |" in text and "| ours, Pallas | 1.00 | 1.00 |" in text
    assert "nothing here was run" in text and not failures(rows)
    forward = next(r for r in rows if r["what"] == "schedule forward_backward" and r["r"] == 1)
    seconds, prediction = predicted(forward, "forward", 800)
    # 8 rows x 16 chunks x 32 blocks of two heads, four of them in a step.
    assert seconds == pytest.approx(800 * 8 * 16 * 32 / 4 / CHIPS["v5e"].clock)
    assert f"{1e3 * seconds:.2f} | {1e3 * prediction.units['HBM']:.2f}" in text


def test_what_should_not_be_is_named(rows):
    rows[-1] = {k: v for k, v in rows[-1].items() if k != "bundles"} | dict(reason="out of VMEM")
    moved = next(r for r in rows if r["implementation"] == "tpu" and "moves" in r)
    moved["moves"] = ["copy x"]
    assert failures(rows) == [
        f"{moved['name']}: moves an array as large as x: copy x", f"{rows[-1]['name']}: out of VMEM"
    ]  # fmt: skip
    assert "## What failed" in render(dict(command="mamba3", jax="0", libtpu="0", rows=rows))


def test_more_than_half_of_what_another_moves_is_named(rows):
    chunked = next(r for r in rows if r["implementation"] == "chunked")
    ours = next(r for r in rows if r["implementation"] == "tpu" and r["what"] == chunked["what"] and r["r"] == 1)
    ours["hbm_bytes"] = chunked["hbm_bytes"] // 2 + 1
    assert failures(rows) == [f"{ours['name']}: moves 1.50 GB, more than half of the 3.00 of chunked"]


def test_a_change_of_the_decode_step_makes_no_row_of_a_sequence_stale(monkeypatch):
    monkeypatch.setitem(tpu_compile.CODE, "decode", ("pyproject.toml",))
    changed = tpu_compile.identity("decode", "tpu")
    assert changed == tpu_compile.identity("schedule decode", "tpu")
    monkeypatch.undo()
    assert "pallas/tpu/decode.py" not in tpu_compile.CODE["tpu"] and changed != tpu_compile.identity("decode", "tpu")
    assert tpu_compile.identity("decode", "tpu") != tpu_compile.identity("schedule forward_backward", "tpu")


def test_without_libtpu_the_smoke_run_says_so_and_passes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tpu_programs, "libtpu_missing", lambda: "libtpu is not installed (the extra tpu)")
    assert main(["experiment", "tpu_compile", "--smoke", f"--results_dir={tmp_path}"]) == 0
    assert "nothing was compiled, because libtpu is not installed (the extra tpu)" in capsys.readouterr().out
    assert main(["experiment", "tpu_compile", f"--results_dir={tmp_path}"]) == 1


def test_rows_are_made_once_and_written_at_once(tmp_path, monkeypatch):
    made = []

    def measure(cell, config):
        made.append(cell.name)
        return dict(FIGURES, hbm_bytes=1, moves=[])

    monkeypatch.setattr(tpu_programs, "libtpu_missing", lambda: None)
    monkeypatch.setattr(tpu_compile, "measure", measure)
    monkeypatch.setattr(tpu_compile, "identity", lambda *of: dict(jax="0", libtpu="0", code=of[-1]))
    run = ["experiment", "tpu_compile", "--smoke", f"--results_dir={tmp_path}"]
    assert main([*run, "--only", "*decode*"]) == 0 and main(run) == 0 and main(run) == 0
    assert len(made) == len(set(made)) == 6
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {r["name"] for r in summary["rows"]} == set(made)
    with pytest.raises(SystemExit):
        main([*run, "--only", "nothing"])


def test_bad_options_are_one_line(capsys):
    with pytest.raises(SystemExit) as error:
        main(["experiment", "tpu_compile", "--peer", "/nowhere"])
    assert error.value.code == 2 and "peer: got /nowhere; allowed: a clone" in capsys.readouterr().err
