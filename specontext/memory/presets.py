"""Shapes of public models by name: all that a plan needs, without a checkpoint and without a network."""

from __future__ import annotations

import difflib
from typing import Any

from specontext.layer_sizes import LatentSizes
from specontext.memory.latent_preset import Experts, LatentPreset
from specontext.memory.listed_presets import LISTED
from specontext.memory.preset import Preset


def _preset(
    name: str, source: str, family: str, sizes: tuple[int, int, int, int, int, int], *vocabulary_and_context: int, **others: Any
) -> Preset:
    """A preset; `sizes` are hidden and intermediate size, layers, query heads, KV heads and head dim."""
    vocab, context = vocabulary_and_context
    return Preset(name, source, family, *sizes, vocab, context, **({"tied": False} | others))


_LLAMA: dict[str, Any] = {"rope_theta": 500000.0, "rope_factor": 8.0}
_SMALL_LLAMA = _LLAMA | {"rope_factor": 32.0, "tied": True}
_QWEN: dict[str, Any] = {"rope_theta": 1e6}
_QWEN3 = _QWEN | {"yarn_position": 131072}
_TIED_QWEN = _QWEN | {"tied": True}
_8B, _70B = (4096, 14336, 32, 32, 8, 128), (8192, 28672, 80, 64, 8, 128)
_Q7B, _Q14B, _Q32B = (3584, 18944, 28, 28, 4, 128), (5120, 13824, 48, 40, 8, 128), (5120, 27648, 64, 40, 8, 128)
_GEMMA: dict[str, Any] = {"rope_theta": 1e6, "tied": True}
_LONG_GEMMA = _GEMMA | {"rope_factor": 8.0, "window": 1024}
_G4B, _G12B, _G27B = (2560, 10240, 34, 8, 4, 256), (3840, 15360, 48, 16, 8, 256), (5376, 21504, 62, 32, 16, 128)
_META, _R1 = "meta-llama/Llama-", "deepseek-ai/DeepSeek-R1-Distill-"

_ALL = (
    _preset("llama-3.1-8b", f"{_META}3.1-8B-Instruct", "llama", _8B, 128256, 131072, **_LLAMA),
    _preset("r1-distill-llama-8b", f"{_R1}Llama-8B", "llama", _8B, 128256, 131072, **_LLAMA),
    _preset("llama-3.2-1b", f"{_META}3.2-1B-Instruct", "llama", (2048, 8192, 16, 32, 8, 64), 128256, 131072, **_SMALL_LLAMA),
    _preset("llama-3.2-3b", f"{_META}3.2-3B-Instruct", "llama", (3072, 8192, 28, 24, 8, 128), 128256, 131072, **_SMALL_LLAMA),
    _preset("llama-3.1-70b", f"{_META}3.1-70B-Instruct", "llama", _70B, 128256, 131072, **_LLAMA),
    _preset("llama-3.3-70b", f"{_META}3.3-70B-Instruct", "llama", _70B, 128256, 131072, **_LLAMA),
    _preset("r1-distill-llama-70b", f"{_R1}Llama-70B", "llama", _70B, 128256, 131072, **_LLAMA),
    _preset("qwen3-0.6b", "Qwen/Qwen3-0.6B", "qwen3", (1024, 3072, 28, 16, 8, 128), 151936, 40960, **_TIED_QWEN),
    _preset("qwen3-1.7b", "Qwen/Qwen3-1.7B", "qwen3", (2048, 6144, 28, 16, 8, 128), 151936, 40960, **_TIED_QWEN),
    _preset("qwen3-4b", "Qwen/Qwen3-4B", "qwen3", (2560, 9728, 36, 32, 8, 128), 151936, 40960, **_QWEN3, tied=True),
    _preset("qwen3-8b", "Qwen/Qwen3-8B", "qwen3", (4096, 12288, 36, 32, 8, 128), 151936, 40960, **_QWEN3),
    _preset("qwen3-14b", "Qwen/Qwen3-14B", "qwen3", (5120, 17408, 40, 40, 8, 128), 151936, 40960, **_QWEN3),
    _preset("qwen3-32b", "Qwen/Qwen3-32B", "qwen3", (5120, 25600, 64, 64, 8, 128), 151936, 40960, **_QWEN3),
    _preset("gemma-3-270m", "google/gemma-3-270m-it", "gemma3", (640, 2048, 18, 4, 1, 256), 262144, 32768, **_GEMMA, window=512),
    _preset("gemma-3-1b", "google/gemma-3-1b-it", "gemma3", (1152, 6912, 26, 4, 1, 256), 262144, 32768, **_GEMMA, window=512),
    _preset("gemma-3-4b", "google/gemma-3-4b-it", "gemma3", _G4B, 262208, 131072, **_LONG_GEMMA),
    _preset("gemma-3-12b", "google/gemma-3-12b-it", "gemma3", _G12B, 262208, 131072, **_LONG_GEMMA),
    _preset("gemma-3-27b", "google/gemma-3-27b-it", "gemma3", _G27B, 262208, 131072, **_LONG_GEMMA),
    _preset("mistral-7b-v0.3", "mistralai/Mistral-7B-Instruct-v0.3", "mistral", _8B, 32768, 32768, rope_theta=1e6),
    _preset("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", "qwen2", (1536, 8960, 28, 12, 2, 128), 151936, 131072, **_TIED_QWEN),
    _preset("qwen2.5-7b", "Qwen/Qwen2.5-7B", "qwen2", _Q7B, 152064, 131072, **_QWEN),
    _preset("qwen2.5-14b", "Qwen/Qwen2.5-14B", "qwen2", _Q14B, 152064, 131072, **_QWEN),
    _preset("qwen2.5-32b", "Qwen/Qwen2.5-32B", "qwen2", _Q32B, 152064, 131072, **_QWEN),
    _preset("r1-distill-qwen-7b", f"{_R1}Qwen-7B", "qwen2", _Q7B, 152064, 131072, rope_theta=10000.0),
    _preset("r1-distill-qwen-14b", f"{_R1}Qwen-14B", "qwen2", _Q14B, 152064, 131072, **_QWEN),
    _preset("r1-distill-qwen-32b", f"{_R1}Qwen-32B", "qwen2", _Q32B, 152064, 131072, **_QWEN),
)
_YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
_YARN |= {"beta_fast": 32, "beta_slow": 1}


