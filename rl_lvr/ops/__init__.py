"""Fused operations: each has a float64 reference, plain PyTorch for any device, Triton kernels and one public api."""
