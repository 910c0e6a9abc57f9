"""Runs requests: scheduling, the model step, sampling, statistics, and the offline `LLM`.

What to select, where KV lives and how models are built is decided in the rooms below.
"""
