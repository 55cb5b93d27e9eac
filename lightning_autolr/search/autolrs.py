"""AutoLRS as we run it: search early, anneal slowly, undo what did harm."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from lightning_autolr.core.requests import Probe, ProbeResult, Request, Requests, Run, Train
from lightning_autolr.core.surrogate import FitError, Observation, posterior, suggest
from lightning_autolr.schedules import Constant, Linear, Rex, Schedule, WarmupStableDecay
from lightning_autolr.search.autowu import AutoWU
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.ratchet import LOOK, Ratchet, divergence_limit, paired

__all__ = ["AutoLRS", "Plan"]

_SHORTEST_PROBE = 20


@dataclass(frozen=True)
class Plan:
    """How the steps of a run are used.

    Args:
        probe_steps: steps of one candidate.
        max_probes: candidates, at most.
        stage_steps: real steps between two looks of the ratchet.
    """

    probe_steps: int
    max_probes: int
    stage_steps: int

    @property
    def search_steps(self) -> int:
        """Private steps, at most."""
        return self.probe_steps * self.max_probes


@dataclass(frozen=True)
class AutoLRS(AbstractSearch):
    r"""One search for the peak, then a warm-up and a slow anneal to zero, with a ratchet all along.

    1. **Search early.** Before the first step, candidates are trained privately on the same batches with their learning rate
       going linearly to zero, and scored by their loss on the same evaluation batches. From the configured learning rate
       the search climbs in factors of ``step`` until the best is bracketed, then a Gaussian process refines it; it stops
       when no candidate is expected to gain more than the evaluation's noise.
    2. **No later searches.** Short probes taken later only ever say "lower" (short-horizon bias, Wu et al. 2018, arXiv
       1803.02021). The peak is the best candidate divided by ``caution``, since a run is longer than a probe. After a warm-up
       it goes to zero over the last ``anneal_fraction`` of the run, by default along REX, which stays high for long.
    3. **The ratchet.** The loss on the evaluation batches is looked at forty times in a run. When it has not fallen below its
       lowest for ``patience`` looks while the learning rate is annealed, or when more than half of all that was gained is lost
       again, the stages since are undone: back to the weights that had the lowest, and the learning rate is divided by
       ``shrink`` from there on. It answers overfitting, which no short probe can see, and divergence. The run ends on the
       weights with the lowest loss.

    Differs from the paper (Jin et al., ICLR 2021, arXiv 2105.10762), which searches at every stage, at as many steps as it
    trains, for the lowest loss forecast to the stage's end; see :class:`~lightning_autolr.search.published.PublishedAutoLRS`.

    Args:
        tau: longest stage in steps, >= 1. Stages are shorter in short runs.
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
        ratchet: whether to undo stages.
        shrink: what the learning rate is divided by after an undo, > 1.
        patience: looks without a new lowest loss after which the ratchet acts, >= 1.
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
    ratchet: bool = True
    shrink: float = 2.0
    patience: int = 5
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
        if not (self.step > 1 and self.shrink > 1 and self.patience >= 1 and self.caution >= 1):
            raise ValueError(
                f"Expected step > 1, shrink > 1, patience >= 1 and caution >= 1, got {self.step=}, {self.shrink=}, "
                f"{self.patience=} and {self.caution=}."
            )

    def plan(self, total_steps: int | None) -> Plan:
        """How a run of ``total_steps`` is used; None: nobody knows how long it is.

        >>> AutoLRS().plan(8000)
        Plan(probe_steps=100, max_probes=8, stage_steps=200)
        """
        if total_steps is None:
            probe_steps = self.probe_steps or max(_SHORTEST_PROBE, self.tau // 10)
            return Plan(probe_steps, self.num_candidates, self.tau)
        share = int(self.search_budget * total_steps / self.num_candidates)
        shortest = max(1, min(_SHORTEST_PROBE, total_steps // 10))
        return Plan(
            self.probe_steps or max(shortest, share), self.num_candidates, self._guard().stage_steps(total_steps)
        )

    def describe(self, run: Run) -> str:
        """The plan and its cost."""
        plan = self.plan(run.total_steps)
        share = (
            ""
            if run.total_steps is None
            else f", {plan.search_steps / run.total_steps:.0%} of the run's {run.total_steps}"
        )
        looks = f"a look every {plan.stage_steps} steps" if self.ratchet else "no ratchet"
        end = "held to the end" if run.total_steps is None else f"the last {self.anneal_fraction:.0%} annealed to zero"
        return (
            f"at most {plan.max_probes} candidates of {plan.probe_steps} steps from lr {run.lr:.3g} on "
            f"({plan.search_steps} steps{share}), then {looks}, {end}."
        )

    def requests(self, run: Run) -> Requests:
        """Search for the peak, then train."""
        requests = self._requests(run)
        return self._guard().guard(requests, run) if self.ratchet else requests

    def _guard(self) -> Ratchet:
        return Ratchet(longest_stage=self.tau, patience=self.patience, shrink=self.shrink, evaluate=self.evaluate)

    def _requests(self, run: Run) -> Requests:
        if self.warmup is not None:
            found = yield from self.warmup.warmup(run)
            left = None if run.total_steps is None else run.total_steps - found.num_steps
            rest = replace(self, warmup=None, warmup_fraction=0.0, min_lr=found.bounds[0], max_lr=found.bounds[1])
            yield from rest._requests(replace(run, total_steps=left, lr=found.lr))
            return
        plan = self.plan(run.total_steps)
        if self.evaluate == "validation" and not run.has_validation:
            raise ValueError("Expected validation batches, got none. Use evaluate='holdout'.")
        tried = yield from self._search(run, plan)
        best_lr, reason = tried.choose(run.lr)
        peak = max(best_lr / self.caution, self.min_lr or 0.0)
        reason += f" {best_lr:.3g}, divided by {self.caution:g} since a run is longer than a probe."
        left = run.total_steps
        if left is not None and run.count_search:
            left = max(1, left - tried.num_steps)
        shape = Constant() if left is None else self._shape(left)
        yield Train(lr=peak, num_steps=left, shape=shape, stop_above=tried.limit, reason=reason)

    # -- the peak -----------------------------------------------------------------------------------------------------

    def _search(self, run: Run, plan: Plan) -> Generator[Request, Any, _Tried]:
        tried = _Tried(*self._bounds(run))
        lr: float | None = tried.clip(run.lr)
        while lr is not None and len(tried.results) < plan.max_probes and tried.low < tried.high:
            result: ProbeResult = yield Probe(
                lr=lr,
                num_steps=plan.probe_steps,
                draw=LOOK + 1,
                shape=Linear(),
                evaluate=self.evaluate,
                stop_above=tried.limit,
                label=f"candidate {len(tried.results) + 1} of at most {plan.max_probes}, lr {lr:.2g}",
            )
            tried.add(lr, result)
            lr = tried.climb(self.step) or tried.refine()
        return tried

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


@dataclass
class _Tried:
    """The candidates of the search."""

    low: float
    high: float
    results: dict[float, ProbeResult] = field(default_factory=dict)
    limit: float | None = None

    def clip(self, lr: float) -> float:
        return min(max(lr, self.low), self.high)

    def add(self, lr: float, result: ProbeResult) -> None:
        if self.limit is None:
            self.limit = divergence_limit(result.losses)
        self.results[lr] = result

    @property
    def num_steps(self) -> int:
        return sum(len(r.losses) for r in self.results.values())

    @property
    def best(self) -> float:
        """The best candidate; the lowest one when all failed."""
        return min(sorted(self.results), key=lambda lr: self.results[lr].loss)

    def climb(self, step: float) -> float | None:
        """The next neighbour, or None when the best candidate is bracketed (or stands at a bound)."""
        lrs = sorted(self.results)
        best = self.best
        if best == lrs[-1] < self.high and math.isfinite(self.results[best].loss):
            return self.clip(best * step)
        if best == lrs[0] > self.low:
            return self.clip(best / step)
        return None

    def refine(self) -> float | None:
        """A candidate in the bracket that is expected to gain more than the noise, or None."""
        bracket = self._bracket()
        if bracket is None:
            return None
        observations = self._observations(bracket)
        bounds = (bracket[0], bracket[-1])
        suggestion = suggest(observations, bounds, acquisition="ei", incumbent=self.best)
        noise = math.sqrt(max(o.variance or 0.0 for o in observations))
        return suggestion.lr if suggestion.value is None or suggestion.value > noise else None

    def choose(self, configured: float) -> tuple[float, str]:
        """The peak, and why."""
        if not any(math.isfinite(r.loss) for r in self.results.values()):
            lowest = min(self.results, default=self.clip(configured) * 10)
            return lowest / 10, f"All {len(self.results)} candidates diverged; a tenth of the lowest:"
        best = self.best
        bracket = self._bracket()
        if bracket is None:
            return best, f"The best of {len(self.results)} candidates:"
        lrs = [float(x) for x in np.geomspace(bracket[0], bracket[-1], 101)]
        try:
            mean = posterior(self._observations(bracket), (bracket[0], bracket[-1]), lrs).mean
        except FitError as error:
            return best, f"The best of {len(self.results)} candidates, as the surrogate failed ({error}):"
        return lrs[int(np.argmin(mean))], f"The minimum expected from {len(self.results)} candidates:"

    def _bracket(self) -> list[float] | None:
        """The best candidate with its neighbours; None when it has not got two."""
        lrs = sorted(self.results)
        i = lrs.index(self.best)
        return lrs[i - 1 : i + 2] if 0 < i < len(lrs) - 1 else None

    def _observations(self, lrs: Sequence[float]) -> list[Observation]:
        """Scores with the noise of their paired differences to the best one, whose own is next to nothing."""
        best = self.results[self.best]
        errors = {lr: paired(best, self.results[lr])[1] for lr in lrs if math.isfinite(self.results[lr].loss)}
        typical = max(float(np.median([e for lr, e in errors.items() if lr != self.best] or [0.0])), 1e-9)
        errors[self.best] = 0.1 * typical
        return [Observation(lr, self.results[lr].loss, max(errors.get(lr, typical), 1e-9) ** 2) for lr in lrs]
