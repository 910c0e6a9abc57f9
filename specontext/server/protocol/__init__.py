"""Bodies of requests and responses: strict, and nothing that cannot be honoured is accepted."""
