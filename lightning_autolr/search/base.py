"""The one interface of all searches, and the replay of a recorded one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from lightning_autolr.core.requests import Answer, Request, Requests, Run

__all__ = ["AbstractSearch", "ReplayError", "replay"]


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


def replay(requests: Requests, record: Sequence[tuple[Request, Answer]]) -> Request | None:
    """Feed recorded answers to a new generator and return the request that comes next, or None when it has finished.

    Raises:
        ReplayError: the generator asks for something else than what was recorded.
    """
    request = next(requests, None)
    for number, (recorded, answer) in enumerate(record):
        if request != recorded:
            raise ReplayError(
                f"Expected request {number} of the resumed search to be the recorded one, {recorded}, got {request}. "
                "The options, the seed or the version of the search changed since the checkpoint was written: resume with "
                "the same ones, or start without the callback's state."
            )
        try:
            request = requests.send(answer)
        except StopIteration:
            request = None
    return request
