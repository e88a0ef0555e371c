"""Pallas kernels of the Mamba-3 operator, for GPUs (Triton lowering) and TPUs (Mosaic). Imports jax only.

JAX says of every kernel that it lowers through Triton that this way is deprecated: a DeprecationWarning, which Python
hides unless told otherwise. pyproject caps jax until the kernels have moved.
"""
