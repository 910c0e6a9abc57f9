"""What breaks for single requests in a step, kept apart from what ends the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from specontext.core import SpeContextError
from specontext.engine.runner import DeviceError

NOBODYS = (DeviceError, torch.AcceleratorError)  # the device has failed, whatever request it was busy with


class RequestFailedError(SpeContextError):
    """Something broke while these requests ran; others are not concerned.

    Attributes:
        failures: what happened, by the requests' ids.
    """

    def __init__(self, failures: Mapping[str, Exception]) -> None:
        self.failures = dict(failures)
        super().__init__("; ".join(_sentence(name, error) for name, error in failures.items()))

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(self.failures)


class Failures:
    """Errors of one step by the ids of the requests that they belong to."""

    def __init__(self) -> None:
        self.found: dict[str, Exception] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.found

    def add(self, error: Exception, *request_ids: str) -> None:
        self.found |= dict.fromkeys(request_ids, error)

    @contextmanager
    def of(self, *request_ids: str) -> Iterator[None]:
        """Whatever breaks in this block has broken for these requests only, unless the device itself has failed."""
        try:
            yield
        except NOBODYS:
            raise
        except Exception as error:
            self.add(error, *request_ids)

    def take(self) -> Exception:
        """What was found, as one error: one that speaks for all failed requests as it is.

        It is to be raised as it is returned. A variable that held it, or this object if it still did, would be part of its
        traceback, and with the traceback it would keep the engine alive.
        """
        found, self.found = self.found, {}
        first = next(iter(found.values()))
        if isinstance(first, SpeContextError) and getattr(first, "request_ids", ()) == tuple(found):
            return first
        error = RequestFailedError(found)
        error.__cause__ = first
        return error


def describe(error: BaseException) -> str:
    """Kind and message of an error that was not made for users."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _sentence(name: str, error: Exception) -> str:
    return str(error) if isinstance(error, SpeContextError) else f"request {name} has failed: {describe(error)}"
