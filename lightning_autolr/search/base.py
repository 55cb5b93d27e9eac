"""The one interface of all searches, and the replay of a recorded one."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_autolr.core.requests import Answer, Request, Requests, Run

__all__ = ["AbstractSearch", "ReplayError", "advance", "difference", "replay"]

_MOST_DIFFERENCES = 4  # of two requests, in a message


class AbstractSearch(ABC):
    """A frozen record of options plus one generator. It is deterministic: no clock, no global random numbers inside."""

    @abstractmethod
    def requests(self, run: Run) -> Requests:
        """Yield what to do next, receive what came of it. Called once, before the run's first step."""

    def describe(self, run: Run) -> str:
        """One sentence for the user before training: what will be done, at what cost. Empty when there is nothing to say."""
        return ""


class ReplayError(RuntimeError):
    """A recorded search cannot be continued by this one: their requests differ."""


def difference(recorded: Request | None, got: Request | None) -> str:
    """In what two requests differ, in a few words.

    >>> from lightning_autolr.core.requests import Probe
    >>> difference(Probe(0.1, 5, stage=1), Probe(0.2, 5, stage=2))
    'lr=0.2 (recorded: 0.1), stage=2 (recorded: 1)'
    >>> difference(Probe(0.1, 5), None)
    'no more request (recorded: Probe)'
    """
    if type(recorded) is not type(got):
        now, then = ("no more request" if r is None else type(r).__name__ for r in (got, recorded))
        return f"{now} (recorded: {then})"
    found = [f"{name}={_short(b)} (recorded: {_short(a)})" for name, a, b in _differing("", recorded, got)]
    return ", ".join(found[:_MOST_DIFFERENCES]) + (" and more" if len(found) > _MOST_DIFFERENCES else "")


def _differing(name: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """The innermost fields that are not equal, of those that are compared."""
    if type(a) is type(b) and dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            if field.compare:
                inner = f"{name}.{field.name}" if name else field.name
                yield from _differing(inner, getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differing(f"{name}[{i}]", x, y)
    elif a != b:
        yield name, a, b


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def advance(requests: Requests, answer: Answer) -> Request | None:
    """Give a search an answer; returns its next request, or None when it has ended."""
    try:
        return requests.send(answer)
    except StopIteration:
        return None


def replay(requests: Requests, record: Sequence[tuple[Request, Answer]]) -> Request | None:
    """Feed recorded answers to a new generator and return the request that comes next, or None when it has finished.

    Raises:
        ReplayError: the generator asks for something else than what was recorded.
    """
    request = next(requests, None)
    for number, (recorded, answer) in enumerate(record):
        if request != recorded:
            raise ReplayError(
                f"Expected request {number} of the resumed search to be the recorded one, got "
                f"{difference(recorded, request)}. The options, the seed or the version of the search changed since the "
                "checkpoint was written, or the length of the run: resume with the same ones."
            )
        request = advance(requests, answer)
    return request
