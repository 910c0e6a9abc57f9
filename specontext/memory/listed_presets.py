"""Public models whose layers differ in kind, as their configs and the library's classes have them."""

from __future__ import annotations

from typing import Any

from specontext.memory.listed_preset import NAMES, ListedPreset


def _listed(
    name: str,
    source: str,
    family: str,
    sizes: tuple[int, int, int, int, int],
    vocabulary_and_context: tuple[int, int],
    kinds: str,
    counted: tuple[int, int],
    matrices: dict[tuple[int, int], int],
    **others: Any,
) -> ListedPreset:
    """A preset; `sizes` are hidden and intermediate size, query heads, KV heads and head dim, `counted` parameters and those of
    tables."""
    hidden, intermediate, query_heads, kv_heads, head_dim = sizes
    vocab, context = vocabulary_and_context
    numbers: dict[str, Any] = {"kinds": kinds, "counted": counted[0], "lookup": counted[1], "matrices": matrices}
    return ListedPreset(
        *(name, source, family, hidden, intermediate, len(kinds), query_heads, kv_heads, head_dim, vocab, context),
        **numbers | others,
    )


_GEMMA3N: dict[str, Any] = {"tied": True, "rope_theta": 1e6, "window": 512}
_GEMMA4: dict[str, Any] = {"tied": True, "rope_theta": 1e6}
_CAP = {"final_logit_softcapping": 30.0}
_SMALL = _CAP | {"head_dim": 256, "global_head_dim": 512}
_E2B = _SMALL | {"num_kv_shared_layers": 20, "use_double_wide_mlp": True}
_E4B = _SMALL | {"num_kv_shared_layers": 18}
_LARGE = _SMALL | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "use_bidirectional_attention": "vision"}
_31B = _LARGE | {"num_key_value_heads": 16, "num_global_key_value_heads": 4}
_26B = _LARGE | {"num_key_value_heads": 8, "num_global_key_value_heads": 2, "enable_moe_block": True, "num_experts": 128}
_26B |= {"top_k_experts": 8, "moe_intermediate_size": 704}
_OSS: dict[str, Any] = {"tied": False, "rope_theta": 150000.0, "window": 128}
_NEXT: dict[str, Any] = {"tied": False, "rope_theta": 1e7}
_TURNED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}}
_GRANITE: dict[str, Any] = {"tied": True, "rope_theta": 10000.0}
_KINDS = "sssssfssss" * 4


def _mamba(heads: int, experts: int, chosen: int, shared: int) -> dict[str, Any]:
    """Entries of a Granite 4 H."""
    sizes = {"mamba_n_heads": heads, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2}
    routed = {"num_local_experts": experts, "num_experts_per_tok": chosen, "shared_intermediate_size": shared}
    kinds = ["attention" if NAMES[kind] == "full_attention" else "mamba" for kind in _KINDS]
    return sizes | routed | {"layer_types": kinds, "position_embedding_type": "nope"}


