"""AutoLRS as it was published."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_autolr.core.forecast import Estimator, Forecast, forecast
from lightning_autolr.core.requests import Probe, ProbeResult, Request, Requests, Run, Status, Train, TrainResult
from lightning_autolr.core.surrogate import Observation, suggest
from lightning_autolr.schedules import Constant, Warmup
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.range_test import RangeTest

__all__ = ["PublishedAutoLRS", "Stage", "forecast_of"]

Signal = Literal["train", "validation", "holdout"]

_EVALUATIONS = 16  # of each candidate, where held-out losses are forecast
_TEST_DRAW = 10**6  # of the range test, beyond the draws of all stages
_NARROWEST = 10.0  # ratio of the bounds, when one of them is found


@dataclass(frozen=True)
class Stage:
    """One stage: try candidates for a short time each, then train with the best one.

    Args:
        number: 0, 1, ...
        tau: steps after which the candidates' losses are compared.
        num_steps: steps of the training part: tau, or more in the last stage, which takes what is left of the run.
        num_candidates: learning rates to try; 0 is a stage without search.
        probe_steps: steps for each of them.
        signal: the losses that are forecast.
        is_last: whether the run ends with this stage.
        note: what the user should know about it; mostly empty.
    """

    number: int
    tau: int
    num_steps: int
    num_candidates: int
    probe_steps: int
    signal: Signal
    is_last: bool = False
    note: str = ""

    @property
    def search_steps(self) -> int:
        return self.num_candidates * self.probe_steps


@dataclass(frozen=True)
class _Candidate:
    lr: float
    forecast: Forecast


@dataclass(frozen=True)
class PublishedAutoLRS(AbstractSearch):
    r"""A learning rate per stage, by Bayesian optimisation of the loss forecast for the stage's end.

    A stage of :math:`\tau` steps:

    1. :math:`k` times, a Gaussian process over the learning rates tried so far suggests another one. It is tried for
       :math:`\tau' = \tau / 10` steps from the stage's first state, and an exponential fitted to its losses tells what
       the loss would be after :math:`\tau` steps: that is its score.
    2. The real run trains :math:`\tau` steps with the candidate of the lowest score.

    :math:`\tau` doubles from stage to stage up to ``tau_max``. With :math:`k = 10` search costs as much as training.
    Candidates of a stage see the same batches in the same order.

    **When things go wrong.** A candidate that diverges stops at once and is never chosen. If all do, the stage trains
    with a tenth of the last learning rate, in the first stage with ``min_lr``. If the training itself diverges (its
    loss rises above the run's first one and thrice the stage's), its steps are undone, though a Trainer has counted
    them, and the best of the lower candidates takes over; then a tenth of that, and so on down to ``min_lr``, where
    nothing lower is left to try. The candidates of later stages stay below half of what diverged in these two ways.

    **The end.** A stage is begun only if it fits into the run; otherwise the stage before it takes all that is left. If
    not even the first one fits, it is shrunk, which its ``note`` says. With an unknown end stages go on for ever.

    Differs from the paper's code (github.com/YuchenJin/autolrs): no step is made at a stale learning rate, so that a
    candidate gets exactly :math:`\tau'` steps and a stage exactly :math:`\tau`; candidates share their batches; it had
    none of the above for divergence; forecasts are bounded, unless ``estimator="reference"``. The learning rate stays
    constant to the end of a stage and of the run, as published.

    Args:
        min_lr: smallest learning rate, > 0. None finds it by a :class:`~lightning_autolr.search.range_test.RangeTest` of one
            climb, no longer than the run, before the first step: a tenth of ``max_lr`` at most, if that is given.
        max_lr: largest learning rate. If it equals ``min_lr`` there is nothing to search for. None finds it likewise: ten
            times ``min_lr`` at least, if that is given.
        tau: steps of the first stage, >= 1.
        tau_max: steps of the longest stage, >= ``tau``.
        num_candidates: k >= 1; 1 leaves no choice, and the middle of the (logarithmic) range is taken without search.
        probe_fraction: :math:`\tau' / \tau`, in (0, 1).
        kappa: weight of the standard deviation in the lower confidence bound, >= 0. The published 1e6 fills the space
            and ignores the scores; 1.96 is a usual choice.
        objective: losses to forecast: of "train"ing, on the "validation" batches, on training batches held out
            ("holdout"), or "auto": of training until a stage of ``tau_max`` steps was made, of validation afterwards
            (if there are validation batches).
        estimator: "bounded" or "reference", see :func:`lightning_autolr.core.forecast.forecast`.
        warmup_steps: steps before the first stage, not searched.
        warmup_lr: learning rate at their end; they rise to it linearly. None is ``max_lr``.
        seed: of the first candidate of each stage, and number of the first draw of batches.

    Raises:
        ValueError: options out of range; from :meth:`requests`, no validation batches, or a run no longer than its
            warm-up.

    >>> search = PublishedAutoLRS(min_lr=1e-3, max_lr=1e-1)
    >>> [(stage.tau, stage.num_steps, stage.signal) for stage in search.plan(Run(total_steps=10_000))]
    [(1000, 1000, 'train'), (2000, 2000, 'train'), (4000, 7000, 'train')]

    References: Jin, Zhou, Zhao, Zhu, Guo, Canini and Krishnamurthy, "AutoLRS: Automatic Learning-Rate Schedule by
    Bayesian Optimization on the Fly", ICLR 2021, arXiv 2105.10762.
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
        low, high = self._bounds
        if not 0 < low <= high < math.inf:
            raise ValueError(
                f"Expected 0 < min_lr <= max_lr, both finite, got min_lr={self.min_lr!r} and max_lr={self.max_lr!r}."
            )
        if not 1 <= self.tau <= self.tau_max:
            raise ValueError(f"Expected 1 <= tau <= tau_max, got tau={self.tau!r} and tau_max={self.tau_max!r}.")
        if not 1 <= self.num_candidates <= 100:
            raise ValueError(f"Expected num_candidates from 1 to 100, got num_candidates={self.num_candidates!r}.")
        if not 0 < self.probe_fraction < 1:
            raise ValueError(f"Expected 0 < probe_fraction < 1, got probe_fraction={self.probe_fraction!r}.")
        if not self.kappa >= 0:
            raise ValueError(f"Expected kappa >= 0, got kappa={self.kappa!r}.")
        if self.objective not in ("auto", "train", "validation", "holdout"):
            raise ValueError(
                f"Expected objective auto, train, validation or holdout, got objective={self.objective!r}."
            )
        if self.estimator not in ("bounded", "reference"):
            raise ValueError(f"Expected estimator bounded or reference, got estimator={self.estimator!r}.")
        if self.warmup_steps < 0 or not (self.warmup_lr is None or 0 < self.warmup_lr < math.inf):
            raise ValueError(
                f"Expected warmup_steps >= 0, warmup_lr > 0, got "
                f"warmup_steps={self.warmup_steps!r}, warmup_lr={self.warmup_lr!r}."
            )
        if self.seed < 0:
            raise ValueError(f"Expected seed >= 0, got seed={self.seed!r}.")

    @property
    def _bounds(self) -> tuple[float, float]:
        """Lower and upper bound; as long as one has to be found, the ladder's end stands for it in checks and plans."""
        return self._bounds_within((RangeTest.min_lr, RangeTest.max_lr))

    def _bounds_within(self, found: tuple[float, float]) -> tuple[float, float]:
        """The bounds that were given, the others out of what was found.

        A given bound may lie beyond all that was found. It holds, and the other one leaves room for a search.
        """
        low = found[0] if self.max_lr is None else min(found[0], self.max_lr / _NARROWEST)
        high = found[1] if self.min_lr is None else max(found[1], self.min_lr * _NARROWEST)
        return (low if self.min_lr is None else self.min_lr, high if self.max_lr is None else self.max_lr)

    # -- the plan ---------------------------------------------------------------------------------------------------

    def plan(self, run: Run) -> Iterator[Stage]:
        """The stages that fit into the run, if none diverges; without end for a run of unknown length."""
        left = self._steps_after_warmup(run)
        number = 0
        while left >= 1:
            stage = self._stage(number, left, run)
            yield stage
            left = 0 if stage.is_last else left - stage.num_steps - run.count_search * stage.search_steps
            number += 1

    def _stage(self, number: int, left: float, run: Run) -> Stage:
        """Stage ``number`` when ``left`` steps are left of the run."""
        stage = self._sized(number, self._tau(number), run)
        cost = self._cost(stage, run)
        if left < cost and number > 0:
            note = f"{left:g} steps are left, too few for a stage of {stage.tau}: no search"
            return replace(stage, num_steps=int(left), num_candidates=0, is_last=True, note=note)
        if left < cost:
            stage = self._shrunk(left, run)
            cost = self._cost(stage, run)
        if left - cost < self._cost(self._sized(number + 1, self._tau(number + 1), run), run):
            return replace(stage, num_steps=int(left - cost + stage.tau), is_last=True)
        return stage

    def _tau(self, number: int) -> int:
        doublings = math.ceil(math.log2(self.tau_max / self.tau))
        return self.tau_max if number >= doublings else self.tau * 2**number

    def _sized(self, number: int, tau: int, run: Run) -> Stage:
        signal: Signal = "train"
        if self.objective == "auto":
            if number > 0 and self._tau(number - 1) == self.tau_max and run.has_validation:
                signal = "validation"
        else:
            signal = self.objective
        probe_steps = max(1, round(self.probe_fraction * tau))
        low, high = self._bounds
        search = self.num_candidates > 1 and low < high and probe_steps < tau
        return Stage(number, tau, tau, self.num_candidates if search else 0, probe_steps, signal)

    def _cost(self, stage: Stage, run: Run) -> int:
        return stage.tau + run.count_search * stage.search_steps

    def _shrunk(self, left: float, run: Run) -> Stage:
        """The longest first stage that fits into ``left`` steps."""
        tau = int(left)
        while tau > 1 and self._cost(self._sized(0, tau, run), run) > left:
            tau -= 1
        note = f"the run has {left:g} steps, too few for a stage of {self.tau}: shrunk to {tau}"
        return replace(self._sized(0, tau, run), note=note)

    def _steps_after_warmup(self, run: Run) -> float:
        left = math.inf if run.total_steps is None else run.total_steps - self.warmup_steps
        if left < 1:
            raise ValueError(
                f"Expected a run longer than its warm-up, got "
                f"{run.total_steps} steps with warmup_steps={self.warmup_steps!r}. Train "
                "longer, or warm up shorter."
            )
        return left

    def _range_test(self, run: Run) -> RangeTest:
        """No longer than the run, such as one of a single step to see whether all is well."""
        most = RangeTest.num_steps if run.total_steps is None else max(10, run.total_steps)
        return RangeTest(num_steps=min(RangeTest.num_steps, most), repeats=1, seed=_TEST_DRAW + self.seed)

    # -- the search -------------------------------------------------------------------------------------------------

    def describe(self, run: Run) -> str:
        """The range test, the first stages and their cost."""
        test = (
            f"a range test of {self._range_test(run).num_steps} steps, then "
            if None in (self.min_lr, self.max_lr)
            else ""
        )
        stages = list(itertools.islice(self.plan(run), 4))
        sizes = ", ".join(f"{s.search_steps} + {s.num_steps:g}" for s in stages)
        return f"{test}stages of search + training steps: {sizes}{'' if stages and stages[-1].is_last else ', ...'}."

    def requests(self, run: Run) -> Requests:
        """Find the bounds that are missing; warm up; then search and train, stage by stage, until the run ends."""
        if self.objective == "validation" and not run.has_validation:
            raise ValueError(
                "Expected validation batches for objective='validation', got none: use 'train' or 'holdout'."
            )
        left = self._steps_after_warmup(run)
        if self.min_lr is None or self.max_lr is None:
            found = yield from self._range_test(run).measure()
            low, high = self._bounds_within(found.bounds)
            yield from replace(self, min_lr=low, max_lr=high).requests(run)
            return
        known = _Known(left, math.sqrt(self.min_lr * self.max_lr), self.min_lr, self.max_lr)
        if self.warmup_steps:
            ramp = Warmup(Constant(), self.warmup_steps - 1, start=1 / self.warmup_steps)  # (s + 1) / W at step s
            lr = self.warmup_lr or self.max_lr
            yield Train(lr=lr, num_steps=self.warmup_steps, shape=ramp, label="warm-up", reason="not searched")
        for number in itertools.count():
            if known.left < 1:
                return
            stage = self._stage(number, known.left, run)
            if stage.num_candidates and known.max_lr <= known.min_lr:
                stage = replace(stage, num_candidates=0, note="all higher rates diverged: no search")
            candidates = yield from self._search(stage, known, run)
            yield from self._train(stage, candidates, known, run)

    def _search(self, stage: Stage, known: _Known, run: Run) -> Generator[Request, Any, list[_Candidate]]:
        """Try learning rates for the stage, and return those that did not diverge, best first."""
        observations: list[Observation] = []
        candidates: list[_Candidate] = []
        for i in range(stage.num_candidates):
            suggestion = suggest(
                observations, (known.min_lr, known.max_lr), kappa=self.kappa, seed=self.seed + 1000 * stage.number
            )
            label = f"stage {stage.number + 1}, candidate {i + 1}/{stage.num_candidates}"
            probe = Probe(
                lr=suggestion.lr,
                num_steps=stage.probe_steps,
                draw=self.seed + stage.number,
                evaluate="none" if stage.signal == "train" else stage.signal,
                evaluate_every=None if stage.signal == "train" else _evaluate_every(stage),
                stage=stage.number,
                label=f"{label} ({suggestion.reason})" if observations and suggestion.reason else label,
                forecast_horizon=stage.tau,
                estimator=self.estimator,
                release=known.give_up(),
            )
            result: ProbeResult = yield probe
            if not observations:
                known.note_start(result.losses)
            if run.count_search:
                known.left -= result.num_steps
            score = forecast_of(probe, result)
            candidates.append(_Candidate(suggestion.lr, score))
            # A training loss above the limit is as bad as divergence; as a number it would make all others look equal.
            explodes = stage.signal == "train" and known.limit is not None and score.value > known.limit
            observations.append(Observation(suggestion.lr, math.inf if explodes else score.value))
        good = [c for c in candidates if math.isfinite(c.forecast.value)]
        if candidates and not good:
            known.exclude(min(c.lr for c in candidates))
        return sorted(good, key=lambda c: (c.forecast.value, c.forecast.tail))

    def _train(
        self, stage: Stage, candidates: list[_Candidate], known: _Known, run: Run
    ) -> Generator[Request, Any, None]:
        """Train with the best candidate; if it diverges undo that and take the second best, then lower rates."""
        lr, reason = min(known.lr, known.max_lr), stage.note
        if candidates:
            lr = candidates[0].lr
            reason = (
                f"lowest forecast after {stage.tau} steps: {candidates[0].forecast.value:.4g}. {stage.note}".strip()
            )
        elif stage.num_candidates:
            lr = max(known.min_lr, min(known.lr / 10, known.max_lr) if stage.number else 0.0)
            reason = f"all {stage.num_candidates} candidates diverged"
        undo: str | None = None
        for failures in itertools.count():
            guarded = stage.num_candidates > 0 and (failures == 0 or lr > known.min_lr)
            num_steps = min(stage.num_steps, known.left)
            to_the_end = num_steps == known.left and not run.count_search
            answer: TrainResult = yield Train(
                lr=lr,
                num_steps=None if to_the_end else int(num_steps),
                start=undo,
                keep_start=guarded and undo is None,
                stop_above=known.limit if guarded else None,
                stage=stage.number,
                label=f"stage {stage.number + 1}",
                reason=reason,
                release=known.give_up(),
            )
            undo = undo or answer.start
            known.left -= num_steps if answer.status is Status.OK else answer.num_steps
            if answer.status is Status.OK or known.left < 1:
                break
            known.exclude(lr)
            second = next((c for c in candidates if c.lr < lr), None) if failures == 0 else None
            reason = f"{lr:.3g} diverged at step {answer.num_steps}: {'the next best' if second else 'a lower'} one"
            lr = second.lr if second else max(known.min_lr, lr / 10)
        known.lr = lr
        known.undo = () if undo is None else (undo,)


