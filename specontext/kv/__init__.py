"""WHERE KV entries live and how they move (C2): pools of rows, hot slots, and the two tiers together.

Which entries are wanted is not decided here: a Selection comes in.
"""
