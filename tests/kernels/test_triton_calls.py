"""How calls of the operator reach the kernels: which are refused or fall back, how they are cut over devices and
programs, and that they lower for GPUs without one. What the kernels compute is in test_triton.py.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_triton import INTERPRET, TOLERANCE, arguments, assert_all_close, error, interpreted, values_and_gradients

from mamba3_jax.ops import SSMState, api, ssm, ssm_step
from mamba3_jax.ops.triton import triton
from pallas.triton import backward
from pallas.triton.block_sizes import default_block_sizes
from pallas.triton.operands import Operands
from pallas.triton.tiles import Tiling
from test_operator import cut, make, projection, random_state, split_static

AXES = dict(
    x="bthp", z="bthp", B="btrgn", C="btrgn", dt="bth", A="bth", lam="bth", omega="bt1s", B_bias="hrn", C_bias="hrn",
    D="h", mimo_x="hrp", mimo_z="hrp", mimo_o="hrp", angle="bhs", ssm="bhpn", k="bhrn", v="bhp",
)  # fmt: skip
SHARDED = {
    "batch": ((4, 1), dict()),
    "heads": ((1, 4), dict()),
    "batch and heads": ((2, 2), dict(r=2, mimo=True)),
    "heads of a group apart": ((1, 4), dict(g=2)),
}


def sharded_loss(static):
    def loss(arrays):
        y, final = ssm(**arrays, **static, implementation="triton")
        return projection(y, *final), (y, final)

    return loss


def shardings(mesh, arrays):
    def one(name, value):
        if isinstance(value, SSMState):
            return SSMState(*(one(*item) for item in value._asdict().items()))
        return NamedSharding(mesh, P(*({"b": "data", "h": "model"}.get(axis) for axis in AXES[name])))

    return {name: one(name, value) for name, value in arrays.items()}


@functools.cache
def on_one_device(**kwargs):
    """(arguments, the function, what it returns) of values and gradients."""
    args = arguments(20, b=4, h=4, s=16, **kwargs)
    arrays, static = split_static(args | dict(initial_state=random_state(args)))
    gradients = jax.grad(sharded_loss(static), has_aux=True)
    with interpreted():
        return arrays, gradients, jax.jit(gradients)(arrays)


several_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices, as a CPU has in these tests")


@several_devices
@pytest.mark.parametrize("case", SHARDED)
def test_every_device_runs_its_own_rows_and_heads(case):
    """Under `jit` with shardings: the values and gradients of one device, and x never gathered."""
    shape, kwargs = SHARDED[case]
    arrays, gradients, expected = on_one_device(**kwargs)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(shape), ("data", "model"))
    placed = jax.device_put(arrays, shardings(mesh, arrays))
    # So few that every device takes its rows in parts, if it has more than one.
    with interpreted(programs=2):
        compiled = jax.jit(gradients).lower(placed).compile()
    found = compiled(placed)
    assert_all_close(found, expected, 3e-6)
    assert found[1][0].sharding.is_equivalent_to(placed["x"].sharding, 4)
    gathered = re.findall(r"= (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text())
    # Of several groups every device reads B and C whole, and takes its own.
    assert all("2,32]" in shape for shape in gathered) if case == "heads of a group apart" else not gathered


@several_devices
def test_every_device_trains_its_own_rows_and_heads():
    """As above without a state before and with no use of the one after."""
    args = arguments(20, b=4, h=4, g=2, s=16)
    arrays, static = split_static(args)

    def loss(arrays):
        return projection(ssm(**arrays, **static, implementation="triton")[0])

    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    placed = jax.device_put(arrays, shardings(mesh, arrays))
    with interpreted(programs=2):
        expected = jax.jit(jax.grad(loss))(arrays)
        compiled = jax.jit(jax.grad(loss)).lower(placed).compile()
    assert_all_close(compiled(placed), expected, 3e-6)
    assert not re.findall(r" (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text())


@several_devices
def test_inside_a_shard_map_and_a_vmap():
    """A sweep's runs are vmapped, those of each device by themselves; the two rows of a run one after the other."""
    args = arguments(20, s=16)
    arrays, static = split_static(args)
    gradients = jax.grad(lambda a: sharded_loss(static)(a)[0])
    runs = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a, 0.2 * a, -a]), arrays)
    runs |= dict(dt=jnp.abs(runs["dt"]), A=-jnp.abs(runs["A"]))
    mesh = Mesh(np.array(jax.devices()[:2]), ("each",))
    with interpreted(programs=2):
        mapped = jax.shard_map(jax.vmap(gradients), mesh=mesh, in_specs=P("each"), out_specs=P("each"), check_vma=False)
        found = jax.jit(mapped)(runs)
        single = jax.jit(gradients)
        for i in range(4):
            assert_all_close(jax.tree.map(lambda a: a[i], found), single(jax.tree.map(lambda a: a[i], runs)), 3e-6)


