"""What Hugging Face's generate() holds instead of a cache while an engine computes its tokens: the rows of one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from specontext.engine.generation import Generation
from specontext.engine.led import LedEngine
from specontext.engine.output_statistics import OutputStatistics
from specontext.errors import RequestError

INSTEAD = "greedy search and sampling, one token at a time"
# Arguments of a forward pass that say nothing which the engine does not do in any case.
# generate() hands its tokenizers, which find stop strings, to every forward pass.
WITHOUT_EFFECT = ("use_cache", "return_dict", "cache_position", "tokenizer", "assistant_tokenizer")


class EngineCache(Cache):
    """The rows of one call of generate(): their KV is the engine's, and they advance one token at a time.

    Args:
        longest: tokens that a row has at most, padding included.
        end_token_ids: a row that has been given one of them is computed no further; generate() fills it up with padding.

    Attributes:
        statistics: of each row, once they have ended.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, engine: LedEngine, longest: int, end_token_ids: frozenset[int]) -> None:
        super().__init__(layers=[])
        self.engine, self.longest, self.end_token_ids = engine, longest, end_token_ids
        self.closed = False
        self.statistics: list[OutputStatistics | None] = []
        self._rows: list[Generation] = []
        self._open: list[bool] = []  # of each row, whether it is still computed
        self._length = 0

    def advance(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Logits of the next tokens, [N, V]; zeros for rows that have ended.

        Args:
            input_ids: int64 [N, S], the prompts, padded on the left; later the tokens that were chosen, [N, 1].
            attention_mask, position_ids: of the prompts [N, S].

        Raises:
            RequestError: anything else, a prompt that does not fit, or rows that have ended.
            SpeContextError: what went wrong in a step.
        """
        if self.closed:
            raise RequestError("this cache went with its call of generate(): call generate() again, with the whole text")
        if not self._rows:
            prompts = prompts_of(input_ids, attention_mask, position_ids)
            self._rows = self.engine.lead(prompts, self.longest - input_ids.shape[1])
            self._open = [True] * len(self._rows)
            self._length = input_ids.shape[1]
        else:
            if tuple(input_ids.shape) != (len(self._rows), 1):
                raise RequestError(f"tokens of shape {list(input_ids.shape)} do not go on with {len(self._rows)} rows: {INSTEAD}")
            self._tell(input_ids[:, 0].tolist())
            self._length += 1
        going = [row for row, still in zip(self._rows, self._open, strict=True) if still]
        if not going:
            raise RequestError("all rows have ended with an end token, and are computed no further")
        logits = iter(self.engine.next_logits(going))
        return _as_batch([next(logits) if still else None for still in self._open])

    def _tell(self, tokens: Sequence[int]) -> None:
        for number, (row, token) in enumerate(zip(self._rows, tokens, strict=True)):
            if self._open[number] and token in self.end_token_ids:
                self._open[number] = False
                self.engine.end(row)  # its memory goes to those that go on
            elif self._open[number]:
                self.engine.tell(row, token)

    def close(self) -> None:
        """End what still runs, and free it."""
        if not self.closed:
            self.closed = True
            self.statistics = [self.engine.end(row) for row in self._rows]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Tokens of each row that were given so far, padding included: generate() leaves these out of what it gives next."""
        return self._length

    @property
    def is_linear(self) -> list[bool]:
        return [False]

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RequestError(f"KV that an engine keeps cannot be copied, cut or exchanged by generate(): what works is {INSTEAD}")

    update = reorder_cache = crop = reset = _refuse
    batch_repeat_interleave = batch_select_indices = activate_past_recording = get_mask_sizes = _refuse
    __deepcopy__ = __reduce__ = _refuse


def prompts_of(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> list[list[int]]:
    """The tokens of each row of a batch [N, S] that is padded on the left.

    Raises:
        RequestError: padding anywhere else, or positions that are not counted from each row's first token.
    """
    if input_ids.dim() != 2 or not input_ids.numel():
        raise RequestError(f"the input_ids have shape {list(input_ids.shape)}: give one or more tokens for each row")
    ids: list[list[int]] = input_ids.tolist()
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        shapes = f"{list(attention_mask.shape)} for tokens of shape {list(input_ids.shape)}"
        raise RequestError(f"the attention_mask has shape {shapes}: give one number for each token")
    mask = attention_mask.bool()
    if not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise RequestError(
            "the attention_mask hides tokens in or after a text: pad on the left (tokenizer.padding_side = 'left')"
        )
    if position_ids is not None:
        counted = mask.long().cumsum(dim=-1) - 1
        if position_ids.dim() != 2 or position_ids.shape[1] != mask.shape[1] or ((position_ids != counted) & mask).any():
            raise RequestError("position_ids do not count the tokens of each row from 0, and no other positions are computed")
    return [row[count:] for row, count in zip(ids, (~mask).sum(dim=1).tolist(), strict=True)]


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raises RequestError for an argument of a forward pass that asks for more than tokens and logits."""
    if arguments.pop("logits_to_keep", 1) not in (0, 1):
        raise RequestError("logits of the prompt were asked for (logits_to_keep), and generate() needs those of its end")
    for name, value in arguments.items():
        if name not in WITHOUT_EFFECT and value is not None and value is not False:
            raise RequestError(
                f"generate() was given {name}, which an engine does not compute: leave it out, or disable the model"
            )


def _as_batch(rows: Sequence[Tensor | None]) -> Tensor:
    """Logits of several rows, [N, V]; zeros for rows that have none."""
    some = next(row for row in rows if row is not None)
    return torch.stack([row if row is not None else torch.zeros_like(some) for row in rows])
