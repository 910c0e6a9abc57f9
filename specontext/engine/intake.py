"""What comes in: prompts and parameters are checked against what the engine can serve, and become requests."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from specontext.config import EngineConfig
from specontext.core import Request
from specontext.engine.constraint import Constraint
from specontext.engine.detokenizer import Detokenizer
from specontext.engine.generation import Generation
from specontext.engine.parts import Parts
from specontext.engine.restrictions import banned_sequences
from specontext.errors import RequestError, shown, which_prompt
from specontext.grammars.compiler import GrammarCompiler
from specontext.locations import one_sentence
from specontext.models.loading import LoadedModel
from specontext.models.token_ids import unknown_token
from specontext.sampling_params import SamplingParams, StructuredOutputsParams

BYTES = (bytes, bytearray, memoryview)  # sequences of integers that are no token ids


def advice(prompt: object) -> str:
    """What to give instead of something that is no prompt, where it can be told."""
    if isinstance(prompt, BYTES):
        return ": decode it"
    if isinstance(prompt, Mapping):
        chat = "; messages are written out by the tokenizer's apply_chat_template" if "role" in prompt else ""
        return f": give the text or the token ids alone, without names{chat}"
    return ": give its token ids as .tolist()" if hasattr(prompt, "tolist") else ""


class Intake:
    """Checks requests and makes them; whoever has it queues them.

    Args:
        fits: raises RequestError where a prompt of so many tokens with these parameters could never be served.

    Attributes:
        seeds: of sampled requests that name none.
        grammars: compiles what structured outputs must look like; other threads may do so before they make a request.
    """

    def __init__(
        self, config: EngineConfig, loaded: LoadedModel, parts: Parts, fits: Callable[[int, SamplingParams], None]
    ) -> None:
        self._loaded, self._parts, self._fits, self._seed = loaded, parts, fits, config.seed
        self._tokenizer = loaded.tokenizer
        self.grammars = GrammarCompiler(self._tokenizer, vocab_size=loaded.shape.vocab_size, end_token_ids=loaded.end_token_ids)
        self.seeds = random.Random(config.seed)

    # Checks -----------------------------------------------------------------------------------------------------------

    def check_all(self, prompts: Sequence[str | Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        """`check` of several prompts; the error of a bad one says which it is."""
        checked = []
        for number, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
            try:
                checked.append(self.check(prompt, sampling))
            except RequestError as error:
                raise RequestError(f"{which_prompt(number, len(prompts))}{error}") from error
        return checked

    def check(self, prompt: str | Sequence[int], params: SamplingParams) -> list[int]:
        """The tokens of a prompt that can be served with these parameters; nothing is changed.

        Raises:
            RequestError: an empty or over-long prompt, tokens that the model cannot read, a method that does not run here, more
                than the memory could ever hold.
        """
        token_ids = self.encode(prompt)
        named = {
            "stop_token_ids": params.stop_token_ids,
            "allowed_token_ids": params.allowed_token_ids or (),
            "logit_bias": [token for token, _ in params.logit_bias or ()],  # type: ignore[misc]
        }
        for name, ids in named.items():
            if (wrong := self.unknown(ids)) is not None:
                raise RequestError(f"{name}: {wrong}")
        self._constraint(params)
        self._parts.methods.choose(params.method, params.budget)
        self._fits(len(token_ids), params)
        return token_ids

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens of a prompt; raises RequestError for an empty one, and for tokens that the model cannot read."""
        if not isinstance(prompt, Sequence) or isinstance(prompt, BYTES):
            raise RequestError(f"a prompt must be a text or a list of token ids, got {shown(prompt)}{advice(prompt)}")
        ids = self._tokens_of(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise RequestError("the prompt is empty: give some text or token ids")
        if (wrong := self.unknown(ids)) is not None:
            raise RequestError(wrong)
        return ids

    def unknown(self, ids: Sequence[int]) -> str | None:
        """What is wrong with token ids that the model cannot read."""
        return unknown_token(ids, self._loaded.shape.vocab_size, self._tokenizer)

    def _tokens_of(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not Unicode: half a character at {error.start}") from error
        with one_sentence("the tokenizer cannot encode this prompt"):
            return list(self._tokenizer(text)["input_ids"]) if text else []

    # Requests ---------------------------------------------------------------------------------------------------------

    def generation(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        *,
        index: int = 0,
        forced: Sequence[int] = (),
        on_logits: Callable[[Tensor], None] | None = None,
        awaited: bool = True,
    ) -> Generation:
        """One output of a prompt that `check` has returned.

        Raises:
            RequestError: forced tokens that are none, or with what is for sampled tokens.
        """
        if forced:
            forced = self.encode(forced)
            if params.logprobs is not None:
                raise RequestError("log-probabilities are of sampled tokens: leave logprobs out, on_logits sees the logits")
            if params.structured_outputs is not None:
                raise RequestError("structured_outputs are for sampled tokens: leave them out where tokens are forced")
        request = Request(
            request_id,
            token_ids,
            len(token_ids),
            params,
            seed=self._seed_of(params),
            choice=self._parts.methods.choose(params.method, params.budget),
            index=index,
            logprobs=[] if params.logprobs is not None else None,
            prompt_logprobs=[None] if params.prompt_logprobs is not None else None,
            arrived=time.perf_counter(),
            banned=banned_sequences(params, self._tokenizer) if params.bad_words else (),
            awaited=awaited,
        )
        ends = () if params.ignore_eos else self._loaded.end_token_ids
        return Generation(
            request,
            Detokenizer(self._tokenizer, params, token_ids),
            forced,
            on_logits,
            end_token_ids=frozenset(params.stop_token_ids).union(ends),
            constraint=self._constraint(params),
            moves_before=self._parts.residency.num_moves,
        )

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        wanted = params.structured_outputs
        if wanted is None:
            return None
        assert isinstance(wanted, StructuredOutputsParams)
        return Constraint(self.grammars.compile(wanted), params.thinking)

    def _seed_of(self, params: SamplingParams) -> int:
        """What a request names; else another one for each that is sampled, and the engine's for greedy ones, which repeat."""
        if params.seed is not None:
            return params.seed
        return self.seeds.randrange(2**63) if params.temperature > 0 else self._seed
