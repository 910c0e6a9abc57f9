"""Checkpoints in GGUF files: converted once into ordinary checkpoint directories, which everything else loads unchanged."""
