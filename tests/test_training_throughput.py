"""training_throughput and data_throughput: cells, sizes, plans, tables and what resumes. Times are for the commands."""

import numpy as np
import pytest

from experiments import data_throughput, measured, training_programs, training_throughput
from experiments.training_programs import TINY, Cell, Plan, Prepared, model_config, plans, random_batch
from experiments.training_report import differences, plot, render
from experiments.training_throughput import Config, cells, main
from mamba3_jax.data.pipeline import DataConfig, open_data
from mamba3_jax.models import abstract_model, preset
from mamba3_jax.models.lm import count_parameters
from mamba3_jax.ops.chunked import default_chunk_size

SAME = dict(device="NVIDIA H100 80GB HBM3 (gpu)", jax="1.2.3", flags="", settings=dict(steps=6), code="abc")


def layer_parameters(model: str) -> int:
    config = model_config(Cell("widths", model, "1.5b", 1, 16, 2048))
    return count_parameters(abstract_model(config)) - 128256 * 2048


def test_siso_and_mimo_are_the_published_models_and_the_others_layers_are_as_large():
    for model in ("siso", "mimo"):
        config = model_config(Cell("widths", model, "1.5b", 24, 16, 2048))
        assert config == preset(f"mamba3-{model}-1.5b")
    siso = layer_parameters("siso")
    assert all(layer_parameters(model) == pytest.approx(siso, rel=0.02) for model in ("mimo", "mamba2", "transformer"))


def test_the_peers_shape_has_its_count_of_parameters():
    """Mixers over 128,256 tokens twice, by hand: z, x, B, C, three numbers a head, 32 angles."""
    [cell] = [cell for cell in cells(Config()) if cell.part == "peer"]
    assert (cell.n_layers, cell.b, cell.t) == (48, 16, 4096)
    in_proj = 2048 * (2 * 4096 + 2 * 128 + 3 * 64 + 32)
    small = 2 * 64 * 128 + 2 * 128 + 2 * 64 + 2048
    total = 2 * (in_proj + 4096 * 2048 + small) + 2 * 128256 * 2048 + 2048
    assert count_parameters(abstract_model(model_config(cell._replace(n_layers=2)))) == total


def test_every_cell_has_a_name_and_plans_that_divide_its_rows():
    found = list(cells(Config()))
    assert len({cell.name for cell in found}) == len(found)
    for cell in found:
        if cell.part == "precision":
            continue
        ways = plans(cell)
        assert all(cell.b % plan.rows == 0 for plan in ways) and ways[-1].remat == "blocks"
        if cell.part == "lengths":
            assert ways[0] == Plan(cell.b, "none") and cell.b * cell.t == 65536


def test_targets_are_the_tokens_that_follow():
    batch = random_batch(2, 5, 7)
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.mask.all() and batch.tokens.max() < 7


def test_rows_of_older_code_are_shown_and_measured_again():
    row = dict(name="a", **SAME)
    rows = [row | dict(device="another"), row | dict(code="older"), dict(name="b", **SAME)]
    shown = measured.comparable(rows, SAME)
    assert shown == dict(a=rows[1], b=rows[2])
    assert [measured.stands(found, SAME) for found in (shown["a"], shown["b"], None)] == [False, True, False]
    assert not measured.stands(rows[2] | dict(reason="out of memory"), SAME)


def test_differences_are_of_running_means():
    low, high = np.full(40, 1.01), np.ones(40)
    high[::2], high[1::2] = 0.5, 1.5
    np.testing.assert_allclose(differences(low, high), np.full(21, 0.01), rtol=1e-9)
    assert len(differences(low, high, window=10)) == 31


def test_the_control_of_bfloat16_is_float32_with_other_rounding():
    """The chunked form twice, in chunks that differ on every backend; bfloat16 as a device takes it."""
    runs = {name: training_throughput.precision(Config(), name).model for name in ("bfloat16", "float32", "control")}
    assert [model.dtype for model in runs.values()] == ["bfloat16", "float32", "float32"]
    assert [model.mamba3.implementation for model in runs.values()] == [None, "chunked", "chunked"]
    assert runs["float32"].mamba3.chunk_size is None
    assert runs["control"].mamba3.chunk_size not in {default_chunk_size(backend, 1) for backend in ("cpu", "gpu")}


