"""A model as KV storage, planner and selectors see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from specontext.config_entries import heads_of, inattentive_layers, latent_sizes, longest_context, readers_of, windows_of
from specontext.errors import ConfigError
from specontext.layer_sizes import NOBODY_S_NUMBERS, SCALE_BYTES, LatentSizes, Place, StateTensor, Window

if TYPE_CHECKING:  # torch takes seconds to import, and only annotations here need it
    import torch
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ModelShape:
    """What KV storage, planner and selectors must know of a model.

    Layers are those that attend to the whole context, numbered among themselves: their KV grows, is selected from, and moves.
    Layers with a window keep the tokens of their window, and those without attention a state of fixed size; both take no part in
    any of that. Nor do layers that keep no KV of their own and read that of an earlier one. Where all layers with attention
    have a window, a layer is counted that nobody attends to, with rows of a few bytes: its pages are what an engine knows a
    context's length by.

    Attributes:
        dtype: number format of weights, and of KV unless `kv_dtype` names another.
        max_position: longest context that is served, in tokens: what the checkpoint was made for, as far as attention here
            computes it.
        limited_by: the entry of the config that keeps `max_position` below what the checkpoint was made for, in words; '' for
            none.
        longer: the longest context that may be asked for, where it is more than `max_position`: RoPE has other angles then, for
            contexts of all lengths. 0 where it is not.
        windows: of every layer of the decoder that keeps KV its window, None for one that attends to the whole context; empty
            where none has a window.
        window_heads: KV heads of the layers with a window, and the width of all heads there; None where they are as elsewhere.
        kv_dtype: of the codes of KV in 8 bits, each key and value with a scale; None for numbers of `dtype`.
        inattentive: numbers in the decoder of the layers that have no attention, ascending.
        readers: layers that keep no KV of their own, and the earlier one whose KV each reads: their numbers in the decoder.
        states: what layers keep of each request in a fixed size, once that has been measured (`memory.states`).
        host_kv_dtype: the same of the host's rows, where they alone are in 8 bits; None for rows like those of the device.
        latent: where what is stored are latents. Attention is then to one KV head, a row of which is both key and value, and D
            the numbers of a row. None for keys and values.
    """

    layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    dtype: torch.dtype
    limited_by: str = ""
    windows: tuple[Window | None, ...] = ()
    window_heads: tuple[int, int] | None = None
    longer: int = 0
    kv_dtype: torch.dtype | None = None
    inattentive: tuple[int, ...] = ()
    readers: tuple[tuple[int, int], ...] = ()
    states: tuple[StateTensor, ...] = ()
    host_kv_dtype: torch.dtype | None = None
    latent: LatentSizes | None = None

    @classmethod
    def from_config(cls, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> ModelShape:
        """The shape of a decoder, from its config alone.

        Args:
            dtype: by default the config's own, float32 where it names none.

        Raises:
            AttributeError: an entry that is missing, or heads that differ from layer to layer.
        """
        max_position, limited_by, longer = longest_context(config)
        windows, inattentive = windows_of(config, max(max_position, longer)), inattentive_layers(config)
        readers = readers_of(config)
        without = {*inattentive, *dict(readers)}
        owners = [layer for layer in range(config.num_hidden_layers) if layer not in without]
        latent = latent_sizes(config)
        if dtype is None:
            import torch

            dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        near = [layer for layer, window in zip(owners, windows, strict=False) if window is not None]
        kv_heads, head_dim = heads = heads_of(config, [layer for layer in owners if layer not in near] or near)
        near_heads = heads_of(config, near) if near else heads
        return cls(
            layers=max(1, windows.count(None)) if windows else len(owners),
            hidden_size=config.hidden_size,
            query_heads=config.num_attention_heads,
            kv_heads=1 if latent else kv_heads,
            head_dim=latent.row if latent else head_dim,
            vocab_size=config.vocab_size,
            max_position=max_position,
            dtype=dtype,
            limited_by=limited_by,
            windows=windows,
            window_heads=near_heads if near_heads != heads else None,
            longer=longer,
            inattentive=inattentive,
            readers=readers,
            latent=latent,
        )

    def check_kv_format(self, setting: str) -> None:
        """Raises ConfigError, which names a setting and its value, where rows of these heads cannot be codes with scales."""
        if self.latent is not None and self.head_dim % 4:
            raise ConfigError(f"{setting} needs latents of a multiple of 4 numbers, not of {self.head_dim}: set it to auto")
        if self.head_dim % 2:
            raise ConfigError(f"{setting} needs heads of an even width, not of {self.head_dim}: set it to auto")

    @property
    def only_windows(self) -> bool:
        """Whether all layers have a window, so that nothing grows with a context and there is nothing to select from."""
        return bool(self.windows) and None not in self.windows

    @property
    def reach(self) -> int:
        """The longest context that may be asked for, in tokens."""
        return max(self.max_position, self.longer)

    @property
    def depth(self) -> int:
        """Layers of the decoder, whatever they attend to."""
        return (len(self.windows) or self.layers) + len(self.inattentive) + len(self.readers)

    @property
    def attentive(self) -> tuple[int, ...]:
        """Numbers in the decoder of the layers that have attention."""
        return tuple(layer for layer in range(self.depth) if layer not in self.inattentive)

    @property
    def state_bytes(self) -> int:
        """Bytes of a request's states, in all layers that keep one."""
        return sum(state.num_bytes for state in self.states)

    @property
    def windowed(self) -> tuple[Window, ...]:
        """The windows of the layers that have one."""
        return tuple(window for window in self.windows if window is not None)

    @cached_property
    def places(self) -> Mapping[int, Place]:
        """Of the layers with attention, by their numbers in the decoder, where they find their KV."""
        readers, windows = dict(self.readers), iter(self.windows or (None,) * self.layers)
        found: dict[int, Place] = {}
        counts = {False: 0, True: 0}
        for layer in self.attentive:
            if layer in readers:
                found[layer] = found[readers[layer]]._replace(stored=True)
                continue
            window = next(windows)
            found[layer] = Place(counts[window is not None], window)
            counts[window is not None] += 1
        return found

    @property
    def full(self) -> tuple[int, ...]:
        """Numbers in the decoder of the layers whose KV grows."""
        return tuple(layer for layer, place in self.places.items() if place.window is None and not place.stored)

    @cached_property
    def read_order(self) -> tuple[int, ...]:
        """Layers whose KV grows, in the order in which a step reads them: some more than once."""
        return tuple(place.layer for place in self.places.values() if place.window is None)

    @property
    def window_read_order(self) -> tuple[int, ...]:
        """The same of layers with a window."""
        return tuple(place.layer for place in self.places.values() if place.window is not None)

    @property
    def reads(self) -> int:
        """How often a step reads the KV of a layer that grows."""
        return len(self.read_order) or self.layers

    @property
    def windows_read(self) -> tuple[Window, ...]:
        """The windows that a step reads, those of layers without KV of their own among them."""
        return tuple(place.window for place in self.places.values() if place.window is not None)

    def near_bytes(self, length: int) -> int:
        """Bytes that a decode step of a request of this length moves beside KV that grows: it reads windows, and reads and writes
        states."""
        entries = sum(min(window.size, length) for window in self.windows_read)
        return entries * self.window_token_bytes + 2 * self.state_bytes

    @property
    def longest(self) -> str:
        """`max_position` in words, with what limits it."""
        asked = f"{self.longer} where max_model_len asks for them" if self.longer else ""
        why = ", ".join(filter(None, (self.limited_by, asked)))
        return f"{self.max_position} tokens" + (f" ({why})" if why else "")

    @property
    def row_numbers(self) -> int:
        """Numbers of K and V of one token of one KV head of one layer: of a latent, which is both, they count once."""
        return self.part_numbers if self.latent is not None else 2 * self.part_numbers

    @property
    def part_numbers(self) -> int:
        """Numbers of a key, a value or a latent in pages."""
        return NOBODY_S_NUMBERS if self.only_windows else self.head_dim

    @property
    def row_bytes(self) -> int:
        """Bytes of K and V of one token of one KV head of one layer, with their scales."""
        if self.kv_dtype is not None:
            parts = 1 if self.latent is not None else 2
            return parts * self.part_numbers * self.kv_dtype.itemsize + 2 * SCALE_BYTES
        return self.row_numbers * self.dtype.itemsize

    @property
    def key_dim(self) -> int:
        """Numbers of a head's key as the model makes it: D but for latents."""
        return self.latent.key if self.latent is not None else self.head_dim

    @property
    def made_dim(self) -> int:
        """Numbers of a head's key and value on average, as the model makes them: D but for latents."""
        return (self.latent.key + self.latent.value) // 2 if self.latent is not None else self.head_dim

    @property
    def on_host(self) -> ModelShape:
        """The same with the rows that the host has."""
        return self if self.host_kv_dtype is None else replace(self, kv_dtype=self.host_kv_dtype, host_kv_dtype=None)

    @property
    def window_token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer with a window, whose KV is never in 8 bits."""
        kv_heads, head_dim = self.window_heads or (self.kv_heads, self.head_dim)
        return 2 * kv_heads * head_dim * self.dtype.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token, all layers and KV heads; 0 where all layers have a window."""
        return 0 if self.only_windows else self.layers * self.kv_heads * self.row_bytes
