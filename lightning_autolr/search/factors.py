"""Factor search: the learning rate moves by what one update, tried at several sizes, does to the loss."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lightning_autolr.core.requests import LineProbe, LineResult, Requests, Run, Status, Train, TrainResult
from lightning_autolr.core.scores import Normalization, scored_factor
from lightning_autolr.search.base import AbstractSearch

__all__ = ["FactorSearch"]

_SETTLED = 0.02  # a factor this near to 1 says that the learning rate fits
_LONGEST = 8  # times ``every``, however often nothing changes
_RETRIES = 10  # of a segment in which the loss ran away


@dataclass(frozen=True)
class FactorSearch(AbstractSearch):
    r"""Every so many steps, try one update at several sizes; the learning rate follows the factor they speak for.

    :math:`\eta \leftarrow F \eta` with F from :func:`~lightning_autolr.core.scores.scored_factor`, then clipped to the
    bounds. A decision costs one forward and backward pass, a forward pass for each factor, and the memory of the update and
    of one copy of the training state, whatever the number of factors; ``guard`` keeps another copy.

    Differs from the published method (POSTECH CSED538, 2024, algorithm 1):

    - Its code scores each factor by the loss *before* the virtual step, on a random batch of its own: a random walk.
      Here it is the loss after the step, on the same batch for all; ``shuffle_scores`` is the walk, as a control.
    - Its virtual step is plain SGD whatever the optimizer; here it is the optimizer's own update.
    - One exploding candidate is capped (``outlier_clip``; None: never), and losses that are not finite score zero.

    What its authors list as limits, and what to do about them: memory and time, one direction and forward passes
    instead of a model per factor; a score that weighs the losses badly, ``temperature`` or ``normalize="improvement"``;
    a bad start, ``guard`` and ``start_rounds``; a horizon of one step, ``horizon`` and ``smoothing``.

    Args:
        factors: multiples of the learning rate to try, distinct and > 0. Their product should be 1, or the learning
            rate drifts when the losses say nothing.
        every: optimizer steps from one decision to the next, or "epoch" as published.
        normalize: how losses become comparable, see :func:`~lightning_autolr.core.scores.normalize`.
        temperature: of the scores, > 0; smaller is nearer to "the lowest loss wins".
        outlier_clip: see :func:`~lightning_autolr.core.scores.clip_outliers`.
        evaluate_on: where the losses are measured: the batch of the update (which rewards fitting that batch), the next
            one, or the validation batches.
        horizon: updates that make the direction, >= 1.
        exact: make the updates anew for each factor, for optimizers whose update is not linear in the learning rate.
        initial_lr: None is the optimizer's own.
        min_lr: smallest learning rate to train at, > 0.
        max_lr: largest learning rate to train at. The factors are tried beyond the bounds too: without their losses
            the mean could never come to rest on a bound.
        smoothing: of ln F, in [0, 1): ``m = smoothing * m + (1 - smoothing) * ln F`` and ``lr *= exp(m)``. It spreads
            each decision over the next ones and keeps its total.
        back_off: double the interval, up to 8 times ``every``, as long as F is within this of 1; None never does.
        start_rounds: decisions to make before the first real step, at most; they end once F is within 2 % of 1. From 2
            on, a start value that is off by orders of magnitude is put right before it can do harm.
        guard: a segment in which a training loss rises above ``guard`` times the highest loss that any decision began
            with, > 1, is undone and made again at the smallest factor (half of the learning rate, at most): one update
            does not show what momentum makes of many. None keeps no state, and undoes nothing.
        shuffle_scores: deal the losses out to the factors at random: same cost, same step sizes, no information.
        seed: of the shuffle.

    Raises:
        ValueError: options out of range; from :meth:`requests`, an epoch of unknown length, or no validation batches.

    >>> search = FactorSearch(factors=(2, 1, 0.5), every=10)
    >>> requests = search.requests(Run(lr=0.5))
    >>> probe = next(requests)
    >>> probe.lr, probe.factors
    (0.5, (2, 1, 0.5))
    >>> round(requests.send(LineResult(base=0.5, losses=(0.0, 0.125, 0.28125))).lr, 4)  # 0.5 x 1.4725
    0.7363
    """

    factors: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5, 0.25)
    every: int | Literal["epoch"] = "epoch"
    normalize: Normalization = "zscore"
    temperature: float = 1.0
    outlier_clip: float | None = 3.0
    evaluate_on: Literal["same", "next", "validation"] = "next"
    horizon: int = 1
    exact: bool = False
    initial_lr: float | None = None
    min_lr: float = 1e-7
    max_lr: float = 10.0
    smoothing: float = 0.0
    back_off: float | None = None
    start_rounds: int = 1
    guard: float | None = 4.0
    shuffle_scores: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.factors or len(set(self.factors)) < len(self.factors) or not min(self.factors) > 0:
            raise ValueError(f"Expected distinct factors > 0, got factors={self.factors!r}.")
        if not 0 < self.min_lr < self.max_lr < math.inf:
            raise ValueError(f"Expected 0 < min_lr < max_lr, got min_lr={self.min_lr!r} and max_lr={self.max_lr!r}.")
        if self.every != "epoch" and not (isinstance(self.every, int) and self.every >= 1):
            raise ValueError(f"Expected every to be 'epoch' or a number of steps >= 1, got every={self.every!r}.")
        if self.initial_lr is not None and not self.min_lr <= self.initial_lr <= self.max_lr:
            raise ValueError(
                f"Expected min_lr <= initial_lr <= max_lr, got "
                f"initial_lr={self.initial_lr!r}, min_lr={self.min_lr!r} and max_lr={self.max_lr!r}."
            )
        if self.evaluate_on not in ("same", "next", "validation"):
            raise ValueError(f"Expected evaluate_on to be 'same', 'next' or 'validation', got {self.evaluate_on!r}.")
        if self.horizon < 1 or self.start_rounds < 1:
            raise ValueError(
                f"Expected horizon and start_rounds >= 1, got horizon={self.horizon!r} and start_rounds={self.start_rounds!r}."
            )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"Expected 0 <= smoothing < 1, got smoothing={self.smoothing!r}.")
        if self.guard is not None and not self.guard > 1:
            raise ValueError(f"Expected guard > 1 or None, got guard={self.guard!r}.")
        if self.back_off is not None and not self.back_off > 0:
            raise ValueError(f"Expected back_off > 0 or None, got back_off={self.back_off!r}.")
        self._factor(
            LineResult(1.0, tuple(range(len(self._tried)))), 0
        )  # a wrong score option shows here, not in an hour
        drift = math.exp(math.fsum(map(math.log, self.factors)) / len(self.factors))
        if not math.isclose(drift, 1, rel_tol=1e-6):
            warnings.warn(
                f"Expected factors whose product is 1, got {self.factors}: without information the learning rate is "
                f"multiplied by {drift:.4g} at each decision. Make them symmetric unless you want that.",
                stacklevel=3,
            )

    def requests(self, run: Run) -> Requests:
        """Alternate between one line probe and real training, until the run ends."""
        every = run.steps_per_epoch if self.every == "epoch" else self.every
        if every is None:
            raise ValueError(
                "Expected an epoch of known length, got steps_per_epoch=None. Give every=<number of steps>."
            )
        if self.evaluate_on == "validation" and not run.has_validation:
            raise ValueError(
                "Expected validation batches for evaluate_on='validation', got none. Use evaluate_on='next'."
            )
        lr = self._within(run.lr if self.initial_lr is None else self.initial_lr)
        interval, log_step, started, highest = every, 0.0, False, -math.inf
        kept: str | None = None
        for number in itertools.count():
            answer: LineResult = yield LineProbe(
                lr=lr,
                factors=self._tried,
                draw=number,
                horizon=self.horizon,
                evaluate_on=self.evaluate_on,
                exact=self.exact,
                stage=number,
                label=f"factor search, decision {number + 1}",
            )
            factor = self._factor(answer, number)
            log_step = self.smoothing * log_step + (1 - self.smoothing) * math.log(factor)
            lr = self._within(lr * math.exp(log_step))
            if not started and number + 1 < self.start_rounds and abs(factor - 1) > _SETTLED:
                continue
            started = True
            settled = self.back_off is not None and abs(factor - 1) <= self.back_off
            interval = min(2 * interval, _LONGEST * every) if settled else every
            tried = ", ".join(f"{loss:.4g} at x {f:.3g}" for f, loss in zip(self._tried, answer.losses, strict=True))
            if math.isfinite(answer.base):
                highest = max(highest, answer.base)
            train = Train(
                lr=lr,
                num_steps=interval,
                keep_start=self.guard is not None,
                stop_above=self._ceiling(highest),
                stage=number,
                label=f"factor search, decision {number + 1}",
                reason=f"factor {factor:.4g} out of the losses {tried}, from {answer.base:.4g}",
                release=() if kept is None else (kept,),
            )
            trained: TrainResult = yield train
            if self.guard is None:
                continue
            kept = trained.start
            for _ in range(_RETRIES):
                if trained.status is Status.OK or kept is None:
                    break
                lr = self._within(lr * min(*self.factors, 0.5))
                trained = yield replace(
                    train, lr=lr, start=kept, keep_start=False, release=(), reason="The training loss ran away: undone."
                )

    def _ceiling(self, highest: float) -> float | None:
        if self.guard is None:
            return None
        return highest + (self.guard - 1) * abs(highest) if math.isfinite(highest) else math.inf

    @property
    def _tried(self) -> tuple[float, ...]:
        """The factors, and no step at all where the score needs its loss (one more forward pass)."""
        return (0.0, *self.factors) if self.normalize == "improvement" else self.factors

    def _factor(self, answer: LineResult, number: int) -> float:
        losses = answer.losses[-len(self.factors) :]
        if self.shuffle_scores:
            losses = tuple(np.random.default_rng((self.seed, number)).permutation(losses).tolist())
        return scored_factor(
            self.factors,
            losses,
            answer.losses[0] if self.normalize == "improvement" else None,
            normalization=self.normalize,
            temperature=self.temperature,
            outlier_clip=self.outlier_clip,
        )

    def _within(self, lr: float) -> float:
        return min(max(lr, self.min_lr), self.max_lr)
