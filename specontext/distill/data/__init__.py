"""WHERE training sequences come from: generated tasks, texts, rows and data sets, and what the target writes itself.

What is learned from them (`specontext.distill.attention`) does not live here.
"""

from specontext.distill.data.mixing import Mixed, Weighted, sizes_of_share
from specontext.distill.data.on_policy import OnPolicy
from specontext.distill.data.source import DataError, Sequences, Source
from specontext.distill.data.specs import open_sources

__all__ = ["DataError", "Mixed", "OnPolicy", "Sequences", "Source", "Weighted", "open_sources", "sizes_of_share"]
