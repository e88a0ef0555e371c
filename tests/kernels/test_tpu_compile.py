"""The TPU kernels compiled, not only lowered, for every generation on a machine without a TPU."""

import jax
import jax.numpy as jnp
import pytest

from experiments import tpu_programs
from experiments.kernel_programs import Shape
from pallas.tpu.block_sizes import BlockSizes, default_block_sizes, tiling_of, vmem_bytes
from pallas.tpu.chips import CHIPS

LAYER = Shape(b=1, t=256, h=4)

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(tpu_programs.libtpu_missing() is not None, reason=str(tpu_programs.libtpu_missing())),
]


def large(shape: Shape) -> int:
    return shape.b * shape.t * shape.h * shape.p


def sizes(shape: Shape, r: int) -> dict[str, int]:
    return dict(h=shape.h, p=shape.p, n=shape.n, g=shape.g, r=r, s=shape.n // 4)


def compiled_in_its_vmem(chip: str, r: int, p: int = 64) -> tpu_programs.Compiled:
    """Both kernels, in no more VMEM than was said to be needed."""
    shape = LAYER._replace(h=4 * r * 64 // p, p=p)  # so that x is larger than the B of all ranks, which is transposed
    program = tpu_programs.sequences("tpu", "forward_backward", shape, r)
    compiled = tpu_programs.compile_for(chip, *program, large(shape))
    blocks = default_block_sizes(sizes(shape, r), jnp.bfloat16, CHIPS[chip].device_kinds[0])
    assert set(compiled.vmem) == {"ssm_tpu_forward", "ssm_tpu_backward"}
    needed = vmem_bytes(sizes(shape, r), jnp.bfloat16, blocks)
    assert 0 < max(compiled.vmem.values()) <= needed <= CHIPS[chip].vmem_bytes
    return compiled


def assert_layer_compiles(chip: str, r: int):
    """And nothing as large as x is copied or transposed."""
    assert not compiled_in_its_vmem(chip, r).moves


@pytest.mark.parametrize("chip", CHIPS)
def test_siso_layer_compiles(chip):
    assert_layer_compiles(chip, r=1)


def test_eight_heads_of_a_block_compile():
    """Each has projections and scores of its own, which need VMEM."""
    compiled_in_its_vmem("v5e", r=1, p=16)


@pytest.mark.parametrize("chip", ["v4", "tpu7x"])
def test_mimo_layer_compiles(chip):
    """The oldest and the newest; `mamba3 reproduce tpu_compile` has all of them, at the published shapes."""
    assert_layer_compiles(chip, r=4)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("r", [1, 4])
def test_decode_step_compiles_with_its_state_in_place(chip, r):
    shape = Shape(b=128, t=1, h=64)  # a small state may move to VMEM, which counts among the temporaries
    numbers = large(shape) * shape.n
    compiled = tpu_programs.compile_for(chip, *tpu_programs.step("tpu", shape, r), large=numbers, donate=(1,))
    assert set(compiled.vmem) == {"ssm_tpu_decode"} and compiled.moves == []
    assert compiled.outputs + compiled.temporaries < 4 * numbers < compiled.arguments


def test_none_picks_the_kernels_where_a_mesh_names_tpus():
    """What is compiled for a topology, with nothing said of the implementation."""
    function, arguments = tpu_programs.sequences(None, "forward", LAYER, 1)
    assert set(tpu_programs.compile_for("v5e", function, arguments, large(LAYER)).vmem) == {"ssm_tpu_forward"}


def test_a_chunk_that_does_not_fit_is_named_with_one_that_does():
    """By a v4, whose cores have 16 MiB of VMEM: the bytes, the chip's, and the largest chunk."""
    v4 = CHIPS["v4"]
    shape, blocks = sizes(Shape(b=1, t=4096, h=64), 1), BlockSizes(chunk=1024, blocks=1)
    with pytest.raises(ValueError) as caught:
        tiling_of(shape, jnp.bfloat16, blocks, v4.device_kinds[0])
    needed = vmem_bytes(shape, jnp.bfloat16, blocks)
    text = str(caught.value)
    assert text.startswith(f"chunk: got 1024, which needs {needed} bytes of VMEM where v4 has {v4.vmem_bytes}")
    allowed = int(text.rsplit(" ", 1)[1])
    assert 0 < allowed < 1024 and tiling_of(shape, jnp.bfloat16, BlockSizes(allowed, 1), "TPU v4").c == allowed
    with pytest.raises(ValueError, match="which needs"):
        tiling_of(shape, jnp.bfloat16, BlockSizes(allowed + 128, 1), "TPU v4")


def test_the_compiler_agrees_that_it_does_not_fit():
    """The same call with what it needs, and a limit that is not raised: out of VMEM."""
    from mamba3_jax.ops import api, tpu

    def over_sized(*args, **options):
        return tpu.tpu(*args, **options, blocks=BlockSizes(chunk=2048, blocks=1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "tpu", over_sized)
        patch.setattr("pallas.tpu.block_sizes.vmem_bytes", lambda *_: CHIPS["v4"].vmem_bytes)
        function, arguments = tpu_programs.sequences("tpu", "forward", LAYER._replace(t=2048), 1)
        with pytest.raises(jax.errors.JaxRuntimeError, match="(?i)vmem"):
            tpu_programs.compile_for("v4", function, arguments, large(LAYER))
