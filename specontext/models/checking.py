"""Some tokens through a model that has just been loaded: does it compute here what it computes in the library?

They go through it twice, in the same two chunks at the far end of its context. First as the engine runs models: attention
here, no cache, positions given. Then as the library does: its masks, its own attention function, and a cache that says how
many tokens came before. Each layer must bring the same queries, keys and values both times, and attend to the same.

The second pass goes on with the attention outputs of the first, so all that both compute is computed from equal numbers in
products of equal shapes. What differs is then a difference of meaning (a mask, a window, a position that is taken from the
cache) and not of rounding, in any number format, with random weights and with experts, who are chosen alike.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from specontext.config_entries import WINDOWS
from specontext.errors import ModelError
from specontext.kernels.dense_attention import causal_attention, chunk_attention
from specontext.kernels.latents import Latents
from specontext.kernels.softmax import PLAIN, Softmax
from specontext.kernels.window_attention import window_attention
from specontext.layer_sizes import Window
from specontext.memory.states import mixers_of
from specontext.model_shape import ModelShape
from specontext.models.attention import NoStepError, attention_of, listening, running_of
from specontext.models.decoder import decoder_of
from specontext.models.mixer_check import MixersSeen
from specontext.models.mixers import RUNNING, MixerCall
from specontext.models.tolerance import differ, of_outputs, of_states

logger = logging.getLogger("specontext")
LIBRARY_NAME = "specontext_library"  # the library's own attention, seen while it runs
CHUNKS = (6, 3)
NEAR = 4  # tokens of all windows while a model is looked at: real ones leave nothing out of so few tokens


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of attention: q, k and v [T, heads, D] of the chunk's own tokens, and the output [T, Hq, D].

    Attributes:
        layer: in the decoder; of a layer without KV of its own the one whose KV it reads.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    windowed: bool


class _Witness:
    """Stands where a step stands: attends to what came before, and writes down what layers bring.

    Args:
        begin: position of the first token.

    Raises:
        ModelError: a shape that is not what the config promised.
    """

    def __init__(self, shape: ModelShape, begin: int) -> None:
        self.calls: list[_Call] = []
        self.mixers = MixersSeen()
        self.positions: Tensor | None = None
        windowed = [layer for layer, place in shape.places.items() if place.window is not None and not place.stored]
        self._full, self._windowed, self._begin = shape.full, windowed, begin
        self._queries, self._kv = shape.query_heads, (shape.kv_heads, shape.head_dim)
        self._windows_kv = shape.window_heads or self._kv
        self._stored: dict[int, Tensor] = {}  # of each layer [tokens, Hkv, 2, D]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> Tensor:
        return self._attend(self._full[layer], None, query, key, value, scale, softmax, stored)

    def attend_window(
        self,
        layer: int,
        window: Window,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> Tensor:
        return self._attend(self._windowed[layer], window, query, key, value, scale, softmax, stored)

    def attend_latents(
        self, layer: int, latents: Latents, query: Tensor, row: Tensor, scale: float, softmax: Softmax = PLAIN
    ) -> Tensor:
        output = latents.attention(
            query, lambda absorbed: self._attend(self._full[layer], None, absorbed, row, row, scale, softmax)
        )
        key, value = latents.made(row).unbind(2)
        value = value[..., : output.shape[-1]]
        self.calls[-1] = replace(self.calls[-1], query=query, key=key, value=value, output=output)  # what the library has of it
        return output

    def _attend(
        self,
        layer: int,
        window: Window | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax,
        written: bool = False,
    ) -> Tensor:
        brought = tuple((int(x.shape[1]), int(x.shape[2])) for x in (query, key, value))
        kv = self._kv if window is None else self._windows_kv
        for name, found, promised in zip(("queries", "keys", "values"), brought, ((self._queries, kv[1]), kv, kv), strict=True):
            if found != promised:
                has, says = (f"{heads} heads with {dim} dimensions" for heads, dim in (found, promised))
                raise ModelError(f"layer {layer} has {name} of {has}, the config says {says}")
        past, new = self._stored.get(layer), torch.stack((key, value), dim=2)
        if written:
            before = 0 if past is None else len(past) - len(key)
            if past is None or not torch.equal(past[before:], new):
                raise ModelError(f"a layer that should use the keys and values of layer {layer}, by its config, has others")
            past = past[:before] if before else None
        self._stored[layer] = stored = new if past is None else torch.cat((past, new))
        if window is not None:
            near = replace(window, size=min(window.size, NEAR))
            output = window_attention(query, stored[:, :, 0], stored[:, :, 1], scale, near, self._begin, softmax)
        elif past is None:
            output = causal_attention(query, key, value, scale, softmax)
        else:
            attention = chunk_attention(query, key, value, scale, softmax)
            attention.add(past)
            output = attention.result()
        self.calls.append(_Call(layer, query, key, value, output, window is not None))
        return output

    def mix(self, mixer: int, hidden: Tensor, call: MixerCall) -> Tensor:
        return self.mixers.see(mixer, hidden, call)


class _Comparison:
    """Listens to the library's attention and holds it against what a witness saw."""

    def __init__(self, calls: Sequence[_Call], mixers: MixersSeen, readers: Mapping[int, int]) -> None:
        self._calls, self._mixers, self._readers = iter(calls), mixers, readers

    def see(self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> Tensor:
        """What the layer shall go on with: the witness's output.

        Args:
            query, output: [T, Hq, D]; key and value of all tokens so far, [tokens, Hkv, D].

        Raises:
            ModelError: something differs.
        """
        ours = next(self._calls, None)
        if ours is None or ours.layer != self._readers.get(layer, layer):
            raise ModelError("its layers come to attention in another order when it has a cache")
        tokens = len(query)
        pairs = (
            ("queries", ours.query, query),
            ("keys", ours.key, key[-tokens:]),
            ("values", ours.value, value[-tokens:]),
        )
        for name, mine, theirs in pairs:
            if differ(mine, theirs, of_states(query)):
                raise ModelError(
                    f"layer {layer} makes other {name} here than in the library, for example because it takes positions from "
                    "the library's cache"
                )
        if differ(ours.output, output, of_outputs(query)):
            over = "its window" if ours.windowed else "the whole context"
            raise ModelError(
                f"the library's own attention of layer {layer} gives other results than causal softmax attention over {over}, "
                "for example because it has a mask, a window or a bias of its own"
            )
        return ours.output

    def mix(self, mixer: int, hidden: Tensor, call: MixerCall) -> Tensor:
        """See `MixersSeen.compare`."""
        return self._mixers.compare(mixer, hidden, call)

    def end(self) -> None:
        """Raises ModelError unless all that the witness saw was seen again."""
        if next(self._calls, None) is not None:
            raise ModelError("its layers come to attention in another order when it has a cache")


def library_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The attention that a module has in the library, shown to the running comparison; see `attention_forward` for shapes."""
    home = sys.modules[type(module).__module__]
    own = getattr(home, "eager_attention_forward", sdpa_attention_forward)
    output: Tensor = own(module, query, key, value, attention_mask, **options)[0]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    listener = getattr(module, RUNNING).listener
    mine = listener.see(module.layer_idx, q, k, v, output[0].view(q.shape[0], q.shape[1], -1))
    return mine[None], None


class _LaterLayer(DynamicLayer):
    """A layer of the library's cache in which some tokens are said to have come before those that it stores."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.before = before

    def get_seq_length(self, *_: Any) -> int:
        return self.before + (0 if self.keys is None or not self.keys.numel() else int(self.keys.shape[-2]))

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() - self.before + new, self.before


class _LaterHybrid(LinearAttentionAndFullAttentionLayer):
    """The same of a layer that has a state beside attention."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.before = before

    get_seq_length, get_mask_sizes = _LaterLayer.get_seq_length, _LaterLayer.get_mask_sizes


def _later_layer(layer: int, mixing: Collection[int], shape: ModelShape, before: int) -> Any:
    """A layer of the library's cache as the library's code expects it."""
    if layer in shape.inattentive:
        return LinearAttentionLayer()
    return _LaterHybrid(before) if layer in mixing else _LaterLayer(before)


@torch.inference_mode()
def check_attention(model: PreTrainedModel, shape: ModelShape) -> None:
    """Raises ModelError unless every layer comes to the engine's attention, once and in the shape of the config, and attends
    there as it does in the library."""
    name = type(model).__name__
    running_of(model).know(shape)
    AttentionInterface.register(LIBRARY_NAME, library_attention)
    AttentionMaskInterface.register(LIBRARY_NAME, eager_mask)
    try:
        _check(model, shape)
    except NoStepError as error:
        raise ModelError(f"{name} is not supported: its layers do not pass on what the engine gives them") from error
    except ModelError as error:
        raise ModelError(f"{name} is not supported: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except (TypeError, AttributeError, KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ModelError(f"{name} is not supported: it does not run as the engine runs models: {error}") from error


def _check(model: PreTrainedModel, shape: ModelShape) -> None:
    sizes = [size for size in CHUNKS if sum(CHUNKS) <= shape.max_position] or [1]
    begin = shape.max_position - sum(sizes)
    ids = (torch.arange(sum(sizes), device=model.device) * 7919 + 17) % shape.vocab_size
    positions = torch.arange(begin, shape.max_position, device=model.device)
    parts = list(zip(ids[None].split(sizes, dim=1), positions[None].split(sizes, dim=1), strict=True))
    witness, readers = _Witness(shape, begin), dict(shape.readers)
    last = torch.tensor([-1], device=model.device)  # not 1, for which the library leaves tokens out of its last layers
    with listening(model, witness):
        for tokens, places in parts:
            before, witness.positions = len(witness.calls), places[0]
            model(input_ids=tokens, position_ids=places, use_cache=False, logits_to_keep=last)
            layers = [call.layer for call in witness.calls[before:]]
            if layers != [readers.get(layer, layer) for layer in shape.attentive]:
                if not layers:
                    raise ModelError("its layers have attention of their own, which cannot be exchanged for the engine's")
                if len(set(layers)) < len(layers) and not readers:
                    raise ModelError("several of its layers share one attention, which does not say whose KV it brings")
                numbers = ", ".join(map(str, layers))
                raise ModelError(f"of its {shape.depth} layers these have ordinary attention: {numbers}")
    running_of(model).serial = witness.mixers.serial
    if witness.mixers.serial:
        logger.warning(
            "%s goes on with a state for one token at a time only: prompts longer than max_num_batched_tokens will be slow",
            type(model).__name__,
        )
    comparison = _Comparison(witness.calls, witness.mixers, readers)
    mixing = {int(mixer.layer_idx) for mixer in mixers_of(model)}  # type: ignore[arg-type]
    cache = Cache(layers=[_later_layer(layer, mixing, shape, begin) for layer in range(shape.depth)])
    with listening(model, comparison, expanded=True), attention_of(model, LIBRARY_NAME), _near_windows(model, shape):
        for tokens, places in parts:
            model(input_ids=tokens, position_ids=places, use_cache=True, logits_to_keep=last, **{cache_name(model): cache})
    comparison.end()


@contextmanager
def _near_windows(model: PreTrainedModel, shape: ModelShape) -> Iterator[None]:
    """Inside, the library makes masks for windows of few tokens, in the layers for which it makes any."""
    found = [(config, entry, getattr(config, entry, None)) for config in running_of(model).configs for entry in WINDOWS]
    sizes = {window.size for window in shape.windowed}
    before = [(config, entry, size) for config, entry, size in found if size in sizes]
    try:
        for config, entry, size in before:
            setattr(config, entry, min(size, NEAR))
        yield
    finally:
        for config, entry, size in before:
            setattr(config, entry, size)


def cache_name(model: PreTrainedModel) -> str:
    """The name that a cache has among the arguments of the model's forward."""
    return "cache" if "cache" in inspect.signature(decoder_of(model).forward).parameters else "past_key_values"
