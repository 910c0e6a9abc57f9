"""How much a request may bring along: each of these costs time or memory before the engine sees the request."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from specontext.sampling_params import MOST_BIASED

MOST_OUTPUTS = 128  # of one prompt, as OpenAI has it
MOST_PROMPTS = 512
MOST_MESSAGES = 4096
MOST_PARTS = 16_384  # of all messages together
MOST_VARIABLES = 65_536  # characters of a chat template's variables, each value counting as one more
DEEPEST_VARIABLES = 16  # levels of lists and objects in them
MOST_TOOLS = 128  # as OpenAI has it
MOST_OUTPUTS_OF_TOOLS = 1024  # parts of one result
MOST_SCHEMA = 1 << 18  # characters and values of a JSON schema
DEEPEST_SCHEMA = 64
MOST_METADATA = 16  # entries, keys and values as OpenAI has them

Name = Annotated[str, Field(max_length=1024)]


def at_most(entries: int) -> BeforeValidator:
    """Of an object: it is counted before its entries are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > entries:
            raise ValueError(f"{len(value)} entries are too many: at most {entries}")
        return value

    return BeforeValidator(check)


Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], at_most(MOST_METADATA)]
Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], at_most(MOST_BIASED)]


def check_messages(value: Any) -> Any:
    """A list of messages, counted before each of them is looked at."""
    if isinstance(value, list):
        if len(value) > MOST_MESSAGES:
            raise ValueError(f"{len(value)} messages are too many: at most {MOST_MESSAGES}")
        contents = [item.get(name) for item in value if isinstance(item, dict) for name in ("content", "summary", "output")]
        parts = sum(len(content) for content in contents if isinstance(content, list))
        if parts > MOST_PARTS:
            raise ValueError(f"their contents have {parts} parts in all, which are too many: at most {MOST_PARTS}")
    return value


def _check_variables(value: Any) -> Any:
    return check_size(value, MOST_VARIABLES, DEEPEST_VARIABLES)


def _check_schema(value: Any) -> Any:
    return check_size(value, MOST_SCHEMA, DEEPEST_SCHEMA)


def check_size(value: Any, most: int, deepest: int) -> Any:
    """The value, if it has at most so many characters and values in all, and so many levels; else a ValueError."""
    size, waiting = 0, [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > deepest:
            raise ValueError(f"it is nested too deeply: at most {deepest} levels")
        size += 1 + (len(item) if isinstance(item, str | list) else sum(map(len, item)) if isinstance(item, dict) else 0)
        if size > most:
            raise ValueError(f"it is too large: at most {most} characters and values in all")
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        waiting += [(one, depth + 1) for one in inner]
    return value


Variables = Annotated[dict[str, Any], BeforeValidator(_check_variables)]
Schema = Annotated[dict[str, Any], BeforeValidator(_check_schema)]
