"""AutoLRS as published, with its bounds found when the user gives none."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from lightning_autolr.core.forecast import Estimator
from lightning_autolr.core.requests import Requests, Run
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.published import PublishedAutoLRS
from lightning_autolr.search.range_test import RangeTest

__all__ = ["PublishedInRange"]


@dataclass(frozen=True)
class PublishedInRange(AbstractSearch):
    """A range test where a bound is missing, then :class:`~lightning_autolr.search.published.PublishedAutoLRS`.

    The options are those of the published search; ``min_lr`` and ``max_lr`` may be None.
    """

    min_lr: float | None = None
    max_lr: float | None = None
    tau: int = 1000
    tau_max: int = 8000
    num_candidates: int = 10
    probe_fraction: float = 0.1
    kappa: float = 1e6
    objective: Literal["auto", "train", "validation", "holdout"] = "auto"
    estimator: Estimator = "bounded"
    warmup_steps: int = 0
    warmup_lr: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._search(self.min_lr or 1e-7, self.max_lr or 10.0)  # a wrong option shows here, not in an hour

    def describe(self, run: Run) -> str:
        test = "" if self.min_lr is not None and self.max_lr is not None else "a range test of 100 steps, then "
        return test + self._search(self.min_lr or 1e-7, self.max_lr or 10.0).describe(run)

    def requests(self, run: Run) -> Requests:
        low, high = self.min_lr, self.max_lr
        if low is None or high is None:
            found = (yield from RangeTest(repeats=1, seed=10**6 + self.seed).measure()).bounds
            low, high = low or min(found[0], high or found[1]), high or max(found[1], low or found[0])
        yield from self._search(low, high).requests(run)

    def _search(self, low: float, high: float) -> PublishedAutoLRS:
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("min_lr", "max_lr")}
        return PublishedAutoLRS(min_lr=low, max_lr=high, **options)
