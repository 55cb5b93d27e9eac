"""A schedule that is known beforehand, as a search that asks for nothing but training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

from lightning_autolr.core.requests import Probe, Requests, Run, Train
from lightning_autolr.schedules import Constant, Schedule, Tabulated
from lightning_autolr.schedules.tabulated import goes_back
from lightning_autolr.search.base import AbstractSearch

__all__ = ["Fixed"]


@dataclass(frozen=True)
class Fixed(AbstractSearch):
    """Train with ``peak_lr * schedule(step)``, or repeat a found schedule segment by segment.

    A found schedule (``Tabulated`` with absolute learning rates) is repeated with its undone segments: they are trained and
    taken back, as in the run that found it, so that the final weights are the same bits.

    Args:
        schedule: the schedule; one with an open number of steps is stretched over the run.
        peak_lr: learning rate at factor 1; None is the one configured in the module.

    Raises:
        ValueError: a table with undone segments within another schedule, which would train them and not take them back.
    """

    schedule: Schedule
    peak_lr: float | None = None

    def __post_init__(self) -> None:
        parts = tuple(s.shape for s in self.schedule.segments) if _is_found(self.schedule) else self.schedule
        if goes_back(parts):
            raise ValueError(
                "Expected a found schedule with undone segments by itself, which goes back where the search did, got it within "
                f"{self.schedule}, which would train the undone segments for good. Put `found.kept()` there: it has none."
            )

    def requests(self, run: Run) -> Requests:
        if _is_found(self.schedule):
            return self._segments(self.schedule.without_empty())
        return self._whole(run)

    def _whole(self, run: Run) -> Requests:
        schedule = self.schedule
        if not schedule.is_resolved:
            if run.total_steps is None:
                raise ValueError(
                    f"Expected a run of known length for {schedule}, got one without end. Set `max_steps` or `max_epochs`, "
                    "pass `total_steps=` to the callback, or give the schedule its own `num_steps`."
                )
            schedule = schedule.stretched(run.total_steps)
        lr = 1.0 if schedule.absolute else self.peak_lr or run.lr
        label = type(schedule).__name__
        yield Train(lr=lr, num_steps=None, shape=schedule, momentum=schedule.momentum_schedule(), label=label)

    def _segments(self, table: Tabulated) -> Requests:
        returned_to = {(s.back_to, s.as_left) for s in table.segments}
        states: dict[tuple[int, bool], str] = {}
        for index, segment in enumerate(table.segments):
            if (index, True) in returned_to:
                left = yield Probe(1.0, 0, evaluate="none", keep_end=True, stage=index, label="replay", kind="look")
                states[index, True] = left.end
            later = {(s.back_to, s.as_left) for s in table.segments[index + 1 :]}
            is_last = index == len(table.segments) - 1
            answer = yield Train(
                lr=segment.lr or 1.0,
                num_steps=None if is_last and not segment.diverged else segment.num_steps,  # past its end it goes on
                shape=segment.shape if segment.lr else Constant(0.0),  # a rate of 0 only a shape can have
                momentum=segment.momentum,
                start=None if segment.back_to is None else states[segment.back_to, segment.as_left],
                keep_start=(index, False) in returned_to,
                diverges=segment.diverged,
                goes_on=segment.goes_on,
                release=tuple(states.pop(i) for i in list(states) if i not in later),
                stage=index,
                label="replay",
            )
            if (index, False) in returned_to:
                states[index, False] = answer.start


def _is_found(schedule: Schedule) -> TypeGuard[Tabulated]:
    return isinstance(schedule, Tabulated) and schedule.absolute
