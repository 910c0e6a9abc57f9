"""One file an operation: the plain PyTorch reference, which is also the CPU implementation; `triton/` has its GPU kernel.

Kernels know tensors and indices only: no requests, no tiers, no methods.
"""
