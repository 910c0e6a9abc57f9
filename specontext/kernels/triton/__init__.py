"""Triton kernels, one file an operation, with the signature of the PyTorch reference of the same name one floor up.

Imported only when `kernels.dispatch` chooses them.
"""
