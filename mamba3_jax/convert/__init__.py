"""Released checkpoints of https://github.com/state-spaces/mamba in and out."""

from mamba3_jax.convert.released import Released, read_released, write_released

__all__ = ["Released", "read_released", "write_released"]
