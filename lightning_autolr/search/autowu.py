"""AutoWU: raise the learning rate until the training loss has passed its minimum, go back to that minimum, then decay."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from lightning_autolr.core.minimum import PastMinimum, Regression
from lightning_autolr.core.requests import Request, Requests, Run, Status, Train, TrainResult
from lightning_autolr.schedules import Constant, Cosine, Exponential, Joined, Points, Schedule, Shifted
from lightning_autolr.search.base import AbstractSearch

__all__ = ["AutoWU", "WarmupRange"]


_FEW = 10  # losses below which nothing is concluded from them
_MOST_TESTS = 100
_RESTARTS = 10
Outcome = Literal["minimum", "diverged", "none"]


@dataclass(frozen=True)
class WarmupRange:
    """What a warm-up found.

    Args:
        lr: learning rate at the estimated minimum of the loss.
        bounds: a tenth of it, and the largest learning rate reached: where a search may go on.
        num_steps: optimizer steps made.
        outcome: the minimum was passed; the loss ran away before; or neither happened within the steps allowed.
        ceiling: a training loss above this has run away; inf without ``guard``.
        reason: one sentence for the user.
    """

    lr: float
    bounds: tuple[float, float]
    num_steps: int
    outcome: Outcome
    ceiling: float
    reason: str


@dataclass
class _SmoothedLoss:
    """A running mean of the loss, looked at after each segment: is it the lowest so far, has it run away?

    It has when it rose above its lowest value by ``guard - 1`` times that value, and by half of what it had fallen
    before: no multiple says anything about losses near or below zero.
    """

    guard: float
    memory: int  # steps
    num_steps: int = 0
    total: float = 0.0
    weight: float = 0.0
    first: float = math.nan
    lowest: float = math.inf
    highest: float = -math.inf  # single loss
    is_lowest: bool = True
    ran_away: bool = False

    def add(self, losses: Sequence[float], status: Status) -> None:
        self.num_steps += len(losses)
        if status is Status.DIVERGED:
            self.ran_away = True
        if status is Status.DIVERGED or not losses:
            return
        for loss in losses:
            self.total += (loss - self.total) / self.memory
            self.weight += (1 - self.weight) / self.memory
        if self.num_steps < _FEW:
            return
        mean = self.total / self.weight
        if math.isnan(self.first):
            self.first = mean
        rise = max((self.guard - 1) * abs(self.lowest), (self.first - self.lowest) / 2)
        self.ran_away = mean > self.lowest + rise
        self.is_lowest = mean <= self.lowest
        self.lowest = min(self.lowest, mean)
        if not self.ran_away:
            self.highest = max(self.highest, *losses)

    @property
    def ceiling(self) -> float:
        return self.lowest + self.guard * (self.highest - self.lowest) if self.highest > -math.inf else math.inf


@dataclass(frozen=True)
class AutoWU(AbstractSearch):
    r"""Warm-up whose length and peak are found, then a decay.

    For at most :math:`W = \lfloor` ``max_warmup_fraction`` :math:`\cdot\, T \rfloor` of the run's T steps the learning
    rate grows, :math:`\eta_t = \eta_{min} (\eta_{max} / \eta_{min})^{t / W}`, or linearly. Every ``test_every`` steps
    :class:`~lightning_autolr.core.minimum.PastMinimum` is asked whether the training loss has passed its minimum. After
    ``patience`` times yes in a row the run goes back to the state whose smoothed loss was lowest, and the learning rate
    to what it was at the minimum, the mean over the draws of the last test. There ``decay`` begins. The search asks for
    real training only: no step is private, and those that were undone count.

    **Cost**: a test takes a few tenths of a second, whatever the length of the run; there are 20 of them, or one an
    epoch if that is more (100 at most). **Memory**: one kept state until the decay is under way, none with
    ``guard=None``.

    Differs from the published code, unless ``compat``:

    - The test is scale-free, see :class:`~lightning_autolr.core.minimum.PastMinimum`, and made several times an epoch
      where epochs are few.
    - The state goes back too, and not the learning rate alone: the steps since the minimum were made at rates that
      hurt, and a network with dead units does not recover when the rate does.
    - A loss that runs away ends the warm-up at once. So does one in the first ``patience`` test intervals of the decay:
      they are made again at half the rate.
    - Without a minimum by step W, training goes on from the lowest loss's learning rate and not from the one reached.
    - The decay starts at its step 0 and not 1, and parameter groups keep their ratios.

    Args:
        min_lr: where the learning rate starts, > 0.
        max_lr: what it reaches after W steps.
        max_warmup_fraction: the share of the run that the warm-up may take, in (0, 1).
        growth: "exponential" or "linear".
        confidence: probability above which a draw votes for a past minimum, in (0, 1).
        num_tests: draws per test, >= 1; more than half of them decide.
        patience: tests in a row that must say yes, >= 1.
        test_every: optimizer steps between tests; None is an epoch, or W / 20 if that is less, but no less than W / 100.
        decay: any schedule of factors; with an open number of steps it is stretched over what is left of the run.
        immediate_cooldown: begin the decay at once; otherwise hold the learning rate, and decay at the end ("constant,
            then cosine").
        cooldown_fraction: the share of the run that is the end, in (0, 1]; only without ``immediate_cooldown``.
        plateau_factor: factor on a held learning rate when the mean loss of an epoch (or, if its length is not known,
            of ``test_every`` steps) has not fallen by 1e-4 of itself for more than ``plateau_patience`` epochs, in
            (0, 1]; 1 holds it.
        plateau_patience: see there, >= 0.
        guard: the smoothed training loss has run away when it is above ``guard`` times its lowest value, > 1 (and above
            the middle between its first and its lowest value); None keeps and restores no state, whatever happens.
        seed: of the draws.
        compat: the published rules, without a guard.

    Raises:
        ValueError: options out of range; from :meth:`requests`, a run of unknown length.

    >>> requests = AutoWU().requests(Run(total_steps=1000))
    >>> first = next(requests)
    >>> first.lr, first.num_steps, round(first.shape(1), 7)
    (1e-05, 25, 1.023293)

    References: Kim et al., "Automated Learning Rate Scheduler for Large-batch Training", 2021, arXiv 2107.05855.
    """

    min_lr: float = 1e-5
    max_lr: float = 1.0
    max_warmup_fraction: float = 0.5
    growth: Literal["exponential", "linear"] = "exponential"
    confidence: float = 0.95
    num_tests: int = 5
    patience: int = 3
    test_every: int | None = None
    decay: Schedule = field(default=Cosine())
    immediate_cooldown: bool = True
    cooldown_fraction: float = 0.2
    plateau_factor: float = 1.0
    plateau_patience: int = 5
    guard: float | None = 4.0
    seed: int = 0
    compat: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.min_lr < self.max_lr < math.inf:
            raise ValueError(f"Expected 0 < min_lr < max_lr, got min_lr={self.min_lr!r} and max_lr={self.max_lr!r}.")
        if not 0 < self.max_warmup_fraction < 1 or not 0 < self.cooldown_fraction <= 1:
            raise ValueError(
                f"Expected 0 < max_warmup_fraction < 1 and 0 < cooldown_fraction <= 1, got "
                f"max_warmup_fraction={self.max_warmup_fraction!r} "
                f"and cooldown_fraction={self.cooldown_fraction!r}."
            )
        if self.growth not in ("exponential", "linear"):
            raise ValueError(f"Expected growth 'exponential' or 'linear', got growth={self.growth!r}.")
        if self.patience < 1 or self.plateau_patience < 0 or not 0 < self.plateau_factor <= 1:
            raise ValueError(
                f"Expected patience >= 1, plateau_patience >= 0 and 0 < plateau_factor <= 1, got patience={self.patience!r}, "
                f"plateau_patience={self.plateau_patience!r} and plateau_factor={self.plateau_factor!r}."
            )
        if self.test_every is not None and self.test_every < 1:
            raise ValueError(f"Expected test_every >= 1 or None, got test_every={self.test_every!r}.")
        if self.guard is not None and not self.guard > 1:
            raise ValueError(f"Expected guard > 1 or None, got guard={self.guard!r}.")
        if self.decay.absolute:
            raise ValueError(f"Expected a decay of factors, got one of learning rates: {self.decay}.")
        self.test()  # checks its own options

    def test(self) -> PastMinimum:
        """A new test with these options, as one warm-up uses it."""
        return PastMinimum(self.confidence, self.num_tests, self.seed, self.compat)

    def lr_at(self, step: float, warmup_steps: int) -> float:
        """Learning rate at a step of a warm-up that may take ``warmup_steps``."""
        t = step / warmup_steps
        if self.growth == "linear":
            return self.min_lr + t * (self.max_lr - self.min_lr)
        return float(self.min_lr * (self.max_lr / self.min_lr) ** t)

    def requests(self, run: Run) -> Requests:
        """The warm-up, the hold if there is one, the decay."""
        found = yield from self.warmup(run)
        yield from self._decline(run, found)

    def warmup(self, run: Run) -> Generator[Request, Any, WarmupRange]:
        """The warm-up alone, for searches that go on themselves: ``found = yield from AutoWU().warmup(run)``.

        When it returns, the run is in the state of the lowest loss (unless ``guard`` is None) and nothing is kept.
        """
        climb = _Climb(self, self._warmup_steps(run), self._interval(run))
        while not climb.is_over:
            piece = climb.next_piece()
            climb.add(piece, (yield piece))
        found = climb.found()
        if climb.kept is None:
            return found
        # a step that brings back the state of the lowest loss, or at least gives it up
        start = climb.kept if climb.has_risen else None
        answer: TrainResult = yield Train(
            found.lr, 1, start=start, stage=1, label="warm-up", reason=found.reason, release=(climb.kept,)
        )
        return replace(found, num_steps=found.num_steps + answer.num_steps)

    def _decline(self, run: Run, found: WarmupRange) -> Requests:
        """From the learning rate found to the end of the run.

        The first ``patience`` test intervals are made on probation: should the loss run away, they are undone and made
        again at half the learning rate.
        """
        total, interval = _total(run), self._interval(run)
        lr, left, offset = found.lr, total - found.num_steps, 0
        start: str | None = None
        kept: str | None = None
        if self._guard is not None:
            for _ in range(_RESTARTS):
                if left < 1:
                    return
                shape = self._shape(total, left)
                answer: TrainResult = yield Train(
                    lr=lr,
                    num_steps=min(self.patience * interval, left),
                    shape=shape,
                    momentum=shape.momentum_schedule(),
                    start=start,
                    keep_start=kept is None,
                    stop_above=found.ceiling,
                    stage=1,
                    label="decay",
                    reason=found.reason,
                )
                left -= answer.num_steps
                kept = kept or answer.start
                if answer.status is Status.OK:
                    offset, start = answer.num_steps, None
                    break
                lr, start = lr / 2, kept
        release = () if kept is None else (kept,)
        if self.plateau_factor < 1:
            every, best, bad = run.steps_per_epoch or interval, math.inf, 0
            while (hold := self._hold_steps(total, left)) > 0:
                num_steps = min(every, hold)
                answer = yield Train(
                    lr, num_steps, start=start, stage=1, label="hold", reason=found.reason, release=release
                )
                left, offset, start, release = left - num_steps, 0, None, ()
                if not answer.losses:
                    continue  # all batches were skipped
                loss = float(np.mean(answer.losses))
                improved = loss < best - 1e-4 * abs(best) if math.isfinite(best) else math.isfinite(loss)
                best, bad = (loss, 0) if improved else (best, bad + 1)
                if bad > self.plateau_patience:
                    lr, bad = lr * self.plateau_factor, 0
        if left > 0:
            shape = self._shape(total, left + offset)
            shape = Shifted(shape, offset) if offset else shape
            yield Train(
                lr=lr,
                num_steps=None,
                shape=shape,
                momentum=shape.momentum_schedule(),
                start=start,
                stage=2,
                label="decay",
                reason=found.reason,
                release=release,
            )

    @property
    def _guard(self) -> float | None:
        return None if self.compat else self.guard

    def _warmup_steps(self, run: Run) -> int:
        """W: at least one step, and none of the end of the run."""
        total = _total(run)
        return max(1, min(int(self.max_warmup_fraction * total), total - 1, total - self._end_steps(total)))

    def _end_steps(self, total: int) -> int:
        """Steps of the end of the run, when it is set apart."""
        return 0 if self.immediate_cooldown else int(self.cooldown_fraction * total + 1e-9)

    def _hold_steps(self, total: int, left: int) -> int:
        return 0 if self.immediate_cooldown else max(left - self._end_steps(total), 0)

    def _interval(self, run: Run) -> int:
        if self.test_every is not None:
            return self.test_every
        if self.compat:
            if run.steps_per_epoch is None:
                raise ValueError("Expected a known length of an epoch with compat=True, got None. Give test_every.")
            return run.steps_per_epoch
        most = self._warmup_steps(run)
        return max(1, math.ceil(most / _MOST_TESTS), min(run.steps_per_epoch or most, most // 20))

    def _growth(self, begin: int, most: int) -> Schedule:
        """The ramp from step ``begin`` on, as a factor on the learning rate there."""
        if self.growth == "exponential":
            return Exponential(num_steps=most, gamma=math.log(self.max_lr / self.min_lr))
        return Points((1.0, 1.0 + (self.max_lr - self.min_lr) / self.lr_at(begin, most)), num_steps=most)

    def _shape(self, total: int, left: int) -> Schedule:
        """What the learning rate found is multiplied with in the last ``left`` steps."""
        hold = self._hold_steps(total, left)
        decay = self.decay if self.decay.is_resolved else self.decay.stretched(left - hold)
        if self.compat:
            decay = Shifted(decay, 1)
        return Joined((Constant(), decay), (hold,)) if hold else decay


class _Climb:
    """A warm-up as far as it went: its losses, what the tests say of them, and the state where they were lowest."""

    def __init__(self, search: AutoWU, most: int, interval: int) -> None:
        self._search, self._most, self._interval = search, most, interval
        self._test, self._verdicts = search.test(), deque[bool](maxlen=search.patience)
        self._smoothed = None if search._guard is None else _SmoothedLoss(search._guard, max(_FEW, interval))
        self._made = 0  # steps; a skipped batch makes one without a loss
        self._losses: list[float] = []
        self._regression: Regression | None = None
        self.kept: str | None = None
        self._kept_at = 0

    @property
    def is_over(self) -> bool:
        return self._made >= self._most or self._passed or self._ran_away

    @property
    def has_risen(self) -> bool:
        """Whether the state of the lowest loss is better than the present one."""
        return self._ran_away or (self._regression is not None and self._regression.past)

    @property
    def _passed(self) -> bool:
        return len(self._verdicts) == self._search.patience and all(self._verdicts)

    @property
    def _ran_away(self) -> bool:
        return self._smoothed is not None and self._smoothed.ran_away

    def next_piece(self) -> Train:
        """The steps up to the next test; where the loss is at its lowest, the state before them is kept."""
        search, begin = self._search, self._made
        keep = self._smoothed is not None and self._smoothed.is_lowest
        return Train(
            lr=search.lr_at(begin, self._most),
            num_steps=min(self._interval, self._most - begin),
            shape=search._growth(begin, self._most),
            keep_start=keep,
            stop_above=None if self._smoothed is None else math.inf,
            label="warm-up",
            reason="The learning rate grows until the training loss has passed its minimum.",
            kind="climb",
            release=(self.kept,) if keep and self.kept is not None else (),
        )

    def add(self, piece: Train, answer: TrainResult) -> None:
        """Note what came of a piece, and test all losses so far."""
        if piece.keep_start:
            self.kept, self._kept_at = answer.start, self._made
        self._made += answer.num_steps
        self._losses += answer.losses
        if not self._losses and self._made >= _FEW:
            raise ValueError(
                f"Expected the training losses of the warm-up, got none in {self._made} steps. Return them from "
                "`training_step`."
            )
        if self._smoothed is not None:
            self._smoothed.add(answer.losses, answer.status)
        is_last = self._made >= self._most
        enough = 2 if is_last else _FEW  # the last test is made for its minimum alone
        if np.isfinite(self._losses).sum() >= enough and not (is_last and self._search.compat):
            self._regression = self._test(self._losses)
            self._verdicts.append(self._regression.past)

    def found(self) -> WarmupRange:
        search, made = self._search, self._made
        lr = reached = search.lr_at(made - 1, self._most)
        if self._regression is not None and (self._passed or not search.compat):
            # Position 1 is the step to come. The published code puts the last step's learning rate there.
            now = made - search.compat
            lr = float(np.mean([search.lr_at(x * now, self._most) for x in self._regression.argmins]))
        outcome: Outcome = "minimum" if self._passed else "none"
        if self._ran_away:
            outcome, lr = "diverged", min(lr, search.lr_at(self._kept_at, self._most))
        return WarmupRange(
            lr=lr,
            bounds=(lr / 10, max(lr, reached)),
            num_steps=made,
            outcome=outcome,
            ceiling=math.inf if self._smoothed is None else self._smoothed.ceiling,
            reason={
                "diverged": f"The training loss ran away by step {made}: back to step {self._kept_at}.",
                "minimum": f"The training loss passed its minimum before step {made}: back to it.",
                "none": f"The training loss had not passed a minimum by step {made}, where the warm-up must end.",
            }[outcome],
        )


def _total(run: Run) -> int:
    if run.total_steps is None:
        raise ValueError(
            "Expected a run of known length, got total_steps=None: the growth of the learning rate depends on it. Give the "
            "Trainer max_steps or max_epochs, or the callback total_steps."
        )
    return run.total_steps
