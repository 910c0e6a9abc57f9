"""What single tokens say: their bytes, and texts to show for them in log-probabilities."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Bytes and texts of a tokenizer's tokens, one at a time.

    A token of a byte-level vocabulary may be part of a character. Its text then has U+FFFD for the bytes that are none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = set(tokenizer.get_added_vocab().values())
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.dumps(json.loads(backend.to_str()).get("decoder")) if backend is not None else ""
        self._byte_of = _bytes_of_characters() if '"ByteLevel"' in decoder else None
        self._metaspace = '"Metaspace"' in decoder or '"▁"' in decoder
        self.bytes_of = lru_cache(maxsize=1 << 16)(self._bytes_of)

    def is_added(self, token: int) -> bool:
        """Whether it is one of the marks beside the vocabulary, which texts need not have where their tokens do."""
        return token in self._added

    def text_of(self, token: int) -> str:
        return self.bytes_of(token).decode("utf-8", errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        raw = self._tokenizer.convert_ids_to_tokens(token)
        if raw is None:
            return b""  # ids beyond the tokenizer's vocabulary, which padded embeddings have
        if token not in self._added:
            if self._byte_of is not None and all(character in self._byte_of for character in raw):
                return bytes(self._byte_of[character] for character in raw)
            if match := _BYTE.fullmatch(raw):
                return bytes([int(match[1], 16)])
            if self._metaspace:
                return raw.replace("▁", " ").encode()
        return raw.encode("utf-8", errors="replace") if token in self._added else self._tokenizer.decode([token]).encode()


def _bytes_of_characters() -> dict[str, int]:
    """The alphabet of byte-level vocabularies: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
