"""Attention of a prompt's chunk on a GPU in a 16-bit format: few long calls of the fastest kernels, merged by log-sum-exp.

Two kernels serve. Flash attention takes any numbers of queries and keys. cuDNN's is 1.6 times as fast where PyTorch prefers it
(from Hopper on), but prepares a plan for every pair of numbers that a thread has not seen, and for every layout. So it gets
queries in multiples of `QUERIES` and keys in powers of two from `KEYS` on, of which there are few, and they look as if they were
all, whatever they are a part of; flash attention does what is left over at both ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from specontext.kernels.dispatch import operation
from specontext.kernels.fused_attention import as_multiplied

logger = logging.getLogger("specontext")
QUERIES = 2048
KEYS = 2048
HALVES = (torch.bfloat16, torch.float16)

# query [1, Hq, Q, D], key and value [1, Hkv, S, D], factor of the logits, and whether query i sees keys 0 .. S - Q + i only.
# Returns the output [1, Hq, Q, D] and float32 log-sum-exp [1, Hq, Q].
Attend = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]


def serves(query: Tensor) -> bool:
    """Whether these kernels attend for such queries [.., D]."""
    fits = query.is_cuda and query.dtype in HALVES and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return fits and _capable(query.device)


@cache
def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def flash(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Flash attention, whose causal mask ends in the lower right corner; K and V are read once for a whole group of heads."""
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, is_causal=causal, scale=scale)[:2]
    return output, lse


def cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's attention; causal only for as many keys as queries."""
    assert not causal or query.shape[2] == key.shape[2]
    query, key, value = map(as_if_alone, (query, key, value))
    output, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, causal, scale=scale)[:2]
    return output, lse.reshape(query.shape[:3])


def as_if_alone(numbers: Tensor) -> Tensor:
    """[1, H, T, D] of some tokens with strides that do not depend on how many others lie beside them: a plan is made for strides,
    too, also for those of dimensions of size 1. Token by token as it is, or copied so."""
    _, heads, tokens, width = numbers.shape
    if heads > 1 and numbers.stride(1) > numbers.stride(2):  # head by head: how far apart heads are depends on the tokens between
        numbers = numbers.transpose(1, 2).contiguous().transpose(1, 2)
    of_token = numbers.stride(2)
    return numbers.as_strided(
        numbers.shape, (tokens * of_token, numbers.stride(1) if heads > 1 else width, of_token, numbers.stride(3))
    )


def regular_kernel(query: Tensor, key: Tensor) -> Attend | None:
    """The kernel for regular numbers of queries [C, Hq, D] and keys [C, Hkv, D]; None where flash attention does all."""
    device, dtype = query.device, query.dtype
    return cudnn if _cudnn_is_good(device, dtype, query.shape[1], key.shape[1], query.shape[2]) else None


