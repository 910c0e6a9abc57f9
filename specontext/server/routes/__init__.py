"""One file a group of endpoints: each reads a validated body, asks the engine and shapes the answer."""
