"""A schedule that is known beforehand, written per optimizer step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_autolr.core.requests import Run
from lightning_autolr.engine.driver import SearchCallback
from lightning_autolr.schedules import Schedule, Tabulated
from lightning_autolr.search.fixed import Fixed

__all__ = ["ScheduleCallback"]


class ScheduleCallback(SearchCallback):
    """Drives the learning rate from a schedule, so that configs can compare schedules without touching the module.

    Steps are optimizer steps: accumulation is counted. Past its end a schedule stays at its last value; one that ends at 0
    trains nothing any more. When a run is resumed with another length, an open schedule is stretched over the new one.

    Args:
        schedule: any schedule, or one that a search found (``Tabulated.from_file(path)``), which is repeated bit for bit
            (unless a segment of it leaps, see :class:`~lightning_autolr.schedules.Segment`). Within another schedule it must
            not have undone segments: ``found.kept()`` has none.
        peak_lr: learning rate at factor 1; None is the one configured in the module. Unused by found schedules.
        options: see :class:`~lightning_autolr.engine.driver.SearchCallback`.

    Example::

        Trainer(callbacks=[ScheduleCallback(Rex(), peak_lr=0.1)])
    """

    scores_candidates = False

    def __init__(
        self,
        schedule: Schedule,
        peak_lr: float | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"Expected a Schedule, got {schedule!r}. For a file pass `Tabulated.from_file(path)`.")
        if peak_lr is not None and not peak_lr > 0:
            raise ValueError(f"Expected peak_lr > 0 or None, got {peak_lr=}.")
        Fixed(schedule, peak_lr)  # checks it, on every rank
        super().__init__(**options)
        self.schedule_to_follow = schedule
        self.peak_lr = peak_lr

    @override
    def make_search(self, run: Run) -> Fixed:
        followed = self.schedule_to_follow
        if isinstance(followed, Tabulated) and any(s.leaps for s in followed.segments):
            rank_zero_warn(
                f"{type(self).__name__} repeats the learning rates of a run that took up the ends of private probes (beam "
                "search with several states does): a replay has not made their steps, and ends with other weights."
            )
        if isinstance(followed, Tabulated) and run.total_steps not in (None, followed.length):
            rank_zero_warn(
                f"{type(self).__name__} repeats {followed.length} steps in a run of {run.total_steps}: a shorter run does not "
                "come to its end, and a longer one goes on at its last learning rate. Set `max_steps` to its length, or "
                f"stretch what it kept: `Tabulated.from_file(path, num_steps={run.total_steps})`."
            )
        return Fixed(followed, self.peak_lr)

    @property
    @override
    def searches(self) -> bool:
        followed = self.schedule_to_follow
        undoes = isinstance(followed, Tabulated) and any(s.back_to is not None for s in followed.segments)
        return undoes or self.ratchet is not None
