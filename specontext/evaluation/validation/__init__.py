"""VALIDATION of a model on a user's own machine: fidelity, a part of RULER, a long chain of thought, the speed of decoding.

Everything is compared with full attention, and put into words that can be posted. What is measured lives elsewhere.
"""
