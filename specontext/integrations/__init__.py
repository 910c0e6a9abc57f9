"""Bridges from other people's frameworks to the engine; each needs its framework installed and imports it itself.

What the engine does itself (serving, its own evaluation) does not live here.
"""
