"""FIDELITY of methods to full attention on any text: next-token distributions, position by position, and attention recall.

Nothing is generated and nothing needs an answer. A window of text is prefilled densely up to its last part; the rest is decoded
with the text's own tokens forced, with full attention and with every method and budget beside each other.
"""
