"""AutoLRS as we run it: search early, anneal slowly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_autolr.core.requests import Probe, ProbeResult, Requests, Run, Train, TrainResult
from lightning_autolr.schedules import Linear, Rex, Schedule, Shifted, WarmupStableDecay
from lightning_autolr.search.autowu import AutoWU
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.ladder import Ladder
from lightning_autolr.search.ratchet import LOOK

__all__ = ["AutoLRS", "Plan"]

_SHORTEST_PROBE = 20


@dataclass(frozen=True)
class Plan:
    """How the steps of a run are used.

    Args:
        probe_steps: steps of one candidate.
        max_probes: candidates, at most.
    """

    probe_steps: int
    max_probes: int

    @property
    def search_steps(self) -> int:
        """Private steps, at most."""
        return self.probe_steps * self.max_probes


@dataclass(frozen=True)
class AutoLRS(AbstractSearch):
    r"""One search for the peak, then a warm-up and a slow anneal to zero.

    1. **Search early.** Before the first step, candidates are trained privately on the same batches with their learning rate
       going linearly to zero, and scored by their loss on the same evaluation batches. From the configured learning rate
       the search climbs in factors of ``step`` until the best is bracketed, then a Gaussian process refines it; it stops
       when no candidate is expected to gain more than the evaluation's noise.
    2. **No later searches.** Short probes taken later only ever say "lower" (short-horizon bias, Wu et al. 2018, arXiv
       1803.02021). The peak is the best candidate divided by ``caution``, since a run is longer than a probe. After a warm-up
       it goes to zero over the last ``anneal_fraction`` of the run, by default along REX, which stays high for long.

    The callback puts a :class:`~lightning_autolr.search.ratchet.Ratchet` around it, which answers what no short probe can see:
    overfitting, and a peak that is too high for a long run.

    Differs from the paper (Jin et al., ICLR 2021, arXiv 2105.10762), which searches at every stage, at as many steps as it
    trains, for the lowest loss forecast to the stage's end; see :class:`~lightning_autolr.search.published.PublishedAutoLRS`.

    Args:
        tau: steps of which a candidate gets a tenth when nobody knows the length of the run, >= 1.
        num_candidates: candidates of the search, at most, >= 1.
        min_lr: lower bound; None is far below the configured learning rate.
        max_lr: upper bound; None is far above it.
        search_budget: search steps as a share of the run's, in (0, 1).
        probe_steps: steps of one candidate; None divides the budget among the candidates.
        step: ratio of neighbouring candidates while the best is not bracketed, > 1.
        caution: what the best candidate's learning rate is divided by, >= 1: a run is longer than a probe, and longer runs want
            lower peaks.
        warmup_fraction: share of the run that goes linearly up to the peak, in [0, 1).
        anneal_fraction: share of the run at its end that goes to zero, in (0, 1].
        anneal: shape of the end, open in its number of steps.
        evaluate: "validation" batches, or training batches held out from the probes ("holdout").
        warmup: a search for the warm-up that goes first; the candidates then stay in the range that it found, and the
            warm-up of ``warmup_fraction`` is left out.

    Raises:
        ValueError: options out of range.
    """

    tau: int = 1000
    num_candidates: int = 8
    min_lr: float | None = None
    max_lr: float | None = None
    search_budget: float = 0.1
    probe_steps: int | None = None
    step: float = 3.0
    caution: float = 2.0
    warmup_fraction: float = 0.05
    anneal_fraction: float = 0.95
    anneal: Schedule = field(default=Rex())
    evaluate: Literal["validation", "holdout"] = "validation"
    warmup: AutoWU | None = None

    def __post_init__(self) -> None:
        if self.tau < 1 or self.num_candidates < 1:
            raise ValueError(f"Expected tau >= 1 and num_candidates >= 1, got {self.tau=} and {self.num_candidates=}.")
        for name in ("min_lr", "max_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Expected {name} > 0 or None, got {value!r}.")
        if self.min_lr is not None and self.max_lr is not None and not self.min_lr <= self.max_lr:
            raise ValueError(f"Expected min_lr <= max_lr, got {self.min_lr=} and {self.max_lr=}.")
        if not 0 < self.search_budget < 1:
            raise ValueError(f"Expected 0 < search_budget < 1, got {self.search_budget=}.")
        if self.probe_steps is not None and self.probe_steps < 1:
            raise ValueError(f"Expected probe_steps >= 1 or None, got {self.probe_steps=}.")
        if not (0 <= self.warmup_fraction < 1 and 0 < self.anneal_fraction <= 1):
            raise ValueError(
                f"Expected 0 <= warmup_fraction < 1 and 0 < anneal_fraction <= 1, got {self.warmup_fraction=} and "
                f"{self.anneal_fraction=}."
            )
        if not (self.step > 1 and self.caution >= 1):
            raise ValueError(f"Expected step > 1 and caution >= 1, got {self.step=} and {self.caution=}.")

    def plan(self, total_steps: int | None) -> Plan:
        """How a run of ``total_steps`` is used; None: nobody knows how long it is.

        >>> AutoLRS().plan(8000)
        Plan(probe_steps=100, max_probes=8)
        """
        if total_steps is None:
            steps = max(_SHORTEST_PROBE, self.tau // 10)
        else:
            share = int(self.search_budget * total_steps / self.num_candidates)
            steps = max(1, share, min(_SHORTEST_PROBE, total_steps // 40))
        return Plan(self.probe_steps or steps, self.num_candidates)

    def describe(self, run: Run) -> str:
        """The plan and its cost."""
        plan = self.plan(run.total_steps)
        share = (
            ""
            if run.total_steps is None
            else f", {plan.search_steps / run.total_steps:.0%} of the run's {run.total_steps}"
        )
        known, unknown = (
            f"the last {self.anneal_fraction:.0%} annealed to zero",
            "held until an end is known, then annealed",
        )
        end = unknown if run.total_steps is None else known
        return (
            f"at most {plan.max_probes} candidates of {plan.probe_steps} steps from lr {run.lr:.3g} on "
            f"({plan.search_steps} steps{share}); {end}."
        )

    def requests(self, run: Run) -> Requests:
        """Search for the peak, then train."""
        if self.warmup is not None:
            warm = yield from self.warmup.warmup(run)
            left = None if run.total_steps is None else run.total_steps - warm.num_steps
            rest = replace(self, warmup=None, warmup_fraction=0.0, min_lr=warm.bounds[0], max_lr=warm.bounds[1])
            yield from rest.requests(replace(run, total_steps=left, lr=warm.lr))
            return
        plan = self.plan(run.total_steps)
        if self.evaluate == "validation" and not run.has_validation:
            raise ValueError("Expected validation batches, got none. Use evaluate='holdout'.")
        ladder = Ladder(*self._bounds(run), self.step)
        lr: float | None = ladder.clip(run.lr)
        while lr is not None and len(ladder.results) < plan.max_probes and ladder.low < ladder.high:
            result: ProbeResult = yield Probe(
                lr=lr,
                num_steps=plan.probe_steps,
                draw=LOOK + 1,
                shape=Linear(),
                evaluate=self.evaluate,
                stop_above=ladder.limit,
                label=f"candidate {len(ladder.results) + 1} of at most {plan.max_probes}, lr {lr:.2g}",
            )
            ladder.add(lr, result)
            lr = ladder.climb() or ladder.refine()
        best, reason = ladder.choose(run.lr)
        peak = max(best / self.caution, self.min_lr or 0.0)
        reason += f" {best:.3g}, divided by {self.caution:g} since a run is longer than a probe."
        if run.total_steps is None:
            yield from self._open_ended(peak, reason, ladder.limit)
        else:
            left = max(1, run.total_steps - ladder.num_steps) if run.count_search else run.total_steps
            yield Train(lr=peak, num_steps=left, shape=self._shape(left), stop_above=ladder.limit, reason=reason)

    def _open_ended(self, peak: float, reason: str, limit: float | None) -> Requests:
        """Hold until somebody knows where the end is, then anneal over what is left."""
        piece = max(1, self.tau // 10)
        answer: TrainResult = yield Train(lr=peak, num_steps=piece, stop_above=limit, reason=reason)
        while answer.steps_left is None:
            answer = yield Train(lr=peak, num_steps=piece, stop_above=limit, reason="No end is known: hold.")
        done, left = 0, answer.steps_left
        while left > 0:  # an estimate: looked at again after each piece
            steps = left if left < 2 * piece else piece
            shape = Shifted(self.anneal.stretched(done + left), done)
            reason = f"The run has {left} steps left: anneal."
            answer = yield Train(lr=peak, num_steps=steps, shape=shape, stop_above=limit, reason=reason)
            done += steps
            left = left - steps if answer.steps_left is None else answer.steps_left

    def _bounds(self, run: Run) -> tuple[float, float]:
        reach = self.step**self.num_candidates
        low = self.min_lr if self.min_lr is not None else min(run.lr, self.max_lr or math.inf) / reach
        high = self.max_lr if self.max_lr is not None else max(run.lr, low) * reach
        return low, high

    def _shape(self, total: int) -> Schedule:
        return WarmupStableDecay(
            num_steps=total,
            num_warmup_steps=self.warmup_fraction,
            num_decay_steps=self.anneal_fraction,
            decay=self.anneal,
            start=0.1 if self.warmup_fraction else 1.0,  # no step at learning rate 0
        )
