"""How many heads an attention module of a rank has: what modelling code says of the model's is made to say it of the rank's."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from torch import nn

from specontext.memory.sharing import Share

QUERY_HEADS, KV_HEADS = ("num_heads", "num_attention_heads"), ("num_key_value_heads", "kv_heads")


class Heads(NamedTuple):
    """How many heads a layer has."""

    query: int
    kv: int

    def of_rank(self, share: Share) -> Heads:
        """Those of a rank."""
        own = share.some_of(self.kv)
        return Heads(self.query // share.size, own.stop - own.start)


def count_heads(attention: nn.Module, whole: Heads, share: Share) -> None:
    """Have an attention module, whose projections are a rank's, count that rank's heads."""
    own, module = whole.of_rank(share), vars(attention)
    _set(module, own)
    if "num_key_value_groups" in module:
        module["num_key_value_groups"] = own.query // own.kv
    if "split_size" in module:  # of GPT-2 and its kin: numbers of all queries
        module["split_size"] = module["embed_dim"] = own.query * module["head_dim"]
    if "config" in module:
        module["config"] = copy.copy(module["config"])
        _set(vars(module["config"]), own)
    for parent in list(attention.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) in whole:  # one for each head
                kept = share.some_of(len(child))
                setattr(parent, name, child[kept])


def _set(attributes: dict[str, Any], own: Heads) -> None:
    for names, heads in ((QUERY_HEADS, own.query), (KV_HEADS, own.kv)):
        attributes |= dict.fromkeys((name for name in names if isinstance(attributes.get(name), int)), heads)
