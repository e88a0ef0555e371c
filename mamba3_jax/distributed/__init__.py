"""One model on many devices: the mesh, which array is cut along which axis of it, several processes, sequences."""
