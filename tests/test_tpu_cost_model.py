"""The cost model of the TPU kernels: bytes as the kernels' operands have them, and what `mamba3 bench` says."""

import functools
import itertools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.kernel_programs import Shape, arrays
from experiments.tpu_compile import predicted
from mamba3_jax import bench_command
from mamba3_jax.cli import main
from mamba3_jax.ops import SSMState, api, ssm
from mamba3_jax.ops.decode import decode
from pallas.tpu import cost_model
from pallas.tpu.block_sizes import default_block_sizes
from pallas.tpu.chips import CHIPS, chip_of
from pallas.tpu.cost_model import INFLATION, Sizes, predict

ROOT = Path(__file__).resolve().parent.parent
V5E = CHIPS["v5e"]
LAYER = Sizes(b=8, t=8192, h=32, p=64, n=128, s=32)


@pytest.fixture
def tpu(monkeypatch):
    """Inside, this machine is taken for one with a v5e, for which calls are traced, not run."""
    mesh = jax.sharding.AbstractMesh(
        (), (), abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
    )
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def kernel_calls(function, *args) -> dict[str, tuple]:
    """By name: (bytes of the operands and results, cost estimate) of the Pallas calls of a traced function."""
    found = {}

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                size = sum(v.aval.size * v.aval.dtype.itemsize for v in (*eqn.invars, *eqn.outvars))
                found[eqn.params["name"]] = size, eqn.params["cost_estimate"]
            for inside in eqn.params.values():
                if hasattr(inside := getattr(inside, "jaxpr", inside), "eqns"):
                    visit(inside)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def layer(model: str, r: int):
    a = jax.eval_shape(lambda: arrays(model, Shape(b=2, t=1024, h=8), r, "bfloat16"))
    a.pop("dy")
    return a


@pytest.mark.parametrize("model, r", [("siso", 1), ("mimo", 4)])
def test_bytes_are_those_of_the_kernels(tpu, model, r):
    """Of forward and backward within 5%: the rest is per row of the batch or per head, not per token."""

    def loss(a):
        return jnp.sum(ssm(**a, implementation="tpu")[0].astype(jnp.float32))

    calls = kernel_calls(jax.grad(loss), layer(model, r))
    assert set(calls) == {"ssm_tpu_forward", "ssm_tpu_backward"}
    for name, (size, estimate) in calls.items():
        assert abs(estimate.bytes_accessed / size - 1) < 0.05, name
        assert estimate.flops > 0 and estimate.transcendentals > 0


def test_bytes_of_a_step_are_the_state_twice_and_little_else(tpu):
    a = {k: jax.ShapeDtypeStruct((u.shape[0], *u.shape[2:]), u.dtype) if u.ndim > 2 and u.shape[1] == 1024 else u
         for k, u in layer("siso", 1).items()}  # fmt: skip
    state = SSMState(*(jax.ShapeDtypeStruct(u, jnp.float32) for u in SSMState.shapes(2, 8, 64, 128, 1, 32)))
    calls = kernel_calls(lambda a, state: decode(**a, state=state, kernel="tpu"), a, state)
    size, estimate = calls["ssm_tpu_decode"]
    assert 0.95 * size < estimate.bytes_accessed < 1.2 * size  # arrays of 64 channels take 128 lanes


def test_products_are_padded_to_the_matrix_unit():
    """A 128 x 128 x 128 product fills a unit of 128, and a quarter of one of 256; float32 takes six passes."""
    of = functools.partial(cost_model._Blocks, LAYER)
    assert of(V5E, 128).product(128, 128, 128) == of(CHIPS["v6e"], 128).product(128, 128, 128) == 128
    assert of(V5E, 128).product(128, 64, 130) == 2 * 128
    assert cost_model._Blocks(LAYER._replace(itemsize=4), V5E, 128).product(128, 128, 128) == 6 * 128


def test_work_grows_with_what_it_is_of():
    """Linear in rows and heads; twice the ranks more than twice the products; a chunk's squares with the chunk."""
    once = cost_model.forward(LAYER, V5E, 128)
    twice = cost_model.forward(LAYER._replace(b=16, h=64), V5E, 128)
    assert twice.mxu == 4 * once.mxu and twice.vpu == 4 * once.vpu
    ranks = [cost_model.forward(LAYER._replace(r=r), V5E, 128).mxu for r in (1, 2, 4)]
    assert ranks[2] - ranks[1] > 2 * (ranks[1] - ranks[0])
    assert cost_model.forward(LAYER, V5E, 256).eup == 1.5 * once.eup  # as many of the scores' as of the gate's
    assert cost_model.backward(LAYER, V5E, 128).vpu > once.vpu


