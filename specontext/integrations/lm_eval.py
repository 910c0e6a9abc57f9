"""The engine as a model of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

This module is lm-eval's own command line with one model more:

    python -m specontext.integrations.lm_eval --model specontext \\
        --model_args pretrained=nano,method=speculative,budget=256 --batch_size auto --tasks gsm8k

Generation decodes with the chosen method, like everything else in this engine. Log-likelihoods come from the prefill, which is
dense under every method: tasks of multiple choice and perplexity measure the model, not the method.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch

from specontext.config import EngineConfig, SpeContextConfig
from specontext.core import RequestOutput
from specontext.engine.llm import LLM
from specontext.errors import ConfigError, RequestError, SpeContextError
from specontext.installing import install_command
from specontext.integrations.lm_eval_arguments import DEFAULT_TOKENS, read_arguments
from specontext.models.chat_template import ChatTemplate
from specontext.retrieval.registry import FULL, base_of
from specontext.sampling_params import SamplingParams

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ImportError as error:
    raise SpeContextError(f"lm-eval is not installed: {install_command('eval')} ({error})") from error

logger = logging.getLogger(__name__)

AT_ONCE = 128  # requests that are handed to the engine together; answers are kept in lm-eval's cache after each such part
MEASURES = ("tokens_read_per_step", "overlap", "selection_bytes_per_step", "bytes_loaded_per_step")

# What lm-eval hands over for one log-likelihood: texts for its cache, context and continuation as token ids.
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("specontext")
class SpeContextLM(TemplateLM):
    """`--model specontext`.

    Args:
        pretrained: 'nano', a checkpoint directory or a Hub id.
        method: a selection method, also a variant such as quest-prompt.
        retrieval_head: 'auto', a head's directory, or None.
        batch_size: requests that run at the same time; 'auto' or None leaves it to the engine. lm-eval's command line says 1
            where it is not given. `max_num_seqs` among the settings goes before it.
        max_batch_size: bound of the engine's choice for 'auto'.
        add_bos_token: whether texts begin with the tokenizer's special tokens; None where the text does not begin with them.
        enable_thinking: for chat templates that ask.
        think_end_token: text that ends the model's thinking; what comes before it is no part of the answer, nor do stop texts
            count there.
        device: where the model runs. lm-eval's command line says cuda:0 where it is not given; without a GPU that is a CPU here.
        settings: any other field of `SpeContextConfig` and `EngineConfig` by name: budget, offload_layers, max_model_len, dtype,
            gpu_memory (bytes) ...

    Raises:
        SpeContextError: anything that does not fit; the message says what to do.
    """

    def __init__(
        self,
        pretrained: str,
        method: str = "speculative",
        retrieval_head: str | None = "auto",
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        add_bos_token: bool | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        device: str = "auto",
        **settings: Any,
    ) -> None:
        super().__init__()
        selecting = {f.name for f in fields(SpeContextConfig)} - {"method"}
        running = {f.name for f in fields(EngineConfig)} - {"model", "retrieval_head", "method", "methods", "device"}
        if unknown := sorted(set(settings) - selecting - running):
            known = ", ".join(["pretrained", "method", "retrieval_head", "device", *sorted(selecting | running)])
            raise ConfigError(f"unknown model argument {', '.join(unknown)}: choose among {known}")
        if "max_num_seqs" not in settings and (seats := _seats(batch_size, max_batch_size)) is not None:
            settings["max_num_seqs"] = seats
        config = SpeContextConfig(method=base_of(method), **{name: settings.pop(name) for name in selecting & set(settings)})
        self.llm = LLM(pretrained, retrieval_head, config, methods=(method,), device=_device(device), **settings)
        self.method = method
        self._told_of_prefill = False
        self.tokenizer = self.llm.tokenizer
        self._add_bos_token, self._think_end_token = add_bos_token, think_end_token
        self._template_options: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._measured: dict[str, list[float]] = {name: [] for name in MEASURES}

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> SpeContextLM:
        """A model from `--model_args`, which go before lm-eval's options of the same names and their defaults."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**options | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> SpeContextLM:
        """The same from a text such as `pretrained=nano,budget=256`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # What lm-eval asks about the model ----------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Longest context in tokens, prompt and answer together."""
        return self.llm.engine.parts.max_tokens

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that is scored from its beginning."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's prompt; without a generation prompt its last message is to be continued.

        Raises:
            SpeContextError: the model has no chat template, or it leaves out some of the text.
        """
        if not self.tokenizer.chat_template:
            raise SpeContextError("the model has no chat template: run without --apply_chat_template")
        return ChatTemplate(self.tokenizer).render(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._template_options,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What stands in lm-eval's results: the settings, and the means of what the answers so far have read."""
        config = self.llm.config
        measured = {name: sum(values) / len(values) if values else None for name, values in self._measured.items()}
        settings = {"method": self.method, "budget": config.budget if config.method != FULL else None}
        return {"specontext": settings | {"sink": config.sink, "recent": config.recent} | measured}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens are added as asked, or unless the text has the first one already (chat templates put it)."""
        add = self._add_bos_token if add_special_tokens is None else add_special_tokens
        if add is None:
            bos = self.tokenizer.bos_token
            add = not (bos and string.startswith(bos))
        return list(self.tokenizer(string, add_special_tokens=add)["input_ids"])

    # Requests -----------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers; a prompt that leaves no room for one loses its beginning.

        Equal requests (lm-eval's repeats) that are sampled get seeds of their own.

        Raises:
            RequestError: generation arguments that the engine does not have.
        """
        answers: list[str] = []
        repeats: Counter[str] = Counter()
        for part in _parts(requests):
            prompts, params, stops = [], [], []
            for context, arguments in (request.args for request in part):
                count = repeats[repr((context, arguments))]
                repeats[repr((context, arguments))] += 1
                ids, sampling, until = self._request(context, arguments, count)
                prompts.append(ids)
                params.append(sampling)
                stops.append(until)
            outputs = self.llm.generate(prompts, params, progress=not disable_tqdm)
            for request, output, until in zip(part, outputs, stops, strict=True):
                answer = self._answer(output.text, until)
                self._measure(output)
                self.cache_hook.add_partial("generate_until", request.args, answer)
                answers.append(answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once, with as much context as the model has room for."""
        totals: list[float] = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 2,  # one token of context, one that is generated
                context_len=1,
            )
            scored: list[Scored] = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(one for one, _ in self._loglikelihood_tokens(scored, disable_tqdm=disable_tqdm)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        if self.method != FULL and not self._told_of_prefill:
            logger.warning("log-likelihoods come from the dense prefill: they say nothing about the method %s", self.method)
            self._told_of_prefill = True
        found: list[tuple[float, bool]] = []
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        for part in _parts(requests):
            prompts = [self._scored_tokens(context, continuation) for _, context, continuation in part]
            outputs = self.llm.generate(prompts, params, progress=not disable_tqdm)
            for (texts, _, continuation), output in zip(part, outputs, strict=True):
                found.append(_score(output, len(continuation)))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def _scored_tokens(self, context: list[int], continuation: list[int]) -> list[int]:
        room = self.max_length - 1
        tokens = context + continuation
        if len(continuation) >= room:
            raise RequestError(f"a continuation of {len(continuation)} tokens has no room in the model's {self.max_length}")
        if len(tokens) > room:
            logger.warning("a context of %d tokens loses its first %d", len(context), len(tokens) - room)
        return tokens[-room:]

    def _request(self, context: str, arguments: dict[str, Any], repeat: int) -> tuple[list[int], SamplingParams, tuple[str, ...]]:
        """Prompt, sampling and stop texts of one request."""
        asked = read_arguments(arguments)
        wanted, chosen = asked.max_tokens, asked.sampling
        if asked.temperature > 0 and "seed" not in chosen:
            chosen = chosen | {"seed": self.llm.engine.config.seed + repeat}
        ids = self.tok_encode(context)
        room = self.max_length - min(wanted, DEFAULT_TOKENS, self.max_length // 2)
        if len(ids) > room:
            logger.warning("a prompt of %d tokens loses its first %d", len(ids), len(ids) - room)
            ids = ids[-room:]
        if wanted > self.max_length - len(ids):
            logger.warning("an answer of %d tokens has room for %d only", wanted, self.max_length - len(ids))
        sampling = SamplingParams(
            **{"skip_special_tokens": False} | chosen,
            temperature=asked.temperature,
            max_tokens=min(wanted, self.max_length - len(ids)),
            stop=() if self._think_end_token else asked.stops,
            method=self.method,
        )
        return ids, sampling, asked.stops

    def _answer(self, text: str, stops: tuple[str, ...]) -> str:
        """What follows the thinking, up to the first stop text."""
        if self._think_end_token:
            text = text.rpartition(self._think_end_token)[2].lstrip()
            for stop in stops:
                text = text.partition(stop)[0]
        return text

    def _measure(self, output: RequestOutput) -> None:
        for name, values in self._measured.items():
            value = output.stats.get(name)
            if isinstance(value, int | float):
                values.append(float(value))


def _parts(requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(requests), AT_ONCE):
        yield requests[start : start + AT_ONCE]


def _seats(batch_size: int | str | None, most: int | None) -> int | None:
    """`max_num_seqs` for a batch size; None leaves it to the engine."""
    if batch_size is None or str(batch_size).startswith("auto"):
        return most
    try:
        return int(batch_size)
    except ValueError as error:
        raise ConfigError(f"batch_size must be a number or 'auto', got {batch_size!r}") from error


def _device(name: str) -> str:
    if name == "cuda:0" and not torch.cuda.is_available():
        logger.warning("there is no CUDA device: running on the CPU")
        return "cpu"
    return name


def _score(output: RequestOutput, count: int) -> tuple[float, bool]:
    """Log-likelihood of the prompt's last `count` tokens, and whether each was the likeliest."""
    assert output.prompt_logprobs is not None
    total, greedy = 0.0, True
    first = len(output.prompt_token_ids) - count
    for token, table in zip(output.prompt_token_ids[first:], output.prompt_logprobs[first:], strict=True):
        assert table is not None, "the first token of a prompt has no likelihood"
        total += table[token]
        greedy = greedy and table[token] >= max(table.values())
    return total, greedy


def main() -> int:
    """lm-eval's command line; returns the exit status, 2 for bad usage and 1 for other errors that a user can cause."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except SpeContextError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