@pytest.mark.parametrize(
    "kwargs, dtype",
    [
        (dict(), jnp.bfloat16),
        (dict(s=64, gate=False), jnp.bfloat16),
        (dict(r=4, mimo=True), jnp.bfloat16),
        (dict(r=8, mimo=True, g=4, reduce=False), jnp.bfloat16),
        (dict(p=16, n=64, s=16), jnp.float32),
    ],
    ids=["siso", "siso, all turn, no gate", "mimo", "mimo rank 8, groups, ranks kept", "siso float32 of a sweep"],
)
@pytest.mark.parametrize(
    "device, capability",
    [("NVIDIA A100-SXM4-80GB", "8.0"), ("NVIDIA H100 80GB HBM3", "9.0"), ("NVIDIA B200", "10.0")],
    ids=["A100", "H100", "B200"],
)
def test_lowers_for_gpus(device, capability, kwargs, dtype):
    """To Triton IR, which needs no GPU: the forward and backward pass of a layer of 64 heads."""
    sizes = dict(p=64, n=128, s=32) | kwargs
    shapes = jax.eval_shape(lambda: split_static(make(2048, b=8, h=64, **sizes))[0])
    static = dict(rotation="data_dependent")
    wide = ("dt", "A", "lam", "omega")
    shapes = {k: u if k in wide else jax.ShapeDtypeStruct(u.shape, dtype) for k, u in shapes.items()}
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(device, num_cores=None, platform="gpu"))
    with pytest.MonkeyPatch.context() as patch, jax.sharding.use_abstract_mesh(mesh):
        blocks = default_block_sizes(sizes.get("r", 1), sizes["p"], sizes["n"], dtype, capability)
        patch.setattr(api, "triton", functools.partial(triton, blocks=blocks))
        patch.setattr(api, "_platform", lambda: "cuda")
        traced = jax.jit(jax.value_and_grad(sharded_loss(static), has_aux=True)).trace(shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    names = set(re.findall(r'name = "(ssm_\w+)"', text))
    gradients = {f"ssm_{of}_gradients" for of in ("coefficient", "output", "value", "projection")}
    assert names == {f"ssm_{of}" for of in ("angles", "coefficients", "states", "outputs", "adjoints")} | gradients


def test_layers_of_one_shape_share_their_kernels():
    """Traced and lowered once, however many there are: it is most of what JAX does before the compiler."""
    shapes = jax.eval_shape(lambda: split_static(make(64, h=2, p=64, n=64, s=16))[0])
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"))
    with pytest.MonkeyPatch.context() as patch, jax.sharding.use_abstract_mesh(mesh):
        patch.setattr(api, "_platform", lambda: "cuda")
        two = jax.jit(lambda a: ssm(**(a | dict(x=ssm(**a)[0])))[0])
        text = two.trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('name = "ssm_outputs"') == 1


def test_without_a_state_no_zeros_of_its_size_are_made():
    """Written and read, those of a state before a sequence and of a gradient after it took some 0.04 of 2.9 ms of a
    layer's forward and backward pass on an H200, 0.03 of it to make them. Of several segments there are some."""
    shapes = jax.eval_shape(lambda: split_static(make(64, b=128, h=2, p=32, n=64, s=16))[0])
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"))

    def lowered(state):
        def loss(a):
            return jnp.sum(ssm(**a, initial_state=state)[0])

        return jax.jit(jax.grad(loss)).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()

    def zeros(text):
        return re.findall(r"broadcast_in_dim.*-> tensor<128x2x(?:1x)?(?:64x32|32x64)xf32>", text)

    with pytest.MonkeyPatch.context() as patch, jax.sharding.use_abstract_mesh(mesh):
        patch.setattr(api, "_platform", lambda: "cuda")
        assert zeros(lowered(SSMState.zeros(128, 2, 32, 64, s=16)))
        assert not zeros(lowered(None))


ERRORS = {
    "head dim": (dict(p=8), "x: got head dim p=8", "16, 32, 64, 128"),
    "state size": (dict(n=16, s=4), "B: got state size n=16", "32, 64, 128, 256"),
    "rank": (dict(r=3, mimo=True), "B: got rank r=3", "1, 2, 4, 8"),
    "angles per head": (dict(hh=2), "omega: got one row for each of h=2 heads", "one row for all heads"),
    "dtype": (dict(dtype=jnp.float16), "x: got dtype float16", "bfloat16, float32"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_explicit_choice_names_what_does_not_fit_and_none_falls_back(case, caplog):
    kwargs, got, allowed = ERRORS[case]
    args = arguments(5, **kwargs)
    with interpreted(), caplog.at_level("INFO", logger="mamba3_jax.ops.api"):
        with pytest.raises(NotImplementedError) as caught:
            ssm(**args, implementation="triton")
        api._log_choice.cache_clear()
        jax.eval_shape(lambda: ssm(**args))
    message = str(caught.value)
    assert message.startswith(got) and "; allowed in the triton kernels" in message and allowed in message
    assert [r.getMessage() for r in caplog.records] == [
        f"ssm on cuda: implementation 'chunked' for sequences ({message})"
    ]


def test_float64_is_refused():
    with jax.enable_x64(True), interpreted():
        with pytest.raises(NotImplementedError, match="x: got dtype float64; allowed .* compute in float32"):
            ssm(**arguments(5, dtype=jnp.float64), implementation="triton")


def test_float32_runs_beside_float64():
    """Where JAX makes int64 and float64 of what has no dtype, float32 arguments have the same outputs and gradients."""
    args = arguments(40, b=1)
    with interpreted():
        y, _, gradients = values_and_gradients(args, random_state(args), implementation="triton")
        with jax.enable_x64(True):
            y_, _, gradients_ = values_and_gradients(args, random_state(args), implementation="triton")
    assert y_.dtype == jnp.float32 and error(y_, y) <= 1e-6
    assert_all_close(gradients_, gradients, TOLERANCE[jnp.float32])


def step_of(args, **options):
    per_token = ("x", "B", "C", "dt", "A", "lam", "omega", "z")
    token = {k: v[:, 0] if k in per_token and np.ndim(v) > 1 else v for k, v in args.items()}
    return jax.eval_shape(lambda: ssm_step(**token, **options))


@pytest.mark.skipif(not INTERPRET, reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_named():
    args = arguments(1)
    expected = "implementation: got 'triton' on a machine with cpu devices.*; allowed: recurrent, chunked"
    with pytest.raises(NotImplementedError, match=expected):
        ssm(**args, implementation="triton")
    with pytest.raises(NotImplementedError, match=expected):
        step_of(args, state=random_state(args), implementation="triton")


def test_what_a_gpu_picks(caplog):
    """Sequences and steps by the kernels, one token of a prefill by the recurrence; each logged once."""
    api._log_choice.cache_clear()
    args, odd = arguments(5), arguments(1, p=6)
    narrow = random_state(args)
    narrow = narrow.map(lambda a: a.astype(jnp.bfloat16))._replace(angle=narrow.angle)
    with interpreted(), caplog.at_level("INFO", logger="mamba3_jax.ops.api"):
        for _ in range(2):
            jax.eval_shape(lambda: ssm(**args))
            jax.eval_shape(lambda: ssm(**cut(args, 0, 1)))
            _, new = step_of(cut(args, 0, 1), state=narrow)
            step_of(odd, state=random_state(odd))
        with pytest.raises(NotImplementedError, match="x: got head dim p=6"):
            step_of(odd, state=random_state(odd), implementation="triton")
        with pytest.raises(ValueError, match="initial_state.ssm: got shape"):
            step_of(cut(args, 0, 1), state=random_state(odd), implementation="triton")
    assert [a.dtype for a in new] == [jnp.float32] + [jnp.bfloat16] * 3
    prefix = "ssm on cuda: implementation"
    assert [r.getMessage().removeprefix(prefix) for r in caplog.records[:3]] == [
        " 'triton' for sequences",
        " 'recurrent' for one token",
        " 'triton' for steps",
    ]
    assert len(caplog.records) == 4 and "'recurrent' for steps (x: got head dim p=6" in caplog.records[3].getMessage()


def test_states_of_chunks_are_not_kept_for_the_backward_pass():
    """Nothing is kept that holds a state for each chunk; coefficients are made anew; parts wait for one another."""
    args = arguments(64, b=4)
    arrays, static = split_static(args)
    with interpreted(rows=16, programs=2):
        loss = sharded_loss(static)
        kept = jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(lambda a: loss(a)[0], a)[1], arrays))
        text = jax.jit(jax.grad(loss, has_aux=True)).lower(arrays).as_text()
    n, p = args["B"].shape[-1], args["x"].shape[-1]
    assert kept and not [u.shape for u in kept if u.ndim == 5 and {n, p} <= set(u.shape[-2:])]
    # The angles before chunks are, once.
    b, t, h, _ = args["x"].shape
    assert [u.shape for u in kept].count((b, t // 16, h, args["omega"].shape[-1])) == 1
    # Before the coefficients, and two in each of the four parts.
    assert text.count("optimization_barrier") == 1 + 2 * 4


def test_block_sizes_fit_the_gpu():
    """Tiles of float32 by the width of a head; less is fetched ahead where larger states would not fit."""
    tiles = {(p, n): default_block_sizes(1, p, n, jnp.float32, "9.0") for p in (16, 64) for n in (64, 128)}
    assert {size: blocks.rows for size, blocks in tiles.items()} == {
        (16, 64): 32,
        (64, 64): 16,
        (16, 128): 16,
        (64, 128): 16,
    }
    assert [blocks.stages for blocks in tiles.values()] == [2, 2, 1, 2]
    assert [blocks.num_warps for blocks in tiles.values()] == [2, 4, 2, 4]

    def ahead(capability, p, n, r=1):
        blocks = default_block_sizes(r, p, n, jnp.bfloat16, capability)
        return blocks.serial_stages, blocks.stages

    assert [ahead(gpu, 64, 128) for gpu in ("8.0", "8.9", "9.0", "10.0", "12.0")] == [
        (3, 2),
        (3, 2),
        (3, 2),
        (1, 1),
        (1, 1),
    ]
    assert [ahead(gpu, 64, 256) for gpu in ("8.0", "8.6", "8.9", "9.0", "10.0")] == [
        (3, 2),
        (2, 1),
        (2, 1),
        (3, 2),
        (1, 1),
    ]
    assert {ahead(gpu, 128, 256) for gpu in ("8.0", "8.9", "9.0")} == {(2, 1)}
    assert {ahead(gpu, 64, 128, r=4) for gpu in ("8.0", "8.9", "9.0", "10.0")} == {(1, 1)}


def test_rows_at_once_fill_the_gpu_and_divide_the_batch():
    many, waves = 2**20, backward.WAVES
    # No more than four parts, each of which has kernels of its own to compile.
    assert backward.rows_at_once(32, many, 128, 256) == 8
    assert backward.rows_at_once(7, many, 1024, 256) == 7
    assert backward.rows_at_once(8, many, 128, 256) == 2
    assert backward.rows_at_once(8, many, 64, 256) == 4
    # Five rows would do, and six divide the batch; of three rows all together make too few.
    assert backward.rows_at_once(6, many, 60, 256) == backward.rows_at_once(12, many, 60, 256) == 6
    assert backward.rows_at_once(3, many, 60, 256) == 3
    assert backward.rows_at_once(1, many, 4096, 256) == 1
    # The kernels over chunks want several times as many; rows of one chunk are cut too.
    assert backward.rows_at_once(8, 4096 // waves, many, 4096) == 8
    assert backward.rows_at_once(2048, waves, many, 256) == 512
    assert backward.rows_at_once(2048, 1, many, 512 // waves) == 512
    # Of 8 rows of 2048 tokens and 64 heads: SISO has too few programs to be cut, MIMO of rank 4 not.
    blocks = default_block_sizes(1, 64, 128, jnp.bfloat16, "9.0")
    found = [backward.rows_at_once(8, 64 // blocks.heads * chunks, 64, blocks.programs) for chunks in (32, 128)]
    assert found == [8, 4]


def test_programs_have_fewer_heads_where_they_would_leave_the_gpu_empty():
    """Of 64 heads, one row of 512 or 2048 tokens, and 8 of 2048; and of 12 heads a group."""
    blocks = default_block_sizes(1, 64, 128, jnp.bfloat16, "9.0")

    def heads(b, t, h, g):
        x, B = (jax.ShapeDtypeStruct((b, t, k, 64), jnp.bfloat16) for k in (h, g))
        ops = Operands(**dict.fromkeys(Operands._fields) | dict(x=x, B=B))
        return backward._Grid(ops, 0, b, Tiling(64, 1, 128, 32, 64, False), blocks).heads

    assert [heads(*sizes) for sizes in ((1, 512, 64, 1), (1, 2048, 64, 1), (8, 2048, 64, 1))] == [2, 8, blocks.heads]
    assert heads(1, 64, 12, 1) == 1 and heads(64, 2048, 24, 2) == 12
