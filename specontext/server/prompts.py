"""From messages and texts to token ids, off the event loop."""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from specontext.errors import ChatTemplateError, which_prompt
from specontext.models.chat_template import ChatTemplate
from specontext.models.token_ids import unknown_token
from specontext.server.errors import ApiError
from specontext.server.protocol.chat import TemplateBody

Result = TypeVar("Result")
_TOKENS_AT_A_CUT = 64  # after so many a text that was cut has the tokens that it had before
NO_CHAT_TEMPLATE = (
    "the model has no chat template, neither in chat_template.jinja nor in tokenizer_config.json beside its weights: download "
    "that file, start the server with --chat-template FILE, or use /v1/completions"
)


class ChatPrompt(NamedTuple):
    """A conversation in the chat template."""

    text: str
    token_ids: list[int]


class PromptEncoder:
    """A tokenizer of the server's own, used by one thread.

    Args:
        tokenizer: copied, since the engine's thread goes on using it.
        chat_template: used in place of the tokenizer's own.
        max_model_len: a text that must be longer than this is refused before it is encoded.
        vocab_size: rows of the model's embedding.
    """

    def __init__(self, tokenizer: Any, *, chat_template: str | None, max_model_len: int, vocab_size: int) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        self.template = ChatTemplate(self.tokenizer)
        self.max_model_len, self.vocab_size = max_model_len, vocab_size
        self._longest_token = max((len(token) for token in self.tokenizer.get_vocab()), default=1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="specontext-tokenizer")

    async def texts(self, prompts: Sequence[str], *, add_special_tokens: bool = True, keep: int | None = None) -> list[list[int]]:
        """Token ids of texts that are to be continued.

        Args:
            keep: as of `text`.

        Raises:
            ApiError: an empty or over-long text.
        """
        if not all(prompts):
            raise ApiError(400, "the prompt is empty: give some text or token ids", param="prompt")
        places = [which_prompt(number, len(prompts)) for number in range(len(prompts))]
        encoded = [
            await self.text(prompt, add_special_tokens=add_special_tokens, place=place, keep=keep)
            for prompt, place in zip(prompts, places, strict=True)
        ]
        for ids, place in zip(encoded, places, strict=True):
            if not ids:
                raise ApiError(400, f"{place}the prompt has no tokens: give some text", param="prompt")
        return encoded

    async def text(self, text: str, *, add_special_tokens: bool = True, place: str = "", keep: int | None = None) -> list[int]:
        """Token ids of a text, which may have none.

        Args:
            place: begins errors.
            keep: how many of the last tokens to keep; None keeps all.

        Raises:
            ApiError: an over-long text, or one with tokens that the model cannot read.
        """
        ids = await self._encode(text, add_special_tokens, keep)
        await self.check_ids(ids, "prompt", place)
        return ids

    async def messages(self, body: TemplateBody, *, add_special_tokens: bool = False, keep: int | None = None) -> ChatPrompt:
        """A conversation in the model's chat template.

        Args:
            keep: as of `text`.

        Raises:
            ApiError: no template, one that refuses the messages or leaves some of their text out, or tokens that the model cannot
                read.
        """
        if not self.tokenizer.chat_template:
            raise ApiError(400, NO_CHAT_TEMPLATE)
        text = await self.run(lambda: self._render(body))
        ids = await self._encode(text, add_special_tokens, keep)
        if not ids:
            raise ApiError(400, "the messages have no tokens: give some text", param="messages")
        await self.check_ids(ids, "messages")
        return ChatPrompt(text, ids)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens; raises ApiError for ids that are not the model's."""
        await self.check_ids(token_ids)
        return await self.run(
            lambda: self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    async def check_ids(self, token_ids: Sequence[int], param: str = "tokens", place: str = "") -> None:
        """Raises ApiError, beginning with `place`, for ids that the model cannot read."""
        wrong = await self.run(lambda: unknown_token(token_ids, self.vocab_size, self.tokenizer))
        if wrong is not None:
            raise ApiError(400, f"{place}{wrong}", param=param)

    def _render(self, body: TemplateBody) -> str:
        tools = [tool.function.for_template() for tool in body.shown_tools]
        own = {"self", "messages", *inspect.signature(self.tokenizer.apply_chat_template).parameters}
        extra = body.template_variables
        if "reasoning_effort" in extra and not self.template.speaks_of("reasoning_effort"):
            raise ApiError(400, "the chat template knows no reasoning_effort: leave it out", param="reasoning_effort")
        given = {"tools": [{"type": "function", "function": tool} for tool in tools]} if tools else {}
        if clash := sorted(own & extra.keys()):
            raise ApiError(400, f"chat_template_kwargs may not set {', '.join(clash)}", param="chat_template_kwargs")
        try:
            return self.template.render(
                [message.for_template() for message in body.messages],
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                **given,
                **extra,
            )
        except ChatTemplateError as error:
            place = "tools" if error.tools else "messages" if error.message is None else f"messages.{error.message}"
            raise ApiError(400, str(error), param=place, quotes=True) from error  # templates quote what they do not like

    async def _encode(self, text: str, add_special_tokens: bool, keep: int | None) -> list[int]:
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ApiError(400, f"the text is not Unicode: half a character at {error.start}") from error
        if keep is not None:  # what comes before is in no token that is kept
            text = text[-(min(keep, self.max_model_len) + _TOKENS_AT_A_CUT) * self._longest_token :]
        elif len(text) > self.max_model_len * self._longest_token:
            raise over_length(
                f"the prompt has {len(text)} characters, which is more than they can say",
                self.max_model_len,
                prompt_tokens=-(-len(text) // self._longest_token),
            )
        ids = list(await self.run(lambda: self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]))
        return ids if keep is None else ids[-keep:]

    async def run(self, function: Callable[[], Result]) -> Result:
        """A function's result, from the thread that the tokenizer belongs to."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def over_length(message: str, max_model_len: int, *, prompt_tokens: int | None = None, max_tokens: int = 0) -> ApiError:
    """An error that clients know by its code and by how OpenAI begins it, those of Anthropic's protocol by its words.

    Args:
        prompt_tokens: that the prompt has at least, where it is known.
        max_tokens: that were to follow.
    """
    anthropic = None
    if prompt_tokens is not None:
        anthropic = f"prompt is too long: {prompt_tokens} tokens > {max_model_len} maximum"
        if prompt_tokens < max_model_len:
            anthropic = (
                f"input length and `max_tokens` exceed context limit: {prompt_tokens} + {max_tokens} > {max_model_len}, decrease "
                "input length or `max_tokens` and try again"
            )
    return ApiError(
        400,
        f"This model's maximum context length is {max_model_len} tokens. However, {message}",
        code="context_length_exceeded",
        anthropic=anthropic,
    )