def test_a_prediction_is_no_faster_than_any_unit_and_names_the_one_that_binds():
    """Which takes all of the time: HBM by its bytes alone, another unit as the schedule keeps it busy."""
    found = set()
    for chip, sizes in itertools.product(CHIPS.values(), (LAYER._replace(b=128), LAYER._replace(b=128, r=4))):
        step = predict(cost_model.decode(sizes, chip), "decode", sizes, chip)
        both = predict(cost_model.backward(sizes, chip, 128), "backward", sizes, chip)
        for what, prediction in (("decode", step), ("backward", both)):
            assert prediction.seconds >= max(prediction.units.values())
            assert (prediction.binds == "HBM") == (prediction.seconds == prediction.units["HBM"])
            if prediction.binds != "HBM":
                assert prediction.seconds == INFLATION[what] * prediction.units[prediction.binds]
            found.add((what, prediction.binds))
    # On v5e a step waits for its bytes, on the newer chips for the vector unit.
    assert found == {("decode", "HBM"), ("decode", "VPU"), ("backward", "VPU"), ("backward", "MXU")}
    assert predict(cost_model.decode(LAYER._replace(b=128), V5E), "decode", LAYER, V5E).binds == "HBM"


def committed() -> list[dict]:
    return json.loads((ROOT / "results/tpu_compile/summary.json").read_text())["rows"]


