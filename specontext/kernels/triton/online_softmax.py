# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""What kernels share that add up a softmax in base 2."""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
TWO_LOG2E = tl.constexpr(2.8853900817779268)  # 2 / ln 2


@triton.jit
def capped(logits, cap_log2):
    """cap * tanh(x / cap) of logits in base 2, of which exp2 gives no overflow: 1 - 2 / (e^2y + 1)."""
    doubled = tl.exp2(logits / cap_log2 * TWO_LOG2E)
    return cap_log2 * (1.0 - 2.0 / (doubled + 1.0))
