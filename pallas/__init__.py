"""Pallas kernels of the Mamba-3 operator, for GPUs (Triton lowering) and TPUs (Mosaic). Imports jax only.

No kernel is in this release: `mamba3_jax.ops.ssm` says so to whoever asks for implementation "triton" or "tpu", and
picks "chunked" for everybody else.
"""
