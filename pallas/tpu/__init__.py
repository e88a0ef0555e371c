"""TPU kernels of the Mamba-3 operator through Pallas's Mosaic lowering."""
