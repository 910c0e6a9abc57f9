"""Attention distillation: a retrieval head learns which tokens its target attends to.

Teacher of retrieval group g at query t: the target's attention probabilities, pooled over the query heads of KV head g and
averaged over layers. Sinks and the recent window are kept whatever the head says, so both distributions are restricted to
the tokens between them, and every query counts by the teacher's mass there.
Shapes: N sequences, S tokens, Q sampled queries, L layers, Hq query heads, G groups (KV heads), D head dim.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from specontext.core import SpeContextError
from specontext.retrieval.head import RetrievalHead

IMPLEMENTATION = "specontext_recording"
LOWEST = -1e30  # a finite stand-in for -inf: rows without any candidate stay free of NaN
Pool = Literal["max", "mean"]
Batch = tuple[Tensor, Tensor]  # token ids [N, S], and the mask [N, S] of positions whose next token is an answer


@dataclass(frozen=True)
class DistillConfig:
    """Settings of one training.

    Attributes:
        queries: query positions sampled of each sequence; `random_share` of them anywhere, the others before answers.
        sink, recent: first and last tokens that every selection keeps (the query's own among the recent ones).
        teacher_pool: pooling of the target's probabilities over a group. 'max' keeps what any head needs, 'mean' is the
            average that attention recall measures.
        student_pool: pooling of the head's weights in the loss; selection always takes the maximum.
        measure_every: steps between measurements of recall.
    """

    steps: int
    learning_rate: float = 4e-3
    warmup: int = 30
    weight_decay: float = 0.01
    clip: float = 1.0
    queries: int = 256
    random_share: float = 0.1
    sink: int = 4
    recent: int = 16
    teacher_pool: Pool = "max"
    student_pool: Pool = "max"
    measure_every: int = 100
    save_every: int = 25
    seed: int = 0


@dataclass
class Recorder:
    """Collects, layer after layer, the attention probabilities [N, Hq, Q, S] of the query positions `rows` [N, Q]."""

    rows: Tensor
    layers: list[Tensor] = field(default_factory=list)


def recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    recorder: Recorder | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention in Hugging Face's calling convention that shows the probabilities of some rows to `recorder`.

    Args:
        query: [N, Hq, S, D] after RoPE; key and value [N, G, S, D]. Sequences are padded at the end only.

    Raises:
        SpeContextError: the model's attention is not plain causal softmax attention.
    """
    if unsupported := [name for name in ("sliding_window", "softcap", "s_aux") if options.get(name) is not None]:
        raise SpeContextError(f"cannot record this model's attention: it uses {', '.join(unsupported)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    if recorder is not None:
        index = recorder.rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
        logits = grouped_scores(query.gather(2, index), key) * scale
        future = torch.arange(key.shape[2], device=key.device) > recorder.rows[..., None]  # [N, Q, S]
        recorder.layers.append(logits.float().masked_fill(future[:, None], -math.inf).softmax(-1))
    return out.transpose(1, 2), None


def grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """Dot products [N, Hq, Q, S] of queries [N, Hq, Q, D] with the keys [N, G, S, D] of their group."""
    scores = query.unflatten(1, (key.shape[1], -1)) @ key[:, :, None].transpose(-1, -2)
    return scores.flatten(1, 2)


def pooled(weights: Tensor, groups: int, how: Pool) -> Tensor:
    """Weights [..., Hq, Q, S] pooled over the query heads of each group: [..., G, Q, S]."""
    split = weights.unflatten(-3, (groups, -1))
    return split.amax(-3) if how == "max" else split.mean(-3)


@dataclass(frozen=True)
class Observation:
    """What one pass of the target shows."""

    embeddings: Tensor  # [N, S, H]
    features: Tensor  # [N, S, F * H], those of the token before; zero at position 0
    attention: list[Tensor]  # of every layer, the probabilities [N, Hq, Q, S] of the sampled queries

    def teacher(self, groups: int, how: Pool) -> Tensor:
        """Pooled over each group's heads, averaged over layers: [N, G, Q, S]."""
        return torch.stack([pooled(layer, groups, how) for layer in self.attention]).mean(0)


class Target:
    """A Hugging Face decoder whose attention and features a head learns from; it is never trained itself."""

    def __init__(self, model: PreTrainedModel, feature_layers: tuple[int, ...]) -> None:
        AttentionInterface.register(IMPLEMENTATION, recording_attention)
        model.set_attn_implementation(IMPLEMENTATION)
        self.model, self.feature_layers = model.eval().requires_grad_(False), feature_layers
        self.groups: int = model.config.num_key_value_heads

    @torch.no_grad()
    def observe(self, ids: Tensor, rows: Tensor) -> Observation:
        """Run the tokens ids [N, S] and watch the query positions rows [N, Q]."""
        recorder = Recorder(rows)
        out = self.model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True, recorder=recorder)
        features = torch.cat([out.hidden_states[layer] for layer in self.feature_layers], -1)
        shifted = F.pad(features[:, :-1], (0, 0, 1, 0))
        return Observation(self.model.get_input_embeddings()(ids), shifted, recorder.layers)


def sample_rows(answers: Tensor, queries: int, random_share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw query positions of each sequence: before answers, and a few anywhere up to the last of these.

    Args:
        answers: bool [N, S], the positions whose next token is an answer.

    Returns:
        rows int64 [N, queries] and bool [N, queries], False for filling where a sequence has fewer answers.
    """
    rows = torch.zeros(len(answers), queries, dtype=torch.int64)
    real = torch.zeros(len(answers), queries, dtype=torch.bool)
    others = round(queries * random_share)
    for n, mask in enumerate(answers.cpu()):
        found = mask.nonzero().flatten()
        if len(found):
            picked = found[torch.randperm(len(found), generator=generator)[: queries - others]]
            anywhere = torch.randint(int(found[-1]) + 1, (others,), generator=generator)
            rows[n, : len(picked) + others] = torch.cat((picked, anywhere))
            real[n, : len(picked) + others] = True
    return rows.to(answers.device), real.to(answers.device)


def candidates(rows: Tensor, length: int, sink: int, recent: int) -> tuple[Tensor, Tensor]:
    """The tokens [N, 1, Q, S] that queries `rows` [N, Q] choose from, and those they always keep."""
    token, row = torch.arange(length, device=rows.device), rows[:, None, :, None]
    far = (token >= sink) & (token <= row - recent)
    return far, (token <= row) & ~far


def head_log_weights(head: RetrievalHead, seen: Observation, rows: Tensor, far: Tensor, pool: Pool) -> Tensor:
    """Log of the head's weights among `far` [N, 1, Q, S], pooled over each group up to a constant: [N, G, Q, S]."""
    config = head.config
    positions = torch.arange(seen.embeddings.shape[1], device=rows.device)
    queries, keys = head(seen.embeddings, seen.features if config.variant == "features" else None, positions)
    index = rows[:, :, None, None].expand(-1, -1, config.heads, config.head_dim)
    scores = grouped_scores(queries.gather(1, index).transpose(1, 2), keys.transpose(1, 2)) / math.sqrt(config.head_dim)
    split = scores.float().masked_fill(~far, LOWEST).log_softmax(-1).unflatten(1, (config.kv_heads, -1))
    return split.amax(2) if pool == "max" else split.logsumexp(2)


def distillation_loss(student: Tensor, teacher: Tensor, far: Tensor, real: Tensor) -> Tensor:
    """KL(teacher || student) over the candidates, averaged over queries by the teacher's mass among them.

    Args:
        student: log weights [N, G, Q, S]; teacher: weights [N, G, Q, S]; both are renormalised here.
        far: bool [N, 1, Q, S], the candidates; real: bool [N, Q], the queries that count.
    """
    teacher = teacher * far
    mass = teacher.sum(-1)
    wanted = teacher / mass[..., None].clamp_min(1e-9)
    divergence = torch.xlogy(wanted, wanted).sum(-1) - (wanted * student.log_softmax(-1)).sum(-1)
    weight = mass * real[:, None]
    return (weight * divergence).sum() / weight.sum().clamp_min(1e-9)


def keep_top(scores: Tensor, far: Tensor, always: Tensor, count: int) -> Tensor:
    """Mask [..., Q, S] of the tokens kept: `always`, and the `count` candidates of highest score."""
    best = scores.masked_fill(~far, -math.inf).topk(min(count, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & far | always


def measure(
    head: RetrievalHead, target: Target, batches: Iterable[Batch], config: DistillConfig, budgets: Iterable[int]
) -> dict[int, dict[str, float]]:
    """Attention recall: the share of the target's attention that a selection covers, averaged over layers, heads, queries.

    Returns:
        for every budget (tokens, sinks and recent ones among them) the recall of `head`, of `shared` (best single set by
        the teacher's weights), of `layer` (best set of each layer and KV head) and of `window` (sinks and recent tokens).
    """
    sums = {budget: dict.fromkeys(("head", "shared", "layer", "window"), 0.0) for budget in budgets}
    total, generator = 0.0, torch.Generator().manual_seed(config.seed)
    for batch in batches:
        ids, answers = (tensor.to(target.model.device) for tensor in batch)
        rows, real = sample_rows(answers, min(config.queries, 64), 0.0, generator)
        seen = target.observe(ids, rows)
        length, groups = ids.shape[1], target.groups
        far, always = candidates(rows, length, config.sink, config.recent)
        with torch.no_grad():
            weights = head_log_weights(head, seen, rows, far, "max")
        teacher = seen.teacher(groups, "max")
        total += real.sum().item()
        for budget in sums:
            count = budget - config.sink - config.recent
            shared = {"head": keep_top(weights, far, always, count), "shared": keep_top(teacher, far, always, count)}
            shared["window"] = candidates(rows, length, config.sink, budget - config.sink)[1].expand_as(far)
            for layer in seen.attention:
                best = keep_top(pooled(layer, groups, "max"), far, always, count)
                for name, kept in (shared | {"layer": best}).items():
                    each = kept.repeat_interleave(layer.shape[1] // kept.shape[1], 1)  # [N, Hq, Q, S]
                    recall = (layer * each).sum(-1).mean(1)  # [N, Q]
                    sums[budget][name] += (recall * real).sum().item() / len(seen.attention)
    return {budget: {name: value / max(total, 1.0) for name, value in row.items()} for budget, row in sums.items()}


def learning_rate(config: DistillConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    done = step / max(1, config.steps)
    return config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup)) * 0.5 * (1 + math.cos(math.pi * done))


def train(
    head: RetrievalHead,
    target: Target,
    draw: Callable[[int], Batch],
    config: DistillConfig,
    run: Path,
    *,
    evaluate: Callable[[], dict[str, float]] | None = None,
    until: int | None = None,
) -> None:
    """Train `head` in place, continuing from `run/checkpoint.pt` where there is one; progress goes to `run/log.jsonl`.

    Args:
        draw: the batch of a step; the same step must give the same batch, so that a stopped run continues exactly.
        evaluate: further entries for the log every `config.measure_every` steps.
        until: stop after this step instead of `config.steps`, for continuing later.
    """
    run.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        head.requires_grad_(True).parameters(), config.learning_rate, (0.9, 0.98), weight_decay=config.weight_decay
    )
    checkpoint, step, end = run / "checkpoint.pt", 0, config.steps if until is None else until
    device = target.model.device
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        head.load_state_dict(saved["head"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    while step < end:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        ids, answers = (tensor.to(device) for tensor in draw(step))
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        rows, real = sample_rows(answers, config.queries, config.random_share, generator)
        seen = target.observe(ids, rows)
        far, _ = candidates(rows, ids.shape[1], config.sink, config.recent)
        student = head_log_weights(head, seen, rows, far, config.student_pool)
        loss = distillation_loss(student, seen.teacher(target.groups, config.teacher_pool), far, real)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), config.clip)
        optimizer.step()
        step += 1
        seconds = round(time.perf_counter() - began, 2)
        row = {"step": step, "length": ids.shape[1], "loss": round(loss.item(), 4), "seconds": seconds}
        if evaluate is not None and step % config.measure_every == 0:
            row |= evaluate()
        with (run / "log.jsonl").open("a") as log:
            print(json.dumps(row), file=log)
        if step % config.save_every == 0 or step == end:
            state = {"head": head.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    head.eval().requires_grad_(False)
