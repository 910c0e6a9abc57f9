"""Sizes of a run of the kernels benchmark, and the random data that its operations share."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property

import torch
from measure import fill, host_memory
from torch import Tensor

from specontext.kernels.dispatch import reference_of
from specontext.kernels.slot_plan import plan_slots
from specontext.model_shape import ModelShape
from specontext.retrieval.head_config import HeadConfig
from specontext.retrieval.head_map import band_map
from specontext.retrieval.selector import Budget

PAGE_SIZE = 16
SINK, RECENT = 4, 16
FEATURE_LAYERS = 3
LONG_ROWS = (4, 65536, 2048)  # rows, scores and k of the case that has a target


@dataclass
class Case:
    """Sizes of one run and the data that operations share, made when first used.

    Attributes:
        shape: of the model; its dtype is that of KV and head keys.
        slots: device slots of each KV head.
        chunk: tokens of a prefill chunk.
        long_rows: rows, scores and k of the second top-k.
        pool_bytes: size of the host pool; on a CPU None makes it as large as the context needs.
        rotated_bytes: inputs of one operation together are at least that large.
        bands: groups of the head for each KV head, one for each band of layers.
        key_heads, key_dim: keys of the head for each token, and their width; None: one for each group, and that of the model.
        query_rank: of the head's query projection; None for one matrix.
    """

    shape: ModelShape
    context: int
    budget: Budget
    slots: int
    requests: int
    overlap: float
    chunk: int
    device: torch.device
    pool_bytes: int | None = None
    long_rows: tuple[int, int, int] = LONG_ROWS
    rotated_bytes: int = 256 << 20
    bands: int = 1
    key_heads: int | None = None
    key_dim: int | None = None
    query_rank: int | None = None
    stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.order = torch.Generator().manual_seed(1)

    @property
    def row(self) -> tuple[int, int]:
        """What a token and KV head bring: [2, D], or [1, D] where it is a latent, key and value at once."""
        return self.shape.row_numbers // self.shape.head_dim, self.shape.head_dim

    def pool_size(self, pages: int) -> tuple[int, ...]:
        """Of a pool of so many pages of a layer: [N, *row], or in 8 bits [pages, rows of a page, bytes of a row]."""
        rows = PAGE_SIZE * self.shape.kv_heads
        return (pages * rows, *self.row) if self.shape.kv_dtype is None else (pages, rows, self.shape.row_bytes)

    def pool(self, pages: int) -> Tensor:
        """A pool on the device with random rows."""
        if self.shape.kv_dtype is None:
            return self.random(*self.pool_size(pages))
        from specontext.evaluation.paper.states import fill as fill_pool  # which imports transformers: see kernels.py

        rows = torch.empty(self.pool_size(pages), dtype=self.shape.kv_dtype, device=self.device)
        fill_pool(rows)
        return rows

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    @property
    def head(self) -> HeadConfig:
        """A head with as many query heads for each group as the model has for each KV head."""
        shape = self.shape
        return HeadConfig(
            variant="features",
            hidden_size=shape.hidden_size,
            target_hidden_size=shape.hidden_size,
            vocab_size=shape.vocab_size,
            heads=shape.query_heads * self.bands,
            kv_heads=self.groups,
            head_dim=self.key_dim or shape.key_dim,
            feature_layers=tuple(range(FEATURE_LAYERS)),
            key_heads=self.key_heads,
            key_inputs="before" if self.key_heads is None else "around",
            query_rank=self.query_rank,
        )

    @property
    def groups(self) -> int:
        return self.shape.kv_heads * self.bands

    @cached_property
    def head_map(self) -> Tensor:
        """int64 [L, Hkv]."""
        return torch.tensor(band_map(self.shape.layers, self.shape.kv_heads, self.bands), device=self.device)

    def random(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return fill(torch.empty(size, dtype=dtype or self.shape.dtype, device=self.device), self.generator)

    def queries(self, count: int) -> Tensor:
        """Queries of the model [count, R, Hq, D]; their logits over random keys have a standard deviation of 1."""
        return self.random(count, self.requests, self.shape.query_heads, self.shape.head_dim)

    def permutation(self, count: int, least: int = 0) -> Tensor:
        return (torch.randperm(count, generator=self.order) + least).to(self.device)

    def sets(self, set_bytes: int, most: int = 16) -> int:
        """How many sets of inputs of this size an operation rotates among."""
        return min(most, max(2, -(-self.rotated_bytes // set_bytes)))

    @cached_property
    def token_pages(self) -> int:
        """Pages of one request's context in one layer."""
        return -(-self.context // PAGE_SIZE)

    @cached_property
    def seats(self) -> Tensor:
        return torch.arange(self.requests, device=self.device)

    @cached_property
    def arena(self) -> Tensor:
        """Slots of all layers and requests."""
        return self.pool(self.arena_pages.numel() + 1)

    @cached_property
    def arena_pages(self) -> Tensor:
        """int64 [L, R, P], distinct."""
        pages = -(-self.slots // PAGE_SIZE)
        return self.permutation(self.shape.layers * self.requests * pages, 1).view(self.shape.layers, self.requests, pages)

    @cached_property
    def host(self) -> Tensor:
        """The host pool, on CUDA pinned; in 8 bits as one of single layers."""
        page_bytes = PAGE_SIZE * self.shape.kv_heads * self.shape.row_bytes
        needed = 2 * self.shape.layers * self.requests * self.token_pages + 8  # blocks may have places to spare
        pages = needed if self.pool_bytes is None else self.pool_bytes // page_bytes
        if pages <= self.requests * self.token_pages:
            raise ValueError(f"the host pool holds fewer than {self.requests} x {self.context} tokens of one layer: enlarge it")
        memory = self.stack.enter_context(host_memory(pages * page_bytes, pinned=self.device.type == "cuda"))
        # The CPU writes it: a copy engine refuses a range that was pinned in several parts.
        if self.shape.kv_dtype is None:
            return fill(memory.view(self.shape.dtype), self.order).view(self.pool_size(pages))
        # Blocks of layers put codes and scales elsewhere: bytes that are good numbers as either, again and again.
        some = torch.randint(0x38, 0x40, ((1 << 24) - 8,), dtype=torch.uint8, generator=self.order)
        for part in memory.split(len(some)):
            part.copy_(some[: len(part)])
        return memory.view(self.shape.kv_dtype).view(self.pool_size(pages))

    @cached_property
    def host_pages(self) -> Tensor:
        """int64 [L, R, P], distinct, as prompts of `chunk` tokens a step leave them: runs of a layer's pages, layer after layer.

        Where the pool has too little room, layers share pages.
        """
        layers, run = self.shape.layers, max(1, self.chunk // PAGE_SIZE)
        token = torch.arange(self.token_pages)
        layer = torch.arange(layers)[:, None, None]
        request = torch.arange(self.requests)[:, None] * (-(-self.token_pages // run) * run * layers)
        pages = request + token // run * (run * layers) + layer * run + token % run
        pool = self.host.numel() * self.host.itemsize // (PAGE_SIZE * self.shape.kv_heads * self.shape.row_bytes) - 1
        return (1 + pages % pool).to(self.device)

    @cached_property
    def context_pages(self) -> Tensor:
        """Page tables int64 [sets, R, P] of whole contexts of a layer on the device."""
        count = self.sets(self.requests * self.token_pages * PAGE_SIZE * self.shape.kv_heads * self.shape.row_bytes)
        pages = self.permutation(count * self.requests * self.token_pages, 1)
        return pages.view(count, self.requests, self.token_pages)

    @cached_property
    def context_rows(self) -> Tensor:
        """The pool that has these pages."""
        return self.pool(self.context_pages.numel() + 1)

    @cached_property
    def selections(self) -> list[Tensor]:
        """Scored tokens int64 [R, G, K] of a sequence that ends where it begins; steps share `overlap` of their tokens.

        Tokens come back after so many steps that their slots have been taken, so that every step misses what is new in it.
        """
        low, high, width = SINK, self.context - RECENT, self.budget.scored
        new = width - round(width * self.overlap)
        hot = self.slots - SINK - RECENT
        count = 4 if new == 0 else max(4, -(-hot // new) + 2)
        cycle = max(width, count * new)
        if cycle > high - low:
            raise ValueError(f"{self.context} tokens are too few for selections of {width} with overlap {self.overlap}")
        pairs = range(self.requests * self.groups)
        orders = torch.stack([torch.randperm(high - low, generator=self.order)[:cycle] + low for _ in pairs])
        found = []
        for step in range(count):
            window = (step * new + torch.arange(width)) % cycle
            found.append(orders[:, window].sort(-1).values.view(self.requests, self.groups, width))
        return found

    def empty_tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """slot_of_token, token_of_slot and last_used of empty slots."""
        pairs, hot = (self.requests, self.groups), self.slots - SINK - RECENT
        slot_of_token = torch.full((*pairs, self.context), -1, dtype=torch.int32, device=device)
        token_of_slot = torch.full((*pairs, hot), -1, dtype=torch.int32, device=device)
        return slot_of_token, token_of_slot, torch.zeros((*pairs, hot), dtype=torch.int32, device=device)

    @cached_property
    def plans(self) -> list[tuple[Tensor, Tensor]]:
        """Slots and misses of two rounds through the selections by the reference, on the CPU; the second is the steady state."""
        tables = self.empty_tables(torch.device("cpu"))
        seats = torch.arange(self.requests)
        return [reference_of(plan_slots)(tokens, seats, *tables, step + 1) for step, tokens in enumerate(self.selections * 2)]

    @cached_property
    def misses(self) -> int:
        """Misses of a step in the steady state, all pairs together (mean)."""
        steady = self.plans[len(self.selections) :]
        return round(sum(int(missing.sum()) for _, missing in steady) / len(steady))
