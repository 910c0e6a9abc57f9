"""Short chunks of prompts as CUDA graphs in pieces: a pass is captured between its calls of attention, which run as always.

What attention does in a chunk differs from chunk to chunk: what is stored, where the tokens live, how many prompts there are. All
else depends on the number of tokens only, and launching it one kernel at a time takes the host longer than a GPU computes a
thousand tokens. So the pieces between two layers' attention are captured once for some numbers of tokens, and chunks are padded
to the next one. q, k and v of whichever layer is computed, and its output, lie in the same places.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from specontext.core import Batch
from specontext.engine.graphs import GRAPH_LAYER
from specontext.kernels.gpu_chunk import QUERIES
from specontext.kernels.softmax import PLAIN, Softmax
from specontext.layer_sizes import Window
from specontext.memory.model import MemoryModel
from specontext.model_shape import ModelShape
from specontext.models.attention import LayerAttention

logger = logging.getLogger("specontext")
LEAST = 128  # tokens between two sizes, and of the smallest: fewer cost as much, since all weights are read
STEPS = 4  # sizes between a power of two and the next
SHARE_OF_KV = 0.25  # of the memory that is left for KV, which captured chunks may take
PROMPTS = 32  # that a captured chunk gives logits of, at most

# Runs the model on token ids [S] and positions [S] with somebody who gets the layers' attention. Returns logits of tokens [K] of
# these, [K, V], and the features of all, [S, F * H], where the retrieval head sees any.
ForwardPass = Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
# What a piece ends with: attention of a layer, as the running step computes it, for q, k and v.
Attention = Callable[[LayerAttention, Tensor, Tensor, Tensor], Tensor]


def chunk_sizes(most: int) -> list[int]:
    """Numbers of tokens that are captured, ascending: multiples of a quarter of a power of two, at least `LEAST` apart, up to
    what `most` tokens take; attention to `QUERIES` tokens and more is planned for its exact size, and long enough to launch."""
    sizes, most = [LEAST], min(most, QUERIES - 1)
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(LEAST, (1 << sizes[-1].bit_length() - 1) // STEPS))
    return sizes


def piece_bytes(most: int, *, layers: int, runtime: int, step_tokens: int) -> int:
    """Bytes of all captured chunks: their nodes, and what the largest computes in.

    Args:
        most: tokens of the longest chunk.
        runtime: bytes that a step of `step_tokens` tokens allocates.
    """
    sizes = chunk_sizes(most)
    return len(sizes) * layers * GRAPH_LAYER + runtime * min(sizes[-1], step_tokens) // step_tokens


def without_dear_pieces(plan: MemoryModel, pieces: int, limit: int) -> tuple[MemoryModel, bool]:
    """What a plan becomes where captured chunks, which it counts, would take more than a share of the KV's memory, as on a small
    card; and whether they are captured. Chunks run as well without, at the host's pace.

    Args:
        pieces: bytes of captured chunks.
        limit: bytes of the GPU that the engine may use.
    """
    bare = replace(plan, fixed={**plan.fixed, "graphs": plan.fixed["graphs"] - pieces})
    if pieces <= SHARE_OF_KV * (limit - bare.fixed_bytes):
        return plan, True
    logger.info("chunks of prompts are not captured: graphs of %d bytes would take much of what is left for KV", pieces)
    return bare, False


def in_pieces(shape: ModelShape) -> bool:
    """Whether a model's layers hand q, k and v to attention, and nothing else to whoever listens."""
    return shape.latent is None and not shape.states


@dataclass(frozen=True)
class _Piece:
    graph: torch.cuda.CUDAGraph
    attention: Attention | None
    places: tuple[Tensor, Tensor, Tensor, Tensor] | None  # of q, k, v and the output


@dataclass(frozen=True)
class Captured:
    """A recorded pass: what it reads, and where its results are.

    Attributes:
        numbers: int64 [2, S], token ids and positions.
        last: int64 [K], the tokens whose logits are wanted.
    """

    numbers: Tensor
    last: Tensor
    pieces: Sequence[_Piece]
    logits: Tensor
    features: Tensor | None


@dataclass
class Places:
    """Where q, k, v and outputs of layers lie, the same for all layers whose sizes are alike."""

    most: int
    _made: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = field(default_factory=dict)

    @property
    def made(self) -> Iterable[Tensor]:
        """All of them."""
        return self._made.values()

    def of(self, name: str, like: Tensor, width: int | None = None) -> Tensor:
        """A place [S, heads, width] for a tensor [S, heads, width] of that name."""
        inner = (like.shape[1], like.shape[2] if width is None else width)
        key = (name, inner, like.dtype)
        if key not in self._made:
            self._made[key] = like.new_zeros((self.most, *inner))
        return self._made[key][: len(like)]


