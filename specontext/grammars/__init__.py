"""What outputs must look like: schemas, regular expressions and grammars, compiled over a vocabulary by llguidance.

Nothing here knows of logits, requests or HTTP.
"""