def test_the_report_counts_flops_against_the_devices_peak_and_puts_the_peer_beside():
    siso = dict(s=0.5, tokens=32768, flops=10**10, parameters=1.5e9, implementation="triton", rows_at_once=8)
    siso |= dict(remat="none", peak_bytes=64 * 10**9, compile_s=60.0)
    config = Config(models=("siso", "mimo"), lengths=(2048, 65536))
    wanted = list(cells(config))
    figures = {
        wanted[0]: siso,
        wanted[1]: dict(reason="MemoryError: needs 99 GB"),
        wanted[2]: siso | dict(s=1.0, tokens=65536),
        wanted[3]: siso,
        wanted[4]: siso | dict(s=0.625),
        wanted[5]: dict(losses=[2.02] * 30, tokens=4096, implementation="triton"),
        wanted[6]: dict(losses=[2.0] * 30, tokens=4096, implementation="chunked"),
        wanted[7]: dict(losses=[2.0] * 10 + [1.99] * 20, tokens=4096, implementation="chunked"),
    }
    rows = [dict(name=cell.name, **cell._asdict(), **figure, **SAME) for cell, figure in figures.items()]
    peer = dict(s=2.0, tokens=65536, jax="0.11.2", tried=[{}, {}], rows_at_once=4, remat="none")
    summary = dict(command="uv run ...", **SAME, rows=rows, peers=[peer])
    text = render(summary, wanted)
    # 65,536 tokens/s of 1e10 FLOPs are 655 of 989.4 TFLOP/s.
    assert "| Mamba-3 SISO | Pallas Triton | 24 | 1.5B | 16 x 2048 | 8 | kept | 0.500 | 65,536 | 655 | 66.2% |" in text
    assert "MemoryError: needs 99 GB" in text and "32,976 tokens/s" in text
    assert "32,768 tokens/s, 33.1% MFU by our count; ours is 2.00 times as fast" in text
    assert "| 65536 | 1 | 52,429 | 80.0% |" in text and "2.0200 against 2.0000 nats" in text
    assert "| bfloat16 | 1.00% | 1.00% | 1.00% |" in text and "| control | 0.50% | 0.50% | 0.50% |" in text
    left, middle, right = plot(summary).axes
    assert len(left.lines) == 2 and len(right.lines) == 1
    # bfloat16, the control, 1%.
    assert len(middle.lines) == 3
    without = summary | dict(rows=rows[:-1])
    assert "| control | not run | - | - |" in render(without, wanted) and len(plot(without).axes[1].lines) == 2
    missing = render(summary | dict(rows=[], peers=[]), wanted)
    assert missing.count("not run") == 5 and "Not run." in missing and "was not timed" in missing


def test_a_cell_is_measured_once_and_one_that_fails_again(tmp_path, monkeypatch):
    """Of the smallest one: what a row says, and that other rows are not lost with it."""
    options = ["--smoke", "--only=lengths,*", f"--results_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(training_throughput, "prepare", lambda cell: 1 / 0)
        assert main(options) == 1
    assert main(options) == 0
    failed, row = measured.read(tmp_path)
    assert failed["reason"] == "ZeroDivisionError: division by zero"
    assert row["implementation"] == "chunked" and row["s"] > 0 and row["tokens"] == 32
    assert main(options) == 0 and len(measured.read(tmp_path)) == 2
    assert main([f"--results_dir={tmp_path}", "--smoke", "--measure=false"]) == 0


def test_a_step_that_fits_nowhere_says_what_each_way_needs(monkeypatch):
    cell = Cell("widths", "siso", TINY, 1, 16, 2048)
    prepared = Prepared(None, None, None, None, "chunked", 2 * 10**9, 1.0)
    monkeypatch.setattr(training_programs, "compiled", lambda step, plan, b, t: prepared._replace(step=step, plan=plan))
    assert training_programs.prepare(cell).plan == Plan(8, "none")
    monkeypatch.setattr(training_programs, "memory_available", lambda: 10**9)
    with pytest.raises(MemoryError, match=r"2 GB \(8 rows at once, remat none\), .*4 rows.*blocks\) of the 1 GB"):
        training_programs.prepare(cell)


def test_all_tokens_of_the_shards_are_read(tmp_path):
    config = data_throughput.Config(tokens=5000, context=64, batch_size=2, batches=3)
    data_throughput.write_shards(tmp_path, config)
    data = open_data(DataConfig(str(tmp_path), config.context, config.batch_size))
    assert data.splits["train"].tokens == config.tokens and data.vocab_size == config.vocab_size
    assert data_throughput.read(data, 3)["tokens_per_second"] > 0


@pytest.mark.parametrize("options, text", [
    (dict(size="7b"), "size: got '7b'; allowed: 180m"),
    (dict(models=("gpt",)), "models: got 'gpt'; allowed: siso"),
    (dict(rows=0), "rows: got 0; allowed: a positive integer"),
    (dict(lengths=(3000,)), "lengths: got 3000; allowed: divisors of length_tokens=65536"),
])  # fmt: skip
def test_bad_options_are_named(options, text):
    with pytest.raises(ValueError) as error:
        Config(**options)
    assert str(error.value).startswith(text)
