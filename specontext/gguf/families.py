"""Architectures of GGUF files and what is particular to each: its name in transformers, its tensors, its settings.

llama.cpp's own names on the left, those of transformers on the right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
LLAMA = ATTENTION | {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA2 = LLAMA | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
EXPERTS = ATTENTION | {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_up_proj",
    "ffn_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
EXPERT_SIZES = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}


@dataclass(frozen=True)
class Windows:
    """Which layers attend to a window; files give its size, and mostly nothing else.

    Attributes:
        every: each so many-th layer attends to the whole context.
        size: of the window where the file does not say, None for no windows then.
        theta: base of RoPE in layers with a window where the file does not say, None for the same as in the others.
    """

    every: int
    size: int | None = None
    theta: float | None = None


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        model_type, name: in transformers, of its config and of its class.
        layer: parts of a layer by their names.
        interleaved: rows of queries and keys lie in llama.cpp's order, in which a pair that RoPE turns is adjacent.
        norm_offset: what files add to the weights of norms.
        sizes: further settings without which there is no model, by their names in configs.
        caps: soft caps, by their names in configs, and what they are where a file does not say.
        config: entries that are the same in all models.
        windows: None where no layer has one.
        by_share: numbers of layers of those models whose queries are scaled by their share of the hidden size, the others' by the
            width of a head; None where no config says how they are scaled.
        ends: tokens that end an output beside the one that files name.
        biased: whether the config says that queries, keys and values have biases, as the file's tensors tell.
    """

    model_type: str
    name: str
    layer: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(LLAMA))
    interleaved: bool = False
    norm_offset: float = 0.0
    sizes: Mapping[str, str] = field(default_factory=dict)
    caps: Mapping[str, tuple[str, float | None]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    windows: Windows | None = None
    by_share: frozenset[int] | None = None
    ends: tuple[str, ...] = ()
    biased: bool = True

    @property
    def settings(self) -> set[str]:
        """Settings of this architecture alone."""
        windows = {"attention.sliding_window_pattern", "rope.freq_base_swa"} if self.windows is not None else set()
        return {*self.sizes, *self.caps, *windows}


_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
_TURN = ("<end_of_turn>",)
_SILU = {"hidden_act": "silu"}
FAMILIES = {
    # llama.cpp keeps Mistral's dense models under "llama": without a sliding window they compute the same.
    "llama": Family("llama", "LlamaForCausalLM", interleaved=True, config=_SILU),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", config=_SILU, biased=False),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", config=_SILU),
    "qwen2moe": Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        EXPERTS,
        sizes=EXPERT_SIZES | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        biased=False,
        config=_SILU | {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "qwen3moe": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        EXPERTS,
        sizes=EXPERT_SIZES,
        config=_SILU | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "gemma": Family("gemma", "GemmaForCausalLM", norm_offset=1.0, config={"hidden_act": "gelu_pytorch_tanh"}, ends=_TURN),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        GEMMA2,
        norm_offset=1.0,
        caps={
            "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": ("final_logit_softcapping", 30.0),
        },
        config=_GELU,
        windows=Windows(every=2, size=4096),
        by_share=frozenset({46}),
        ends=_TURN,
    ),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        GEMMA2,
        norm_offset=1.0,
        caps={"final_logit_softcapping": ("final_logit_softcapping", None)},
        config=_GELU,
        windows=Windows(every=6, theta=10000.0),
        by_share=frozenset({62}),
        ends=_TURN,
    ),
}
