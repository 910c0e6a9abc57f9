"""A model that judges what another one wrote, behind an OpenAI-compatible endpoint.

It gives marks from 1 to 5 in the six dimensions of LongBench-Write (arXiv 2408.07055), at upstream's temperature. The request is
in our own words: marks depend on the judging model and on the request, so compare only those of one judge under one of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from specontext.errors import SpeContextError
from specontext.evaluation.traffic.http import Address, HttpError, fetch_json

DIMENSIONS = {
    "Relevance": "does it do what was asked, all of it and nothing else?",
    "Accuracy": "is it free of factual errors and misleading statements?",
    "Coherence": "is it well organised, does one part follow from another?",
    "Clarity": "is the language clear, with enough detail to be understood?",
    "Breadth and Depth": "does it cover the subject widely and thoroughly?",
    "Reading Experience": "is it pleasant and engaging to read?",
}
LOWEST, HIGHEST = 1, 5
KEY_VARIABLE = "OPENAI_API_KEY"
TEMPERATURE, MAX_TOKENS = 0.5, 2048
_ABOUT_THE_TEXT = re.compile(r"context.length|too long|max_model_len|content.{0,20}(policy|filter)", re.IGNORECASE)
_MARK = re.compile(r"\s*([1-4](?:\.\d+)?|5(?:\.0+)?)(?:\s*/\s*5)?(?![\d./]*\d|/)")

Marks = dict[str, float]  # a mark for each of DIMENSIONS, LOWEST .. HIGHEST


class JudgeError(SpeContextError):
    """A judge that cannot be asked; the message says why."""


@dataclass(frozen=True)
class Judge:
    """Where the judging model is, and how often it is asked.

    Attributes:
        tries: for answers without marks, and for a server that is busy or out of reach.
        timeout: seconds for one answer.
        pause: waits so many seconds between two tries at a busy server.
    """

    address: Address = field(repr=False)  # holds the key
    model: str
    tries: int = 5
    timeout: float = 600.0
    pause: Callable[[float], None] = time.sleep

    @classmethod
    def at(cls, url: str, model: str) -> Judge:
        """The judge at a URL such as `https://api.openai.com/v1`, with the key in the environment's OPENAI_API_KEY if it is set.

        Raises:
            HttpError: it is no URL.
        """
        return cls(Address.parse(url, os.environ.get(KEY_VARIABLE)), model)

    def try_out(self) -> None:
        """Ask once, so that a judge that cannot be asked is known before anything is written for it.

        Raises:
            JudgeError: as of `marks`.
        """
        self.marks("Write one sentence about rain.", "It has been raining since the morning.")

    def marks(self, request: str, response: str) -> Marks | None:
        """What the judge thinks of a response; None where it gave no complete marks, or refused this text.

        Raises:
            JudgeError: it is out of reach, or refuses to be asked at all.
        """
        for attempt in range(self.tries):
            try:
                answer = asyncio.run(self._ask(judging_request(request, response)))
            except (HttpError, TimeoutError) as error:
                status = error.status if isinstance(error, HttpError) else None
                if _ABOUT_THE_TEXT.search(str(error)):
                    return None
                if attempt + 1 == self.tries or (status is not None and status < 500 and status not in (408, 409, 429)):
                    raise JudgeError(f"the judge {self.model} could not be asked: {error or 'it took too long'}") from error
                self.pause(2.0**attempt)
                continue
            if (found := read_marks(answer)) is not None:
                return found
        return None

    async def _ask(self, text: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": TEMPERATURE,
            "max_tokens": MAX_TOKENS,
        }
        async with asyncio.timeout(self.timeout):
            answer = await fetch_json(self.address, "POST", "/v1/chat/completions", body)
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise JudgeError(f"the judge {self.model} did not answer with a chat completion") from error
        return content if isinstance(content, str) else ""


def judging_request(request: str, response: str) -> str:
    """What the judge is told."""
    questions = "\n".join(f"- {name}: {question}" for name, question in DIMENSIONS.items())
    form = json.dumps({"Analysis": "...", **dict.fromkeys(DIMENSIONS, "...")})
    return (
        "You judge the quality of texts, and you are strict. Below are a user's request and the response of an assistant. "
        f"Give the response a whole number from {LOWEST} (very poor) to {HIGHEST} (excellent) in each of these dimensions:\n\n"
        f"{questions}\n\nWhether it has the length that was asked for is of no account.\n\n"
        f"<request>\n{request}\n</request>\n\n<response>\n{response}\n</response>\n\n"
        "Analyse the response briefly, then give the numbers. Answer with nothing but one JSON object of this form, with numbers "
        f"in place of the dots behind the dimensions: {form}"
    )


def quality(marks: Mapping[str, float]) -> dict[str, float]:
    """Marks from 0 to 1, by the dimensions' names, and `quality`, their mean: the score S_q of the paper."""
    scaled = {name: (mark - LOWEST) / (HIGHEST - LOWEST) for name, mark in marks.items()}
    return {"quality": sum(scaled.values()) / len(scaled)} | scaled


def read_marks(answer: str) -> Marks | None:
    """The marks in a judge's answer, wherever in it they stand; None unless all six are there and in range.

    The last JSON object with all dimensions counts. Where there is none, as with quotes in the analysis that are not escaped, the
    last mark behind each dimension's name is taken.
    """
    found = None
    for record in _objects(answer):
        known = {_name(key): value for key, value in record.items()}
        marks = {name: _mark(known.get(_name(name))) for name in DIMENSIONS}
        found = {name: mark for name, mark in marks.items() if mark is not None}
        if len(found) == len(DIMENSIONS):
            return found
    if found is None:
        found = {}
        for name in DIMENSIONS:
            places = list(re.finditer(rf"{name}[\"'*`]*\s*[:=]\s*[\"'*`]*(?=\d)", answer, re.IGNORECASE))
            if places and (match := _MARK.match(answer, places[-1].end())):
                found[name] = float(match[1])
        if len(found) == len(DIMENSIONS):
            return found
    return None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text that name a dimension, the last first."""
    decoder = json.JSONDecoder(strict=False)  # line breaks in strings are common
    for place in reversed([match.start() for match in re.finditer(r"\{", text)]):
        try:
            record, _ = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            continue
        if any(_name(key) in map(_name, DIMENSIONS) for key in record):
            yield record


def _name(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text).strip().casefold()


def _mark(value: Any) -> float | None:
    if isinstance(value, Mapping):
        value = next((value[key] for key in value if _name(str(key)) in ("score", "mark", "rating")), None)
    if isinstance(value, str):
        match = _MARK.match(value)
        value = float(match[1]) if match else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not LOWEST <= value <= HIGHEST:
        return None
    return float(value)
