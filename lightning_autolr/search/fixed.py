"""A schedule that is known beforehand, as a search that asks for nothing but training."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_autolr.core.requests import Probe, Requests, Run, Train
from lightning_autolr.schedules import Schedule, Tabulated
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
    """

    schedule: Schedule
    peak_lr: float | None = None

    def requests(self, run: Run) -> Requests:
        if isinstance(self.schedule, Tabulated) and self.schedule.absolute:
            return self._segments(self.schedule)
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
            answer = yield Train(
                lr=segment.lr,
                num_steps=segment.num_steps,
                shape=segment.shape,
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
