"""The protocol of OpenAI's /v1/responses over conversations: items in, items and events out, answers that are remembered."""
