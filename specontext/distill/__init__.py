"""HOW a retrieval head is trained: teachers, losses and training loops.

What the head is and how it selects (`specontext.retrieval`), and where training text comes from, do not live here.
"""
