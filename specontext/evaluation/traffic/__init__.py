"""Traffic: requests for any OpenAI-compatible server or for the offline engine, and the usual numbers about them."""