def forecast_of(probe: Probe, result: ProbeResult) -> Forecast:
    """What the loss would be after ``probe.forecast_horizon`` steps; inf if the probe diverged.

    Raises:
        ValueError: the probe is not scored by a forecast.
    """
    if probe.forecast_horizon is None or probe.estimator is None:
        raise ValueError(f"Expected a probe with forecast_horizon and estimator, got {probe}.")
    if result.status is Status.DIVERGED:
        return Forecast(value=math.inf, tail=math.inf, reason="the candidate diverged")
    every = probe.evaluate_every
    if every is None:
        return forecast(result.losses, probe.forecast_horizon, estimator=probe.estimator)
    # Evaluation i comes after (i + 1) * every steps, which gives the horizon this index. The published code asks for one
    # evaluation later.
    losses = [evaluation.mean for evaluation in result.evaluations if evaluation.step % every == 0]
    return forecast(losses, probe.forecast_horizon / every - 1, estimator=probe.estimator, single_outlier=True)


def _evaluate_every(stage: Stage) -> int:
    return max(1, stage.probe_steps // _EVALUATIONS)


@dataclass
class _Known:
    """What was learned so far.

    Args:
        left: steps that are left of the run.
        lr: learning rate of the last stage.
        min_lr: lower bound for candidates.
        max_lr: upper bound for candidates.
        first_loss: training loss at the start of the first stage.
        start_loss: training loss at the start of this stage.
        undo: the state before the last stage, which is not needed once another one begins.
    """

    left: float
    lr: float
    min_lr: float
    max_lr: float
    first_loss: float | None = None
    start_loss: float | None = None
    undo: tuple[str, ...] = ()

    def note_start(self, losses: tuple[float, ...]) -> None:
        """The first loss of a probe is that of the real run's weights: no step was made yet."""
        if losses and math.isfinite(losses[0]):
            self.start_loss = losses[0]
            self.first_loss = losses[0] if self.first_loss is None else self.first_loss

    def exclude(self, diverged: float) -> None:
        """Later candidates stay below half of a learning rate that diverged."""
        self.max_lr = max(self.min_lr, diverged / 2)

    @property
    def limit(self) -> float | None:
        """A training loss above this is divergence: above the run's first one, and above thrice the stage's."""
        if self.first_loss is None or self.start_loss is None:
            return None
        return max(self.first_loss, self.start_loss + 2 * abs(self.start_loss))

    def give_up(self) -> tuple[str, ...]:
        undo, self.undo = self.undo, ()
        return undo
