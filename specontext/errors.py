"""Every error that loading a model, making an engine and running requests may raise. Messages say in one sentence what to do.

Tools have errors of their own (evaluation, distillation, the CLI), which nobody else raises or catches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LONGEST_SHOWN = 80  # characters of a value that an error quotes


def shown(value: object) -> str:
    """A value as errors quote it: whatever was given, in a few words."""
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST_SHOWN:  # Python refuses to write very large ones out
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes | list | tuple) and len(value) > LONGEST_SHOWN:
        head = repr(value[: LONGEST_SHOWN // 2]) if isinstance(value, str | bytes) else type(value).__name__
        return f"{head} ({len(value)} {'characters' if isinstance(value, str) else 'items'} in all)"
    text = repr(value)
    return text if len(text) <= 2 * LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} ..."


def which_prompt(number: int, count: int) -> str:
    """How an error begins that is about one of several prompts; nothing where there is only one."""
    return f"prompt {number} of {count}, counted from 0: " if count > 1 else ""


class SpeContextError(Exception):
    """Base of every error that a user's input can cause; its message says what to do."""


# What was asked for --------------------------------------------------------------------------------------------------------


class ConfigError(SpeContextError, ValueError):
    """A setting that cannot be honoured; the message says which one and what would work."""


class RequestError(SpeContextError, ValueError):
    """A request that cannot be served as asked."""


class ChatTemplateError(RequestError):
    """Messages that the chat template does not take.

    Attributes:
        message: number of the message at fault, from 0; None where it is not known or is the fault of several.
        tools: it is the tools that have no place.
    """

    def __init__(self, text: str, message: int | None = None, *, tools: bool = False) -> None:
        super().__init__(text)
        self.message, self.tools = message, tools


# What was to be read -------------------------------------------------------------------------------------------------------


class ModelError(SpeContextError):
    """A model that cannot be found, read or run; the message says why and what to do."""


class GGUFError(SpeContextError):
    """A GGUF file that cannot be found, read, converted or kept; the message says why and what to do."""


class HeadError(SpeContextError, ValueError):
    """A retrieval head that is missing, broken or made for another model."""


class HubError(SpeContextError, ValueError):
    """A data set of the Hub that cannot be had; the message says why and what would work."""


# Memory --------------------------------------------------------------------------------------------------------------------


class MemoryPlanError(SpeContextError):
    """The memory that was allowed cannot hold what was asked for; the message says how much is needed."""


class HostMemoryError(SpeContextError):
    """Host memory that was allowed cannot be had; the message says how much was asked and what to set."""


class OutOfPagesError(SpeContextError):
    """A pool has fewer free pages than were asked for; nothing was allocated.

    Attributes:
        pages: the allocator that has too few, where one is to blame.
    """

    def __init__(self, message: str, pages: object = None) -> None:
        super().__init__(message)
        self.pages = pages


class LoadError(SpeContextError):
    """A row in a slot differs from the host's (only found with `verify_loads`)."""


# A step that went wrong ----------------------------------------------------------------------------------------------------


class DeviceError(SpeContextError):
    """The device failed in a step, and no later step can be trusted; the message says what to do."""


class NamedRequestsError(SpeContextError):
    """What went wrong in a step concerns some requests only, which have ended; others go on.

    Attributes:
        request_ids: those requests.
    """

    def __init__(self, message: str, request_ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.request_ids = tuple(request_ids)

    @property
    def reasons(self) -> dict[str, Exception]:
        """What happened to each of them."""
        return dict.fromkeys(self.request_ids, self)


class DeviceMemoryError(NamedRequestsError):
    """The device had too little memory for a step; others may fit. Its requests are named once they are known."""


class LogitsError(NamedRequestsError):
    """The model produced logits from which no token can be chosen, for these requests."""

    def __init__(self, request_ids: Sequence[str]) -> None:
        super().__init__(
            f"the model produced values that are not numbers for {', '.join(request_ids)}: its weights are broken or the number "
            "format is too narrow; try dtype float32",
            request_ids,
        )


class NoTokenLeftError(LogitsError):
    """What these requests allow leaves no token to choose."""

    def __init__(self, request_ids: Sequence[str]) -> None:
        NamedRequestsError.__init__(
            self,
            f"no token is left to choose for {', '.join(request_ids)}: structured_outputs, allowed_token_ids, bad_words, "
            "logit_bias or min_tokens exclude them all",
            request_ids,
        )


class ConstraintError(SpeContextError):
    """An output cannot go on in its grammar."""


class RequestFailedError(NamedRequestsError):
    """Something broke while these requests ran; others are not concerned.

    Args:
        failures: what happened, by the requests' ids.
    """

    def __init__(self, failures: Mapping[str, Exception]) -> None:
        self.failures = dict(failures)
        super().__init__("; ".join(_sentence(name, error) for name, error in failures.items()), tuple(failures))

    @property
    def reasons(self) -> dict[str, Exception]:
        return self.failures


# An engine's life ----------------------------------------------------------------------------------------------------------


class EngineClosedError(SpeContextError):
    """An engine is asked for something after it was closed."""


class EngineDeadError(SpeContextError):
    """The engine's loop has ended; no request can be served any more."""


class RankError(SpeContextError):
    """One of the processes that share a model is gone, or cannot go on; the engine has ended with it."""


class QueueFullError(SpeContextError):
    """Too many requests wait already; try again later."""


def described(error: BaseException) -> str:
    """Kind and message of an error that was not made for users."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _sentence(name: str, error: Exception) -> str:
    return str(error) if isinstance(error, SpeContextError) else f"request {name} has failed: {described(error)}"
