"""The retrieval head as a press of NVIDIA's kvpress (https://github.com/NVIDIA/kvpress), for its pipeline and its evaluation.

A press is a context manager around a Hugging Face model: `with press(model): ...`. kvpress's own presses remove KV while the
context is read. This one removes nothing: for every token after the context it masks all KV but what the head chooses for that
token, `1 - compression_ratio` of what the cache holds. So it measures what choosing costs in accuracy, at equal numbers of
entries read; it saves neither memory nor time, which the engine does.

    python -m specontext.integrations.kvpress KVPRESS/evaluation --dataset ruler --data_dir 4096 --model Qwen/Qwen3-8B \\
        --press_name specontext --compression_ratio 0.75

is kvpress's own command with one press more, where KVPRESS is a checkout of its repository. kvpress asks for other versions of
transformers than this package; docs/evaluation.md says how both are installed, and which of its presses run beside this one.
"""

from __future__ import annotations

import argparse
import importlib
import math
import runpy
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from specontext.config import SpeContextConfig
from specontext.errors import ConfigError, SpeContextError
from specontext.kernels.retrieval_scores import paged_retrieval_scores
from specontext.kernels.top_k import choose
from specontext.model_shape import ModelShape
from specontext.models.decoder import decoder_layers, decoder_of
from specontext.models.features import FeatureTaps
from specontext.retrieval.catalog import find_head
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.selector import Budget, uniform_map

NAME = "specontext"  # of the press
MASKED = ("sdpa", "eager")  # attention of transformers that obeys a mask for each head


@dataclass
class SpeContextPress:
    """What a token reads of the cache is what the retrieval head chooses for it.

    It belongs to the cache that is filled inside of `with press(model)`: whatever the model reads from that cache later is
    masked, also after the block, since kvpress's pipeline leaves it before it asks its questions. Several tokens at once, such as
    a question, are computed one after another, because the head needs the features of the token before. Other caches are
    read whole, and the next `with press(model)` takes the press off the last one.

    Attributes:
        compression_ratio: share of the cache that a token does not read, 0 to 1; sinks and recent tokens count as read.
        retrieval_head: 'auto', a head's or draft's directory, or a Hub id.
        budget: entries that a token reads, instead of the share.
        max_tokens: longest context, which fixes the head's extension by YaRN; None is the model's own.
    """

    compression_ratio: float = 0.5
    retrieval_head: str = "auto"
    budget: int | None = None
    sink: int = SpeContextConfig.sink
    recent: int = SpeContextConfig.recent
    max_tokens: int | None = None
    _reading: _Reading | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.budget is not None:
            SpeContextConfig(budget=self.budget, sink=self.sink, recent=self.recent)

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        """Watch what is read into a new cache, and mask what is read from it afterwards.

        Raises:
            ConfigError: a ratio beyond 0 to 1, or attention that takes no mask.
            HeadError: there is no head for the model.
        """
        if not 0 <= self.compression_ratio < 1:
            raise ConfigError(f"compression_ratio must be at least 0 and below 1, got {self.compression_ratio}")
        used = model.config._attn_implementation
        if used not in MASKED:
            raise ConfigError(
                f"the press masks attention, which '{used}' does not do: load the model with attn_implementation='sdpa'"
            )
        self.remove()
        self._reading = _Reading(self, model, self._head(model))
        yield

    def remove(self) -> None:
        """Take the press off the model."""
        if self._reading is not None:
            self._reading.remove()
        self._reading = None

    def _head(self, model: PreTrainedModel) -> RetrievalHead:
        name, shape = str(model.name_or_path), ModelShape.from_config(model.config)
        folder = Path(name) if Path(name).is_dir() else None
        head = find_head(self.retrieval_head, model_name=name, model_path=folder, target=shape)
        head.set_rope(yarn_factor=head.config.yarn_factor(self.max_tokens or shape.max_position))
        return head.to(device=model.device, dtype=model.dtype).requires_grad_(False)

    def _budget(self, length: int) -> Budget:
        """What a token reads that has `length` tokens in context, itself among them."""
        asked = self.budget if self.budget is not None else math.ceil((1 - self.compression_ratio) * length)
        total = min(length, max(asked, self.sink + self.recent + 1))
        return Budget(total, self.sink, self.recent)


