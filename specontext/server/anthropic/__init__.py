"""The protocol of Anthropic's /v1/messages over conversations: blocks in, blocks and events out."""
