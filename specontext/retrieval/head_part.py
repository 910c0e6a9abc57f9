"""The groups of a retrieval head that one of several ranks needs: those that its KV heads read."""

from __future__ import annotations

from dataclasses import replace

import torch

from specontext.memory.sharing import Share
from specontext.model_shape import ModelShape
from specontext.retrieval.head import RetrievalHead


def head_part(head: RetrievalHead, shape: ModelShape, share: Share) -> RetrievalHead:
    """A head of some groups of another one, whose head map is that of a rank's KV heads; itself where a rank needs all of them.

    All ranks have equally many groups, so that their keys take equally many pages: one that reads fewer has others beside.

    Args:
        shape: of the whole model.
    """
    c = head.config
    if c.key_count not in (1, c.kv_heads):  # groups that share keys are not taken apart
        return head
    rows = c.head_map or (tuple(range(shape.kv_heads)),) * shape.layers
    read = share.groups_read(shape, rows)
    own, most = read[share.rank], max(map(len, read))
    if most == c.kv_heads:
        return head
    beside = [group for group in range(c.kv_heads) if group not in own]
    groups = sorted(own + beside[: most - len(own)])
    number = {group: place for place, group in enumerate(groups)}
    config = replace(
        c,
        heads=c.heads // c.kv_heads * most,
        kv_heads=most,
        key_heads=None if c.key_count == c.kv_heads else 1,
        head_map=tuple(tuple(number[group] for group in row[share.kv_heads(shape)]) for row in rows),
    )
    part = RetrievalHead(config).to(head.k_proj.weight)
    state = head.state_dict()
    each = torch.tensor(groups, device=head.k_proj.weight.device)
    queries = "q_proj.weight" if c.query_rank is None else "q_b_proj.weight"
    for name in (queries, "k_proj.weight") if c.key_count == c.kv_heads else (queries,):
        state[name] = state[name].unflatten(0, (c.kv_heads, -1))[each].flatten(0, 1)
    part.load_state_dict(state)
    part.set_rope(theta=head.rope_theta, yarn_factor=head.yarn_factor)
    return part.train(head.training).requires_grad_(head.k_proj.weight.requires_grad)
