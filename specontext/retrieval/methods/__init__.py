"""One selection method a file, and the table of them."""

from __future__ import annotations

from specontext.retrieval.methods.full import FullSelector
from specontext.retrieval.methods.oracle import OracleSelector
from specontext.retrieval.methods.random import RandomSelector
from specontext.retrieval.methods.speculative import SpeculativeSelector
from specontext.retrieval.methods.streaming import StreamingSelector

__all__ = ["FullSelector", "OracleSelector", "RandomSelector", "SpeculativeSelector", "StreamingSelector"]
