"""What breaks for single requests in a step, kept apart from what ends the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from specontext.errors import DeviceError, NamedRequestsError, RequestFailedError

NOBODYS = (DeviceError, torch.AcceleratorError)  # the device has failed, whatever request it was busy with


@dataclass(eq=False)
class Failures:
    """Errors of one step by the ids of the requests that they belong to."""

    found: dict[str, Exception] = field(default_factory=dict)

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
        if isinstance(first, NamedRequestsError) and first.request_ids == tuple(found):
            return first
        error = RequestFailedError(found)
        error.__cause__ = first
        return error
