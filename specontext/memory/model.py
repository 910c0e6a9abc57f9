"""How many bytes a model, its retrieval head and the KV of some requests take: eq. 6-7 of the paper, and what is allocated.

Both modes say the same thing with other numbers:

    GPU memory = fixed parts + tokens * [(L - i) * resident + common] + requests * slots of i layers          i layers offloaded

with tokens summed over the requests, so `KVCost` holds the coefficients and everything else (thresholds, run-time policy,
plots) works on it. Mode `paper` counts whole numbers as eq. 7 does; mode `measured` counts pages, tables and workspace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from specontext.config import STEP_TOKENS
from specontext.memory.facts import ModelFacts
from specontext.memory.kv_cost import KVCost
from specontext.memory.tiles import DECODE_TILE, LEAST_TILE, made_tile, prompt_tile
from specontext.memory.windows import kept_bytes, ring_bytes
from specontext.model_shape import ModelShape

MODES = ("measured", "paper")
FLOAT16 = 2  # bytes; eq. 6-7 count models and KV in 2-byte floats, whatever they are loaded in
MIB = 1 << 20
LEAST_STEP, BUFFERS = 1024, 8  # see `fitting_step`
LIBRARIES = 64 * MIB  # workspaces of matrix products
COUNTERS = 10  # of the statistics of a request, besides the recall of every layer
HISTORY = 5  # of each token of the vocabulary that a request with penalties has seen: a flag and a count
SAMPLER = 96 * MIB  # float64 scores and ranks of one chunk of logits


@dataclass(frozen=True)
class MemoryModel:
    """All bytes of a planned engine.

    Attributes:
        fixed: bytes by part that do not depend on the tokens: at least `weights`, `retrieval_head` and `runtime`.
        kv: bytes that do.
        merged: whether keys and slots are counted in `kv_device`, as eq. 6-7 do, or are parts of their own.
    """

    mode: str
    fixed: Mapping[str, int]
    kv: KVCost
    merged: bool = False

    @property
    def fixed_bytes(self) -> int:
        return sum(self.fixed.values())

    def by_part(self, length: int, requests: int, offloaded: int) -> dict[str, int]:
        """Bytes by part for `requests` requests of `length` tokens; all but `kv_host` are on the device."""
        tokens, kv = requests * self.kv.whole_pages(length), self.kv
        if self.merged:
            parts = {"kv_device": kv.device(tokens, requests, offloaded)}
        else:
            parts = {
                "keys": tokens * kv.common_token,
                "slots": kv.slots(requests, offloaded),
                "kv_device": tokens * (kv.layers - offloaded) * kv.resident_token,
            }
        return {**self.fixed, **parts, "kv_host": kv.host(tokens, offloaded)}

    def device(self, length: int, requests: int, offloaded: int) -> int:
        """Bytes on the device for requests of equal length."""
        return self.fixed_bytes + self.kv.device(requests * self.kv.whole_pages(length), requests, offloaded)

    def host(self, length: int, requests: int, offloaded: int) -> int:
        """Bytes on the host for requests of equal length."""
        return self.kv.host(requests * self.kv.whole_pages(length), offloaded)


# Mode paper -----------------------------------------------------------------------------------------------------------


def paper_model(facts: ModelFacts, *, budget: int) -> MemoryModel:
    """Eq. 6-7 with the factor 4 that Algorithm 1's printed i B R H D term lacks.

        M_part = 1.3 (M_O + M_D) + 4 R [(L_GPU + 1 + alpha) S + L_CPU B] H D

    M_O and M_D are all parameters of the model and of the pruned retrieval head in 2-byte floats, H the KV heads, alpha the
    query heads of one KV head. The product with 1.3 is rounded up to whole bytes, which changes no threshold.
    """
    shape = facts.shape
    model, head = FLOAT16 * facts.parameters, FLOAT16 * facts.head.parameters
    buffers = -(-3 * (model + head) // 10)
    entry = FLOAT16 * shape.kv_heads * shape.row_numbers  # bytes: K and V of a token in one layer
    kv = KVCost(
        layers=shape.layers,
        resident_token=entry,
        common_token=entry * (1 + shape.query_heads // shape.kv_heads),
        layer_slots=entry * budget,
    )
    return MemoryModel("paper", {"weights": model, "retrieval_head": head, "runtime": buffers}, kv, merged=True)


# Mode measured --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunSettings:
    """Settings of an engine that decide what it allocates; meanings as in `SpeContextConfig` and `EngineConfig`.

    Attributes:
        requests: requests at the same time, R; tables have a row for each.
        max_tokens: longest context; tables and score workspace are made for it.
        sets: token sets of a selection; None takes what the head's groups and the granularity make.
        selections: selections of a step: 1, or the number of layers where each selects for itself.
    """

    requests: int
    max_tokens: int
    budget: int
    slots: int
    sink: int = 4
    recent: int = 16
    granularity: str = "head"
    page_size: int = 16
    max_batched_tokens: int = STEP_TOKENS["cuda"]
    sets: int | None = None
    selections: int = 1


def measured_model(
    facts: ModelFacts, run: RunSettings, *, runtime: int | None = None, graphs: int = 0, spare_layers: int = 1, states: int = 0
) -> MemoryModel:
    """What the engine allocates, part by part.

    Args:
        runtime: bytes of activations and library workspaces that a profiling pass found; None takes `estimate_runtime`.
        graphs: bytes set aside for captured CUDA graphs.
        states: bytes that selection methods keep for all requests, besides the retrieval head's keys.
        spare_layers: see `KVCost`; 1 for an engine that moves layers while it runs, 0 for fixed residency.
    """
    shape = facts.shape
    entry, host_entry = shape.kv_heads * shape.row_bytes, shape.kv_heads * shape.on_host.row_bytes
    page = run.page_size * entry
    keyed = facts.tokens_of_key_page(run.page_size)
    windows = ring_bytes(shape, seats=run.requests + 1, max_tokens=run.max_tokens, page_size=run.page_size)
    windows += kept_bytes(shape, tokens=min(run.max_batched_tokens, run.requests * run.max_tokens))
    fixed = {
        "weights": facts.weight_bytes,
        "retrieval_head": facts.head_bytes,
        "runtime": estimate_runtime(facts, run) if runtime is None else runtime,
        "graphs": graphs,
        "tables": table_bytes(facts, run) + page,  # and the page that nobody holds
        "workspace": workspace_bytes(facts, run),
        **({"methods": states} if states else {}),
        **({"windows": windows} if windows else {}),
        **({"states": (run.requests + 2) * shape.state_bytes} if shape.states else {}),
    }
    kv = KVCost(
        layers=shape.layers,
        resident_token=entry,
        common_token=-(-page // keyed) if keyed else 0,  # with what is left over at the end of a page
        layer_slots=-(-run.slots // run.page_size) * page,
        page_size=run.page_size,
        spare_layers=spare_layers,
        host_fixed=run.page_size * host_entry * facts.layer_blocks.places,
        blocks=facts.layer_blocks,
        of_host=host_entry,
    )
    return MemoryModel("measured", fixed, kv)


def table_bytes(facts: ModelFacts, run: RunSettings) -> int:
    """Bytes of the tables that have a row for each seat, and one for the padding of a batch.

    Pages of tokens and slots in both tiers and of the keys, the slot tables with their inverse, the last selection and the
    counters of the statistics, and what the head keeps of each request's last token.
    """
    shape, groups = facts.shape, _groups(facts, run)
    width = -(-run.max_tokens // run.page_size)
    slot_width = max(1, -(-run.slots // run.page_size))
    blocks = len(facts.layer_blocks.sizes)
    pages = 8 * (shape.layers * (width + slot_width) + blocks * width + _key_pages(facts, run))  # int64
    hot = run.slots - run.sink - run.recent if run.slots else 0
    slots = 4 * groups * (2 * hot + run.max_tokens) if run.slots else 0  # int32: token of a slot, its last use, slot of a token
    statistics = 4 * groups * run.selections * run.budget + 8 * (COUNTERS + shape.layers)  # int32, float64
    feature = facts.head.state_width * shape.dtype.itemsize
    # Head map, flags, readers of a group, steps, counters of requests that left; of the engine, not of a seat.
    maps = shape.layers * (8 * (shape.kv_heads + groups) + 1) + 4 * run.selections + 8 * COUNTERS
    maps += copy_tables(facts)
    return (run.requests + 1) * (pages + run.selections * slots + statistics + feature) + maps


def copy_tables(facts: ModelFacts) -> int:
    """Bytes of the tables that say which layers are copied together: where they lie in both tiers, and the parts of a read for
    heads that read alike, in blocks and by single layers, and for the head map, likewise."""
    blocks, layers, heads = facts.layer_blocks, facts.shape.layers, facts.shape.kv_heads
    reads = len(blocks.sizes) * heads + blocks.reads(facts.head_map)
    return 8 * (reads * (blocks.places + 2) + 6 * layers * heads + len(blocks.sizes) * blocks.places + 4 * layers)


def workspace_bytes(facts: ModelFacts, run: RunSettings) -> int:
    """Bytes that selecting and loading write in a step, for requests as long as they may be.

    The head's queries, before and after they are rotated in float32; logits of its query heads and scores of its groups,
    float32 for every position; the counts of top-k; and for every place of the budget the selection, the load plan and the
    rows of a layer.
    """
    head, groups = facts.head, _groups(facts, run)
    queries = head.heads * head.head_dim * (2 * facts.shape.dtype.itemsize + 12)
    position = 4 * (head.heads + head.kv_heads)
    counts = 4 * head.kv_heads * (1024 + 129 * min(256, -(-run.max_tokens // 1024)))
    place = 30 * groups + 40 * facts.shape.kv_heads
    return run.requests * (queries + run.max_tokens * position + counts + run.budget * place + 8 * groups * run.slots)


def estimate_runtime(facts: ModelFacts, run: RunSettings) -> int:
    """Bytes of activations and library workspaces, where no profiling pass has measured them.

    For a step of T tokens, all at once (which errs on the large side): four hidden states, features and their copy, q, k, v
    before and after RoPE, three feed-forward activations, two float32 attention outputs, eight float32 tensors as wide as the
    convolution of a layer with a state, buffers of stored KV, new rows of two blocks of layers, logits with a float32 copy and
    the record that penalties need, the sampler's chunk, and the workspaces of matrix products. The CUDA context is no part of it.
    """
    shape, size = facts.shape, facts.shape.dtype.itemsize
    heads = shape.query_heads * shape.key_dim
    stored = heads if shape.latent is not None else shape.kv_heads * shape.head_dim  # numbers of keys, and as many of values
    token = size * (4 * shape.hidden_size + 2 * facts.head.feature_width + 2 * (heads + 2 * stored) + 3 * facts.intermediate_size)
    token += 2 * 4 * heads
    channels = max((state.shape[0] for state in shape.states if not state.recurrent), default=0)
    token += 8 * 4 * channels
    tiles = buffer_bytes(facts, run)
    logits = run.requests * shape.vocab_size * (size + 4 + HISTORY)
    sampler = min(SAMPLER, 24 * run.requests * shape.vocab_size)
    steps = min(run.max_batched_tokens, run.requests * run.max_tokens)
    return steps * token + tiles + staged_bytes(facts, run) + logits + sampler + LIBRARIES


def fitting_step(facts: ModelFacts, run: RunSettings, memory: int) -> RunSettings:
    """The settings with so many tokens of a step that a GPU with little memory has most of it for KV.

    Half as many, and again, until run-time buffers take an eighth of what weights and head leave.
    """
    room = memory - facts.weight_bytes - facts.head_bytes
    while run.max_batched_tokens > LEAST_STEP and BUFFERS * estimate_runtime(facts, run) > room:
        run = replace(run, max_batched_tokens=max(LEAST_STEP, run.max_batched_tokens // 2))
    return run


def dequantised_bytes(shape: ModelShape, tile: int, steps: int) -> int:
    """Bytes of numbers beside KV in 8 bits: a tile of stored tokens, and three float32 copies of the new ones of a step."""
    numbers = 2 * shape.kv_heads * shape.head_dim  # of a token in one layer
    return 0 if shape.on_host.kv_dtype is None else numbers * (tile * shape.dtype.itemsize + 3 * 4 * steps)


def made_bytes(shape: ModelShape, run: RunSettings) -> int:
    """Bytes of keys and values that are made of stored latents, with those of one kind before they are put in place."""
    if shape.latent is None:
        return 0
    tokens = min(made_tile(shape.query_heads, shape.latent.key, shape.dtype.itemsize), run.max_tokens)
    return 3 * tokens * shape.query_heads * shape.latent.key * shape.dtype.itemsize


def buffer_bytes(facts: ModelFacts, run: RunSettings) -> int:
    """Bytes of the buffers through which stored tokens are read: one of a resident layer, and two of offloaded ones."""
    shape = facts.shape
    entry = shape.kv_heads * shape.row_bytes
    tile = entry * min(prompt_tile(entry), run.max_tokens)
    decoding = entry * min(max(DECODE_TILE, LEAST_TILE * run.requests), run.requests * run.max_tokens)
    steps = min(run.max_batched_tokens, run.requests * run.max_tokens)
    other = dequantised_bytes(shape, min(prompt_tile(entry), run.max_tokens), steps) + made_bytes(shape, run)
    return tile + 2 * max(tile, decoding) + other


def staged_bytes(facts: ModelFacts, run: RunSettings) -> int:
    """Bytes in which the new rows of prompts wait until all layers of a block have them: of one block, and of the last one while
    it is on its way to the host."""
    shape, tokens = facts.shape, min(run.max_batched_tokens, run.requests * run.max_tokens)
    return 2 * tokens * facts.layer_blocks.places * shape.kv_heads * shape.on_host.row_bytes


def _key_pages(facts: ModelFacts, run: RunSettings) -> int:
    """Pages of the longest context's keys: a page of KV holds the keys of more tokens."""
    tokens = facts.tokens_of_key_page(run.page_size)
    return -(-run.max_tokens // tokens) if tokens else 0


def _groups(facts: ModelFacts, run: RunSettings) -> int:
    """Token sets of a selection."""
    if run.sets is not None:
        return run.sets
    return facts.head.kv_heads if run.granularity == "head" else 1
