"""Replicas of the server on a Ray cluster, behind one endpoint: Ray starts, watches, scales and replaces them.

A replica runs the server's own application over its own engine; nothing here answers a request itself.
"""
