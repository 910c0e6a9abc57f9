"""Settings of the server; the CLI derives its options from them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from specontext.config import option
from specontext.errors import ConfigError, shown
from specontext.server.tools.formats import FORMATS

REASONING_PARSERS = ("deepseek_r1", "qwen3")
TOOL_CALL_PARSERS = ("auto", "none", *FORMATS)
BUILT_IN_TEMPLATES = {"hermes": Path(__file__).parent / "tools" / "hermes.jinja"}
_ALL = ("*",), ("*",)
_LONGEST = 10**6  # seconds that something may be waited for
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.\[\]:_~-]+|null")
_OWN_PORT = re.compile(r"^(http://[^/]*(?=:80$)|https://[^/]*(?=:443$)):[0-9]+$")


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens, who may use it and what it bears.

    Raises:
        ConfigError: a value out of range.
    """

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is every network interface.")
    port: int = option(8000, "Port to listen on; 0 takes any free one.")
    api_key: tuple[str, ...] = option(
        (), "Key that clients must present; may be repeated. Default: what SPECONTEXT_API_KEY says, else none is needed."
    )
    served_model_name: tuple[str, ...] = option(
        (), "Name of the model in requests and responses; more names are accepted too. Default: MODEL."
    )
    chat_template: str | None = option(
        None, "Jinja chat template: a file, the text itself, or hermes (ChatML with tools). Default: the model's own."
    )
    reasoning_parser: str | None = option(None, "Put the model's thinking into reasoning_content: deepseek_r1 or qwen3.")
    tool_call_parser: str = option(
        "auto", "Form of the model's tool calls: auto (what its chat template shows), none, or a name such as hermes."
    )
    generation_config: str = option(
        "auto", "Sampling defaults of requests: auto (what the model's generation_config.json says) or none."
    )
    allowed_origins: tuple[str, ...] = option(
        (),
        "Origin, such as http://localhost:3000, whose pages browsers let call the server, or * for any; may be repeated, or a "
        "JSON list. Default: none.",
    )
    allow_credentials: bool = option(False, "Let pages of the allowed origins send cookies and the like.")
    allowed_methods: tuple[str, ...] = option(
        ("*",), "Method that pages of the allowed origins may use; as --allowed-origins. Default: all."
    )
    allowed_headers: tuple[str, ...] = option(
        ("*",), "Header that pages of the allowed origins may send; as --allowed-origins. Default: all."
    )
    max_queued_requests: int = option(512, "Requests that may wait; more are refused with 429.")
    max_logprobs: int = option(20, "Most log-probabilities a token that a request may ask for.")
    max_body_size: int = option(32 * 2**20, "Longest request body.")
    receive_timeout: float = option(
        30.0, "Seconds in which a request must have come, and one more for every 4 KiB of its body; 0 is no limit."
    )
    timeout_keep_alive: float = option(75.0, "Seconds for which a connection without a request stays open.")
    shutdown_timeout: float = option(30.0, "Seconds that running requests may take to finish after SIGTERM.")
    log_interval: float = option(10.0, "Seconds between two lines about the engine's load; 0 is never.")
    disable_log_requests: bool = option(False, "Do not log a line for every request.")

    def __post_init__(self) -> None:
        bounds = (
            ("port", 0, 65535),
            ("max_queued_requests", 1, None),
            ("max_logprobs", 0, None),
            ("max_body_size", 1, None),
            ("receive_timeout", 0, _LONGEST),
            ("timeout_keep_alive", 0, _LONGEST),
            ("shutdown_timeout", 0, _LONGEST),
            ("log_interval", 0, _LONGEST),
        )
        for name, least, most in bounds:
            value = getattr(self, name)
            if not value >= least or (most is not None and value > most):
                upper = f" and at most {most}" if most is not None else ""
                raise ConfigError(f"{name} must be at least {least}{upper}, got {value!r}")
        if self.reasoning_parser is not None and self.reasoning_parser not in REASONING_PARSERS:
            raise ConfigError(f"unknown reasoning parser '{self.reasoning_parser}': choose one of {', '.join(REASONING_PARSERS)}")
        if self.tool_call_parser not in TOOL_CALL_PARSERS:
            raise ConfigError(f"unknown tool call parser '{self.tool_call_parser}': choose one of {', '.join(TOOL_CALL_PARSERS)}")
        if self.generation_config not in ("auto", "none"):
            raise ConfigError(f"unknown generation_config '{self.generation_config}': choose auto or none")
        keys = tuple(key.strip() for key in self.api_key)  # as they arrive: headers have no spaces at their ends
        if not all(key.isprintable() for key in keys):
            raise ConfigError("api_key has a character that no header can carry: write keys of letters, digits and signs")
        object.__setattr__(self, "api_key", keys)
        for name in ("api_key", "served_model_name"):
            if not all(getattr(self, name)):
                raise ConfigError(f"{name} must not be empty")
        for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
            object.__setattr__(self, name, _listed(name, getattr(self, name)))
        object.__setattr__(self, "allowed_origins", tuple(map(_origin, self.allowed_origins)))
        object.__setattr__(self, "allowed_methods", tuple(method.upper() for method in self.allowed_methods))
        if not self.allowed_origins and (self.allow_credentials, self.allowed_methods, self.allowed_headers) != (False, *_ALL):
            raise ConfigError(
                "allow_credentials, allowed_methods and allowed_headers say what allowed_origins may do: give these too"
            )

    def read_chat_template(self) -> str | None:
        """The text of the chat template that was named, if any.

        Raises:
            ConfigError: a file that is not there or is not text, or a template that no conversation can be put into.
        """
        template = self.chat_template
        if template is None:
            return None
        if "{" not in template:
            try:
                template = BUILT_IN_TEMPLATES.get(template, Path(template)).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"cannot read the chat template {self.chat_template}: {error}") from error
        from specontext.models.chat_template import flaw  # brings transformers, which takes seconds

        if why := flaw(template):
            name = shown(template) if template == self.chat_template else self.chat_template
            raise ConfigError(f"the chat template {name} cannot be used: {why}")
        return template


def _origin(text: str) -> str:
    """An origin as browsers write it, which compare letter by letter: in small letters, without the scheme's own port."""
    origin = _OWN_PORT.sub(r"\1", text.lower())
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise ConfigError(f"'{text}' in allowed_origins is not an origin: write * for any, or for example http://localhost:3000")
    return origin


def _listed(name: str, values: tuple[str, ...]) -> tuple[str, ...]:
    """The items of an option that may be repeated, or one JSON list, as vLLM has it."""
    if len(values) == 1 and values[0].lstrip().startswith("["):
        try:
            items = json.loads(values[0])
        except (ValueError, RecursionError):
            items = None
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{name} is not a JSON list of texts: {values[0]}")
        values = tuple(items)
    if not all(values):
        raise ConfigError(f"{name} must not be empty")
    return tuple(values)
