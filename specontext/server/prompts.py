"""From messages and texts to token ids, off the event loop."""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from specontext.models.chat_template import ChatTemplate, ChatTemplateError
from specontext.server.errors import ApiError
from specontext.server.protocol.chat import TemplateBody

Result = TypeVar("Result")


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
    """

    def __init__(self, tokenizer: Any, *, chat_template: str | None, max_model_len: int, vocab_size: int) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        self.template = ChatTemplate(self.tokenizer)
        self.max_model_len, self.vocab_size = max_model_len, vocab_size
        self._longest_token = max((len(token) for token in self.tokenizer.get_vocab()), default=1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="specontext-tokenizer")

    async def texts(self, prompts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of texts that are to be continued.

        Raises:
            ApiError: an empty or over-long text.
        """
        if not all(prompts):
            raise ApiError(400, "the prompt is empty: give some text or token ids", param="prompt")
        encoded = [await self.text(prompt, add_special_tokens=add_special_tokens) for prompt in prompts]
        if not all(encoded):
            raise ApiError(400, "the prompt has no tokens: give some text", param="prompt")
        return encoded

    async def text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, which may have none; raises ApiError for an over-long one."""
        self._check_text(text)
        return list(await self._run(lambda: self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]))

    async def messages(self, body: TemplateBody, *, add_special_tokens: bool = False) -> ChatPrompt:
        """A conversation in the model's chat template.

        Raises:
            ApiError: no template, or one that refuses the messages or leaves some of their text out.
        """
        if not self.tokenizer.chat_template:
            raise ApiError(400, "the model has no chat template: use /v1/completions, or start the server with --chat-template")
        text = await self._run(lambda: self._render(body))
        self._check_text(text)
        ids = await self._run(lambda: self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        if not ids:
            raise ApiError(400, "the messages have no tokens: give some text", param="messages")
        return ChatPrompt(text, list(ids))

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens; raises ApiError for ids that are not the model's."""
        self.check_ids(token_ids)
        return await self._run(
            lambda: self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    def check_ids(self, token_ids: Sequence[int], param: str = "tokens") -> None:
        wrong = next((token for token in token_ids if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise ApiError(
                400, f"{wrong} is not a token id of this model: its vocabulary is 0 .. {self.vocab_size - 1}", param=param
            )

    def _render(self, body: TemplateBody) -> str:
        own = {"messages", *inspect.signature(self.tokenizer.apply_chat_template).parameters}
        extra = body.chat_template_kwargs or {}
        if clash := sorted(own & extra.keys()):
            raise ApiError(400, f"chat_template_kwargs may not set {', '.join(clash)}", param="chat_template_kwargs")
        try:
            return self.template.render(
                [message.for_template() for message in body.messages],
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                **extra,
            )
        except ChatTemplateError as error:
            place = "messages" if error.message is None else f"messages.{error.message}"
            raise ApiError(400, str(error), param=place) from error

    def _check_text(self, text: str) -> None:
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ApiError(400, f"the text is not Unicode: half a character at {error.start}") from error
        if len(text) > self.max_model_len * self._longest_token:
            raise over_length(f"the prompt has {len(text)} characters, which is more than {self.max_model_len} tokens can say")

    async def _run(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def over_length(message: str) -> ApiError:
    return ApiError(400, message, code="context_length_exceeded")
