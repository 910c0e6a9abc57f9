"""Training of retrieval heads: what a target model attends to and says, and heads that learn it.

Selecting at run time does not live here, nor does the form of a head.
"""
