"""Calls of tools: how models of different families write them, read while the text arrives or forced by a grammar.

Nothing here knows of HTTP or of engines: text in, pieces of calls out.
"""
