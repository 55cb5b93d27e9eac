"""AutoLRS as we run it: search early, anneal slowly."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from lightning_autolr.core.requests import Probe, ProbeResult, Request, Requests, Run, Train, TrainResult
from lightning_autolr.schedules import Linear, Rex, Schedule, Shifted, WarmupStableDecay
from lightning_autolr.search.autowu import AutoWU
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.ladder import Ladder
from lightning_autolr.search.ratchet import LOOK

__all__ = ["AutoLRS", "Plan"]

_ENOUGH = 50  # steps: below, candidates see little but the first plateau of the loss, and like too high a rate ...
_SHORT_PROBE = 10  # ... but a short run has no more than this for one
_COARSE_STEP = 10.0
_LEAVES = 0.1  # of the first loss is gone: the network has left that plateau, and the candidate was long enough
_BUDGET = 0.05
_DRAW = LOOK + 1  # of all candidates
_MOST_COARSE = 8
_COARSE_PROBE = 10  # steps at least, in runs that are not short
_FEWEST = 2  # steps of a candidate that is scored by its training losses: the first one comes before any step
_STEADY = 10  # steps of a candidate: below, the training losses of its second half are too few
_OF_FRESH, _OF_TRAINED = 2.0, 0.5  # networks: what a peak that a short probe found best is divided by
_SHORTER = 0.2  # exponent: the fewer steps a candidate has, and the less of the run it is, the higher the rate it likes
_LEARNT = 0.5  # of the loss of permuted weights is gone: the network is trained
_SHORT_RUN = 400  # steps: below, there is one ladder only, in factors of ten


@dataclass(frozen=True)
class Plan:
    """How the steps of a run are used.

    Args:
        coarse_steps: steps of one coarse candidate; 0: there are none.
        probe_steps: steps of one candidate, if all coarse ones are needed; else they have more.
        max_probes: candidates, at most.
    """

    coarse_steps: int
    probe_steps: int
    max_probes: int

    @property
    def asks(self) -> bool:
        """Whether one more step finds out if the network is trained already."""
        return self.probe_steps >= _STEADY

    @property
    def search_steps(self) -> int:
        """Private steps, at most."""
        return _MOST_COARSE * self.coarse_steps + self.probe_steps * self.max_probes + self.asks


@dataclass(frozen=True)
class AutoLRS(AbstractSearch):
    r"""One search for the peak, then a warm-up and a slow anneal to zero.

    1. **Search early.** Before the first step, candidates are trained privately on the same batches with their learning rate
       going linearly to zero, and scored by the training losses of the second half of their steps: that costs nothing, and is
       steadier than one validation at their end. Short, coarse ones find the order of magnitude: from the configured learning
       rate on, in factors of ten. If the network is trained already, or has learnt something in the best of them (a tenth of
       its first loss is gone), they were long enough: one or two more between the best and its neighbours, and that is all.
       Else, from a little below the best, few long ones climb in factors of ``step`` until the best is bracketed, then a
       Gaussian process refines it; it stops when no candidate is expected to gain more than the scores' noise.
    2. **No later searches.** Short probes taken later only ever say "lower" (short-horizon bias, Wu et al. 2018, arXiv
       1803.02021). The peak is the best candidate's learning rate divided by ``caution``, since a run is longer than a probe:
       at least halved for a fresh network, which a high rate helps off its first plateau, doubled for one that is trained
       already, as in fine-tuning, of which short probes say "lower". It is trained when its first loss is less than half of
       that of the same weights in another order. After a warm-up the learning rate goes to zero over the last
       ``anneal_fraction`` of the run, by default along REX, which stays high for long.

    The callback puts a :class:`~lightning_autolr.search.ratchet.Ratchet` around it, which answers what no short probe can see:
    overfitting, and a peak that is too high for a long run.

    Differs from the paper (Jin et al., ICLR 2021, arXiv 2105.10762), which searches at every stage, at as many steps as it
    trains, for the lowest loss forecast to the stage's end; see :class:`~lightning_autolr.search.published.PublishedAutoLRS`.

    Args:
        tau: a run of unknown length is searched as if it had ten times as many steps, >= 1.
        num_candidates: candidates after the coarse ones, at most, >= 1.
        min_lr: lower bound; None is far below the configured learning rate.
        max_lr: upper bound; None is far above it.
        search_budget: search steps as a share of the run's, at most, in (0, 1). None is 1 % where the coarse candidates have
            learnt something, about a twentieth where they have not, and more in runs of less than 5,000 steps: 4 and 19 %
            of 1,000, 20 % of 200, 26 % of 160.
        coarse_steps: steps of one coarse candidate, >= 0; None is a 500th of the run, 10 at least. In runs of less than 400 the
            long candidates are coarse ones, too: they begin at the configured learning rate and climb in factors of ten. With
            0 there are no coarse ones.
        probe_steps: steps of one of the others; None divides among them what is left of the budget.
        step: ratio of their neighbours while the best is not bracketed, > 1; ten in runs of less than 400 steps. Where coarse
            ones are enough, others are tried between them until the best one's neighbours are within the square of it.
        caution: what the best candidate's learning rate is divided by, > 0. None is 1/2 for a network that is trained already
            (one more private step finds out, where candidates have ten steps or more). For a fresh one it is 2, times
            (50 / steps)^0.2 for candidates of less than 50 steps (in runs of less than 1,250: of a 25th), times
            (share / 0.01)^-0.2 for those of less than a hundredth of the run: 2.6 for ten steps of 1,000, 3.8 for ten of 5,000.
        warmup_fraction: share of the run that goes linearly up to the peak, in [0, 1).
        anneal_fraction: share of the run at its end that goes to zero, in (0, 1].
        anneal: shape of the end, open in its number of steps.
        objective: what scores a candidate: its own "train"ing losses, the "validation" batches, or training batches held out
            from the probes ("holdout"). None is "train", and "validation" for candidates of less than ten steps, as in runs of
            less than 160.
        warmup: a search for the warm-up that goes first; the candidates then stay in the range that it found, and the
            warm-up of ``warmup_fraction`` is left out.

    Raises:
        ValueError: options out of range.
    """

    tau: int = 1000
    num_candidates: int = 4
    min_lr: float | None = None
    max_lr: float | None = None
    search_budget: float | None = None
    coarse_steps: int | None = None
    probe_steps: int | None = None
    step: float = 2.5
    caution: float | None = None
    warmup_fraction: float = 0.1
    anneal_fraction: float = 0.9
    anneal: Schedule = field(default=Rex())
    objective: Literal["train", "validation", "holdout"] | None = None
    warmup: AutoWU | None = None

    def __post_init__(self) -> None:
        if self.tau < 1 or self.num_candidates < 1:
            raise ValueError(
                f"Expected tau >= 1 and num_candidates >= 1, got tau={self.tau!r} and num_candidates={self.num_candidates!r}."
            )
        for name in ("min_lr", "max_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Expected {name} > 0 or None, got {value!r}.")
        if self.min_lr is not None and self.max_lr is not None and not self.min_lr <= self.max_lr:
            raise ValueError(f"Expected min_lr <= max_lr, got min_lr={self.min_lr!r} and max_lr={self.max_lr!r}.")
        if self.search_budget is not None and not 0 < self.search_budget < 1:
            raise ValueError(f"Expected 0 < search_budget < 1 or None, got search_budget={self.search_budget!r}.")
        if self.probe_steps is not None and self.probe_steps < 1:
            raise ValueError(f"Expected probe_steps >= 1 or None, got probe_steps={self.probe_steps!r}.")
        if self.objective == "train" and 1 in (self.probe_steps, self.coarse_steps):
            raise ValueError(f"Expected candidates of {_FEWEST} steps or more with objective='train', got {self!r}.")
        if self.coarse_steps is not None and self.coarse_steps < 0:
            raise ValueError(f"Expected coarse_steps >= 0 or None, got coarse_steps={self.coarse_steps!r}.")
        if not (0 <= self.warmup_fraction < 1 and 0 < self.anneal_fraction <= 1):
            raise ValueError(
                f"Expected 0 <= warmup_fraction < 1 and 0 < anneal_fraction <= 1, got "
                f"warmup_fraction={self.warmup_fraction!r} and "
                f"anneal_fraction={self.anneal_fraction!r}."
            )
        if not (self.step > 1 and (self.caution is None or 0 < self.caution < math.inf)):
            raise ValueError(
                f"Expected step > 1 and caution > 0 or None, got step={self.step!r} and caution={self.caution!r}."
            )

    def plan(self, total_steps: int | None) -> Plan:
        """How a run of ``total_steps`` is used; None: nobody knows how long it is.

        >>> AutoLRS().plan(8000)
        Plan(coarse_steps=16, probe_steps=67, max_probes=4)
        """
        length = self._length(total_steps)
        coarse = max(_COARSE_PROBE, length // 500)
        if self.coarse_steps is not None:
            coarse = self.coarse_steps
        elif self._is_short(length):
            coarse = 0
        elif self.search_budget is not None:  # the long candidates get three quarters of it and more
            coarse = min(coarse, int(self.search_budget * length / (4 * _MOST_COARSE)))
            if self.objective == "train" and coarse < _FEWEST:
                coarse = 0
        return Plan(coarse, self._probe_steps(length, _MOST_COARSE * coarse), self.num_candidates)

    def _is_short(self, length: int) -> bool:
        """Whether one ladder has to find the order of magnitude, and the peak too."""
        return length < _SHORT_RUN and self.coarse_steps is None

    def _length(self, total_steps: int | None) -> int:
        return 10 * self.tau if total_steps is None else total_steps

    def _probe_steps(self, length: int, used: int) -> int:
        """Steps of a long candidate when short ones took ``used``."""
        if self.probe_steps is not None:
            return self.probe_steps
        budget = _BUDGET if self.search_budget is None else self.search_budget
        share = int((budget * length - used - 1) / self.num_candidates)  # one step tells whether the network is trained
        if self.search_budget is not None:
            shortest = 1
        elif self._is_short(length):
            shortest = min(_SHORT_PROBE, length // 16)
        else:
            shortest = self._enough(length)
        return max(_FEWEST if self.objective == "train" else 1, share, shortest)

    def _enough(self, length: int) -> int:
        """Steps with which a candidate of a run of this length sees what it likes."""
        return min(_ENOUGH, length // 25)

    def describe(self, run: Run) -> str:
        """The plan and its cost."""
        if self.warmup is not None:
            searched = replace(self, warmup=None, coarse_steps=0).describe(run)
            return f"AutoWU finds the warm-up and where to begin; then {searched}"
        plan = self._scored(run).plan(run.total_steps)
        share = (
            ""
            if run.total_steps is None
            else f", {plan.search_steps / run.total_steps:.0%} of the run's {run.total_steps}"
        )
        known, unknown = (
            f"the last {min(self.anneal_fraction, 1 - self.warmup_fraction):.0%} annealed",
            "held until an end is known, then annealed",
        )
        end = unknown if run.total_steps is None else known
        coarse = f"at most {_MOST_COARSE} candidates of {plan.coarse_steps} steps for its order of magnitude, then "
        long = f"at most {plan.max_probes} {'longer ones' if plan.coarse_steps else 'candidates'} of {plan.probe_steps} steps"
        long += " if these learn nothing yet" if plan.coarse_steps else ""
        return (
            f"the peak is looked for from lr {run.lr:.3g} on: {coarse if plan.coarse_steps else ''}{long} "
            f"(in all at most {plan.search_steps} steps{share}); {end}."
        )

    def requests(self, run: Run) -> Requests:
        """Search for the peak, then train."""
        if self.warmup is not None:
            warm = yield from self.warmup.warmup(run)
            left = None if run.total_steps is None else run.total_steps - warm.num_steps
            low = max(warm.bounds[0], self.min_lr or 0.0)
            high = max(low, min(warm.bounds[1], self.max_lr or math.inf))
            caution = self.caution or _OF_FRESH  # what it has learnt in the warm-up is not what is meant by trained
            rest = replace(
                self, warmup=None, warmup_fraction=0.0, caution=caution, coarse_steps=0, min_lr=low, max_lr=high
            )
            yield from rest.requests(replace(run, total_steps=left, lr=warm.lr))
            return
        if self.objective == "validation" and not run.has_validation:
            raise ValueError("Expected validation batches, got none. Use objective='train' or 'holdout'.")
        if (scored := self._scored(run)) != self:
            yield from scored.requests(run)
            return
        plan, length = self.plan(run.total_steps), self._length(run.total_steps)
        coarse = self._ladder(run.lr, _COARSE_STEP, _MOST_COARSE)
        if plan.coarse_steps:
            yield from self._try(coarse, run.lr, plan.coarse_steps, _MOST_COARSE, "coarse")
        permuted = yield from self._permuted(coarse, plan)
        trained = _is_trained(coarse, permuted)
        if trained or _learns(coarse):
            ladders, num_steps = [coarse], plan.coarse_steps
            yield from self._close_in(coarse, num_steps)
        else:
            start = coarse.best / self.step if coarse.results else run.lr  # longer candidates like lower rates
            ladders = [coarse, self._longer_ladder(start, length, coarse.limit)]
            num_steps = self._probe_steps(length, len(coarse.results) * plan.coarse_steps)
            yield from self._try(ladders[1], start, num_steps, self.num_candidates, "candidate")
            permuted = permuted or (yield from self._permuted(ladders[1], plan))
        found = ladders[-1]
        best, reason = found.choose(run.lr)
        caution, why = self._caution(num_steps, length, _is_trained(found, permuted))
        lr = min(max(best / caution, self.min_lr or 0.0), self.max_lr or math.inf)
        reason += f" {best:.3g}, divided by {caution:.3g} {why}."
        if run.total_steps is None:
            yield from self._open_ended(lr, reason, found.limit)
        else:
            searched = sum(ladder.num_steps for ladder in ladders) + (permuted.num_steps if permuted else 0)
            left = max(1, run.total_steps - (searched if run.count_search else 0))
            yield Train(lr, left, self._shape(left), stop_above=found.limit, reason=reason)

    def _scored(self, run: Run) -> AutoLRS:
        """Without validation batches, short candidates too are scored by their training losses."""
        return self if self.objective or run.has_validation else replace(self, objective="train")

    def _ladder(
        self, start: float, step: float, most: int, limit: float | None = None, widen_after: int | None = None
    ) -> Ladder:
        """Between the bounds; where there are none, as far as ``most`` candidates can go."""
        reach = step ** (2 * most)
        low = self.min_lr if self.min_lr is not None else min(start, self.max_lr or math.inf) / reach
        high = self.max_lr if self.max_lr is not None else max(start, low) * reach
        return Ladder(low, high, step, limit, widen_after)

    def _longer_ladder(self, start: float, length: int, limit: float | None) -> Ladder:
        if self._is_short(length):
            return self._ladder(start, _COARSE_STEP, self.num_candidates)
        return self._ladder(start, self.step, self.num_candidates, limit, widen_after=3)

    def _try(
        self, ladder: Ladder, start: float, num_steps: int, most: int, kind: Literal["candidate", "coarse"]
    ) -> Requests:
        """Candidates until the best is bracketed, and then, if not coarse, until the Gaussian process expects no gain."""
        name = "coarse candidate" if kind == "coarse" else "candidate"
        lr: float | None = ladder.clip(start)
        note = ""
        while lr is not None and len(ladder.results) < most and ladder.low < ladder.high:
            label = f"{name} {len(ladder.results) + 1} of at most {most}, lr {lr:.2g}{note}"
            yield from self._probe(ladder, lr, num_steps, label, kind)
            lr = ladder.climb()
            if lr is None and kind == "candidate" and (suggestion := ladder.refine()) is not None:
                lr, note = suggestion.lr, suggestion.reason and f" ({suggestion.reason})"

    def _close_in(self, ladder: Ladder, num_steps: int) -> Requests:
        """Candidates between the best one and its neighbours, no more of them than there would be long ones."""
        for _ in range(self.num_candidates):
            if (lr := ladder.between(self.step**2)) is None:
                return
            yield from self._probe(ladder, lr, num_steps, f"coarse candidate between two others, lr {lr:.2g}", "coarse")

    def _probe(
        self, ladder: Ladder, lr: float, num_steps: int, label: str, kind: Literal["candidate", "coarse"]
    ) -> Requests:
        result: ProbeResult = yield Probe(
            lr=lr,
            num_steps=num_steps,
            draw=_DRAW,
            shape=Linear(),
            evaluate=self.objective or ("train" if num_steps >= _STEADY else "validation"),
            stop_above=ladder.limit,
            label=label,
            kind=kind,
        )
        ladder.add(lr, result)

    def _permuted(self, ladder: Ladder, plan: Plan) -> Generator[Request, Any, ProbeResult | None]:
        """One step from permuted weights, which shows whether the network is trained; None where nobody wants to know."""
        if self.caution is not None or not (ladder.results and plan.asks):
            return None
        permuted: ProbeResult = yield Probe(
            lr=ladder.best, num_steps=1, draw=_DRAW, evaluate="none", permuted=True, label="check for trained weights"
        )
        return permuted

    def _caution(self, num_steps: int, length: int, trained: bool) -> tuple[float, str]:
        """What the learning rate of the best candidate is divided by, and why."""
        if self.caution is not None:
            return self.caution, "as configured"
        if trained:
            return _OF_TRAINED, "since short probes of a trained network like too low a rate"
        lacks = max(1.0, self._enough(length) / num_steps) * max(1.0, 0.01 * length / num_steps)
        return _OF_FRESH * lacks**_SHORTER, "since a run is longer than a probe"

    def _open_ended(self, peak: float, reason: str, limit: float | None) -> Requests:
        """Hold until somebody knows where the end is, then anneal over what is left."""
        piece = max(1, self.tau // 10)
        answer: TrainResult = yield Train(lr=peak, num_steps=piece, stop_above=limit, reason=reason)
        while answer.steps_left is None:
            answer = yield Train(
                lr=peak, num_steps=piece, stop_above=limit, goes_on=True, reason="No end is known: hold."
            )
        done, left = 0, answer.steps_left
        while left > 0:  # an estimate: looked at again after each piece
            steps = left if left < 2 * piece else piece
            shape = Shifted(self.anneal.stretched(done + left), done)
            reason = f"The run has {left} steps left: anneal."
            answer = yield Train(lr=peak, num_steps=steps, shape=shape, stop_above=limit, goes_on=True, reason=reason)
            done += steps
            left = left - steps if answer.steps_left is None else answer.steps_left

    def _shape(self, total: int) -> Schedule:
        return WarmupStableDecay(
            num_steps=total,
            num_warmup_steps=self.warmup_fraction,
            num_decay_steps=self.anneal_fraction,
            decay=self.anneal,
            start=0.1 if self.warmup_fraction else 1.0,  # no step at learning rate 0
        )


def _learns(ladder: Ladder) -> bool:
    """Whether the network leaves, in the best candidate, the plateau that it begins on."""
    losses = ladder.results[ladder.best].losses if ladder.results else ()
    return len(losses) > 1 and losses[0] - fmean(losses[len(losses) // 2 :]) > _LEAVES * abs(losses[0])


def _is_trained(ladder: Ladder, permuted: ProbeResult | None) -> bool:
    """Whether the loss before the first step is far below that of permuted weights on the same batch.

    Weights that nothing is known of, or whose order breaks the network, are taken for fresh ones: there the rate is lower.
    """
    if permuted is None or not permuted.losses:
        return False
    first, other = next((r.losses[0] for r in ladder.results.values() if r.losses), math.nan), permuted.losses[0]
    return math.isfinite(other) and other - first > _LEARNT * abs(other)
