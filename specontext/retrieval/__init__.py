"""WHICH entries: the retrieval head, its checkpoints and key cache, and the selection methods.

Where entries live and how they move is not known here.
"""
