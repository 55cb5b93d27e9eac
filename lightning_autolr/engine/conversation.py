"""What the search and the run tell each other: on rank 0 the generator itself, on all ranks the record of it."""

from __future__ import annotations

from typing import Any

import torch

from lightning_autolr.core.record import Cost, Entry, Record
from lightning_autolr.core.requests import Answer, Probe, Request, Requests, Run, Train
from lightning_autolr.engine.randomness import RandomState
from lightning_autolr.engine.ranks import decide
from lightning_autolr.search.base import AbstractSearch, ReplayError, advance, difference, replay

__all__ = ["Conversation"]

_WITHOUT_STATE = (
    "To go on without the callback's state, take its entry out of `checkpoint['callbacks']` and save the file again: the steps "
    "left are then searched and planned anew."
)


class Conversation:
    """Asks the search for its next request and tells it the answers; a resumed run tells it all of them again.

    Args:
        strategy: the Trainer's; what rank 0 decides, all do.
        record: where everything is written down.
        cost: what the search used up so far.
        leftover: what a killed run found out after its last checkpoint.
    """

    def __init__(self, strategy: Any, record: Record, cost: Cost, leftover: list[Entry]) -> None:
        self._strategy, self._record, self._cost, self._leftover = strategy, record, cost, leftover
        self._requests: Requests | None = None
        self._request: Request | None = None

    def begin(
        self, search: AbstractSearch, run: Run, active: Train | None, may_change: bool, planned: int | None = None
    ) -> Train | None:
        """Start the search (on rank 0), or bring it to where the record ends.

        Args:
            search: the search.
            run: what it may know.
            active: the training under way in a resumed run.
            may_change: the search may ask for something else than ``active``: a schedule over another length of run.
            planned: steps for which a resumed run was planned when it began; None when nobody knows.

        Returns:
            The training to go on with; ``active``, if there is one and it did not change.

        Raises:
            ReplayError: the search asks for something else than what stands in the record.
        """
        self._requests = search.requests(run)
        try:
            self._request = replay(self._requests, [(e.request, e.answer) for e in self._record.trace])
            if active is None or self._request == active:
                return active
            if not may_change or self._record.trace or not isinstance(self._request, Train):
                raise ReplayError(
                    f"Expected the resumed search to go on with the training under way, got "
                    f"{difference(active, self._request)}. Resume with the same options and length of run."
                )
        except ReplayError as error:
            raise ReplayError(f"{_other_length(planned, run.total_steps)}{error} {_WITHOUT_STATE}") from None
        return self._request

    def next(self) -> Request | None:
        """What the search asks for, on every rank; None when it has ended."""
        request: Request | None = decide(self._strategy, self._request)
        return request

    def tell(self, request: Request, answer: Answer, global_step: int, seconds: float, fingerprint: str = "") -> None:
        """Write the answer down and give it to the search."""
        spent = self._cost.steps + self._cost.steps_undone
        self._record.add(Entry(request, answer, global_step, spent, seconds, fingerprint, self._cost.eval_batches))
        if self._requests is not None:
            random_state = RandomState(torch.device(self._strategy.root_device))
            self._request = advance(self._requests, answer)
            random_state.restore()  # fitting a surrogate may draw numbers, also between two real steps

    def known_answer(self, request: Request, global_step: int, fingerprint: str) -> Answer | None:
        """The answer of a probe that a killed run made from these very weights."""
        answer: Answer | None = decide(self._strategy, self._look_up(request, global_step, fingerprint))
        return answer

    def _look_up(self, request: Request, global_step: int, fingerprint: str) -> Answer | None:
        if isinstance(request, Train) or request.start is not None:
            return None
        if isinstance(request, Probe) and (request.keep_end or request.release):
            return None  # the state that belongs to it is gone
        for entry in self._leftover:
            same_place = entry.global_step == global_step and entry.fingerprint == fingerprint
            if same_place and entry.request == request:
                self._cost.steps = max(self._cost.steps, entry.search_steps - self._cost.steps_undone)
                self._cost.seconds += entry.seconds
                self._cost.eval_batches = max(self._cost.eval_batches, entry.eval_batches)
                return entry.answer
        return None


def _other_length(planned: int | None, now: int | None) -> str:
    if planned is None or planned == now:
        return ""
    return (
        f"The search planned for {planned:,} steps when it began, and the run is now of "
        f"{'unknown length' if now is None else f'{now:,}'}: a search keeps to the length that it began with. "
    )
