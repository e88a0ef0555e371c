"""The TPUs that the kernels are compiled for: one table of what each can do, per device as JAX sees it.

A device is a chip with its TensorCores (v4, v5e, v5p, v6e) or one of the two TensorCores of a chip (tpu7x). Sources:

    hbm_bandwidth, bf16_flops   Google's pages of each generation (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e,
                                tpu7x), half of the chip's for tpu7x
    hbm_bytes                   what libtpu 0.0.52 lets a program have, as its out-of-memory error says: the page's
                                32, 16, 95, 32 and 192/2 GB less what the runtime keeps
    vmem_bytes, mxu_size        jax's own table (jax/_src/tpu_info.py, jax 0.12)
    valus, eups, loads, stores  vector registers of a bundle: the slots that libtpu 0.0.52 prints as capacity when it
                                dumps the static utilisation of a kernel's bundles
    clock                       bf16_flops / (2 x multipliers): 1.05 GHz for v4 as published (Jouppi et al., ISCA 2023),
                                1.5 for v5e, 1.75 for v5p. v6e and tpu7x reach their page's figure at 1.75 and 2.2 GHz
                                with two 256 x 256 units that take two rows per cycle, here counted as four; the
                                compiler's own cycles for a copy and for a large product agree with these clocks

jax's table differs where the pages changed: 8.20e11 (v5e), 2.46e12 (v5p), 1.64e12 (v6e) bytes/s, 920e12 (v6e) FLOP/s.
"""

import dataclasses

import jax

GIB = 2**30
# Elements of one vector register, 32 bits each.
LANES = 128
SUBLANES = 8
VREG = LANES * SUBLANES


def padded_up(size: int) -> int:
    """The next multiple of 128."""
    return -(-size // LANES) * LANES


def padded_head_dim(h: int, p: int, g: int) -> int:
    """p where heads of one group fill the lanes, else the next multiple of 128: blocks of one head, partly zero."""
    return p if p % LANES == 0 or (LANES % p == 0 and (h // g) % (LANES // p) == 0) else padded_up(p)


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        name: as in topologies, "v5e".
        device_kinds: what JAX may call it; the first is what topologies give.
        hbm_bytes: of the device.
        hbm_bandwidth: bytes per second of the device.
        bf16_flops: of the device's matrix units, per second; a multiply and an add are 2.
        cores: TensorCores of the device; a kernel's parallel grid axes are spread over them.
        vmem_bytes: of one core.
        mxu_size: rows and columns of a matrix unit.
        mxus: matrix units of one core, each taking one row per cycle.
        valus, eups, loads, stores: vector registers that one core computes, passes through its transcendental unit,
            loads from VMEM and stores there in one cycle.
    """

    name: str
    device_kinds: tuple[str, ...]
    hbm_bytes: int
    hbm_bandwidth: float
    bf16_flops: float
    cores: int
    vmem_bytes: int
    mxu_size: int
    mxus: int
    valus: int
    eups: int
    loads: int
    stores: int

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.bf16_flops / (2 * self.cores * self.mxus * self.mxu_size**2)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", ("TPU v4",), hbm_bytes=int(30.75 * GIB), hbm_bandwidth=1.2288e12, bf16_flops=275e12, cores=2,
            vmem_bytes=16 * 2**20, mxu_size=128, mxus=4, valus=2, eups=1, loads=1, stores=1,
        ),
        Chip(
            "v5e", ("TPU v5 lite", "TPU v5e"), hbm_bytes=int(15.75 * GIB), hbm_bandwidth=8.19e11, bf16_flops=197e12,
            cores=1, vmem_bytes=128 * 2**20, mxu_size=128, mxus=4, valus=4, eups=1, loads=3, stores=1,
        ),
        Chip(
            "v5p", ("TPU v5", "TPU v5p"), hbm_bytes=int(95.73 * GIB), hbm_bandwidth=2.765e12, bf16_flops=459e12,
            cores=2, vmem_bytes=64 * 2**20, mxu_size=128, mxus=4, valus=4, eups=1, loads=3, stores=1,
        ),
        Chip(
            "v6e", ("TPU v6 lite", "TPU v6e"), hbm_bytes=int(31.24 * GIB), hbm_bandwidth=1.638e12, bf16_flops=918e12,
            cores=1, vmem_bytes=128 * 2**20, mxu_size=256, mxus=4, valus=4, eups=1, loads=3, stores=2,
        ),
        Chip(
            "tpu7x", ("TPU7x",), hbm_bytes=int(94.74 * GIB), hbm_bandwidth=3.69e12, bf16_flops=2307e12 / 2, cores=1,
            vmem_bytes=64 * 2**20, mxu_size=256, mxus=4, valus=4, eups=1, loads=3, stores=2,
        ),
    )
}  # fmt: skip


def chip_of(device_kind: str) -> Chip:
    """The chip of a device that JAX calls `device_kind`, or of a name of this table.

    Raises:
        ValueError: an unknown chip, with the known ones.
    """
    for chip in CHIPS.values():
        if device_kind in (chip.name, *chip.device_kinds):
            return chip
    raise ValueError(f"chip: got {device_kind!r}; allowed: {', '.join(CHIPS)}")


def device_kind() -> str:
    """Of the devices that the ambient mesh names, as when compiling for a topology; else of those at hand."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described.device_kind if described else jax.local_devices()[0].device_kind
