"""CONTINUATION of texts: long outputs of methods beside full attention's, token by token and as full attention judges them.

Nothing needs an answer. Half of a length is a prompt cut from a text, and every method goes on from it greedily.
"""
