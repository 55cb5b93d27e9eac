"""Candidates of one length, and where the best one lies: climb until it is bracketed, or ask a Gaussian process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_autolr.core.requests import ProbeResult
from lightning_autolr.core.surrogate import FitError, Observation, Suggestion, posterior, suggest
from lightning_autolr.search.ratchet import divergence_limit, paired

__all__ = ["Ladder", "Peak"]


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
        return sum(len(r.losses) for r in self.results.values())

    @property
    def has_finite(self) -> bool:
        return any(math.isfinite(r.loss) for r in self.results.values())

    @property
    def best(self) -> float:
        """The best candidate; the lowest one when all failed."""
        return min(sorted(self.results), key=lambda lr: self.results[lr].loss)

    def climb(self) -> float | None:
        """The next neighbour, or None when the best candidate is bracketed (or stands at a bound)."""
        lrs, best = sorted(self.results), self.best
        step = self.step if self.widen_after is None or len(lrs) < self.widen_after else self.step**2
        up = self.clip(best * step) if best == lrs[-1] and math.isfinite(self.results[best].loss) else best
        down = self.clip(best / step) if best == lrs[0] else best
        return next((lr for lr in (up, down) if lr != best), None)


@dataclass
class Peak:
    """The best learning rate of the long candidates, by one Gaussian process over (log learning rate, stage).

    The short ones are a stage of their own: their scores have another level and like higher rates, but say where not to look.

    Args:
        before: evaluation before any step. What ends worse than that is bad; how bad says nothing, so scores are cut off as far
            above it as the best one is below.
        short: candidates of few steps; there may be none.
        long: candidates of more steps.
    """

    before: ProbeResult
    short: Ladder
    long: Ladder

    @property
    def bounds(self) -> tuple[float, float]:
        """Where a candidate may lie: between the lowest and highest that were tried, or a step of the long ones outside."""
        tried = [*self.short.results, *self.long.results]
        best = self.long.best
        low, high = (self.long.clip(lr) for lr in (best / self.long.step**2, best * self.long.step**2))
        return min(low, *tried), max(high, *tried)

    def suggest(self) -> Suggestion | None:
        """The long candidate that is expected to gain the most on the best one; None when that is less than the noise."""
        low, high = self.bounds
        if low == high:
            return None
        observations = self._observations()
        suggestion = suggest(observations, (low, high), acquisition="ei", incumbent=self.long.best, stage=1)
        noise = _noise(self.long)
        return suggestion if suggestion.value is None or suggestion.value > noise else None

    def choose(self) -> tuple[float, str]:
        """The best learning rate between the best long candidate's neighbours, and why: a sentence, open at its end."""
        lrs = sorted(self.long.results)
        if not self.long.has_finite:
            return lrs[0] / 10, f"All {len(lrs)} candidates diverged; a tenth of the lowest:"
        if len(lrs) < 3:
            return self.long.best, f"The best of {len(lrs)} candidates:"
        i = lrs.index(self.long.best)
        between = [float(x) for x in np.geomspace(lrs[max(0, i - 1)], lrs[min(i + 1, len(lrs) - 1)], 101)]
        try:
            mean = posterior(self._observations(), self.bounds, between, stage=1).mean
        except FitError as error:
            return self.long.best, f"The best of {len(lrs)} candidates, as the surrogate failed ({error}):"
        return between[int(np.argmin(mean))], f"The minimum expected from {len(lrs)} candidates:"

    def _observations(self) -> list[Observation]:
        stages = enumerate((self.short, self.long))
        return [o for stage, ladder in stages if ladder.has_finite for o in _observations(ladder, self.before, stage)]


def _errors(ladder: Ladder) -> dict[float, float]:
    """Standard errors of the paired differences to the best candidate."""
    best = ladder.results[ladder.best]
    finite = {lr: r for lr, r in ladder.results.items() if math.isfinite(r.loss) and lr != ladder.best}
    return {lr: paired(best, result)[1] for lr, result in finite.items()}


def _noise(ladder: Ladder) -> float:
    return max(1e-9, float(np.median([*_errors(ladder).values()] or [0.0])))


def _observations(ladder: Ladder, before: ProbeResult, stage: int) -> Sequence[Observation]:
    """Scores with the noise of their paired differences to the best one, whose own is next to nothing."""
    best, noise = ladder.results[ladder.best].loss, _noise(ladder)
    worst = best + 2 * abs(before.loss - best) if math.isfinite(before.loss) else math.inf
    errors = {ladder.best: 0.1 * noise, **_errors(ladder)}
    return [
        Observation(
            lr, min(r.loss, worst) if math.isfinite(r.loss) else math.inf, max(errors.get(lr, noise), 1e-9) ** 2, stage
        )
        for lr, r in ladder.results.items()
    ]
