"""The architectures that tests run against unmodified Hugging Face models. The table of docs/models.md is made of these.

A new one is a line in `RUN` and one in `EXAMPLES`; `python scripts/models_table.py` then writes the table.
"""

from __future__ import annotations

from typing import Any

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    **{"kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
OLD = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "num_key_value_heads": 4}  # names of GPT-2's time
WINDOW = {"sliding_window": 24}  # shorter than the prompts
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
GROUPED = ROUTED | {"n_group": 2, "first_k_dense_replace": 1}
ALTERNATING = WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
SHARED = WINDOW | {
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
}  # the last ones read KV of one with a window, and of another
SHARED |= {"layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
KEEPING = {"num_hidden_layers": 4}  # states: every other layer has attention
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
DELTA |= KEEPING | {"layer_types": ["linear_attention", "full_attention"] * 2}
CONV = KEEPING | {"layer_types": ["conv", "full_attention"] * 2}
MAMBA = KEEPING | {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
KDA = EXPERTS | KEEPING | {"layer_types": DELTA["layer_types"], "head_dim": 16, "num_local_experts": 4}  # beside latents
# By the name of their configuration class: what a tiny config needs beside the common entries.
RUN: dict[str, dict[str, Any]] = {
    "AXK1": LATENT | GROUPED,
    "Bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "BailingHybrid": LATENT | KDA | {"n_group": 2, "topk_group": 1, "num_local_experts": 8, "first_k_dense_replace": 1},
    "BioGpt": {"num_key_value_heads": 4},
    "CodeGen": OLD | {"rotary_dim": 8},
    "Cohere": {},
    "Cohere2": ALTERNATING,
    "DeepseekV2": LATENT | GROUPED | {"q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "DeepseekV3": LATENT | GROUPED | {"rope_interleave": False},
    "Exaone4": ALTERNATING,
    "FalconH1": MAMBA | {"mamba_d_ssm": 128, "num_hidden_layers": 3, "head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0, **ALTERNATING},
    "Gemma3Text": {"head_dim": 16, "query_pre_attn_scalar": 24, **ALTERNATING},
    "Gemma3nText": SHARED
    | {"head_dim": 16, "vocab_size_per_layer_input": 1900, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
    | {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0], "altup_active_idx": 1, "altup_num_inputs": 3},
    "Glm4": {"head_dim": 16},
    "Glm4MoeLite": LATENT | GROUPED | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "GPT2": OLD,
    "GPTJ": OLD | {"rotary_dim": 8},
    "Gemma4Text": {
        **{"head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
        **{"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, **WINDOW, "use_bidirectional_attention": "vision"},
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],  # the last one always is
    },
    "GptOss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **ALTERNATING},
    "GPTNeoX": {"num_key_value_heads": 4},
    "Granite": {"attention_multiplier": 0.3},
    "GraniteMoeHybrid": MAMBA
    | {
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    },
    "Jamba": KEEPING
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4}
    | {"num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "KimiLinear": LATENT
    | KDA
    | {"linear_num_heads": 4, "linear_head_dim": 16, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "Lfm2": CONV | {"block_multiple_of": 8},
    "Lfm2Moe": CONV | {"num_experts": 4, "num_dense_layers": 1} | EXPERTS,
    "Llama4Text": {
        **{"head_dim": 16, "attention_chunk_size": 24, "num_local_experts": 2, "intermediate_size_mlp": 96},
        **{"layer_types": ["chunked_attention", "full_attention", "chunked_attention"], "no_rope_layers": [1, 0, 1]},
        "floor_scale": 20,  # so that the temperature changes within the prompts
    },
    "MiniCPM3": LATENT,
    "Ministral": {"head_dim": 16, **ALTERNATING},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Nemotron": {},
    "NemotronH": {
        "layers_block_type": ["mamba", "moe", "attention", "mamba", "mlp", "attention"],
        **{"head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1},
        **{"n_routed_experts": 4, "moe_shared_expert_intermediate_size": 32, "num_hidden_layers": 6, **EXPERTS},
    },
    "Olmo2": {},
    "Olmo3": ALTERNATING,
    "OlmoHybrid": DELTA,
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": 4},
    "Persimmon": {"num_key_value_heads": 4},
    "Phi": {},
    "Phi3": {"sliding_window": None},
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS},
    "Qwen3_5Text": DELTA | {"head_dim": 16},
    "Qwen3_5MoeText": DELTA | {"head_dim": 16, "num_experts": 4, "shared_expert_intermediate_size": 32} | EXPERTS,
    "Qwen3Next": DELTA | {"head_dim": 16, "num_experts": 4, "shared_expert_intermediate_size": 32} | EXPERTS,
    "Qwen3Moe": {"num_experts": 4, "head_dim": 24, **EXPERTS},
    "SmolLM3": {},
    "StableLm": {},
    "Youtu": LATENT,
    # Near relatives of these, which only the long tests run.
    "Apertus": {},
    "Arcee": {},
    "Cwm": {"head_dim": 16, **ALTERNATING},
    "Dots1": {"first_k_dense_replace": 1, **ROUTED},
    "Ernie4_5": {"head_dim": 16},
    "Ernie4_5_Moe": {
        **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
        **{"moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    },
    "ExaoneMoe": {"num_experts": 4, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, **EXPERTS, **ALTERNATING},
    "FlexOlmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "Glm": {"head_dim": 16},
    "Glm4Moe": {"head_dim": 16, "first_k_dense_replace": 1, **ROUTED},
    "GPTBigCode": OLD | {"num_key_value_heads": 1},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeShared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    "Helium": {"head_dim": 16},
    "HunYuanDenseV1": {"head_dim": 16},
    "HunYuanMoEV1": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "Jais2": {},
    "MiniMaxM2": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmo": {},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Phimoe": {"num_local_experts": 4},
    "SeedOss": {"head_dim": 16},
    "Starcoder2": {"sliding_window": None},
    "SolarOpen": {"head_dim": 16, **ROUTED},
    "VaultGemma": {"head_dim": 16, **ALTERNATING},
}
# Near relatives of others, which only the long tests run.
_STATES = ("Bamba", "BailingHybrid", "GraniteMoeHybrid", "Lfm2Moe", "NemotronH", "OlmoHybrid", "Qwen3_5MoeText", "Qwen3_5Text")
SELDOM = {*_STATES, *list(RUN)[list(RUN).index("Apertus") :]}
# Public checkpoints, in the table's order: of what stands in `RUN`, and of the families that all other tests use (conftest.py).
EXAMPLES: dict[str, tuple[str, ...]] = {
    "Llama": ("meta-llama/Llama-3.1-8B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    "Qwen2": ("Qwen/Qwen2.5-7B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
    "Qwen3": ("Qwen/Qwen3-8B",),
    "Mistral": ("mistralai/Mistral-7B-Instruct-v0.3",),
    "Qwen3Moe": ("Qwen/Qwen3-30B-A3B",),
    "Qwen2Moe": ("Qwen/Qwen1.5-MoE-A2.7B",),
    "Llama4Text": ("meta-llama/Llama-4-Scout-17B-16E-Instruct (its text part)",),
    "Qwen3Next": ("Qwen/Qwen3-Next-80B-A3B-Instruct",),
    "Qwen3_5Text": ("Qwen/Qwen3.5-9B-Base (its text part)",),
    "Qwen3_5MoeText": ("Qwen/Qwen3.5-35B-A3B-Base (its text part)",),
    "KimiLinear": ("moonshotai/Kimi-Linear-48B-A3B-Instruct",),
    "BailingHybrid": ("inclusionAI/Ling-3.0-Flash",),
    "GraniteMoeHybrid": ("ibm-granite/granite-4.0-h-small",),
    "FalconH1": ("tiiuae/Falcon-H1-7B-Instruct",),
    "NemotronH": ("nvidia/NVIDIA-Nemotron-Nano-9B-v2",),
    "Jamba": ("ai21labs/AI21-Jamba-Mini-1.7",),
    "Lfm2": ("LiquidAI/LFM2-1.2B",),
    "Lfm2Moe": ("LiquidAI/LFM2-8B-A1B",),
    "Bamba": ("ibm-ai-platform/Bamba-9B-v2",),
    "OlmoHybrid": ("allenai/Olmo-Hybrid-7B",),
    "Mixtral": ("mistralai/Mixtral-8x7B-Instruct-v0.1",),
    "DeepseekV3": ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1", "moonshotai/Moonlight-16B-A3B-Instruct"),
    "DeepseekV2": ("deepseek-ai/DeepSeek-V2-Lite-Chat",),
    "Glm4MoeLite": ("zai-org/GLM-4.7-Flash",),
    "Glm4Moe": ("zai-org/GLM-4.6", "zai-org/GLM-4.5-Air"),
    "MiniMaxM2": ("MiniMaxAI/MiniMax-M2",),
    "Phi3": ("microsoft/phi-4",),
    "Phimoe": ("microsoft/Phi-3.5-MoE-instruct",),
    "SeedOss": ("ByteDance-Seed/Seed-OSS-36B-Instruct",),
    "Ernie4_5": ("baidu/ERNIE-4.5-0.3B-PT",),
    "Ernie4_5_Moe": ("baidu/ERNIE-4.5-21B-A3B-PT",),
    "HunYuanDenseV1": ("tencent/Hunyuan-7B-Instruct",),
    "HunYuanMoEV1": ("tencent/Hunyuan-A13B-Instruct",),
    "Starcoder2": ("bigcode/starcoder2-15b",),
    "Olmo": ("allenai/OLMo-7B-0724-hf",),
    "Olmoe": ("allenai/OLMoE-1B-7B-0924-Instruct",),
    "FlexOlmo": ("allenai/FlexOlmo-7x7B-1T",),
    "Olmo2": ("allenai/OLMo-2-1124-7B-Instruct",),
    "Olmo3": ("allenai/Olmo-3-7B-Instruct",),
    "Granite": ("ibm-granite/granite-3.3-8b-instruct",),
    "GraniteMoe": ("ibm-granite/granite-3.1-3b-a800m-instruct",),
    "GraniteMoeShared": ("ibm-research/moe-7b-1b-active-shared-experts",),
    "Apertus": ("swiss-ai/Apertus-8B-Instruct-2509",),
    "Arcee": ("arcee-ai/AFM-4.5B",),
    "Cwm": ("facebook/cwm",),
    "Dots1": ("rednote-hilab/dots.llm1.inst",),
    "SolarOpen": ("upstage/Solar-Open-100B",),
    "Helium": ("kyutai/helium-1-2b",),
    "Jais2": ("inceptionai/Jais-2-8B-Chat",),
    "SmolLM3": ("HuggingFaceTB/SmolLM3-3B",),
    "Glm": ("zai-org/glm-4-9b-chat-hf",),
    "Glm4": ("zai-org/GLM-4-9B-0414",),
    "Gemma": ("google/gemma-7b-it",),
    "Gemma2": ("google/gemma-2-9b-it",),
    "Gemma3Text": ("google/gemma-3-1b-it", "google/gemma-3-270m-it"),
    "Gemma3nText": ("google/gemma-3n-E2B-it (its text part)",),
    "Gemma4Text": ("google/gemma-4-31B-it (its text part)",),
    "VaultGemma": ("google/vaultgemma-1b",),
    "GptOss": ("openai/gpt-oss-20b",),
    "Cohere": ("CohereLabs/c4ai-command-r-v01",),
    "Cohere2": ("CohereLabs/c4ai-command-r7b-12-2024",),
    "Exaone4": ("LGAI-EXAONE/EXAONE-4.0-32B",),
    "ExaoneMoe": ("LGAI-EXAONE/K-EXAONE-236B-A23B",),
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
    "GPTBigCode": ("bigcode/starcoder",),
    "GPTJ": ("EleutherAI/gpt-j-6b",),
    "CodeGen": ("Salesforce/codegen-2B-mono",),
    "BioGpt": ("microsoft/biogpt",),
}
# The language models of checkpoints that read images too: what tests/models/test_multimodal.py loads.
MULTIMODAL: dict[str, tuple[str, ...]] = {
    "Gemma3": ("google/gemma-3-4b-it", "google/gemma-3-27b-it"),
    "Gemma4": ("google/gemma-4-E2B-it", "google/gemma-4-E4B-it"),
    "Qwen2_5_VL": ("Qwen/Qwen2.5-VL-7B-Instruct",),
    "Qwen3_5": ("Qwen/Qwen3.5-9B",),
    "Qwen3_5Moe": ("Qwen/Qwen3.5-35B-A3B",),
    "Qwen3VL": ("Qwen/Qwen3-VL-8B-Instruct",),
    "Qwen3VLMoe": ("Qwen/Qwen3-VL-30B-A3B-Instruct",),
    "Qwen2VL": ("Qwen/Qwen2-VL-7B-Instruct",),
    "Mistral3": ("mistralai/Mistral-Small-3.2-24B-Instruct-2506",),
    "Llama4": ("meta-llama/Llama-4-Scout-17B-16E-Instruct",),
    "Llava": ("llava-hf/llava-1.5-7b-hf",),
}
