"""What is trained, and its losses on one batch."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from specontext.distill.attention import Teacher, attention_loss, head_log_weights, map_of
from specontext.distill.draft import Draft
from specontext.distill.effects import selection_loss, straight_through, token_effects
from specontext.distill.queries import candidates, sample_rows
from specontext.distill.replay import Replay
from specontext.distill.settings import DistillConfig
from specontext.distill.target import Observation, Target
from specontext.retrieval.head import RetrievalHead

HIGHEST = 20.0  # of one row's loss in the loop, nats: a few rows do not decide a step


class Student(nn.Module):
    """What is trained: the head, and the draft around it where the output objective needs one."""

    def __init__(self, head: RetrievalHead, draft: Draft | None = None) -> None:
        super().__init__()
        self.head = head
        self.draft = draft

    def losses(
        self, target: Target, batch: tuple[Tensor, Tensor], config: DistillConfig, index: int, *, loop: bool = False
    ) -> dict[str, Tensor]:
        """Losses of one batch by name, and the draft's agreement where there is one.

        Args:
            batch: token ids [N, S] and the mask [N, S] of positions whose next token the target has to say.
            index: number of the batch, which decides query positions.
            loop: with the selection in the loop.
        """
        ids, wanted = (tensor.to(target.device) for tensor in batch)
        found: dict[str, Tensor] = {}
        if config.attends:
            generator = generator_of(config.seed, index)
            rows, real = sample_rows(wanted, config.queries, config.random_share, generator)
            chance = torch.rand(rows.shape, generator=generator).to(rows.device)
            head_map = map_of(self.head.config, target.layers, target.groups)
            teacher = Teacher(head_map, self.head.config.kv_heads, config.teacher_pool, config.teacher_layers)
            listeners = (teacher,) if config.attention_weight else ()
            seen = target.observe(ids, rows, *listeners, keep=config.effect_weight > 0 or loop)
            far, always = candidates(rows, ids.shape[1], config.sink, config.recent)
            student = head_log_weights(self.head, seen, rows, far, config.student_pool)
            if config.attention_weight:
                found["attention"] = attention_loss(student, teacher.weights, far, real)
            if seen.stored:
                part = slice(config.replay_queries)  # the wanted rows come first
                some = (student[:, :, part], rows[:, part], real[:, part], far[:, :, part], always[:, :, part], chance[:, part])
                found |= self._replayed(target, seen, config, index, *some, loop=loop)
        else:
            seen = target.observe(ids)
        if config.speaks:
            assert self.draft is not None
            loss, agreement = self.draft.loss(
                seen.embedded(self.head),
                seen.features,
                seen.hidden,
                target.output_matrix,
                wanted,
                steps=config.unroll_steps,
                decay=config.unroll_decay,
            )
            found["output"] = loss
            found["agreement"] = torch.tensor(agreement[0])
        return found

    def _replayed(
        self,
        target: Target,
        seen: Observation,
        config: DistillConfig,
        index: int,
        student: Tensor,
        rows: Tensor,
        real: Tensor,
        far: Tensor,
        always: Tensor,
        chance: Tensor,
        *,
        loop: bool,
    ) -> dict[str, Tensor]:
        """The losses whose rows run through the target again."""
        found: dict[str, Tensor] = {}
        head_map, replay = map_of(self.head.config, target.layers, target.groups), Replay(target, seen, rows)
        if config.effect_weight:
            effects, dense = token_effects(replay, head_map, self.head.config.kv_heads, real, chance)
            found["effect"] = attention_loss(student, effects, far, real)
        else:
            with torch.no_grad():
                dense = replay.hidden()
        if loop:
            if config.student_pool != "max":
                student = head_log_weights(self.head, seen, rows, far)
            count = max(1, int(seen.ids.shape[1] * budget_share(config, index)) - config.sink - config.recent)
            gates = straight_through(student, far, always, count, config.loop_temperature)
            found["selection"] = selection_loss(replay, head_map, gates, dense, real, HIGHEST)
        return found


def weighted(found: dict[str, Tensor], config: DistillConfig) -> Tensor:
    """The loss of a batch."""
    weights = {
        "attention": config.attention_weight,
        "effect": config.effect_weight,
        "selection": config.loop_weight,
        "output": config.output_weight if config.attends else 1.0,
    }
    return torch.stack([weights[name] * value for name, value in found.items() if name in weights]).sum()


def budget_share(config: DistillConfig, index: int) -> float:
    """Budget of the loop in batch `index`, as a share of the length; drawn from (seed, index)."""
    budgets, shares = zip(*config.loop_budgets, strict=True)
    share: float = random.Random(f"budget/{config.seed}/{index}").choices(budgets, shares)[0]
    return share


def generator_of(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + index)
