"""WHERE KV entries live and how they move (C2): `KVCache` owns pages, slots and residency, `Transfers` moves rows.

Which entries are wanted is not decided here: a Selection comes in.
"""