def test_chunked_moves_what_was_counted():
    counted = {row["what"]: row for row in committed() if row["implementation"] == "chunked"}
    assert counted
    for what, row in counted.items():
        shape = Shape.parse(row["shape"])
        sizes = Sizes(shape.b, shape.t, shape.h, shape.p, shape.n, shape.g, s=shape.n // 4)
        assert cost_model.chunked(sizes, what, 256).bytes == pytest.approx(row["hbm_bytes"], rel=0.01), what


def test_schedules_are_as_much_longer_than_the_busiest_unit_as_counted():
    """Of SISO on v5e, which INFLATION is read from."""
    rows = [row for row in committed() if row["chip"] == "v5e" and row["r"] == 1 and "bundles" in row]
    assert len(rows) == 2
    for kernel, bundles, row in ((*item, row) for row in rows for item in row["bundles"].items()):
        what = kernel.removeprefix("ssm_tpu_")
        seconds, prediction = predicted(row, what, bundles)
        busiest = max(time for unit, time in prediction.units.items() if unit != "HBM")
        assert INFLATION[what] == pytest.approx(seconds / busiest, rel=0.1), what


def test_heads_that_do_not_fill_the_lanes_with_their_group_are_padded():
    """One head of 64 channels per group: each on 128 lanes, as the kernels have it."""
    alone, padded = (cost_model.forward(LAYER._replace(g=32, p=p), V5E, 128) for p in (64, 128))
    assert alone == padded


def test_cores_share_whole_rows():
    """Three rows on two cores take as long as four; a decode step of one row is shared by its blocks of heads."""
    v4 = CHIPS["v4"]
    seconds = {}
    for b in (3, 4):
        sizes = LAYER._replace(b=b)
        seconds[b] = predict(cost_model.forward(sizes, v4, 128), "forward", sizes, v4).units["VPU"]
    assert seconds[3] == pytest.approx(seconds[4])
    row = LAYER._replace(b=1)
    one, two = (predict(cost_model.decode(row, v4), what, row, v4).units["VPU"] for what in ("forward", "decode"))
    assert one == pytest.approx(2 * two)


@pytest.mark.parametrize("r", [1, 4])
def test_the_default_chunk_is_as_fast_as_any_by_the_model(r):
    sizes = LAYER._replace(r=r)
    shape = {name: getattr(sizes, name) for name in "hpngrs"}
    for chip in CHIPS.values():
        default = default_block_sizes(shape, jnp.bfloat16, chip.device_kinds[0]).chunk
        best = min(cost_model.train_seconds(sizes, chip, chunk) for chunk in (128, 256, 512))
        assert cost_model.train_seconds(sizes, chip, default) <= 1.02 * best


@pytest.mark.parametrize("kind, name", [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU7x", "tpu7x"), ("v4", "v4")])
def test_chips_by_the_names_jax_gives_them(kind, name):
    assert chip_of(kind) is CHIPS[name]


def test_an_unknown_chip_is_named():
    with pytest.raises(ValueError, match="chip: got 'TPU v9'; allowed: v4, v5e, v5p, v6e, tpu7x"):
        chip_of("TPU v9")


def test_none_picks_the_predicted_faster_form_and_says_why(tpu, monkeypatch, caplog):
    a = layer("siso", 1)
    with caplog.at_level("INFO", logger="mamba3_jax.ops.api"):
        api._log_choice.cache_clear()
        jax.eval_shape(lambda a: ssm(**a), a)
        monkeypatch.setattr("mamba3_jax.ops.tpu.chunked_seconds", lambda *_: 0.0)
        jax.eval_shape(lambda a: ssm(**a), a)
    kernels, chunked = (record.getMessage() for record in caplog.records)
    assert kernels.endswith("implementation 'tpu' for sequences")
    assert "implementation 'chunked' for sequences (predicted 0 ms forward and backward" in chunked


@pytest.mark.parametrize("names, cut", [((), ()), (("a", "b"), ()), (("a", "b"), ("a",)), (("a", "b"), ("a", "b"))])
def test_none_leaves_to_xla_what_may_lie_on_several_devices(names, cut, monkeypatch, caplog):
    """Without a mesh, with one that is not this library's, and in a shard_map over some or all of its axes."""
    monkeypatch.setattr(api, "_platform", lambda: "tpu")
    monkeypatch.setattr("mamba3_jax.ops.tpu.device_kind", lambda: "TPU v5 lite")

    def call(a):
        return ssm(**a)[0]

    if names:
        mesh = jax.make_mesh((2, 2), names, axis_types=(jax.sharding.AxisType.Auto,) * 2)
        whole = jax.sharding.PartitionSpec()
        call = jax.shard_map(call, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False, axis_names={*cut})
    a = layer("siso", 1)
    with caplog.at_level("INFO", logger="mamba3_jax.ops.api"), monkeypatch.context() as patch:
        patch.setattr(api, "tpu", lambda inputs, state, **_: (inputs.x, state))
        api._log_choice.cache_clear()
        if not names or cut:
            jax.eval_shape(call, a)
        else:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                jax.eval_shape(lambda a: ssm(**a)[0], a)
    (record,) = caplog.records
    assert ("implementation 'tpu'" in record.getMessage()) == (cut == names != ())
    devices = {(): 4, ("a",): 2}.get(cut)
    assert devices is None or f"{devices} devices, among which" in record.getMessage()


def test_where_no_chunk_fits_none_falls_back_and_the_kernels_refuse(tpu, monkeypatch, caplog):
    """Rank 4 in float32 on a v4, whose VMEM is an eighth of a v5e's; and a TPU that nobody knows."""
    monkeypatch.setattr("mamba3_jax.ops.tpu.device_kind", lambda: "TPU v4")
    a = {name: jax.ShapeDtypeStruct(u.shape, jnp.float32) for name, u in layer("mimo", 4).items()}
    with caplog.at_level("INFO", logger="mamba3_jax.ops.api"):
        api._log_choice.cache_clear()
        jax.eval_shape(lambda a: ssm(**a), a)
    (record,) = caplog.records
    reason = r"h, p, n, r: got h=8 p=64 n=128 r=4 in float32, \d+ bytes of VMEM where v4 has 16777216; allowed: "
    assert re.search(rf"implementation 'chunked' for sequences \({reason}", record.getMessage())
    with pytest.raises(NotImplementedError, match=f"^{reason}implementation recurrent, chunked"):
        jax.eval_shape(lambda a: ssm(**a, implementation="tpu"), a)
    monkeypatch.setattr("mamba3_jax.ops.tpu.device_kind", lambda: "TPU v9")
    with pytest.raises(NotImplementedError, match="^chip: got 'TPU v9'; allowed: v4, v5e"):
        jax.eval_shape(lambda a: ssm(**a, implementation="tpu"), a)


def test_bench_prints_predictions_beside_the_peer(capsys):
    assert main(["bench", "--cost_model", "tpu", "--chip", "v5e"]) == 0
    text = capsys.readouterr().out
    assert "Predictions for one v5e" in text and "not measurements" in text
    assert "17.4 ms measured" in text and "80.1 ms measured" in text
    rows = bench_command.rows(bench_command.Config())
    (_, _, forward), (_, _, backward) = rows["forward"][0], rows["backward"][0]
    assert f"{1e3 * forward.seconds:.3f}" in text and f"{1e3 * backward.seconds:.3f}" in text
    assert main(["bench", "--chip", "v6e"]) == 0
    assert "measured" not in capsys.readouterr().out.replace("not measurements", "")


def test_bench_says_why_there_is_no_step(capsys):
    """What the decode kernel would raise."""
    assert main(["bench", "--h", "12", "--n", "2048", "--decode_b", "1"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("decode step, b=1"))
    assert "state.ssm: got 6291456 bytes of 12 heads" in line


@pytest.mark.parametrize("options, expected", [
    (["--chip", "v9"], "chip: got 'v9'; allowed: v4, v5e"), (["--h", "0"], "h: got 0; allowed: a positive integer"),
    (["--chunk", "100"], "chunk: got 100; allowed: a multiple of 128"), (["--g", "3"], "g: got 3; allowed: a divisor"),
    (["--n", "127"], "n: got 127; allowed: an even size"),
    (["--chip", "v4", "--chunk", "1024"], "chunk: got 1024, which needs"),
    (["--chip", "v4", "--r", "4", "--dtype", "float32"], "h, p, n, r: got h=32 p=64 n=128 r=4 in float32"),
])  # fmt: skip
def test_bad_options_are_one_line(options, expected, capsys):
    with pytest.raises(SystemExit) as error:
        main(["bench", *options])
    assert error.value.code == 2 and expected in capsys.readouterr().err