class _Reading:
    """One cache being filled and read through the hooks of a model.

    Attributes:
        keys: [S, key heads, D] of the head, one for each token of the cache.
        fused: what the head has fused of the last token of each forward pass, [1, H], by the number of tokens in the cache after
            it: kvpress cuts answers off the cache again, and then an earlier one is the last.
    """

    def __init__(self, press: SpeContextPress, model: PreTrainedModel, head: RetrievalHead) -> None:
        self.press, self.model, self.head = press, model, head
        self.shape = ModelShape.from_config(model.config)
        c = head.config
        own = torch.tensor(c.head_map) if c.head_map is not None else uniform_map(self.shape, c.kv_heads)
        self.head_map = own.to(model.device)  # [L, Hkv], of the layers that attend to the whole context
        self.cache: weakref.ref[Cache] | None = None
        self.keys = torch.empty((0, c.key_count, c.head_dim), device=model.device, dtype=model.dtype)
        self.fused: dict[int, Tensor] = {}
        self.ids: Tensor | None = None  # [T] of the forward pass that runs
        self.masks: Tensor | None = None  # [G, S], what each group's heads do not read
        self.taps = FeatureTaps(model, c.feature_layers) if c.variant == "features" else None
        decoder = decoder_of(model)
        self.handles = [
            model.register_forward_pre_hook(self._one_by_one, with_kwargs=True),
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True),
        ]
        # Layers with a window keep the mask that the model gives them: the engine reads their whole window, too.
        layers = list(decoder_layers(model))
        for number, place in self.shape.places.items():
            if place.window is None:
                self.handles.append(layers[number].register_forward_pre_hook(self._masking(place.layer), with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        if self.taps is not None:
            self.taps.remove()

    def _ours(self, kwargs: dict[str, Any]) -> Cache | None:
        """The cache of a call, where it is the one of this reading; an empty one becomes it, as long as there is none."""
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        if cache is None:
            return None
        if self.cache is None and not cache.get_seq_length():
            self.cache = weakref.ref(cache)
        return cache if self.cache is not None and self.cache() is cache else None

    def _one_by_one(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Of several tokens after the context compute all but the last, and go on with that one."""
        cache, ids = self._ours(kwargs), args[0] if args else kwargs.get("input_ids")
        if cache is None or ids is None or not cache.get_seq_length() or ids.shape[1] == 1:
            return None
        places = kwargs.get("position_ids")
        for number in range(ids.shape[1]):
            part = slice(number, number + 1)
            mine = kwargs | {"input_ids": ids[:, part]} | ({} if places is None else {"position_ids": places[:, part]})
            if number < ids.shape[1] - 1:
                model(**mine)
        return (), mine

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache, ids = self._ours(kwargs), args[0] if args else kwargs.get("input_ids")
        self.ids = self.masks = None
        if cache is None:
            return
        if ids is None or ids.shape[0] != 1:
            raise SpeContextError("the press reads one sequence of token ids at a time: give input_ids [1, T]")
        known = cache.get_seq_length()
        self.ids = ids[0]
        self.keys = self.keys[:known]
        self.fused = {length: last for length, last in self.fused.items() if length <= known}
        if known and len(self.ids) > 1:
            raise SpeContextError("tokens after the context go through the whole model, not through its decoder alone")
        if known:
            self.masks = self._choose(known)

    def _choose(self, known: int) -> Tensor | None:
        """What each group does not read at position `known`, bool [G, known + 1]; None where everything is read."""
        assert self.ids is not None
        place = torch.full((1,), known, device=self.ids.device)
        queries = self.head.queries(self._embedded(self.ids), self._before_token(known), place)
        budget = self.press._budget(known + 1)
        if budget.total > known:
            return None
        lengths = torch.tensor([known + 1], device=self.keys.device)
        ends, groups = budget.candidates_end(lengths), self.head.config.kv_heads
        tokens = torch.arange(len(self.keys), device=self.keys.device)  # each a page of its own
        scores = paged_retrieval_scores(queries, self.keys[:, None], tokens[None], budget.sink, ends, len(tokens), groups)
        tokens = budget.compose(choose(scores, "head", budget.scored), lengths).tokens[0]  # [G, B]
        hidden = torch.ones((len(tokens), known + 2), dtype=torch.bool, device=tokens.device)
        return hidden.scatter_(1, torch.where(tokens < 0, known + 1, tokens), False)[:, :-1]

    def _embedded(self, ids: Tensor) -> Tensor:
        return self.head.embedded(ids, self.model.get_input_embeddings()).to(self.keys.dtype)

    def _before_token(self, known: int) -> Tensor | None:
        """What was fused of the last of `known` tokens, [1, H]; zeros where there is none."""
        if self.taps is None:
            return None
        if not known:
            return self.keys.new_zeros((1, self.head.config.hidden_size))
        if known not in self.fused:
            raise SpeContextError(f"the cache was cut to {known} tokens, where no forward pass had ended: fill a new one")
        return self.fused[known]

    def _after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        taken = None if self.taps is None else self.taps.take()[0]  # [T, F * H]
        if self.ids is None:
            return
        known, own, before = len(self.keys), None, None
        if taken is not None:
            own, last = self.head.fuse(taken.to(self.keys.dtype)), self._before_token(known)
            assert last is not None
            before = torch.cat((last, own[:-1]))
        positions = torch.arange(known, known + len(self.ids), device=self.ids.device)
        self.keys = torch.cat((self.keys, self.head.keys(self._embedded(self.ids), own, before, positions)))
        if own is not None:
            self.fused[len(self.keys)] = own[-1:]

    def _masking(self, place: int) -> Any:
        """The hook of a layer by its place among those that attend to the whole context."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            if self.masks is None:
                return None
            ratio = self.shape.query_heads // self.shape.kv_heads
            hidden = self.masks[self.head_map[place]].repeat_interleave(ratio, 0)  # [Hq, S]
            mask = torch.zeros(hidden.shape, dtype=self.model.dtype, device=hidden.device)
            mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)
            return args, kwargs | {"attention_mask": mask[None, :, None]}

        return hook


def main(arguments: list[str] | None = None) -> int:
    """kvpress's evaluation with the press `specontext`; returns the exit status."""
    said = "kvpress's evaluation with the press 'specontext'; all other options are its own"
    parser = argparse.ArgumentParser("specontext.integrations.kvpress", description=said)
    parser.add_argument("evaluation", type=Path, help="the directory 'evaluation' of a checkout of kvpress")
    parser.add_argument("--retrieval-head", default="auto", help="a head or draft, directory or Hub id; auto: the model's own")
    asked, others = parser.parse_known_args(arguments)
    folder: Path = asked.evaluation.resolve()
    if not (folder / "evaluate_registry.py").is_file():
        print(f"error: {asked.evaluation} is not the directory 'evaluation' of a checkout of kvpress", file=sys.stderr)
        return 2
    sys.path.insert(0, str(folder))
    try:
        press = SpeContextPress(retrieval_head=asked.retrieval_head)
        importlib.import_module("evaluate_registry").PRESS_REGISTRY[NAME] = press
        sys.argv = [str(folder / "evaluate.py"), *others]
        runpy.run_path(sys.argv[0], run_name="__main__")
    except (ImportError, SpeContextError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
