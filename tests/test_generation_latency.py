"""generation_latency: which cells there are, what a step must move, and the tables. Times are for the command."""

import pytest

from experiments.generation_latency import Cell, Config, bound_ms, cells, plot, random_model, render, step_bytes

TINY = Config(models=("tiny",), batches=(1, 4), positions=(1, 9), prefill_lengths=(8,), table_7_lengths=(8,))


def test_every_cell_is_measured_once_and_the_largest_batch_with_both_states():
    found = list(cells(TINY))
    assert len({cell.name for cell in found}) == len(found)
    decode = [(cell.b, cell.t, cell.state_dtype) for cell in found if cell.what == "decode"]
    assert sorted(decode) == [(1, 1, "float32"), (1, 9, "float32"), (4, 1, "bfloat16"), (4, 1, "float32")]
    assert [(c.what, c.b) for c in found if c.what != "decode"] == [
        ("prefill", 1), ("prefill", 128), ("prefill+decode", 128),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_a_step_moves_the_weights_and_the_states(dtype, size):
    """By hand: 2 layers of d 32, inner 64, 4 heads of 16, state 16; MLP 128; 256 tied tokens. Angles stay float32."""
    in_proj = 32 * (2 * 64 + 2 * 16 + 3 * 4 + 4)
    layer = in_proj + 64 * 32 + 4 + 4 + 2 * 16 + 2 * 4 * 16 + 2 * 32 + 32 * 256 + 128 * 32
    state = size * (4 * 16 * 16 + 4 * 16 + 4 * 16) + 4 * 4 * 4
    moved = step_bytes(random_model("tiny"), Cell("decode", "tiny", 3, 1, dtype))
    assert moved == dict(weight_bytes=4 * (2 * layer + 256 * 32 + 32), state_bytes=3 * 2 * state)
    # Read once, and read and written.
    row = dict(**moved, copy_bytes_per_s=1e9)
    assert bound_ms(row) == pytest.approx((moved["weight_bytes"] + 2 * moved["state_bytes"]) / 1e6)


def test_the_report_puts_the_papers_figures_beside_those_of_its_size_only():
    same = dict(device="some GPU", jax="1.2.3", copy_bytes_per_s=1e12, code="abc")
    large, small = "mamba3-siso-1.5b", "tiny"
    figures = {
        Cell("decode", large, 1, 1): dict(ms=4.0, weight_bytes=10**9, state_bytes=5 * 10**8),
        Cell("prefill", large, 128, 2048): dict(s=1.5),
        Cell("prefill", small, 128, 2048): dict(s=2.5),
    }
    rows = [dict(name=cell.name, **cell._asdict(), **figure, **same) for cell, figure in figures.items()]
    wanted = [Cell("prefill+decode", model, 128, 2048) for model in (large, small)]
    wanted += [Cell("decode", large, 8, 1), Cell("prefill", large, 1, 4096)]
    text = render(dict(command="uv run ...", rows=rows), wanted)
    assert "| mamba3-siso-1.5b | 1 | 1 | float32 | 4.000 | 250 | 500 | 2.000 | 2.00 |" in text
    assert "| mamba3-siso-1.5b | 128 | 2048 | 1.50 (2.02) | not run (17.57) |" in text
    assert "| tiny | 128 | 2048 | 2.50 (-) | not run (-) |" in text
    assert "| mamba3-siso-1.5b | 8 | 1 | float32 | not run | - |" in text
    assert "| mamba3-siso-1.5b | 4096 | not run | - |" in text
    # As well before any decode step of one row, or of any, is measured.
    for some in (rows, rows[1:], [rows[0] | dict(b=8)]):
        left, right = plot(some).axes
        assert left.get_xlabel() == "rows" and right.get_xlabel() == "tokens before"
        assert len(left.lines) == 2 * any(row["what"] == "decode" for row in some)


@pytest.mark.parametrize("options, text", [
    (dict(models=("gpt",)), "models: got 'gpt'; allowed: mamba3-siso-180m"),
    (dict(batches=()), "batches: got []; allowed: at least one"),
    (dict(positions=(0,)), "positions: got [0]; allowed: positive integers"),
    (dict(repeats=0), "repeats: got 0; allowed: a positive integer"),
    (dict(state_dtypes=("float8",)), "state_dtypes: got 'float8'; allowed: float32, bfloat16"),
])  # fmt: skip
def test_bad_options_are_named(options, text):
    with pytest.raises(ValueError) as error:
        Config(**options)
    assert str(error.value).startswith(text)
