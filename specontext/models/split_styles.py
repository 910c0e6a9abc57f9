"""How each table of a decoder's layers is to be split among ranks, by its name: by ours where attention and feed-forward layers
have names that are usual, else by the modelling code's own plan for tensor parallelism.

What is split by columns of the output ('colwise') computes some heads, or some of the feed-forward's numbers; what takes these in
('rowwise') gives a part of a sum. Routers, norms, embeddings and `whole_modules` are whole on every rank.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from specontext.memory.whole_modules import whole_modules

COLUMNS, ROWS = "colwise", "rowwise"
PACKED_COLUMNS, PACKED_ROWS = "packed_colwise", "packed_rowwise"  # two tables of one size behind each other: gate and up
QUERY_KEY_VALUE = "query_key_value"  # three tables behind each other, by columns
NORM_OF_ALL_HEADS = "norm_of_all_heads"
ONCE = "once"  # what is added to a sum, and so is zero on all ranks but one
EXPERTS = "moe_tp_experts"  # a module whose result is a part of a sum
WHOLE = "replicated_with_grad_allreduce"

ATTENTION = {
    **dict.fromkeys(("q_proj", "q_b_proj", "k_proj", "v_proj", "kv_b_proj", "g_proj"), COLUMNS),
    **dict.fromkeys(("o_proj", "out_proj", "c_proj", "dense", "sinks"), ROWS),
}
FEED_FORWARD = {
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h"), COLUMNS),
    **dict.fromkeys(("down_proj", "w2", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "output_linear"), ROWS),
    "input_linear": PACKED_COLUMNS,
}
ATTENTION_MODULES, FEED_FORWARD_MODULES = ("attn", "attention", "mixer"), ("mlp", "feed_forward", "shared_mlp", "mixer")
# How queries, keys and values lie in one matrix stands in modelling code alone. Heads behind each other, each with its query, key
# and value, or blocks of heads, are cut as any other columns.
FUSED = ("c_attn", "qkv_proj", "query_key_value", "qkv", "Wqkv")
QUERIES = {"q_proj", "q_b_proj", *FUSED}  # one of which each attention has
FUSED_OF_TYPE = {
    **dict.fromkeys(("phi3", "gpt2"), QUERY_KEY_VALUE),
    **dict.fromkeys(("gpt_neox", "persimmon", "codegen"), COLUMNS),
}
# The library gathers what gate and up bring, to take it apart; where each is split by itself, nothing is gathered.
GATHERED = {("gate_up_proj", "colwise_gather_output"): PACKED_COLUMNS}
# The experts of gpt-oss have their matrices the other way round, and gate and up alternate.
GPT_OSS = {
    "mlp.experts": EXPERTS,
    "mlp.experts.gate_up_proj": ROWS,
    "mlp.experts.gate_up_proj_bias": ROWS,
    "mlp.experts.down_proj": COLUMNS,
    "mlp.experts.down_proj_bias": ONCE,
}


class Styles:
    """How the tables of one model are split."""

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config.get_text_config()
        plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
        self._plan = {re.sub(r"^\w+\.\*\.", "", name): style for name, style in plan.items()}
        self._fused = FUSED_OF_TYPE.get(config.model_type)
        if config.model_type == "gpt_oss":
            self._plan |= GPT_OSS
        if config.model_type == "gpt_bigcode":
            self._fused = QUERY_KEY_VALUE if config.multi_query else COLUMNS
        self._whole = {id(module) for whole in whole_modules(model) for module in whole.modules()}
        experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        self._router_rows = {1} | {getattr(config, name, None) for name in experts}

    def keeps_whole(self, module: nn.Module) -> bool:
        """Whether each rank has all of a module, whatever its tables are called."""
        return id(module) in self._whole

    def of(self, path: str) -> str | None:
        """The style of a module or a parameter, by its path in its layer; None where nothing says it."""
        *parents, name = path.split(".")
        if parents and parents[-1].endswith(ATTENTION_MODULES):
            if name in FUSED:
                return self._fused
            if name in ATTENTION:
                return ATTENTION[name]
        feeding = not parents or parents[-1] in FEED_FORWARD_MODULES or parents[-1].startswith("shared_expert")
        if feeding and name in FEED_FORWARD:
            return FEED_FORWARD[name]
        if self._plan.get(".".join(parents)) == WHOLE:
            return WHOLE
        style = self._plan.get(path)
        return style if style is None else GATHERED.get((name, style), style)

    def leaves_whole(self, table: Tensor, path: str) -> bool:
        """Whether each rank has all of a table that has no style: numbers of a norm, and of routers, which have a row for each
        expert or one in all."""
        return table.dim() < 2 or (EXPERTS in self._plan.values() and table.dim() == 2 and table.shape[0] in self._router_rows)
