"""The error of this room."""

from __future__ import annotations

from specontext.core import SpeContextError


class GGUFError(SpeContextError):
    """A GGUF file that cannot be found, read, converted or kept; the message says why and what to do."""
