"""The OpenAI-compatible HTTP server: protocol, routes, metrics and the status page over an `AsyncEngine`.

How requests are batched, sampled and stored is the engine's business; nothing here touches a tensor.
"""