class Cutter:
    """A listener that gets the layers' attention while a pass is recorded, and ends a piece wherever it is called.

    Args:
        cut: called with what a piece ends with.
    """

    def __init__(self, positions: Tensor, places: Places, cut: Callable[[Attention, tuple[Tensor, ...]], None]) -> None:
        self.positions, self._places, self._cut = positions, places, cut

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> Tensor:
        """See `LayerAttention.attend`."""
        return self._end(lambda step, q, k, v: step.attend(layer, q, k, v, scale, softmax, stored=stored), query, key, value)

    def attend_window(
        self,
        layer: int,
        window: Window,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> Tensor:
        """See `LayerAttention.attend_window`."""

        def attention(step: LayerAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return step.attend_window(layer, window, q, k, v, scale, softmax, stored=stored)

        return self._end(attention, query, key, value)

    def _end(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        of = self._places.of
        places = of("query", query), of("key", key), of("value", value), of("output", query, value.shape[2])
        for place, tensor in zip(places, (query, key, value), strict=False):
            place.copy_(tensor)
        self._cut(attention, places)
        return places[-1]


class ChunkGraphs:
    """Captured passes of short chunks, by size.

    Whoever has them gives the forward pass that is recorded, as for `DecodeGraphs`.

    Args:
        most: tokens of the longest chunk.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        self.sizes, self._device = chunk_sizes(most), device
        self._captured: dict[int, Captured] = {}
        self._places = Places(self.sizes[-1])
        self._pool: Any = None

    def size_of(self, batch: Batch) -> int | None:
        """The size as which the chunks of a batch run; None where they do not."""
        tokens = len(batch.token_ids)
        if batch.num_decodes or tokens > self.sizes[-1] or tokens >= QUERIES or len(batch.prefills) > PROMPTS:
            return None
        return self.sizes[bisect_left(self.sizes, tokens)]

    def record(self, sizes: Iterable[int], forward: ForwardPass) -> None:
        """Capture passes of these sizes that have not been. The largest come first: what follows finds room in the memory that
        they have computed in.

        Raises:
            RuntimeError: the pass asks the device for a number.
        """
        for size in sorted(set(sizes) - set(self._captured), reverse=True):
            self._captured[size] = self._capture(size, forward)

    def run(self, batch: Batch, step: LayerAttention) -> tuple[Tensor, Tensor | None]:
        """Logits [prompts, V] of the chunks' last tokens and features [T, F * H] of all, of a size that was recorded; valid until
        the next run."""
        tokens, prompts, size = len(batch.token_ids), len(batch.prefills), self.size_of(batch)
        assert size is not None
        captured = self._captured[size]
        torch.stack((batch.token_ids, batch.positions), out=captured.numbers[:, :tokens])
        captured.numbers[:, tokens:] = 0
        captured.last[:prompts] = batch.last_tokens
        self._replay(captured, tokens, step)
        return captured.logits[:prompts], None if captured.features is None else captured.features[:tokens]

    def _replay(self, captured: Captured, tokens: int, step: LayerAttention) -> None:
        for piece in captured.pieces:
            piece.graph.replay()
            if piece.attention is not None and piece.places is not None:
                query, key, value, output = piece.places
                output[:tokens] = piece.attention(step, query[:tokens], key[:tokens], value[:tokens])
                output[tokens:] = 0  # what is padding must not be what some request has left there

    def close(self) -> None:
        """Give the graphs' memory back."""
        self._captured.clear()
        self._places = Places(self.sizes[-1])

    def _capture(self, size: int, forward: ForwardPass) -> Captured:
        numbers = torch.zeros((2, size), dtype=torch.int64, device=self._device)
        last = torch.zeros(min(PROMPTS, size), dtype=torch.int64, device=self._device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        side = torch.cuda.graph(torch.cuda.CUDAGraph()).capture_stream  # see `DecodeGraphs._capture`
        assert side is not None
        side.wait_stream(torch.cuda.current_stream())
        recording = _Recording(self._pool)
        with torch.cuda.stream(side):
            forward(Cutter(numbers[1], self._places, lambda *_: None), numbers[0], numbers[1], last)  # what is lazy is done now
            torch.cuda.synchronize(self._device)
            logits, features = recording.of(
                lambda: forward(Cutter(numbers[1], self._places, recording.cut), numbers[0], numbers[1], last)
            )
        torch.cuda.current_stream().wait_stream(side)
        logger.debug("captured a chunk of %d tokens in %d pieces", size, len(recording.pieces))
        return Captured(numbers, last, recording.pieces, logits, features)


class _Recording:
    """Records what is launched on the current stream, in pieces."""

    def __init__(self, pool: Any) -> None:
        self.pieces: list[_Piece] = []
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def of(self, run: Callable[[], Any]) -> Any:
        """Record a call and return what it does."""
        self._begin()
        try:
            result = run()
            self._end(None, None)
        except BaseException:
            with suppress(RuntimeError):
                self._graph.capture_end()
            raise
        return result

    def cut(self, attention: Attention, places: Any) -> None:
        """End a piece with a call of attention, and begin the next."""
        self._end(attention, places)
        self._graph = torch.cuda.CUDAGraph()
        self._begin()

    def _begin(self) -> None:
        # Other threads may pin memory or copy meanwhile: only this thread's calls are checked.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end(self, attention: Attention | None, places: Any) -> None:
        self._graph.capture_end()
        self.pieces.append(_Piece(self._graph, attention, places))
