"""What a preset says of a public model, and what follows from it: parameters, shape, a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specontext.layer_sizes import Window
from specontext.memory.facts import HeadFacts, ModelFacts, eagle3_head
from specontext.model_shape import ModelShape

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


FULL_EVERY = 6  # layers of Gemma 3


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

    def matrices_of(self, layer: int) -> tuple[tuple[int, int], ...]:
        """Outputs and inputs of the linear layers of a decoder layer, and of its experts' matrices, that can be quantised."""
        width, heads, groups = self.hidden_size, self.query_heads * self.head_dim, self.kv_heads * self.head_dim
        wide = self.intermediate_size
        return ((heads, width), (groups, width), (groups, width), (width, heads), (wide, width), (wide, width), (width, wide))

    @property
    def linear_layers(self) -> tuple[tuple[int, int], ...]:
        """The same of all layers."""
        return tuple(shape for layer in range(self.layers) for shape in self.matrices_of(layer))

    @property
    def parameters(self) -> int:
        """Number of parameters, a shared table counted once."""
        width, dim = self.hidden_size, self.head_dim
        heads, groups = self.query_heads * dim, self.kv_heads * dim
        layer = sum(n * k for n, k in self.matrices_of(0)) + 2 * width
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
        head = head or eagle3_head(shape)
        return ModelFacts(self.name, shape, self.parameters, lookup, self.intermediate_size, head, tied=self.tied)

    @property
    def size_entries(self) -> dict[str, Any]:
        """Entries of a config that all families call alike."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position,
            "tie_word_embeddings": self.tied,
            "dtype": "bfloat16",
        }

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
        values = self.size_entries | {"rope_parameters": rope}
        values["rms_norm_eps"] = 1e-5 if self.family in ("llama", "mistral") else 1e-6
        if self.family == "mistral":
            values["sliding_window"] = None
        if self.window:
            values |= {"sliding_window": self.window, "query_pre_attn_scalar": self.head_dim}
            values["layer_types"] = ["sliding_attention" if window else "full_attention" for window in self.windows]
        config: PreTrainedConfig = kinds[self.family](**(values | changes))
        return config
