"""The experiment that times the GPU kernels with other block sizes: its cuts, and what they are traced with."""

import dataclasses
import threading

import pytest

from experiments import block_sizes, kernel_latency
from experiments.block_sizes import Config, cuts, main, measure_all
from mamba3_jax.ops import triton as sequences
from pallas.triton import decode as steps


def test_a_cut_differs_from_the_default_in_one_number():
    found = list(cuts(Config()))
    assert len({cut.name for cut in found}) == len(found)
    defaults = {cut.cell: cut.blocks for cut in found if cut.changed == "default"}
    # Forward, forward + backward, and two dtypes of a decode step's state, of SISO and MIMO.
    assert len(defaults) == 8
    for cut in found:
        values = zip(dataclasses.astuple(cut.blocks), dataclasses.astuple(defaults[cut.cell]))
        assert sum(a != b for a, b in values) == (cut.changed != "default")


def test_every_program_is_traced_with_its_own_blocks(monkeypatch):
    """Though several are compiled at once, on threads that wait for each other here."""
    chosen = list(cuts(Config()))[: block_sizes.GROUP]
    together = threading.Barrier(len(chosen))

    def prepare(cell, _):
        together.wait(timeout=60)
        module = steps if cell.what == "decode" else sequences
        return module.default_block_sizes(1, 2, 3)

    monkeypatch.setattr(kernel_latency, "prepare", prepare)
    monkeypatch.setattr(kernel_latency, "measure", lambda cell, prepared, _: dict(blocks=prepared))
    before = sequences.default_block_sizes, steps.default_block_sizes
    assert [figures["blocks"] for _, figures in measure_all(chosen, Config())] == [cut.blocks for cut in chosen]
    assert (sequences.default_block_sizes, steps.default_block_sizes) == before


def test_times_stand_beside_the_defaults(tmp_path, monkeypatch):
    """Rows are kept, and not measured again."""
    times = iter([2.0, 5.0, *[1.0] * 100])
    monkeypatch.setattr(kernel_latency, "prepare", lambda cell, _: cell)
    monkeypatch.setattr(kernel_latency, "measure", lambda *_: dict(ms=next(times)))
    command = ["--smoke", f"--results_dir={tmp_path}"]
    assert main([*command, "--only=*,siso,*"]) == 0
    report = (tmp_path / "report.md").read_text()
    assert (
        "| default | 2.000 (1.00) | 5.000 (1.00) |" in report and "| rows=16 | 1.000 (0.50) | 1.000 (0.20) |" in report
    )
    monkeypatch.setattr(kernel_latency, "prepare", pytest.fail)
    assert main([*command, "--only=*,siso,*"]) == 0


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([f"--results_dir={tmp_path / 'none'}"])
    assert "got a machine with cpu devices; allowed: an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
