"""The bridge to Hugging Face decoders: loading, the registered attention function, feature taps, and the bundled `nano`.

Modelling code of transformers runs unchanged; scheduling and KV storage do not live here.
"""
