"""Quantised weights: what checkpoints say and store of them, brought into the one form that kernels multiply with.

Nothing here knows a model class or reads a file; whoever has tensors gives them.
"""
