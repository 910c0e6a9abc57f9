"""The architectures that tests run against unmodified Hugging Face models. The table of docs/models.md is made of these.

A new one is a line in `RUN` and one in `EXAMPLES`; `python scripts/models_table.py` then writes the table.
"""

from __future__ import annotations

from typing import Any

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    **{"kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
}
ROUTED = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32},
    "first_k_dense_replace": 1,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
OLD = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "num_key_value_heads": 4}  # names of GPT-2's time
WINDOW = {"sliding_window": 24}  # shorter than the prompts
ALTERNATING = WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# By the name of their configuration class: what a tiny config needs beside the common entries.
RUN: dict[str, dict[str, Any]] = {
    "AXK1": LATENT | ROUTED,
    "BioGpt": {"num_key_value_heads": 4},
    "CodeGen": OLD | {"rotary_dim": 8},
    "Cohere": {},
    "Cohere2": ALTERNATING,
    "DeepseekV2": LATENT | ROUTED | {"q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "DeepseekV3": LATENT | ROUTED | {"rope_interleave": False},
    "Exaone4": ALTERNATING,
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0, **ALTERNATING},
    "Gemma3Text": {"head_dim": 16, "query_pre_attn_scalar": 24, **ALTERNATING},
    "Glm4": {"head_dim": 16},
    "Glm4MoeLite": LATENT | ROUTED | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "GPT2": OLD,
    "GPTJ": OLD | {"rotary_dim": 8},
    "GptOss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **ALTERNATING},
    "GPTNeoX": {"num_key_value_heads": 4},
    "Granite": {"attention_multiplier": 0.3},
    "Llama4Text": {
        **{"head_dim": 16, "attention_chunk_size": 24, "num_local_experts": 2, "intermediate_size_mlp": 96},
        **{"layer_types": ["chunked_attention", "full_attention", "chunked_attention"], "no_rope_layers": [1, 0, 1]},
        "floor_scale": 20,  # so that the temperature changes within the prompts
    },
    "MiniCPM3": LATENT,
    "Ministral": {"head_dim": 16, **ALTERNATING},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Nemotron": {},
    "Olmo2": {},
    "Olmo3": ALTERNATING,
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": 4},
    "Persimmon": {"num_key_value_heads": 4},
    "Phi": {},
    "Phi3": {"sliding_window": None},
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS},
    "Qwen3Moe": {"num_experts": 4, "head_dim": 24, **EXPERTS},
    "SmolLM3": {},
    "StableLm": {},
    "Youtu": LATENT,
}
# Public checkpoints, in the table's order: of what stands in `RUN`, and of the families that all other tests use (conftest.py).
EXAMPLES: dict[str, tuple[str, ...]] = {
    "Llama": ("meta-llama/Llama-3.1-8B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    "Qwen2": ("Qwen/Qwen2.5-7B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
    "Qwen3": ("Qwen/Qwen3-8B",),
    "Mistral": ("mistralai/Mistral-7B-Instruct-v0.3",),
    "Qwen3Moe": ("Qwen/Qwen3-30B-A3B",),
    "Qwen2Moe": ("Qwen/Qwen1.5-MoE-A2.7B",),
    "Llama4Text": ("meta-llama/Llama-4-Scout-17B-16E-Instruct (its text part)",),
    "Mixtral": ("mistralai/Mixtral-8x7B-Instruct-v0.1",),
    "DeepseekV3": ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1", "moonshotai/Moonlight-16B-A3B-Instruct"),
    "DeepseekV2": ("deepseek-ai/DeepSeek-V2-Lite-Chat",),
    "Glm4MoeLite": ("zai-org/GLM-4.7-Flash",),
    "Phi3": ("microsoft/phi-4",),
    "Olmo2": ("allenai/OLMo-2-1124-7B-Instruct",),
    "Olmo3": ("allenai/Olmo-3-7B-Instruct",),
    "Granite": ("ibm-granite/granite-3.3-8b-instruct",),
    "SmolLM3": ("HuggingFaceTB/SmolLM3-3B",),
    "Glm4": ("zai-org/GLM-4-9B-0414",),
    "Gemma": ("google/gemma-7b-it",),
    "Gemma2": ("google/gemma-2-9b-it",),
    "Gemma3Text": ("google/gemma-3-1b-it", "google/gemma-3-270m-it"),
    "GptOss": ("openai/gpt-oss-20b",),
    "Cohere": ("CohereLabs/c4ai-command-r-v01",),
    "Cohere2": ("CohereLabs/c4ai-command-r7b-12-2024",),
    "Exaone4": ("LGAI-EXAONE/EXAONE-4.0-32B",),
    "Ministral": ("mistralai/Ministral-8B-Instruct-2410",),
    "MiniCPM3": ("openbmb/MiniCPM3-4B",),
    "Youtu": ("tencent/Youtu-LLM-2B",),
    "AXK1": ("skt/A.X-K1",),
    "GPTNeoX": ("EleutherAI/pythia-6.9b",),
    "StableLm": ("stabilityai/stablelm-2-12b-chat",),
    "Nemotron": ("nvidia/Minitron-8B-Base",),
    "Phi": ("microsoft/phi-2",),
    "Persimmon": ("adept/persimmon-8b-chat",),
    "OPT": ("facebook/opt-6.7b",),
    "GPT2": ("openai-community/gpt2",),
    "GPTJ": ("EleutherAI/gpt-j-6b",),
    "CodeGen": ("Salesforce/codegen-2B-mono",),
    "BioGpt": ("microsoft/biogpt",),
}
# The language models of checkpoints that read images too: what tests/models/test_multimodal.py loads.
MULTIMODAL: dict[str, tuple[str, ...]] = {
    "Gemma3": ("google/gemma-3-4b-it", "google/gemma-3-27b-it"),
    "Qwen2_5_VL": ("Qwen/Qwen2.5-VL-7B-Instruct",),
    "Qwen3VL": ("Qwen/Qwen3-VL-8B-Instruct",),
    "Qwen3VLMoe": ("Qwen/Qwen3-VL-30B-A3B-Instruct",),
    "Qwen2VL": ("Qwen/Qwen2-VL-7B-Instruct",),
    "Mistral3": ("mistralai/Mistral-Small-3.2-24B-Instruct-2506",),
    "Llama4": ("meta-llama/Llama-4-Scout-17B-16E-Instruct",),
    "Llava": ("llava-hf/llava-1.5-7b-hf",),
}
