"""Keys of servers: those of the environment, which no other user of the machine can see."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from specontext.errors import ConfigError

_VARIABLE = "SPECONTEXT_API_KEY"

KeyOfServer = Annotated[
    str | None, typer.Option("--api-key", help=f"Key of the server. Default: the first one that {_VARIABLE} says.")
]


def keys_of_environment() -> tuple[str, ...]:
    """Keys that the environment says, separated by commas; none where it says nothing.

    Raises:
        ConfigError: it says something that has no key: a server would be open although somebody thinks that it is not.
    """
    said = os.environ.get(_VARIABLE, "")
    keys = tuple(key.strip() for key in said.split(",") if key.strip())
    if said and not keys:
        raise ConfigError(f"{_VARIABLE} is set, but has no key: write keys, separated by commas, or leave it out")
    return keys


def key_to_send(given: str | None) -> str | None:
    """The key that a client sends: the one it was given, else the environment's first, if any.

    Raises:
        ConfigError: as `keys_of_environment`; a key that no header can carry.
    """
    key = given.strip() if given is not None else next(iter(keys_of_environment()), None)
    if key and not key.isprintable():
        raise ConfigError("the API key has a character that no header can carry: give it as the server has it")
    return key
