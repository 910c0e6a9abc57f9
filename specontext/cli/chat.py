"""`specontext chat`: a conversation with any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.markup import escape

from specontext.cli.api_keys import KeyOfServer, key_to_send
from specontext.cli.terminal import UsageError, decoded, error_console
from specontext.errors import shown
from specontext.evaluation.traffic.http import Address, Exchange, HttpError, fetch_json

Message = dict[str, str]
LONGEST_ANSWER = 1024  # tokens, unless it is said otherwise
NANO = (
    "nano knows its generated tasks only (specontext tasks list): "
    "'Remember the facts in this text. apple = 417. Question: apple?'"
)


@dataclass
class Conversation:
    """The messages so far and how the server is asked for the next one."""

    address: Address
    model: str
    options: dict[str, Any]
    messages: list[Message] = field(default_factory=list)

    async def answer(self, text: str) -> AsyncGenerator[tuple[str, str], None]:
        """Say something; yields ("reasoning" or "content", text) as the answer comes, and ("cut", why) where it was cut off. A
        failed exchange leaves no trace."""
        asked = [*self.messages, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": asked, "stream": True, **self.options}
        content = []
        async with Exchange(self.address, "POST", "/v1/chat/completions", body) as exchange:
            async for event in exchange.events():
                choice = _first_choice(event)
                delta = choice.get("delta") or {}
                if reasoning := _text(delta.get("reasoning_content") or delta.get("reasoning")):
                    yield "reasoning", reasoning
                if piece := _text(delta.get("content")):
                    content.append(piece)
                    yield "content", piece
                if choice.get("finish_reason") == "length":
                    yield "cut", f"the answer was cut: it may have {self.options['max_tokens']} tokens (--max-tokens)"
        self.messages = [*asked, {"role": "assistant", "content": "".join(content)}]


def _first_choice(event: dict[str, Any]) -> dict[str, Any]:
    choices = event.get("choices") or [{}]
    if not isinstance(choices, list) or not isinstance(choices[0], dict) or not isinstance(choices[0].get("delta") or {}, dict):
        raise HttpError(f"the server's stream has no choices as OpenAI's has: {shown(choices)}")
    return choices[0]


def _text(content: Any) -> str:
    """The text of a delta, which some servers send as a list of parts."""
    if isinstance(content, list):
        return "".join(_text(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def chat(
    base_url: Annotated[str, typer.Option("--base-url", help="Address of the server.")] = "http://127.0.0.1:8000",
    api_key: KeyOfServer = None,
    model: Annotated[str | None, typer.Option("--model", help="Model to talk to. Default: the server's first.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="Instructions that go before the conversation.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Say only this, print the answer and end.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", help="Tokens of an answer at most.", show_default=f"{LONGEST_ANSWER}, a quarter of a short context"
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 is greedy. Default: the server's.")] = None,
) -> None:
    """Talk to a running server; an empty line or Ctrl-D ends, /new begins anew, Ctrl-C stops an answer and, again, the chat.

    Answers go to standard output, thinking and everything else to standard error.
    """
    system, prompt = (decoded(text, name) if text else text for text, name in ((system, "--system"), (prompt, "--prompt")))
    given = {"max_tokens": max_tokens, "temperature": temperature}
    options = {name: value for name, value in given.items() if value is not None}
    _talk(Address.parse(base_url, key_to_send(api_key)), model, options, system, prompt)


def _models(address: Address, *, needed: bool) -> Any:
    """The server's list of models; None where it has none and is not needed."""
    try:
        return asyncio.run(fetch_json(address, "GET", "/v1/models"))
    except HttpError:
        if needed:
            raise
        return None


def _talk(address: Address, model: str | None, options: dict[str, Any], system: str | None, prompt: str | None) -> None:
    if model is None or "max_tokens" not in options:
        listed = _models(address, needed=model is None)
        try:
            found = next(each for each in listed["data"] if model in (None, each["id"]))
        except (KeyError, StopIteration, TypeError) as error:
            if model is None:
                raise UsageError("the server lists no models: give --model") from error
            found = {}
        model = model or str(found["id"])
        context = found.get("max_model_len")
        longest = min(LONGEST_ANSWER, context // 4) if isinstance(context, int) else LONGEST_ANSWER
        options = {"max_tokens": max(1, longest)} | options
    beginning: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    conversation = Conversation(address, model, options, list(beginning))
    if prompt is not None:
        asyncio.run(_say(conversation, prompt))
        return
    console = error_console()
    console.print(
        escape(f"{model} at {address.host}:{address.port}; an empty line ends, /new begins anew, Ctrl-C stops an answer"),
        style="dim",
    )
    if model == "nano":
        console.print(escape(NANO), style="dim")
    while text := _read_line():  # outside of asyncio, which would wait for the line before it lets Ctrl-C end the program
        if text == "/new":
            conversation.messages = list(beginning)
            continue
        try:
            asyncio.run(_say(conversation, text))
        except HttpError as error:  # the conversation can go on
            console.print(escape(f"error: {error}"), style="red")
        except KeyboardInterrupt:  # ends the answer; the next one, at the prompt, ends the chat
            print(flush=True)
            console.print("stopped; Ctrl-C again ends the chat", style="dim")


async def _say(conversation: Conversation, text: str) -> None:
    console, last, notes = error_console(), "", []
    async with contextlib.aclosing(conversation.answer(text)) as pieces:
        async for kind, piece in pieces:
            if kind == "content":
                sys.stdout.write(piece)
                sys.stdout.flush()
                last = piece
            elif kind == "cut":
                notes.append(piece)
            else:
                console.print(escape(piece), style="dim", end="")
    if not last.endswith("\n"):
        print(flush=True)
    for note in notes:
        console.print(escape(note), style="dim")


def _read_line() -> str:
    """The next line of input; empty at its end."""
    if sys.stdin.isatty():
        error_console().print("> ", end="")
    try:
        return sys.stdin.readline().strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not {sys.stdin.encoding.upper()} text: convert it") from error
