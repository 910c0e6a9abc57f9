"""Triton kernels, one file an operation, with the signature of the PyTorch reference of the same name one floor up.

Numbers that change from step to step (counts, spans, splits) are not specialised on, so a kernel is compiled once and not for
each of their values; strides are, where alignment makes loads wide.

Imported only when `kernels.dispatch` chooses them.
"""
