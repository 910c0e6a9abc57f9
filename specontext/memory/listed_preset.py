"""Presets of models whose layers differ in kind: what follows from their configs is written down, and tests count it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from specontext.layer_sizes import StateTensor, Window
from specontext.memory.facts import HeadFacts, ModelFacts
from specontext.memory.preset import NUMBER_FORMATS, NumberFormat, Preset
from specontext.model_shape import ModelShape

if TYPE_CHECKING:  # takes seconds to import, and only annotations here need them
    import torch
    from transformers import PreTrainedConfig

# Letters of the kinds of layers, and what configs call them.
FULL, NEAR, STATE = "fws"
NAMES = {FULL: "full_attention", NEAR: "sliding_attention", STATE: "linear_attention"}


@dataclass(frozen=True, kw_only=True)
class ListedPreset(Preset):
    """A decoder with windows, states or shared KV. `family` is the class of its config; `kv_heads` and `head_dim` are those of
    the layers that attend to the whole context.

    Attributes:
        kinds: a letter for each layer.
        counted: its parameters, a shared table counted once.
        lookup: those of them in tables of which a step reads rows alone.
        matrices: how many linear layers of the decoder's layers, and experts in each of their tables, have these outputs and
            inputs.
        readers: how many of the last layers read the KV of the last one of their kind before them.
        window_heads: see `ModelShape`.
        convolution, recurrence: shapes of what a layer with a state keeps, in the model's number format and in float32.
        whole: parameters of `whole_modules`.
        entries: of its config, beside those of all models.
    """

    kinds: str
    counted: int
    lookup: int
    matrices: Mapping[tuple[int, int], int]
    readers: int = 0
    window_heads: tuple[int, int] | None = None
    convolution: tuple[int, ...] = ()
    recurrence: tuple[int, ...] = ()
    whole: int = 0
    entries: Mapping[str, Any] = field(default_factory=dict)

    @property
    def _owners(self) -> str:
        return self.kinds[: len(self.kinds) - self.readers]

    @property
    def windows(self) -> tuple[Window | None, ...]:
        """See `ModelShape`."""
        near = Window(self.window)
        return tuple(near if kind == NEAR else None for kind in self._owners if kind != STATE) if self.window else ()

    @property
    def full_layers(self) -> int:
        """See `Preset.full_layers`."""
        return self._owners.count(FULL)

    @property
    def parameters(self) -> int:
        """See `Preset.parameters`."""
        return self.counted

    @property
    def linear_layers(self) -> tuple[tuple[int, int], ...]:
        """See `Preset.linear_layers`."""
        return tuple(shape for shape, count in self.matrices.items() for _ in range(count))

    def shape(self, dtype: torch.dtype | NumberFormat | None = None) -> ModelShape:
        """See `Preset.shape`."""
        plain = super().shape(dtype)
        wide: Any = NUMBER_FORMATS["float32"]
        if not isinstance(plain.dtype, NumberFormat):
            import torch

            wide = torch.float32
        kept = ((False, self.convolution, plain.dtype), (True, self.recurrence, wide))
        states = tuple(
            StateTensor(mixer, recurrent, 0, size, numbers)
            for mixer in range(self.kinds.count(STATE))
            for recurrent, size, numbers in kept
        )
        return replace(
            plain,
            window_heads=self.window_heads,
            inattentive=tuple(layer for layer, kind in enumerate(self.kinds) if kind == STATE),
            readers=tuple((layer, self._owners.rindex(self.kinds[layer])) for layer in range(len(self._owners), self.layers)),
            states=states,
        )

    def facts(self, dtype: torch.dtype | NumberFormat | None = None, head: HeadFacts | None = None) -> ModelFacts:
        """See `Preset.facts`."""
        return replace(super().facts(dtype, head), lookup_parameters=self.lookup, whole_parameters=self.whole)

    def config(self, **changes: Any) -> PreTrainedConfig:
        """See `Preset.config`."""
        import transformers

        values = self.size_entries
        if self.window:
            values["sliding_window"] = self.window
        values["layer_types"] = [NAMES[kind] for kind in self.kinds]
        values |= dict(self.entries) | changes
        config: PreTrainedConfig = getattr(transformers, self.family)(**values)
        return config