LISTED = (
    _listed(
        "gemma-3n-e2b",
        "google/gemma-3n-E2B-it",
        "Gemma3nTextConfig",
        (2048, 8192, 8, 2, 256),
        (262400, 32768),
        "wwwwf" * 6,
        (4435182688, 2013265920),
        {(2048, 2048): 60, (512, 2048): 40, (8192, 2048): 60, (2048, 8192): 30, (4, 2048): 30}
        | {(64, 2048): 30, (2048, 64): 30, (256, 2048): 30, (2048, 256): 30},
        **_GEMMA3N | {"readers": 10, "whole": 583965024, "entries": {"num_kv_shared_layers": 10}},
    ),
    _listed(
        "gemma-3n-e4b",
        "google/gemma-3n-E4B-it",
        "Gemma3nTextConfig",
        (2048, 16384, 8, 2, 256),
        (262400, 32768),
        "wwwwf" * 7,
        (6835235568, 2348810240),
        {(2048, 2048): 70, (512, 2048): 40, (16384, 2048): 70, (2048, 16384): 35, (4, 2048): 35}
        | {(64, 2048): 35, (2048, 64): 35, (256, 2048): 35, (2048, 256): 35},
        **_GEMMA3N | {"readers": 15, "whole": 1096528624, "entries": {"num_kv_shared_layers": 15}},
    ),
    _listed(
        "gemma-4-e2b",
        "google/gemma-4-E2B-it",
        "Gemma4TextConfig",
        (1536, 6144, 8, 1, 512),
        (262144, 131072),
        "wwwwf" * 7,
        (4628569344, 2348810240),
        {(2048, 1536): 28, (256, 1536): 59, (1536, 2048): 28, (6144, 1536): 30, (1536, 6144): 15, (1536, 256): 35}
        | {(4096, 1536): 7, (512, 1536): 6, (1536, 4096): 7, (12288, 1536): 40, (1536, 12288): 20},
        **_GEMMA4 | {"readers": 20, "whole": 41287680, "window": 512, "window_heads": (1, 256), "entries": _E2B},
    ),
    _listed(
        "gemma-4-e4b",
        "google/gemma-4-E4B-it",
        "Gemma4TextConfig",
        (2560, 10240, 8, 2, 512),
        (262144, 131072),
        "wwwwwf" * 7,
        (7463013376, 2818572288),
        {(2048, 2560): 35, (512, 2560): 40, (2560, 2048): 35, (10240, 2560): 84, (2560, 10240): 42, (256, 2560): 42}
        | {(2560, 256): 42, (4096, 2560): 7, (1024, 2560): 8, (2560, 4096): 7},
        **_GEMMA4 | {"readers": 18, "whole": 82575360, "window": 512, "window_heads": (2, 256), "entries": _E4B},
    ),
    _listed(
        "gemma-4-26b-a4b",
        "google/gemma-4-26B-A4B-it",
        "Gemma4TextConfig",
        (2816, 2112, 16, 2, 512),
        (262144, 262144),
        "wwwwwf" * 5,
        (25233141760, 0),
        {(4096, 2816): 25, (2048, 2816): 50, (2816, 4096): 25, (2112, 2816): 60, (2816, 2112): 30}
        | {(128, 2816): 30, (8192, 2816): 5, (1024, 2816): 5, (2816, 8192): 5, (1408, 2816): 3840, (2816, 704): 3840},
        **_GEMMA4 | {"window": 1024, "window_heads": (8, 256), "entries": _26B},
    ),
    _listed(
        "gemma-4-31b",
        "google/gemma-4-31B-it",
        "Gemma4TextConfig",
        (5376, 21504, 32, 4, 512),
        (262144, 262144),
        "wwwwwf" * 10,
        (30697345280, 0),
        {(8192, 5376): 50, (4096, 5376): 100, (5376, 8192): 50, (21504, 5376): 120, (5376, 21504): 60}
        | {(16384, 5376): 10, (2048, 5376): 10, (5376, 16384): 10},
        **_GEMMA4 | {"window": 1024, "window_heads": (16, 256), "entries": _31B},
    ),
    _listed(
        "gpt-oss-20b",
        "openai/gpt-oss-20b",
        "GptOssConfig",
        (2880, 2880, 64, 8, 64),
        (201088, 131072),
        "wf" * 12,
        (20914757184, 579133440),
        {(4096, 2880): 24, (512, 2880): 48, (2880, 4096): 24, (5760, 2880): 768, (2880, 2880): 768},
        **_OSS | {"entries": {"num_local_experts": 32}},
    ),
    _listed(
        "gpt-oss-120b",
        "openai/gpt-oss-120b",
        "GptOssConfig",
        (2880, 2880, 64, 8, 64),
        (201088, 131072),
        "wf" * 18,
        (116829156672, 579133440),
        {(4096, 2880): 36, (512, 2880): 72, (2880, 4096): 36, (5760, 2880): 4608, (2880, 2880): 4608},
        **_OSS | {"entries": {"num_local_experts": 128}},
    ),
    _listed(
        "qwen3-next-80b-a3b",
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "Qwen3NextConfig",
        (2048, 5120, 16, 2, 256),
        (151936, 262144),
        "sssf" * 12,
        (79674391296, 311164928),
        {(12288, 2048): 36, (64, 2048): 36, (2048, 4096): 48, (512, 2048): 120, (2048, 512): 24624, (8192, 2048): 12}
        | {(1024, 2048): 24576},
        **_NEXT | {"convolution": (8192, 4), "recurrence": (32, 128, 128), "whole": 1213864704, "entries": _TURNED},
    ),
    _listed(
        "granite-4.0-h-tiny",
        "ibm-granite/granite-4.0-h-tiny",
        "GraniteMoeHybridConfig",
        (1536, 512, 12, 4, 128),
        (100352, 131072),
        _KINDS,
        (6939037248, 0),
        {(2048, 1536): 40, (1536, 1024): 40, (6448, 1536): 36, (1536, 3072): 36, (1536, 1536): 8, (512, 1536): 8}
        | {(1024, 1536): 2560, (1536, 512): 2560},
        **_GRANITE
        | {"convolution": (3328, 4), "recurrence": (48, 64, 128), "whole": 527132736, "entries": _mamba(48, 64, 6, 1024)},
    ),
    _listed(
        "granite-4.0-h-small",
        "ibm-granite/granite-4.0-h-small",
        "GraniteMoeHybridConfig",
        (4096, 768, 32, 8, 128),
        (100352, 131072),
        _KINDS,
        (32207337984, 0),
        {(3072, 4096): 40, (4096, 1536): 40, (16768, 4096): 36, (4096, 8192): 36, (4096, 4096): 8, (1024, 4096): 8}
        | {(1536, 4096): 2880, (4096, 768): 2880},
        **_GRANITE
        | {"convolution": (8448, 4), "recurrence": (128, 64, 128), "whole": 3682331136, "entries": _mamba(128, 72, 10, 1536)},
    ),
)
