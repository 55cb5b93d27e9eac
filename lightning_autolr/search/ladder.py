"""Candidates of one length: climb until the best is bracketed, then ask a Gaussian process."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np

from lightning_autolr.core.losses import divergence_limit, paired
from lightning_autolr.core.requests import ProbeResult
from lightning_autolr.core.surrogate import FitError, Observation, Suggestion, observe, posterior, suggest

__all__ = ["Ladder"]


@dataclass
class Ladder:
    """Learning rates that were tried for the same number of steps.

    Args:
        low: lower bound.
        high: upper bound.
        step: ratio of neighbours while the best one is not bracketed, > 1.
        limit: a training loss above it is a divergence; None is found from the first candidate.
        widen_after: so many candidates that have not bracketed the best make the next ratio ``step`` squared: few of them shall
            be enough where they begin far off.
        results: what was tried.
    """

    low: float
    high: float
    step: float
    limit: float | None = None
    widen_after: int | None = None
    results: dict[float, ProbeResult] = field(default_factory=dict)

    def clip(self, lr: float) -> float:
        return min(max(lr, self.low), self.high)

    def add(self, lr: float, result: ProbeResult) -> None:
        if self.limit is None:
            self.limit = divergence_limit(result.losses)
        self.results[lr] = result

    @property
    def num_steps(self) -> int:
        return sum(r.num_steps for r in self.results.values())

    @property
    def best(self) -> float:
        """The best candidate; the lowest one when all failed."""
        return min(sorted(self.results), key=lambda lr: self.results[lr].loss)

    def climb(self) -> float | None:
        """The next neighbour, or None when the best candidate is bracketed (or stands at a bound).

        Upwards it goes until a candidate is worse than the best one by more than the noise: while a network does not learn yet,
        all low rates look alike. Downwards it goes only from one that is better than its neighbour by more than that.
        """
        lrs, best = sorted(self.results), self.best
        step = self.step if self.widen_after is None or len(lrs) < self.widen_after else self.step**2
        up = self.clip(lrs[-1] * step)
        if up > lrs[-1] and self._is_no_worse(lrs[-1]):
            return up
        down = self.clip(best / step)
        goes_down = best == lrs[0] and (len(lrs) == 1 or not self._is_no_worse(lrs[1]))
        return down if goes_down and down < best else None

    def between(self, gap: float) -> float | None:
        """The middle of the wider gap beside the best candidate, the upper one if they are alike; None when both its
        neighbours are within ``gap``."""
        lrs = sorted(self.results)
        i = lrs.index(self.best)
        beside = reversed(list(itertools.pairwise(lrs[max(0, i - 1) : i + 2])))
        low, high = max(beside, key=lambda pair: round(pair[1] / pair[0], 6), default=(1.0, 1.0))
        return math.sqrt(low * high) if high > gap * low else None

    def refine(self) -> Suggestion | None:
        """A candidate in the bracket that is expected to gain more than the noise, or None."""
        bracket = self._bracket()
        if bracket is None:
            return None
        suggestion = suggest(bracket, (bracket[0].lr, bracket[-1].lr), incumbent=self.best)
        noise = math.sqrt(max(o.variance or 0.0 for o in bracket))
        gain = suggestion.expected_improvement
        return suggestion if gain is None or gain > noise else None

    def choose(self, configured: float) -> tuple[float, str]:
        """The best learning rate, and why: a sentence, open at its end."""
        if not self.results:
            return self.clip(configured), "Nothing to choose from between equal bounds:"
        if not any(math.isfinite(r.loss) for r in self.results.values()):
            return min(self.results) / 10, f"All {len(self.results)} candidates diverged; a tenth of the lowest:"
        best = self.best
        bracket = self._bracket()
        if bracket is None:
            return best, f"The best of {len(self.results)} candidates:"
        bounds = bracket[0].lr, bracket[-1].lr
        lrs = [float(x) for x in np.geomspace(*bounds, 101)]
        try:
            mean = posterior(bracket, bounds, lrs).mean
        except FitError as error:
            return best, f"The best of {len(self.results)} candidates, as the surrogate failed ({error}):"
        return lrs[int(np.argmin(mean))], f"The minimum expected from {len(self.results)} candidates:"

    def _is_no_worse(self, lr: float) -> bool:
        """Than the best one, by more than two standard errors of the paired differences."""
        if not math.isfinite(self.results[lr].loss):
            return False
        best = self.results[self.best]
        mean, error = paired(best, self.results[lr])
        return mean <= min(2 * error, abs(best.loss))  # losses on their way to infinity differ greatly among themselves

    def _bracket(self) -> list[Observation] | None:
        """The best candidate with its neighbours; None when it has not got two."""
        lrs = sorted(self.results)
        i = lrs.index(self.best)
        return observe({lr: self.results[lr] for lr in lrs[i - 1 : i + 2]}) if 0 < i < len(lrs) - 1 else None
