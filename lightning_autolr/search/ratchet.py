"""The ratchet: training that takes back what did harm, around any search."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning_autolr.core.losses import divergence_limit
from lightning_autolr.core.requests import Probe, Request, Requests, Run, Status, Train, TrainResult, private_steps
from lightning_autolr.schedules import Constant, Schedule, Shifted
from lightning_autolr.search.base import AbstractSearch, advance
from lightning_autolr.search.looks import Finding, Looks

__all__ = ["LOOK", "Guarded", "Ratchet"]

_SHORTEST_STAGE = 10
LOOK = 0  # the draw of the ratchet's evaluations; AutoLRS trains candidates on the one after it


@dataclass(frozen=True)
class Ratchet:
    """Looks at the loss of the same evaluation batches now and then, keeps the weights that had the lowest, and goes back.

    It undoes the training since the lowest loss, and divides the learning rate by ``shrink`` until the search decides anew
    (asks for another learning rate, or has probed),

    - at once, when the training diverged, or more than half of all that was gained is lost again, in the looks and in the
      training losses alike;
    - when the median of the last ``patience`` looks is above that of the ``patience`` looks before, and the data are learnt by
      heart meanwhile: the training losses are clearly below the lowest look, or below what they were then. Where they are not,
      the looks jitter. Looks made while the learning rate is at its highest do not count: there losses jitter around a trend
      that they hide.

    Under batch normalisation it looks with statistics of the present weights (see ``Probe.update_bn``), since the running
    ones lag behind, and jitter. The run ends on the weights with the lowest loss: its last step goes back to them, unless the
    present ones are no worse with the statistics that both have. Undone steps count as steps of the run.
    It answers overfitting, which no short probe can see, and divergence.

    Args:
        num_looks: looks in a run of known length, >= 1; stages have at least ten steps.
        longest_stage: steps between two looks, at most, and when nobody knows how long the run is; >= 1.
        patience: see above, >= 1.
        shrink: see above, > 1.
        objective: what is looked at: "validation" batches, or training batches held out from probes ("holdout"); None is what
            the callback scores its candidates by, validation batches where there is nothing to say so.

    Raises:
        ValueError: an argument out of its range.
    """

    num_looks: int = 40
    longest_stage: int = 1000
    patience: int = 5
    shrink: float = 2.0
    objective: Literal["validation", "holdout"] | None = None

    def __post_init__(self) -> None:
        if self.num_looks < 1 or self.longest_stage < 1 or self.patience < 1 or not self.shrink > 1:
            raise ValueError(
                f"Expected num_looks, longest_stage and patience >= 1 and shrink > 1, got num_looks={self.num_looks!r}, "
                f"longest_stage={self.longest_stage!r}, patience={self.patience!r} and shrink={self.shrink!r}."
            )
        if self.objective not in ("validation", "holdout", None):
            raise ValueError(f"Expected objective to be 'validation', 'holdout' or None, got {self.objective!r}.")

    def stage_steps(self, total_steps: int | None) -> int:
        """Steps between two looks."""
        if total_steps is None:
            return self.longest_stage
        return min(self.longest_stage, max(_SHORTEST_STAGE, total_steps // self.num_looks))


@dataclass(frozen=True)
class Guarded(AbstractSearch):
    """A search with a ratchet around it: each real training is cut into stages that can be undone.

    The search inside learns nothing of it: it is told all losses, also of undone steps. Training that the search itself can
    undo (``keep_start``) and that diverges is its own affair.
    """

    search: AbstractSearch
    ratchet: Ratchet = Ratchet()

    def requests(self, run: Run) -> Requests:
        if self.ratchet.objective != "holdout" and not run.has_validation:
            raise ValueError("Expected validation batches for the ratchet, got none. Use Ratchet(objective='holdout').")
        watch, inner = _Watch(self.ratchet, run), self.search.requests(run)
        request = next(inner, None)
        while request is not None:
            request = advance(inner, (yield from watch.answer(request)))
        yield from watch.end()

    def describe(self, run: Run) -> str:
        plan = self.search.describe(run)
        return f"{plan} The ratchet looks every {self.ratchet.stage_steps(run.total_steps)} steps.".lstrip()


@dataclass
class _Made:
    """What a search is told of the training that it asked for, made in several pieces."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    start: str | None = None
    steps_left: int | None = None
    steps: int = 0
    skipped: list[int] = field(default_factory=list)

    def add(self, answer: TrainResult, steps: int) -> None:
        self.losses += answer.losses
        self.skipped += [self.steps + step for step in answer.skipped]
        self.grad_norms += answer.grad_norms
        self.steps_left = answer.steps_left
        self.steps += steps

    def result(self, status: Status = Status.OK) -> TrainResult:
        norms, skipped = tuple(self.grad_norms), tuple(self.skipped)
        return TrainResult(tuple(self.losses), status, self.start, norms, self.steps_left, skipped)


