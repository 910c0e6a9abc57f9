"""HOW MUCH fits: page accounting and the sizes of the tiers. Tensors of KV do not live here."""
