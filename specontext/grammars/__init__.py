"""What outputs must look like: JSON schemas, regular expressions and grammars, compiled over a tokenizer's vocabulary (llguidance).

Nothing here knows of logits, requests or HTTP.
"""