class _Watch:
    """Stands between a search and the run: answers the search's requests, and asks for looks and undos of its own."""

    def __init__(self, ratchet: Ratchet, run: Run) -> None:
        self._ratchet, self._run = ratchet, run
        self._stage_steps = ratchet.stage_steps(run.total_steps)
        self._left: float = math.inf if run.total_steps is None else run.total_steps
        self._since = 0  # steps since the last look
        self._looks: Looks | None = None  # none yet
        self._limit: float | None = None  # a training loss above it counts as diverged
        self._lowest: str | None = None  # the id of the weights that had the lowest loss ...
        self._is_lowest = False  # ... or: these are the present ones, not kept yet
        self._goes_back = ""  # why the next real step starts from the lowest; empty: it does not
        self._asked_lr: float | None = None  # of the training that the search asked for last ...
        self._scale = 1.0  # ... and what undos have made of it
        self._last_lr = 0.0  # of the last step

    def answer(self, request: Request) -> Generator[Request, Any, Any]:
        if isinstance(request, Train):
            return (yield from self._train(request))
        if self._goes_back and request.start is None:  # where the training will go on
            request = replace(request, start=self._lowest)
        self._asked_lr = None
        result = yield request
        if self._run.count_search:
            self._left -= private_steps(request, result)
        return result

    def end(self) -> Requests:
        """The search has nothing more to say; what is left of the run is not looked at."""
        if self._goes_back:
            yield Train(
                self._last_lr / self._ratchet.shrink,
                None,
                start=self._lowest,
                release=self._kept(),
                reason="Back to the lowest loss.",
            )
        elif self._lowest is not None:
            yield replace(self._look(), evaluate="none", release=self._kept())

    def _train(self, request: Train) -> Generator[Request, Any, TrainResult]:
        if self._looks is None:
            self._looks = Looks(self._ratchet.patience, (yield self._look()))
            self._is_lowest = True
        if self._is_lowest and (request.start is not None or request.keep_start):
            # The search inside keeps states of its own here; each keeps and releases its own.
            answer = yield replace(self._look(), evaluate="none", keep_end=True, release=self._kept())
            self._lowest, self._is_lowest = answer.end, False
        if request.lr != self._asked_lr:
            self._asked_lr, self._scale = request.lr, 1.0
        steps = self._left if request.num_steps is None else request.num_steps
        is_whole = steps >= self._left
        made, reason = _Made(), self._goes_back or request.reason
        while made.steps < steps:
            piece = self._piece(request, made.steps, self._until_look(steps - made.steps))
            stage = request.stage + (made.steps // self._stage_steps if is_whole else 0)
            answer = yield replace(piece, stage=stage, reason=reason)
            if request.keep_start and made.steps == 0:
                made.start = answer.start
            self._was_made(piece, answer)
            made.add(answer, _steps_of(piece, answer))
            diverged = answer.status is Status.DIVERGED
            if diverged and request.keep_start:
                self._since = 0
                return made.result(Status.DIVERGED)
            if diverged or self._left == 1 or 0 < self._stage_steps <= self._since:
                reason = yield from self._judge(diverged)
        return made.result()

    def _until_look(self, steps: float) -> int:
        """Steps to the next look. The last step of the run stands alone: before it the run can still go back."""
        if self._left <= 1:
            return 1
        room = self._stage_steps - self._since
        rest = min(steps, self._left - 1)
        return int(rest if rest < room + 0.6 * self._stage_steps else room)

    def _piece(self, request: Train, done: int, steps: int) -> Train:
        """The next ``steps`` of a request of which ``done`` are made."""
        is_last = steps == self._left
        keeps = self._is_lowest and not is_last
        is_first = done == 0
        return replace(
            request,
            lr=request.lr * self._scale,
            num_steps=steps,
            shape=_from(request.shape, done),
            momentum=None if request.momentum is None else _from(request.momentum, done),
            start=(request.start if is_first else None) or (self._lowest if self._goes_back else None),
            keep_start=keeps or (request.keep_start and is_first),
            stop_above=None if is_last else self._limit if request.stop_above is None else request.stop_above,
            diverges=None,
            goes_on=request.goes_on or not is_first,
            release=(*(request.release if is_first else ()), *(self._kept() if keeps or is_last else ())),
        )

    def _was_made(self, piece: Train, answer: TrainResult) -> None:
        assert self._looks is not None
        steps = _steps_of(piece, answer)
        is_last = piece.num_steps == self._left
        if self._is_lowest or is_last:
            self._lowest = None if is_last else answer.start
        self._is_lowest, self._goes_back = False, ""
        self._left -= steps
        self._since += steps
        at = sorted({*range(0, steps, max(1, steps // 8)), steps - 1})
        lrs = [piece.lr * piece.shape(step) for step in at]
        self._last_lr = lrs[-1]
        self._looks.add_training([lr / self._scale for lr in lrs], answer.losses)  # as the search wanted them
        if self._limit is None:
            self._limit = divergence_limit(answer.losses)

    def _judge(self, diverged: bool) -> Generator[Request, Any, str]:
        """Look, and decide whether to go back; returns why."""
        assert self._looks is not None
        finding = self._looks.judge(None if diverged else (yield self._look()))
        self._since = 0
        self._is_lowest = finding is Finding.LOWEST
        is_end = self._left <= 1 and finding is Finding.HIGHER
        if finding in (Finding.LOWEST, Finding.HIGHER) and not is_end:
            return str(finding.value)
        if self._left <= 1 and not diverged and self._lowest is not None and not (yield from self._kept_is_lower()):
            return "The end: as they are, the present weights are no worse."
        why = "The end" if is_end else finding.value
        self._goes_back = f"{why}: back to the lowest, at 1/{self._ratchet.shrink:g} of the learning rate."
        self._scale /= self._ratchet.shrink
        return self._goes_back

    def _look(self) -> Probe:
        evaluate = self._ratchet.objective or "validation"
        return Probe(lr=1.0, num_steps=0, draw=LOOK, evaluate=evaluate, update_bn=True, label="ratchet", kind="look")

    def _kept_is_lower(self) -> Generator[Request, Any, bool]:
        """Whether the kept weights have the lower loss as they are: the run may end with their running statistics."""
        as_it_is = replace(self._look(), update_bn=False)
        kept = yield replace(as_it_is, start=self._lowest)
        now = yield as_it_is
        return bool(kept.loss < now.loss)

    def _kept(self) -> tuple[str, ...]:
        return () if self._lowest is None else (self._lowest,)


def _from(schedule: Schedule, step: int) -> Schedule:
    return schedule if step == 0 or isinstance(schedule, Constant) else Shifted(schedule, step)


def _steps_of(piece: Train, answer: TrainResult) -> int:
    return piece.num_steps or 0 if answer.status is Status.OK else answer.num_steps
