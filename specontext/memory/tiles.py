"""How many stored tokens are read at once on a GPU, where not all fit a buffer."""

from __future__ import annotations

PROMPT_TILE = 256 << 20  # bytes of stored tokens of one layer that a prompt chunk reads
DECODE_TILE = 16384  # stored tokens of offloaded layers that dense decoding reads
LEAST_TILE = 256  # of them of one request, where many share a tile


def prompt_tile(entry_bytes: int) -> int:
    """Stored tokens that a prompt chunk reads at once on a GPU: the power of two of which a layer's fill a buffer.

    Args:
        entry_bytes: of a token in one layer.
    """
    return 1 << max(PROMPT_TILE // entry_bytes, 1).bit_length() - 1


def made_tile(query_heads: int, key: int, itemsize: int) -> int:
    """Stored latents of which a prompt chunk makes keys and values at once: the power of two whose are not more than a buffer's.

    Args:
        key: numbers of a head's key, and of its value with what makes it as wide.
    """
    return 1 << max(PROMPT_TILE // (2 * query_heads * key * itemsize), 1).bit_length() - 1
