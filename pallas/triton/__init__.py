"""GPU kernels of the Mamba-3 operator through Pallas's Triton lowering."""
