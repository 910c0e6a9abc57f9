"""The selection methods once more, in float64 and one token after the other, to compare with."""

from __future__ import annotations

import numpy as np

from specontext.retrieval.selector import Budget
from tests.retrieval.method_cases import KV_HEADS, LAYERS, QUERY_HEADS, SCALE, Sets, Talk

GROUP = QUERY_HEADS // KV_HEADS
Array = np.ndarray


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def best_first(scores: dict[int, float]) -> list[int]:
    """Keys by falling score; the later of two equal ones first."""
    return sorted(scores, key=lambda unit: (scores[unit], unit), reverse=True)


class Head:
    """One KV head of one layer of a talk, and the query heads of its group.

    Attributes:
        prompt_only: generated tokens are read in any case.
    """

    def __init__(self, talk: Talk, layer: int, head: int, budget: Budget, *, prompt_only: bool) -> None:
        self.keys = talk.keys[layer, :, head].double().numpy()
        self.queries = talk.queries[layer, :, head * GROUP : (head + 1) * GROUP].double().numpy() * SCALE
        self.prompt, self.sink, self.recent, self.prompt_only = talk.prompt, budget.sink, budget.recent, prompt_only
        self.begin()

    def begin(self) -> None:
        """What there is to do before the first decode step."""

    def choose(self, position: int, candidates: range, room: int) -> set[int]:
        """Tokens among the candidates that the query at `position` reads."""
        raise NotImplementedError

    def weigh(self, position: int, units: dict[int, Array]) -> dict[int, float]:
        """Softmax weights of vectors, the greatest of the group."""
        if not units:
            return {}
        vectors = np.stack(list(units.values()))
        weights = np.max([softmax(vectors @ query) for query in self.queries[position]], axis=0)
        return dict(zip(units, weights, strict=True))

    def blocks(self, size: int, stop: int, candidates: range) -> dict[int, list[int]]:
        """Tokens before `stop` of each block that has candidates."""
        blocks: dict[int, list[int]] = {}
        for token in range(self.sink, stop):
            blocks.setdefault((token - self.sink) // size, []).append(token)
        return {block: tokens for block, tokens in blocks.items() if set(tokens) & set(candidates)}

    def known(self, position: int) -> int:
        """How many tokens the method takes notice of."""
        return self.prompt if self.prompt_only else position + 1

    def whole(self, order: list[int], blocks: dict[int, list[int]], candidates: range, room: int) -> set[int]:
        """Blocks in this order as long as their candidates fit."""
        chosen: set[int] = set()
        for block in order:
            tokens = set(blocks[block]) & set(candidates)
            if len(chosen) + len(tokens) > room:
                break
            chosen |= tokens
        return chosen


class Quest(Head):
    def choose(self, position: int, candidates: range, room: int) -> set[int]:
        pages = self.blocks(16, self.known(position), candidates)
        if not pages:
            return set()
        bounds = np.array([[self.bound(query, tokens) for tokens in pages.values()] for query in self.queries[position]])
        weights = np.max([softmax(row) for row in bounds], axis=0)
        return self.whole(best_first(dict(zip(pages, weights, strict=True))), pages, candidates, room)

    def bound(self, query: Array, tokens: list[int]) -> float:
        high, low = self.keys[tokens].max(0), self.keys[tokens].min(0)
        return float(np.maximum(query * high, query * low).sum())


class ShadowKV(Head):
    def begin(self) -> None:
        self.far_out = self.outliers()

    def choose(self, position: int, candidates: range, room: int) -> set[int]:
        chunks = self.blocks(8, self.known(position), candidates)
        outliers = [c for c in self.far_out[: min(48, room // 8 * 48 // 304)] if c in chunks]
        rest = {c: self.keys[t].mean(0) for c, t in chunks.items() if c not in outliers}
        return self.whole(outliers + best_first(self.weigh(position, rest)), chunks, candidates, room)

    def outliers(self) -> list[int]:
        far = {}
        for chunk, tokens in self.blocks(8, self.prompt, range(self.prompt)).items():
            if len(tokens) == 8:
                keys, mean = self.keys[tokens], self.keys[tokens].mean(0)
                cosines = keys @ mean / np.linalg.norm(keys, axis=1) / np.linalg.norm(mean)
                far[chunk] = -float(cosines.min())
        return best_first(far)[:48]


class ClusterKV(Head):
    def begin(self) -> None:
        self.made: dict[int, list[list[int]]] = {}

    def choose(self, position: int, candidates: range, room: int) -> set[int]:
        first = max(self.prompt, self.sink)
        clusters = [*self.cluster(list(range(self.sink, self.prompt)), -(-(first - self.sink) // 80))]
        if not self.prompt_only:
            while first + 320 <= position + 1:
                clusters += self.cluster(list(range(first, first + 320)), 4)
                first += 320
            clusters += [[token] for token in range(first, position + 1)]
        units = {c: self.keys[tokens].mean(0) for c, tokens in enumerate(clusters) if tokens}
        weights = self.weigh(position, units)
        scores = {token: weights[c] for c in units for token in clusters[c] if token in candidates}
        return set(best_first(scores)[:room])

    def cluster(self, tokens: list[int], count: int) -> list[list[int]]:
        if not tokens:
            return []
        if tokens[0] not in self.made:
            self.made[tokens[0]] = self.k_means(tokens, count)
        return self.made[tokens[0]]

    def k_means(self, tokens: list[int], count: int) -> list[list[int]]:
        means = [self.keys[tokens[i * len(tokens) // count]] for i in range(count)]
        members = self.nearest(tokens, means)
        for _ in range(10):
            means = [self.keys[m].mean(0) if m else means[c] for c, m in enumerate(members)]
            before, members = members, self.nearest(tokens, means)
            if members == before:
                break
        return members

    def nearest(self, tokens: list[int], means: list[Array]) -> list[list[int]]:
        directions = np.stack([mean / np.linalg.norm(mean) for mean in means])
        members: list[list[int]] = [[] for _ in means]
        for token in tokens:
            members[int(np.argmax(directions @ self.keys[token]))].append(token)
        return members


class H2O(Head):
    def begin(self) -> None:
        self.sums = np.zeros(len(self.keys))
        self.gone: set[int] = set()
        for position in range(self.prompt):
            self.look(position, list(range(position + 1)))

    def look(self, position: int, tokens: list[int]) -> None:
        self.sums[tokens] += list(self.weigh(position, {t: self.keys[t] for t in tokens}).values())

    def choose(self, position: int, candidates: range, room: int) -> set[int]:
        alive = [t for t in candidates if t not in self.gone]
        chosen = set(best_first({t: self.sums[t] for t in alive})[:room])
        self.gone |= set(alive) - chosen
        fixed = [t for t in range(position + 1) if t < self.sink or t >= candidates.stop]
        self.look(position, sorted(set(fixed) | chosen))
        return chosen


class SnapKV(Head):
    def begin(self) -> None:
        self.gone: set[int] = set()
        self.scores: dict[int, float] = {}

    def choose(self, position: int, candidates: range, room: int) -> set[int]:
        if position == self.prompt or (not self.prompt_only and (position - self.prompt) % 32 == 0):
            self.score(position)
        alive = [t for t in candidates if t not in self.gone]
        chosen = set(best_first({t: self.scores.get(t, np.inf) for t in alive})[:room])
        self.gone |= set(alive) - chosen
        return chosen

    def score(self, tokens: int) -> None:
        start = max(0, tokens - 32)
        sums = np.zeros(tokens)
        for query in range(start, tokens):
            there = [t for t in range(query + 1) if t not in self.gone]
            sums[there] += list(self.weigh(query, {t: self.keys[t] for t in there}).values())
        self.scores = {t: sums[max(0, t - 3) : min(start, t + 4)].max() for t in range(start)}


KINDS: dict[str, type[Head]] = {"quest": Quest, "shadowkv": ShadowKV, "clusterkv": ClusterKV, "h2o": H2O, "snapkv": SnapKV}


def reference(name: str, talk: Talk, budget: Budget, steps: range) -> list[Sets]:
    """What a request reads in some of its decode steps; methods that drop entries want them from the first one on."""
    kind, prompt_only = KINDS[name.removesuffix("-prompt")], name.endswith("-prompt")
    heads = [[kind(talk, layer, head, budget, prompt_only=prompt_only) for head in range(KV_HEADS)] for layer in range(LAYERS)]
    read = []
    for step in steps:
        position = talk.prompt + step
        end = max(position + 1 - budget.recent, budget.sink)
        if prompt_only:
            end = min(end, max(talk.prompt, budget.sink))
        fixed = {t for t in range(position + 1) if t < budget.sink or t >= end}
        candidates = range(budget.sink, end)
        read.append([[sorted(fixed | head.choose(position, candidates, budget.scored)) for head in row] for row in heads])
    return read
