"""The ratchet: training that takes back what did harm, around any search."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any, Literal

from lightning_autolr.core.losses import divergence_limit, paired
from lightning_autolr.core.requests import (
    Probe,
    ProbeResult,
    Request,
    Requests,
    Run,
    Status,
    Train,
    TrainResult,
    private_steps,
)
from lightning_autolr.schedules import Constant, Schedule, Shifted
from lightning_autolr.search.base import AbstractSearch

__all__ = ["LOOK", "Guarded", "Ratchet"]

_SHORTEST_STAGE = 10
_BY_HEART = 0.15  # training losses are so much below the lowest look, or below what they were then, as a share of it
_LITTLE = 0.1  # of the first loss: while less has been gained, losing half of it means nothing
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
        evaluate: what is looked at: "validation" batches, or training batches held out from probes ("holdout"); None is what
            the callback scores its candidates by, validation batches where there is nothing to say so.

    Raises:
        ValueError: an argument out of its range.
    """

    num_looks: int = 40
    longest_stage: int = 1000
    patience: int = 5
    shrink: float = 2.0
    evaluate: Literal["validation", "holdout"] | None = None

    def __post_init__(self) -> None:
        if self.num_looks < 1 or self.longest_stage < 1 or self.patience < 1 or not self.shrink > 1:
            raise ValueError(
                f"Expected num_looks, longest_stage and patience >= 1 and shrink > 1, got {self.num_looks=}, "
                f"{self.longest_stage=}, {self.patience=} and {self.shrink=}."
            )
        if self.evaluate not in ("validation", "holdout", None):
            raise ValueError(f"Expected evaluate to be 'validation', 'holdout' or None, got {self.evaluate!r}.")

    def stage_steps(self, total_steps: int | None) -> int:
        """Steps between two looks."""
        if total_steps is None:
            return self.longest_stage
        return min(self.longest_stage, max(_SHORTEST_STAGE, total_steps // self.num_looks))

    def guard(self, requests: Requests, run: Run) -> Requests:
        """The same requests, with each real training cut into stages that can be undone.

        The search inside learns nothing of it: it is told all losses, also of undone steps. Training that the search itself
        can undo (``keep_start``) and that diverges is its own affair.
        """
        if self.evaluate != "holdout" and not run.has_validation:
            raise ValueError("Expected validation batches for the ratchet, got none. Use Ratchet(evaluate='holdout').")
        watch = _Watch(self, run)
        request = next(requests, None)
        while request is not None:
            answer = yield from watch.answer(request)
            try:
                request = requests.send(answer)
            except StopIteration:
                request = None
        yield from watch.end()


@dataclass(frozen=True)
class Guarded(AbstractSearch):
    """A search with a ratchet around it."""

    search: AbstractSearch
    ratchet: Ratchet = Ratchet()

    def requests(self, run: Run) -> Requests:
        return self.ratchet.guard(self.search.requests(run), run)

    def describe(self, run: Run) -> str:
        plan = self.search.describe(run)
        return f"{plan} The ratchet looks every {self.ratchet.stage_steps(run.total_steps)} steps.".lstrip()


@dataclass
class _TrainLosses:
    """Medians of the training losses between two looks each."""

    first: float | None = None
    best: float = math.inf
    last: float = math.inf
    at_lowest_look: float = math.inf
    since: list[float] = field(default_factory=list)

    def add(self, losses: Sequence[float]) -> None:
        self.since += losses
        if losses and self.first is None:
            self.first = losses[0]

    def look(self) -> float:
        """The median since the last look."""
        if self.since:
            self.last = median(self.since)
            self.best = min(self.best, self.last)
            self.since = []
        return self.last

    def are_lost(self) -> bool:
        """Whether more than half of what was gained is lost again."""
        return self.first is not None and not self.last <= self.best + max(0.0, 0.5 * (self.first - self.best))


@dataclass
class _Watch:
    """What the ratchet remembers."""

    ratchet: Ratchet
    run: Run
    first: ProbeResult | None = None
    best: ProbeResult | None = None
    state: str | None = None  # the id of the weights that had the lowest loss ...
    is_new: bool = False  # ... or: these are the present ones, not kept yet
    go_back: bool = False  # the next real step starts from ``state`` ...
    why: str = ""  # ... for this reason
    # (loss, median of the training losses before it) since the last undo, below the highest learning rate
    seen: list[tuple[float, float]] = field(default_factory=list)
    since: int = 0  # steps since the last look
    highest_lr: float = 0.0
    asked_lr: float | None = None  # of the last training
    scale: float = 1.0  # of that, after undos
    lr: float = 0.0  # of the last step, as the search wanted it ...
    last_lr: float = 0.0  # ... and as it was
    limit: float | None = None
    train_losses: _TrainLosses = field(default_factory=_TrainLosses)

    def __post_init__(self) -> None:
        self.left: float = math.inf if self.run.total_steps is None else self.run.total_steps
        self.stage_steps = self.ratchet.stage_steps(self.run.total_steps)

    def answer(self, request: Request) -> Generator[Request, Any, Any]:
        if isinstance(request, Train):
            return (yield from self._train(request))
        if self.go_back and request.start is None:  # where the training will go on
            request = replace(request, start=self.state)
        self.asked_lr = None
        result = yield request
        if self.run.count_search:
            self.left -= private_steps(request, result)
        return result

    def end(self) -> Requests:
        """The search has nothing more to say; what is left of the run is not looked at."""
        if self.go_back:
            yield Train(
                self.last_lr / self.ratchet.shrink,
                None,
                start=self.state,
                release=self._release(),
                reason="Back to the lowest loss.",
            )
        elif self.state is not None:
            yield replace(self._look(), evaluate="none", release=self._release())

    def _train(self, request: Train) -> Generator[Request, Any, TrainResult]:
        if self.first is None:
            self.first = self.best = yield self._look()
            self.is_new = True
        if self.is_new and (request.start is not None or request.keep_start):
            # The search inside keeps states of its own here; each keeps and releases its own.
            answer = yield replace(self._look(), evaluate="none", keep_end=True, release=self._release())
            self.state, self.is_new = answer.end, False
        steps = self.left if request.num_steps is None else request.num_steps
        is_whole = steps >= self.left
        if request.lr != self.asked_lr:
            self.asked_lr, self.scale = request.lr, 1.0
        done, reason = 0, self.why if self.go_back else request.reason
        losses: list[float] = []
        grad_norms: list[float] = []
        start: str | None = None
        while done < steps:
            piece = self._piece(steps - done)
            is_last = piece == self.left
            keeps = self.is_new and not is_last
            inner_start = request.start if done == 0 else None
            answer = yield replace(
                request,
                lr=request.lr * self.scale,
                num_steps=piece,
                shape=_from(request.shape, done),
                momentum=None if request.momentum is None else _from(request.momentum, done),
                start=inner_start or (self.state if self.go_back else None),
                keep_start=keeps or (request.keep_start and done == 0),
                stop_above=None if is_last else self.limit if request.stop_above is None else request.stop_above,
                goes_on=request.goes_on or done > 0,
                stage=request.stage + (done // self.stage_steps if is_whole else 0),
                reason=reason,
                release=(*(request.release if done == 0 else ()), *(self._release() if keeps or is_last else ())),
            )
            if done == 0 and request.keep_start:
                start = answer.start
            if keeps or is_last:
                self.state = answer.start if keeps else None
            made = piece if answer.status is Status.OK else len(answer.losses)
            losses += answer.losses
            grad_norms += answer.grad_norms
            self._has_made(request, done, made, answer.losses)
            self.last_lr = self.lr * self.scale
            done += made
            self.is_new = self.go_back = False
            if answer.status is Status.DIVERGED and request.keep_start:
                self.since = 0
                return TrainResult(tuple(losses), answer.status, start, tuple(grad_norms), answer.steps_left)
            if answer.status is Status.DIVERGED or self.left == 1 or 0 < self.stage_steps <= self.since:
                reason = self.why = self._judge((yield self._look()) if answer.status is Status.OK else None)
                is_asked = self.left <= 1 and self.go_back and self.state is not None and answer.status is Status.OK
                if is_asked and not (yield from self._kept_is_lower()):
                    self.go_back, reason = False, "The end: as they are, the present weights are no worse."
                self.scale /= self.ratchet.shrink if self.go_back else 1
        return TrainResult(tuple(losses), Status.OK, start, tuple(grad_norms), answer.steps_left)

    def _piece(self, steps: float) -> int:
        """Steps to the next look. The last step of the run stands alone: before it the run can still go back."""
        if self.left <= 1:
            return 1
        room = self.stage_steps - self.since
        rest = min(steps, self.left - 1)
        return int(rest if rest < room + 0.6 * self.stage_steps else room)

    def _has_made(self, request: Train, done: int, steps: int, losses: tuple[float, ...]) -> None:
        self.left -= steps
        self.since += steps
        at = {*range(done, done + steps, max(1, steps // 8)), done + steps - 1}
        lrs = [request.lr * request.shape(step) for step in sorted(at)]
        self.highest_lr = max(self.highest_lr, *lrs)
        self.lr = lrs[-1]
        self.train_losses.add(losses)
        if self.limit is None:
            self.limit = divergence_limit(losses)

    def _judge(self, after: ProbeResult | None) -> str:
        """Whether to go back, and why."""
        assert self.first is not None
        assert self.best is not None
        self.since = 0
        self.is_new = after is not None and after.loss < self.best.loss
        train_loss = self.train_losses.look()
        learnt = max(self.best.loss, self.train_losses.at_lowest_look)
        blew_up = after is None or not math.isfinite(after.loss)
        if after is not None and not blew_up:
            blew_up = self.train_losses.are_lost() and _is_lost(self.first, self.best, after)
        if self.lr >= self.highest_lr * (1 - 1e-9):
            self.seen = []
        elif after is not None:
            self.seen.append((after.loss, train_loss))
        overfits = not self.is_new and _overfits(self.seen, self.ratchet.patience, learnt)
        self.go_back = blew_up or overfits or (self.left <= 1 and not self.is_new)
        if self.is_new:
            self.best, self.train_losses.at_lowest_look = after, train_loss
            return "The loss fell."
        if not self.go_back:
            return "The loss was lower before, but not for long."
        self.seen = []
        why = "The loss blew up" if blew_up else "The data are learnt by heart" if overfits else "The end"
        return f"{why}: back to the lowest, at 1/{self.ratchet.shrink:g} of the learning rate."

    def _look(self) -> Probe:
        evaluate = self.ratchet.evaluate or "validation"
        return Probe(lr=1.0, num_steps=0, draw=LOOK, evaluate=evaluate, update_bn=True, label="ratchet", kind="look")

    def _kept_is_lower(self) -> Generator[Request, Any, bool]:
        """Whether the kept weights have the lower loss as they are: the run may end with their running statistics."""
        as_it_is = replace(self._look(), update_bn=False)
        kept = yield replace(as_it_is, start=self.state)
        now = yield as_it_is
        return bool(kept.loss < now.loss)

    def _release(self) -> tuple[str, ...]:
        return () if self.state is None else (self.state,)


def _from(schedule: Schedule, step: int) -> Schedule:
    return schedule if step == 0 or isinstance(schedule, Constant) else Shifted(schedule, step)


def _overfits(seen: Sequence[tuple[float, float]], window: int, learnt: float) -> bool:
    """Whether the last ``window`` looks are above the ``window`` before them, and the training losses far below ``learnt``."""
    if len(seen) < 2 * window:
        return False
    before, after = seen[-2 * window : -window], seen[-window:]
    rises = median(look for look, _ in after) > median(look for look, _ in before)
    return rises and fmean(train_loss for _, train_loss in after) < learnt - _BY_HEART * abs(learnt)


def _is_lost(first: ProbeResult, best: ProbeResult, after: ProbeResult) -> bool:
    """Whether more than half of all that was gained since the first look is lost again."""
    mean, error = paired(best, after)
    gained = first.loss - best.loss
    return mean > max(4 * error, 0.5 * gained, _LITTLE * abs(first.loss))
