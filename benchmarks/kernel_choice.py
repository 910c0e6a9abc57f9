"""Operations that choose: the head's forward pass, scores of its keys, top-k, and slots for what was chosen."""

from __future__ import annotations

import copy

import torch
from kernel_case import FEATURE_LAYERS, LONG_ROWS, PAGE_SIZE, RECENT, SINK, Case
from kernel_checks import ROUNDED, Operation, WrongResult, calls_of, relative_error, require, require_equal
from torch import Tensor

from specontext.kernels.retrieval_scores import paged_retrieval_scores
from specontext.kernels.slot_plan import plan_slots
from specontext.kernels.top_k import top_k_positions
from specontext.models.compiled import CompiledModules
from specontext.retrieval.head import CALLED, RetrievalHead

LONG_ROWS_TARGET = 25e-6


def head(case: Case) -> list[Operation]:
    """What a step computes of the head, before and after the model has run; compiled where an engine compiles it.

    Rotates among copies of the head: between two steps the model's weights drive it out of the caches.
    """
    shape, config = case.shape, case.head
    first = RetrievalHead(config).to(device=case.device, dtype=shape.dtype).requires_grad_(False)
    size = sum(p.numel() * p.element_size() for p in first.parameters())
    heads = [first, *(copy.deepcopy(first) for _ in range(case.sets(size) - 1))]
    embeddings, before = (case.random(len(heads), case.requests, shape.hidden_size) for _ in range(2))
    features = case.random(len(heads), case.requests, shape.hidden_size * FEATURE_LAYERS)
    positions = torch.full((case.requests,), case.context - 1, device=case.device)

    def run(module: RetrievalHead, embedding: Tensor, previous: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        queries = module.queries(embedding, previous, positions)
        return queries, module.keys(embedding, module.fuse(feature), previous, positions)

    compiling = case.device.type == "cuda" and shape.dtype != torch.float32
    compiled = CompiledModules([(module, name) for module in heads for name in CALLED] if compiling else [])

    def call(i: int) -> tuple[Tensor, Tensor]:
        with compiled.use(case.requests):
            return run(heads[i], embeddings[i], before[i], features[i])

    exact = run(copy.deepcopy(first).double(), *(x[1].double() for x in (embeddings, before, features)))
    error = max(relative_error(found, right) for found, right in zip(call(1), exact, strict=True))
    require("head", error, 3 * ROUNDED[shape.dtype])
    words = f"{case.requests} tokens, {size / 1e6:.0f} MB of weights, {config.heads} queries, {config.key_count} keys"
    return [Operation("head_forward", words, calls_of(call, len(heads)), error, size)]


def scores(case: Case) -> list[Operation]:
    config, groups = case.head, case.groups
    heads, dim = config.heads, config.head_dim
    set_bytes = case.requests * case.context * config.key_count * dim * case.shape.dtype.itemsize
    count = case.sets(set_bytes)
    pages = case.permutation(count * case.requests * case.token_pages, 1).view(count, case.requests, case.token_pages)
    keys = case.random(pages.numel() + 1, PAGE_SIZE, config.key_count, dim)
    queries = case.random(count, case.requests, heads, dim)  # logits over random keys have a standard deviation of 1
    stops = torch.full((case.requests,), case.context - RECENT, device=case.device)

    def call(i: int) -> Tensor:
        return paged_retrieval_scores(queries[i], keys, pages[i], SINK, stops, case.context, groups)

    found = call(1)
    error = 0.0
    for r in range(case.requests):
        seen = keys[pages[1, r]].flatten(0, 1)[SINK : case.context - RECENT]  # [S, K, D]
        for key, part in enumerate(queries[1, r].view(config.key_count, -1, dim)):
            right = torch.softmax(part.double() @ seen[:, key].double().T * dim**-0.5, -1)
            each = groups // config.key_count
            mine = found[r, key * each : (key + 1) * each, SINK : case.context - RECENT]
            error = max(error, relative_error(mine, right.unflatten(0, (each, -1)).amax(1)))
        if (found[r, :, :SINK] != -1).any() or (found[r, :, case.context - RECENT :] != -1).any():
            raise WrongResult("retrieval scores: entries that do not compete have scores")
    require("retrieval scores", error, 1e-3)
    words = f"{case.requests} x {case.context} x {config.key_count} keys, {groups} x {heads // groups} queries, D {dim}"
    moved = set_bytes + case.requests * groups * case.context * 4
    return [Operation("retrieval_scores", words, calls_of(call, count), error, moved)]


def top_k(case: Case) -> list[Operation]:
    return _top_k(case, "top_k", case.requests * case.groups, case.context, case.budget.scored)


def top_k_64k(case: Case) -> list[Operation]:
    found = _top_k(case, "top_k_64k", *case.long_rows)
    if case.long_rows == LONG_ROWS and case.device.type == "cuda":
        found[0].note = f"target {1e6 * LONG_ROWS_TARGET:.0f} us"
    return found


def _top_k(case: Case, name: str, rows: int, span: int, k: int) -> list[Operation]:
    count = 4  # few and small: the scores kernel leaves them in the cache
    values = torch.softmax(case.random(count, rows, span, dtype=torch.float32) * 2, -1)

    def call(i: int) -> Tensor:
        return top_k_positions(values[i], k)

    for i in range(count):
        chosen = call(i)
        if (chosen[:, 1:] <= chosen[:, :-1]).any() or (chosen < 0).any():
            raise WrongResult(f"{name}: positions do not ascend")
        best = values[i].topk(k, dim=-1).values
        require_equal(name, values[i].gather(-1, chosen).sort(-1, descending=True).values, best)
    words, moved = f"{rows} x {span}, k {k}", rows * (span * 4 + k * 8)
    return [
        Operation(name, words, calls_of(call, count), 0.0, moved),
        Operation(f"{name}_torch", words, calls_of(lambda i: values[i].topk(k, dim=-1), count), 0.0, moved, note="torch.topk"),
    ]


def slot_plan(case: Case) -> list[Operation]:
    selections, plans = case.selections, case.plans
    moved = [tokens.to(case.device) for tokens in selections]
    tables, count = case.empty_tables(case.device), len(moved)
    # The device counts the steps, so that a graph can be replayed: the first call of each round moves all numbers on.
    steps = torch.arange(1 - count, 1, dtype=torch.int32, device=case.device)

    def call(i: int) -> tuple[Tensor, Tensor]:
        if i == 0:
            steps.add_(count)
        return plan_slots(moved[i], case.seats, *tables, steps[i])

    for n, (slots, missing) in enumerate(plans):
        found = call(n % count)
        require_equal("slot plan", found[0].cpu(), slots)
        require_equal("slot plan", found[1].cpu(), missing)
    misses = case.misses
    entries, hot = moved[0].numel(), tables[1].numel()
    words = f"{case.requests} x {case.groups} pairs, {case.budget.scored} of {case.slots - SINK - RECENT} slots, {misses} misses"
    least = entries * (8 + 4 + 8 + 1 + 4) + hot * 4 + misses * 5 * 4
    return [Operation("slot_plan", words, calls_of(call, count), 0.0, least)]
