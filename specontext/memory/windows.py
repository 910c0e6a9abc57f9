"""Bytes of layers with a window, which are the same for a short context and for a long one."""

from __future__ import annotations

from specontext.model_shape import ModelShape


def ring_entries(shape: ModelShape, *, max_tokens: int, page_size: int) -> int:
    """Tokens that a ring holds: those of the widest window, and so many more that a page which ends a prompt still has its own
    window in it. Whole pages; 0 without such layers."""
    widest = max((window.size for window in shape.windowed), default=0)
    return -(-(min(widest, max_tokens) + 2 * page_size) // page_size) * page_size if widest else 0


KEPT_BYTES = 256 << 20  # in which a step keeps tokens of chunks until known pages have been copied from them


def kept_tokens(shape: ModelShape) -> int:
    """Tokens of a step's chunks that are kept until they have been copied."""
    return KEPT_BYTES // (len(shape.windowed) * shape.window_token_bytes)


def kept_bytes(shape: ModelShape, *, tokens: int) -> int:
    """Bytes that a step with so many tokens keeps."""
    if not shape.windowed:
        return 0
    return min(tokens, kept_tokens(shape)) * len(shape.windowed) * shape.window_token_bytes


def ring_bytes(shape: ModelShape, *, seats: int, max_tokens: int, page_size: int) -> int:
    """Bytes of the rings of so many seats in all layers with a window."""
    entries = ring_entries(shape, max_tokens=max_tokens, page_size=page_size)
    return len(shape.windowed) * seats * entries * shape.window_token_bytes
