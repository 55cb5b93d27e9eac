"""Refinement within one run, as a search that asks for nothing but training with its gradient norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_autolr.core.refine import refine_online
from lightning_autolr.core.requests import Requests, Run, Train
from lightning_autolr.schedules import Constant
from lightning_autolr.search.base import AbstractSearch

__all__ = ["OnlineRefined"]


@dataclass(frozen=True)
class OnlineRefined(AbstractSearch):
    """Every so often replan the rest of the run by :func:`~lightning_autolr.core.refine.refine_online`.

    Differs from Defazio et al. 2023 (arXiv 2310.07831): they refine from the norms of an earlier run. Here the last smoothed
    norm stands for all the norms to come.

    Args:
        peak_lr: learning rate at factor 1; None is the one configured in the module.
        norm: "l2" for SGD, "l1" for the Adam family.
        smoothing: width of the median filter as a share of the run, in [0, 1).
        every: share of the run between two plans, in (0, 1].
    """

    peak_lr: float | None = None
    norm: Literal["l1", "l2"] = "l2"
    smoothing: float = 0.1
    every: float = 0.01

    def __post_init__(self) -> None:
        if self.peak_lr is not None and not self.peak_lr > 0:
            raise ValueError(f"Expected peak_lr > 0 or None, got peak_lr={self.peak_lr!r}.")
        if not 0 < self.every <= 1:
            raise ValueError(f"Expected 0 < every <= 1, got every={self.every!r}.")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"Expected 0 <= smoothing < 1, got smoothing={self.smoothing!r}.")

    def requests(self, run: Run) -> Requests:
        if run.total_steps is None:
            raise ValueError(
                "Expected a run of known length to refine a schedule for, got one without end. Set `max_steps`."
            )
        peak, total = self.peak_lr or run.lr, run.total_steps
        piece = max(1, math.ceil(self.every * total))
        norms: list[float] = []
        factor: float | None = None
        while len(norms) < total:
            known = norms if any(0 < x < math.inf for x in norms) else [1.0] * len(norms)  # all batches were skipped
            plan = refine_online(known, total, previous=factor, norm=self.norm, smoothing=self.smoothing)
            num_steps = min(piece, total - len(norms))
            # a last step that stands alone has factor 0, which only a shape can have
            lr, shape = (peak * plan.lr, plan.shape) if plan.lr else (peak, Constant(0.0))
            answer = yield Train(lr, num_steps, shape, grad_norm=self.norm, stage=len(norms) // piece, label="refined")
            norms += answer.grad_norms
            factor = plan(num_steps - 1)
