"""Shapes of public models by name: all that a plan needs, without a checkpoint and without a network."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specontext.core import ModelShape, Window
from specontext.memory.facts import HeadFacts, ModelFacts, eagle3_head

if TYPE_CHECKING:  # takes seconds to import, and only annotations here need them
    import torch
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class NumberFormat:
    """What a plan must know of a number format, where PyTorch, which takes seconds to import, is needed for nothing else.

    Attributes:
        itemsize: bytes of a number.
    """

    name: str
    itemsize: int

    def __str__(self) -> str:
        return f"torch.{self.name}"  # as PyTorch writes its own


KV_FORMATS = {name: NumberFormat(name, 1) for name in ("fp8", "int8")}  # of codes
NUMBER_FORMATS = {name: NumberFormat(name, size) for name, size in (("float32", 4), ("bfloat16", 2), ("float16", 2))}


@dataclass(frozen=True)
class Preset:
    """A decoder of the Llama family as its public config has it, in bfloat16.

    Attributes:
        source: the checkpoint on the Hub that has this config.
        family: `llama`, `mistral`, `qwen2` (biases on q, k and v), `qwen3` (norms of each head's queries and keys) or `gemma3`
            (these, four norms a layer, and windows).
        tied: whether embedding and output share one table.
        rope_factor: Llama 3's extension from 8,192 positions, None for plain RoPE; of Gemma 3 the factor of its layers without a
            window.
        window: tokens that a layer attends to, all layers but every sixth one; 0 where there are no windows.
        yarn_position: the longest context that its makers give it with YaRN, by an entry in its config that is not there at
            first; None for none.
    """

    name: str
    source: str
    family: str
    hidden_size: int
    intermediate_size: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    tied: bool
    rope_theta: float
    rope_factor: float | None = None
    window: int = 0
    yarn_position: int | None = None

    @property
    def windows(self) -> tuple[Window | None, ...]:
        """See `ModelShape`."""
        near = Window(self.window)
        return tuple(near if (layer + 1) % FULL_EVERY else None for layer in range(self.layers)) if self.window else ()

    @property
    def full_layers(self) -> int:
        """Layers that attend to the whole context."""
        return self.windows.count(None) if self.window else self.layers

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Outputs and inputs of the linear layers of a decoder layer."""
        width, heads, groups = self.hidden_size, self.query_heads * self.head_dim, self.kv_heads * self.head_dim
        wide = self.intermediate_size
        return ((heads, width), (groups, width), (groups, width), (width, heads), (wide, width), (wide, width), (width, wide))

    @property
    def parameters(self) -> int:
        """Number of parameters, a shared table counted once."""
        width, dim = self.hidden_size, self.head_dim
        heads, groups = self.query_heads * dim, self.kv_heads * dim
        layer = sum(n * k for n, k in self.matrices) + 2 * width
        if self.family == "qwen2":
            layer += heads + 2 * groups
        if self.family in ("qwen3", "gemma3"):
            layer += 2 * dim
        if self.family == "gemma3":
            layer += 2 * width
        return self.vocab_size * width * (1 if self.tied else 2) + self.layers * layer + width

    def needs_yarn(self, length: int | None) -> bool:
        """Whether a context of this length needs an entry for YaRN in the config, and its makers allow one."""
        return length is not None and self.max_position < length <= (self.yarn_position or 0)

    def shape(self, dtype: torch.dtype | NumberFormat | None = None) -> ModelShape:
        """The shape; None is PyTorch's bfloat16, which has to be imported."""
        if dtype is None:
            import torch

            dtype = torch.bfloat16
        return ModelShape(
            layers=self.full_layers,
            hidden_size=self.hidden_size,
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_position=self.max_position,
            dtype=dtype,  # type: ignore[arg-type]  # a plan asks for its size only
            windows=self.windows,
        )

    def facts(self, dtype: torch.dtype | NumberFormat | None = None, head: HeadFacts | None = None) -> ModelFacts:
        """What a plan needs; with the head of an EAGLE-3 draft where none is given."""
        shape = self.shape(dtype)
        lookup = 0 if self.tied else self.vocab_size * self.hidden_size
        return ModelFacts(self.name, shape, self.parameters, lookup, self.intermediate_size, head or eagle3_head(shape))

    def config(self, **changes: Any) -> PreTrainedConfig:
        """A Hugging Face config of this shape, to make a model of random weights, for example; `changes` are its entries."""
        from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

        kinds: dict[str, type] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
        kinds["gemma3"] = Gemma3TextConfig
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.family == "gemma3":
            far = {"rope_type": "linear", "factor": self.rope_factor} if self.rope_factor else {}
            near = {"rope_type": "default", "rope_theta": 10000.0}
            rope = {"full_attention": rope | far, "sliding_attention": near}
        elif self.rope_factor is not None:
            rope |= {"rope_type": "llama3", "factor": self.rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            rope["original_max_position_embeddings"] = 8192
        values: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": 1e-5 if self.family in ("llama", "mistral") else 1e-6,
            "rope_parameters": rope,
            "dtype": "bfloat16",
        }
        if self.family == "mistral":
            values["sliding_window"] = None
        if self.window:
            values |= {"sliding_window": self.window, "query_pre_attn_scalar": self.head_dim}
            values["layer_types"] = ["sliding_attention" if window else "full_attention" for window in self.windows]
        config: PreTrainedConfig = kinds[self.family](**(values | changes))
        return config


FULL_EVERY = 6  # layers of Gemma 3


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
PRESETS = {preset.name: preset for preset in _ALL}


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