def _latent(
    name: str, source: str, family: str, sizes: tuple[int, int, int, int], *vocabulary_and_context: int, **others: Any
) -> LatentPreset:
    """A preset; `sizes` are hidden and intermediate size, layers and query heads."""
    vocab, context = vocabulary_and_context
    row = others["latent"].row
    plain: dict[str, Any] = {"tied": False, "rope_theta": 10000.0, "rope": {"rope_type": "default"}, "query_rank": 0}
    return LatentPreset(name, source, family, *sizes, 1, row, vocab, context, **(plain | others))


_128, _256 = (LatentSizes(512, 64, key=key, value=value) for key, value in ((192, 128), (256, 256)))
_V2: dict[str, Any] = {"latent": _128, "rope": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}
_V2["experts"] = Experts(64, chosen=6, shared=2, width=1408, dense_layers=1)
_V3: dict[str, Any] = {"latent": _128, "rope": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "query_rank": 1536}
_V3["experts"] = Experts(256, chosen=8, shared=1, width=2048, dense_layers=3, groups=8, chosen_groups=4)
_GLM: dict[str, Any] = {"latent": _256, "rope_theta": 1e6, "query_rank": 768}
_GLM["experts"] = Experts(64, chosen=4, shared=1, width=1536, dense_layers=1)
_DEEPSEEK = "deepseek-ai/DeepSeek-"
_LATENT = (
    _latent("deepseek-v2-lite", f"{_DEEPSEEK}V2-Lite-Chat", "deepseek_v2", (2048, 10944, 27, 16), 102400, 163840, **_V2),
    _latent("deepseek-v3", f"{_DEEPSEEK}V3", "deepseek_v3", (7168, 18432, 61, 128), 129280, 163840, **_V3),
    _latent("deepseek-r1", f"{_DEEPSEEK}R1", "deepseek_v3", (7168, 18432, 61, 128), 129280, 163840, **_V3),
    _latent("glm-4.7-flash", "zai-org/GLM-4.7-Flash", "glm4_moe_lite", (2048, 10240, 47, 20), 154880, 202752, **_GLM),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in (*_ALL, *_LATENT, *LISTED)}


def find_preset(name: str) -> Preset | None:
    """The preset of this name, in any case of letters."""
    return PRESETS.get(name.lower())


def did_you_mean(name: str) -> str:
    """`: did you mean A or B?` for presets that are spelled like a name or like the last part of a Hub id, else ''."""
    last = name.lower().rstrip("/").rsplit("/", 1)[-1]
    for ending in ("-instruct", "-chat", "-hf"):
        last = last.removesuffix(ending)
    close = difflib.get_close_matches(last, PRESETS, n=3, cutoff=0.6)
    return f": did you mean {' or '.join(close)}?" if close else ""