@cache
def _cudnn_is_good(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether PyTorch would take cuDNN's kernel, and it gives flash attention's results, log-sum-exp included."""
    count, scale = 256, head_dim**-0.5
    generator = torch.Generator(device).manual_seed(0)
    query = torch.randn(count, heads, head_dim, dtype=dtype, device=device, generator=generator)
    tokens = torch.randn(2 * count, kv_heads, 2, head_dim, dtype=dtype, device=device, generator=generator)
    queries, keys, values = map(_by_head, (query, *tokens.unbind(2)))
    own = keys[:, :, :count], values[:, :, :count]
    alone = _by_head(tokens[:count, :, 0].contiguous())  # as a model's own attention has keys and values
    chosen = torch._fused_sdp_choice(queries, alone, alone, is_causal=True, scale=scale, enable_gqa=heads != kv_heads)
    if chosen != SDPBackend.CUDNN_ATTENTION.value:
        return False
    try:
        for causal, (key, value) in ((True, own), (False, (keys, values))):
            for found, right in zip(
                cudnn(queries, key, value, scale, causal), flash(queries, key, value, scale, causal), strict=True
            ):
                torch.testing.assert_close(found.float(), right.float(), rtol=0.02, atol=0.02)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        logger.warning("cuDNN's attention is left out: %s", str(error).strip().splitlines()[0])
        return False
    return True


@operation(decided_by="part")
def merge_part(total: Tensor, total_lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add the attention over further keys to that over some keys.

    Args:
        total: float32 [Q, H, D], contiguous, changed in place.
        total_lse: float32 [H, Q], contiguous, changed in place.
        part: [Q, H, D], of any strides that leave the last dimension contiguous.
        part_lse: float32 [H, Q], contiguous. Every query has seen a key in both.
    """
    weight = torch.sigmoid(part_lse - total_lse).T[..., None]
    total.lerp_(part.float(), weight)
    torch.logaddexp(total_lse, part_lse, out=total_lse)


def cuts(tokens: int) -> list[tuple[int, int]]:
    """Bounds of the powers of two, from `KEYS` on and the largest first, that are in a number of tokens, and of what is left."""
    bounds, start = [], 0
    for bit in range(tokens.bit_length() - 1, KEYS.bit_length() - 2, -1):
        if tokens >> bit & 1:
            bounds.append((start, start + (1 << bit)))
            start = bounds[-1][1]
    return [*bounds, (start, tokens)] if start < tokens else bounds


@dataclass(eq=False)
class _Queries:
    """Some queries of a chunk, and their attention so far.

    Attributes:
        query: [1, Hq, Q, D].
        regular: their number is one for the regular kernel.
        output: [1, Hq, Q, D] until something is merged, then float32 [Q, Hq, D].
        lse: [Hq, Q].
    """

    query: Tensor
    regular: bool
    output: Tensor
    lse: Tensor

    def merge(self, part: Tensor, lse: Tensor) -> None:
        if self.output.dim() == 4:
            self.output = self.output[0].transpose(0, 1).float().contiguous()
            self.lse = self.lse.contiguous()
        merge_part(self.output, self.lse, part[0].transpose(0, 1), lse[0].contiguous())

    def result(self) -> Tensor:
        """[Q, Hq, D]."""
        return self.output[0].transpose(0, 1) if self.output.dim() == 4 else self.output


class GpuChunk:
    """Attention of C consecutive tokens over themselves, causally, and over stored tokens, whose tiles are added one by one.

    Args:
        query: [C, Hq, D].
        key, value: [C, Hkv, D], of the chunk itself.
        scale: factor of the logits.
        regular: the kernel for regular numbers; None for none.
        any_number: the one for any numbers.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, regular: Attend | None, any_number: Attend = flash
    ) -> None:
        self._scale, self._dtype, self._regular, self._any = scale, query.dtype, regular, any_number
        count = len(query)
        whole = count // QUERIES * QUERIES if regular is not None else 0
        queries, keys, values = _by_head(query), _by_head(key), _by_head(value)
        self._parts: list[_Queries] = []
        for start, stop in ((0, whole), (whole, count)):
            if start < stop:
                some = queries[:, :, start:stop]
                attend = regular if regular is not None and stop == whole else any_number
                output, lse = attend(some, keys[:, :, :stop], values[:, :, :stop], scale, True)
                self._parts.append(_Queries(some, stop == whole, output, lse[0]))

    def add(self, tile: Tensor) -> None:
        """Attend to the rows [T, Hkv, *row] of T tokens, at least one, before the chunk; T of any strides."""
        keys, values = map(_by_head, as_multiplied(tile, self._parts[0].query.shape[-1], self._dtype).unbind(2))
        for part in self._parts:
            for start, stop in cuts(len(tile)) if part.regular else [(0, len(tile))]:
                regular = self._regular if part.regular and stop - start >= KEYS else None
                key, value = keys[:, :, start:stop], values[:, :, start:stop]
                part.merge(*(regular or self._any)(part.query, key, value, self._scale, False))

    def result(self) -> Tensor:
        """[C, Hq, D] in the query's dtype."""
        results = [part.result().to(self._dtype) for part in self._parts]
        return results[0] if len(results) == 1 else torch.cat(results)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    """Causal attention of several whole sequences over themselves in one call of flash attention.

    Args:
        query: [T, Hq, D].
        key, value: [T, Hkv, D].
        bounds: int32 [N + 1] on the device, where each sequence begins, and where the last one ends.
        longest: tokens of the longest.

    Returns:
        [T, Hq, D] in the query's dtype.
    """
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
    )[0]
    return output


def _by_head(tokens: Tensor) -> Tensor:
    """[T, H, D] as [1, H, T, D]."""
    return tokens[None].transpose(1, 2)
