"""Multi-device and multi-process training: meshes, shardings, kernels, processes, FLOPs."""
