"""How the kernels cut their work."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How the kernels cut their work.

    Attributes:
        chunk: tokens of a step and of a chunk of the algorithm.
        blocks: blocks of 128 lanes that a step works on, one after the other.
        vmem_bytes: what the compiler may use of VMEM.
    """

    chunk: int
    blocks: int
    vmem_bytes: int | None


def default_block_sizes(shape: dict[str, int], dtype, device_kind: str) -> BlockSizes:
    """For sizes t, h, p, n, g, r, s, the dtype of x and a TPU."""
    return BlockSizes(128, 1, None)
