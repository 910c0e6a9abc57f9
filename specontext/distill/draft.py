"""Output distillation: the whole EAGLE-3 draft around a retrieval head, trained to predict what its target predicts.

The draft layer (arXiv 2503.01840) owns the head's fc, norms, q_proj and k_proj, so every step of its training trains the
head; pruned again, the draft is the retrieval head of arXiv 2512.00722. Position t reads the embedding of token x_t and the
target's features of token t-1, and predicts the target's distribution of x_{t+1}. Position 0 has no features: it is neither
key nor query.

Training unrolls the drafting ("training-time test"): a draft that starts at position p has true features up to p. Its step 0
stands at p; its step n stands at p+n, takes its own hidden state of step n-1 for the features it cannot have, and attends to
the true keys of positions <= p and to its own keys of the steps 1..n. Tokens stay those of the text. In the public training
code (SafeAILab/EAGLE, sgl-project/SpecForge) this is the same: a row stays with its start, every step moves tokens, targets
and RoPE positions on by one, the causal mask over the first step's keys stays, and each later step adds one key of the row's own.

Shapes: N sequences, S tokens, H hidden size, F feature layers, Hq query heads, G KV heads, D head dim, V the target's
vocabulary, Vd the draft's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from specontext.errors import HeadError, SpeContextError
from specontext.retrieval.head import RetrievalHead, RMSNorm
from specontext.retrieval.head_config import HeadConfig


def frequent_tokens(counts: Tensor, size: int) -> Tensor:
    """The draft vocabulary: the `size` most frequent tokens, ascending; of equally frequent ones the lower ids.

    Args:
        counts: [V], how often each token of the target's vocabulary occurs in the training text.

    Returns:
        int64 [size].

    Raises:
        SpeContextError: more tokens are asked for than there are.
    """
    if not 1 <= size <= len(counts):
        raise SpeContextError(f"a draft vocabulary of {size} tokens: choose from 1 to {len(counts)}, the target's vocabulary")
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def other_than_eagle(config: HeadConfig) -> list[str]:
    """Settings of a head that no EAGLE-3 draft can have around it."""
    odd = {
        "key_heads": config.key_count != config.kv_heads,
        f"key_inputs '{config.key_inputs}'": config.key_inputs != "before",
        "query_rank": config.query_rank is not None,
    }
    return [name for name, holds in odd.items() if holds]


class Draft(nn.Module):
    """One decoder layer over (embedding, fused features), a final norm and an output matrix over the draft's vocabulary.

    Attributes:
        head: its parameters are the draft's own: training the draft trains it.
        vocabulary: int64 [Vd], the target's token id of each output.
        tile_elements: bound of the attention scores held at once, in numbers; what is held does not change the result.
        chunk_elements: the same for logits.
    """

    vocabulary: Tensor
    tile_elements: int = 1 << 26
    chunk_elements: int = 1 << 26

    def __init__(
        self, head: RetrievalHead, *, intermediate_size: int, vocabulary: Tensor | None = None, lm_head: Tensor | None = None
    ) -> None:
        """Build an untrained draft around `head`.

        Args:
            head: of variant 'features'.
            intermediate_size: width of the MLP.
            vocabulary: int64 [Vd], ascending token ids that the draft predicts; None: all of the target's.
            lm_head: [V, H], the target's output matrix, whose rows initialise the draft's; None: random.

        Raises:
            HeadError: a head that no EAGLE-3 draft has, a vocabulary or matrix that does not fit.
        """
        super().__init__()
        c = head.config
        if c.variant != "features":
            raise HeadError(f"a draft reads features, this retrieval head is of variant '{c.variant}': use a 'features' head")
        if odd := other_than_eagle(c):
            raise HeadError(
                f"an EAGLE-3 draft has a query and a key for each group, of the same input: leave out {', '.join(odd)}"
            )
        if vocabulary is None:
            vocabulary = torch.arange(c.vocab_size)
        ascending = vocabulary.ndim == 1 and len(vocabulary) > 0 and bool((vocabulary.diff() > 0).all())
        if vocabulary.dtype != torch.int64 or not ascending or vocabulary[0] < 0 or vocabulary[-1] >= c.vocab_size:
            raise HeadError(f"a draft vocabulary must be ascending int64 token ids below {c.vocab_size}: use frequent_tokens")
        if lm_head is not None and lm_head.shape != (c.vocab_size, c.hidden_size):
            raise HeadError(
                f"the target's output matrix has shape {list(lm_head.shape)}, this head asks for {[c.vocab_size, c.hidden_size]}"
            )
        self.head = head
        self.v_proj = nn.Linear(2 * c.hidden_size, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden_size, bias=False)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.gate_proj = nn.Linear(c.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, c.hidden_size, bias=False)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, len(vocabulary), bias=False)
        self.register_buffer("vocabulary", vocabulary.clone())
        if lm_head is not None:
            with torch.no_grad():
                self.lm_head.weight.copy_(lm_head[vocabulary.to(lm_head.device)])

    def unroll(self, embeddings: Tensor, features: Tensor, steps: int) -> list[Tensor]:
        """Hidden states, before the final norm, of every step of drafts that start at every position.

        Args:
            embeddings: [N, S, H]; sequences are padded at the end only.
            features: [N, S, F * H], each token's own.
            steps: number of unrolled steps, the first of which sees true features only.

        Returns:
            of each step n [N, S, H]: row t of the draft that started at t-n; rows t <= n have no such draft and are zero.

        Raises:
            SpeContextError: fewer than one step.
        """
        if steps < 1:
            raise SpeContextError(f"cannot unroll {steps} steps: ask for at least one")
        head, length = self.head, embeddings.shape[1]
        state = head.project_features(features)[:, :-1]
        positions = torch.arange(length, device=embeddings.device)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        unrolled: list[Tensor] = []
        for step in range(steps):
            first = min(step + 1, length)  # row r of this step belongs to the draft from position r + 1 and stands at r + first
            state = state[:, : length - first]
            if first < length:
                x = head.layer_input(embeddings[:, first:], head.hidden_norm(state))
                queries = head.project_queries(x, positions[first:])
                keys.append(head.project_keys(x, positions[first:]))
                values.append(self.v_proj(x).unflatten(-1, (head.config.kv_heads, -1)))
                state = state + self.o_proj(self._attend(queries, keys, values))
                state = state + checkpoint(self._mlp, state, use_reentrant=False, preserve_rng_state=False)
            unrolled.append(F.pad(state, (0, 0, first, 0)))
        return unrolled

    def loss(
        self,
        embeddings: Tensor,
        features: Tensor,
        teacher_hidden: Tensor,
        output_matrix: Tensor,
        wanted: Tensor,
        *,
        steps: int = 7,
        decay: float = 0.8,
    ) -> tuple[Tensor, list[float]]:
        """Soft cross-entropy against the target's distribution over the draft's vocabulary.

        As in EAGLE-3, positions whose most likely token the draft cannot say do not count in the loss, and count as misses
        in the agreement. In step n only positions t > n count: the others have no draft that started so long before.

        Args:
            embeddings, features: as in `unroll`.
            teacher_hidden: [N, S, H], the target's hidden states after its final norm.
            output_matrix: [V, H], the target's.
            wanted: bool [N, S], positions t whose prediction of x_{t+1} counts.
            steps: number of unrolled steps.
            decay: step n weighs decay**n.

        Returns:
            the sum over steps of decay**n times the mean over the positions that count, float32; and of each step the share
            of wanted positions where draft and target have the same most likely token (0 where none is wanted).
        """
        unrolled = self.unroll(embeddings, features, steps)
        sequence, position = F.pad(wanted[:, 1:], (1, 0)).nonzero(as_tuple=True)
        kind = output_matrix.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else output_matrix.dtype
        output_matrix = output_matrix.detach().to(low)  # once, not for every chunk
        teacher = teacher_hidden[sequence, position].detach().to(low)
        top = most_likely(teacher, output_matrix, self.chunk_elements)
        label = torch.searchsorted(self.vocabulary, top).clamp_max(len(self.vocabulary) - 1)
        known = self.vocabulary[label] == top
        step = torch.arange(steps, device=position.device)[:, None]
        asked = (position > step).sum(1)
        sequence, position, teacher, label = sequence[known], position[known], teacher[known], label[known]
        real = position > step  # [steps, P]
        states = torch.stack([hidden[sequence, position] for hidden in unrolled])  # [steps, P, H]
        rows = output_matrix if len(self.vocabulary) == len(output_matrix) else output_matrix[self.vocabulary]
        losses, hits = states.new_zeros(steps, dtype=torch.float32), asked.new_zeros(steps)
        chunk = max(1, self.chunk_elements // (steps * len(rows)))
        for part in zip(states.split(chunk, 1), real.split(chunk, 1), teacher.split(chunk), label.split(chunk), strict=True):
            some_losses, some_hits = checkpoint(self._cross_entropy, *part, rows, use_reentrant=False, preserve_rng_state=False)
            losses, hits = losses + some_losses, hits + some_hits
        weights = decay ** step[:, 0].float() / real.sum(1).clamp_min(1)
        return (losses * weights).sum(), (hits / asked.clamp_min(1)).tolist()

    def _attend(self, queries: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Attention [N, R, Hq * D] of one step's queries [N, R, Hq, D], tile by tile; rows are starts of drafts.

        Args:
            keys, values: of every step so far [N, R or more, G, D]. Row r attends to rows <= r of the first step and to row r
                of every other.
        """
        count, heads = queries.shape[1:3]
        tile = max(1, self.tile_elements // (len(queries) * heads * count))
        outputs = []
        for start in range(0, count, tile):
            own, seen = slice(start, start + tile), slice(0, min(start + tile, count))
            outputs.append(
                checkpoint(
                    attend_tile,
                    queries[:, own],
                    keys[0][:, seen],
                    values[0][:, seen],
                    [key[:, seen][:, own] for key in keys[1:]],
                    [value[:, seen][:, own] for value in values[1:]],
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        return torch.cat(outputs, dim=1).flatten(2)

    def _mlp(self, hidden: Tensor) -> Tensor:
        x = self.post_attention_layernorm(hidden)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def _cross_entropy(self, states: Tensor, real: Tensor, teacher: Tensor, label: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of each step, the summed cross-entropy and the count of equal most likely tokens.

        Args:
            states: [steps, P, H]; real: bool [steps, P], those that count.
            teacher: [P, H]; rows: [Vd, H], the target's output matrix over the draft's vocabulary.
            label: int64 [P], the target's most likely token, as a place in the draft's vocabulary.
        """
        probabilities = F.linear(teacher, rows).float().softmax(-1)
        logits = self.lm_head(self.norm(states)).float()
        entropy = logits.logsumexp(-1) - (probabilities * logits).sum(-1)
        hit = logits.argmax(-1) == label
        return entropy.masked_fill(~real, 0.0).sum(1), (hit & real).sum(1)


def attend_tile(query: Tensor, key: Tensor, value: Tensor, own_keys: list[Tensor], own_values: list[Tensor]) -> Tensor:
    """Attention [N, T, Hq, D] of the last T of K rows; softmax in float32.

    Args:
        query: [N, T, Hq, D].
        key, value: [N, K, G, D] of the first step: query row r, counted from K - T, attends to rows <= r.
        own_keys, own_values: of each later step [N, T, G, D], where a row attends to itself only.
    """
    tile, count, groups = query.shape[1], key.shape[1], key.shape[2]
    grouped = (query / math.sqrt(query.shape[-1])).unflatten(2, (groups, -1))
    row = torch.arange(count - tile, count, device=query.device)
    future = torch.arange(count, device=query.device) > row[:, None]
    scores = torch.einsum("ntgrd,nkgd->ngrtk", grouped, key).float().masked_fill_(future, -math.inf)
    if own_keys:
        own = torch.einsum("ntgrd,ntgjd->ngrtj", grouped, torch.stack(own_keys, 3)).float()
        scores = torch.cat((scores, own), dim=-1)
    weights = scores.softmax(-1).to(value.dtype)
    out = torch.einsum("ngrtk,nkgd->ntgrd", weights[..., :count], value)
    if own_values:
        out = out + torch.einsum("ngrtj,ntgjd->ntgrd", weights[..., count:], torch.stack(own_values, 3))
    return out.flatten(2, 3)


@torch.no_grad()
def most_likely(hidden: Tensor, output_matrix: Tensor, elements: int) -> Tensor:
    """Ids int64 [P] of the highest logit of hidden [P, H] under output_matrix [V, H], holding `elements` logits at once."""
    chunk = max(1, elements // len(output_matrix))
    return torch.cat([F.linear(part, output_matrix).argmax(-1) for part in hidden.split(chunk)])
