"""HOW WELL a retrieval head selects: its choices against the target's true attention, as rows and plots (paper, Fig. 5 and 6b).

Whether a model still solves its problems with these choices (`specontext.evaluation.solve`) does not live here.
"""
