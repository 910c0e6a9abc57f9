"""What all routes share: the engine, the names and limits of the server, and how requests reach the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from specontext.engine.async_engine import AsyncEngine
from specontext.engine.llm_engine import LLMEngine
from specontext.engine.request_stream import RequestStream
from specontext.errors import ConfigError, RequestError, shown
from specontext.sampling_params import SamplingParams, StructuredOutputsParams
from specontext.server.errors import ApiError, DrainingError
from specontext.server.metrics import Metrics
from specontext.server.prompts import PromptEncoder
from specontext.server.reasoning import CHANNELS, Reasoning
from specontext.server.responses.store import ResponseStore
from specontext.server.sampling import sampling_defaults
from specontext.server.settings import ServerConfig
from specontext.server.token_text import TokenTexts
from specontext.server.tool_support import ToolSupport


class ServerState:
    """One engine being served.

    Attributes:
        names: the model's names; the first one is used in responses.
        draining: the server is about to stop and takes no more requests.
    """

    def __init__(self, engine: LLMEngine, config: ServerConfig) -> None:
        self.config, self.started = config, time.time()
        self.names = config.served_model_name or (engine.loaded.name,)
        self.root, self.weights_note = engine.loaded.name, engine.loaded.weights_note
        self.max_model_len = engine.parts.max_tokens
        self.metrics = Metrics(self.names[0])
        self.engine = AsyncEngine(engine, max_waiting=config.max_queued_requests, observer=self.metrics)
        self.metrics.watch(self.engine)
        self.encoder = PromptEncoder(
            engine.tokenizer,
            chat_template=config.read_chat_template(),
            max_model_len=self.max_model_len,
            vocab_size=engine.loaded.shape.vocab_size,
        )
        self.grammars = engine.intake.grammars
        self.tools = ToolSupport(config.tool_call_parser, self.encoder.tokenizer, engine.intake.grammars)
        self.reasoning = self._reasoning(config.reasoning_parser)
        self.texts = TokenTexts(self.encoder.tokenizer)
        self.defaults: dict[str, Any] = sampling_defaults(engine.loaded) if config.generation_config == "auto" else {}
        self.responses = ResponseStore()
        self.draining = False

    def _reasoning(self, parser: str | None) -> Reasoning | None:
        if self.tools.channels and parser is not None:
            raise ConfigError("this model thinks in a channel of its own, which is told apart anyway: leave reasoning_parser out")
        parser = CHANNELS if self.tools.channels else parser
        return Reasoning(parser, self.encoder.tokenizer) if parser is not None else None

    @property
    def model(self) -> str:
        return self.names[0]

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for a model that is not served here."""
        if name is not None and name not in self.names:
            raise ApiError(
                404, f"the model {shown(name)} is not served here: use '{self.model}'", param="model", code="model_not_found"
            )

    async def compile(self, make: Callable[[], StructuredOutputsParams | None], field: str) -> StructuredOutputsParams | None:
        """What an output must look like, compiled before the engine hears of it.

        Args:
            make: run in the tokenizer's thread.
            field: of the request, which is blamed.

        Raises:
            ApiError: it cannot be followed.
        """

        def run() -> StructuredOutputsParams | None:
            wanted = make()
            if wanted is not None:
                self.grammars.compile(wanted)
            return wanted

        try:
            return await self.encoder.run(run)
        except RequestError as error:
            raise ApiError(400, str(error).replace("structured_outputs", field, 1), param=field) from error

    async def submit(
        self, request_id: str, prompts: Sequence[Sequence[int]], params: SamplingParams, *, streaming: bool
    ) -> RequestStream:
        """Queue a request; raises as `AsyncEngine.submit`, and DrainingError."""
        if self.draining:
            raise DrainingError("the server is shutting down: try another one")
        return await self.engine.submit(request_id, prompts, params, only_final=not streaming)

    async def drain(self, timeout: float) -> bool:
        """Take no more requests and wait for the open ones; those that take too long fail. Whether all could finish."""
        self.draining = True
        try:
            await asyncio.wait_for(self.engine.drained(), timeout)
        except TimeoutError:
            self.engine.abort_all(DrainingError("the server is shutting down and could not wait for this request"))
            return False
        return True
