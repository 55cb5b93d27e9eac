"""Schedules made of schedules."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lightning_autolr.schedules.base import (
    Budgeted,
    Constant,
    Schedule,
    as_amount,
    as_count,
    as_steps,
    check_number,
    replace_field,
    unresolved,
)
from lightning_autolr.schedules.profiles import Linear


@dataclass(frozen=True)
class Scaled(Schedule):
    """Another schedule times a number.

    Args:
        schedule: any schedule. Its momentum is not scaled.
        factor: >= 0.

    >>> Scaled(Linear(num_steps=4), factor=0.5)(2)
    0.25
    """

    schedule: Schedule
    factor: float

    def __post_init__(self) -> None:
        check_number("factor", self.factor, low=0.0)

    @property
    def absolute(self) -> bool:
        return self.schedule.absolute

    @property
    def length(self) -> int | None:
        return self.schedule.length

    @property
    def is_resolved(self) -> bool:
        return self.schedule.is_resolved

    def stretched(self, num_steps: int) -> Scaled:
        return dataclasses.replace(self, schedule=self.schedule.stretched(num_steps))

    def __call__(self, step: float) -> float:
        return self.factor * self.schedule(step)

    def momentum_schedule(self) -> Schedule | None:
        return self.schedule.momentum_schedule()


@dataclass(frozen=True)
class Joined(Schedule):
    """One schedule after another; each starts at its own step 0 where the one before it stops.

    Args:
        schedules: at least one. All hold factors, or all learning rates.
        boundaries: where each schedule but the first begins, rising: an integer is a step, a float a fraction of the
            run.

    :meth:`stretched` turns fractions into steps, gives each open piece the steps between its boundaries, and stretches
    the last piece over what is left.

    >>> joined = Joined((Constant(), Linear()), (0.5,)).stretched(8)
    >>> [joined(step) for step in range(8)]
    [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int | float, ...]

    def __post_init__(self) -> None:
        replace_field(self, "schedules", tuple(self.schedules))
        replace_field(self, "boundaries", tuple(as_amount("boundary", b) for b in self.boundaries))
        if len(self.boundaries) != len(self.schedules) - 1:
            raise ValueError(
                f"Expected one boundary less than schedules, got {len(self.schedules)} schedules and "
                f"boundaries={self.boundaries}."
            )
        for kind in (int, float):
            alike = [b for b in self.boundaries if isinstance(b, kind)]
            if alike != sorted(alike):
                raise ValueError(f"Expected rising boundaries, got boundaries={self.boundaries}.")
        if len({schedule.absolute for schedule in self.schedules}) > 1:
            raise ValueError(f"Expected only factors or only learning rates, got both in {self.schedules}.")

    @property
    def absolute(self) -> bool:
        return self.schedules[0].absolute

    @property
    def length(self) -> int | None:
        last = self.schedules[-1].length
        return self._starts[-1] + last if self.is_resolved and last is not None else None

    @property
    def is_resolved(self) -> bool:
        return all(s.is_resolved for s in self.schedules) and not any(isinstance(b, float) for b in self.boundaries)

    @property
    def _starts(self) -> tuple[int, ...]:
        return (0, *(b for b in self.boundaries if isinstance(b, int)))

    def stretched(self, num_steps: int) -> Joined:
        # In a trial run of a few steps a fraction may come to lie before a boundary in steps: pieces get empty.
        starts = tuple(itertools.accumulate((as_steps(b, num_steps) for b in self.boundaries), max, initial=0))
        *pieces, last = self.schedules
        pieces = [
            piece if piece.is_resolved else piece.stretched(stop - start)
            for piece, (start, stop) in zip(pieces, itertools.pairwise(starts), strict=True)
        ]
        return Joined((*pieces, last.stretched(max(num_steps - starts[-1], 0))), starts[1:])

    def __call__(self, step: float) -> float:
        if not self.is_resolved:
            raise unresolved(self)
        starts = self._starts
        index = max(bisect.bisect_right(starts, step) - 1, 0)
        return self.schedules[index](step - starts[index])

    def momentum_schedule(self) -> Schedule | None:
        """The momenta, joined; a piece without one keeps the momentum that it finds, or the first that comes."""
        momenta = [schedule.momentum_schedule() for schedule in self.schedules]
        if any(momentum is not None for momentum in momenta) and not self.is_resolved:
            raise unresolved(self)
        return join_momenta(momenta, self._starts)


def join_momenta(momenta: Sequence[Schedule | None], starts: Sequence[int]) -> Schedule | None:
    """Momenta of pieces that begin at ``starts``, as one schedule; None where no piece has one."""
    first = next((momentum for momentum in momenta if momentum is not None), None)
    if first is None:
        return None
    held, joined = first(0), list[Schedule]()
    for index, momentum in enumerate(momenta):
        joined.append(Constant(held) if momentum is None else momentum)
        if index + 1 < len(momenta):
            held = joined[-1](starts[index + 1] - starts[index])
    return Joined(tuple(joined), tuple(starts[1:]))


@dataclass(frozen=True)
class Warmup(Schedule):
    r"""A linear climb to the first value of another schedule, then that schedule.

    :math:`p_0 \cdot (\text{start} + (1 - \text{start}) \, t / W)` for step :math:`t < W`, where :math:`p_0` is the
    schedule's value at its step 0; so the climb meets the schedule.

    Args:
        schedule: what follows. Its own number of steps is the budget.
        num_warmup_steps: :math:`W`: an integer is a number of steps, a float a fraction of the budget.
        start: first value as a share of :math:`p_0`, in [0, 1].
        in_budget: True counts the warm-up as part of the budget and squeezes the schedule into the rest of it; False
            puts the warm-up before the budget (as the REX paper's YOLO runs: 2 epochs from 1e-5 to 1e-4, then 50
            epochs).

    :meth:`stretched` makes the whole, warm-up included, as long as it is told in either case, and returns a warm-up in
    numbers of steps, put before a schedule that is stretched over the rest.

    >>> [Warmup(Linear(num_steps=6), num_warmup_steps=2)(step) for step in range(7)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    >>> Warmup(Linear(num_steps=4), num_warmup_steps=2, in_budget=False).length
    6

    References: Goyal et al., "Accurate, Large Minibatch SGD", 2017 (arXiv:1706.02677), section 2.2.
    """

    schedule: Schedule
    num_warmup_steps: int | float
    start: float = 0.0
    in_budget: bool = True

    def __post_init__(self) -> None:
        replace_field(self, "num_warmup_steps", as_amount("num_warmup_steps", self.num_warmup_steps))
        check_number("start", self.start, low=0.0, high=1.0)

    @property
    def absolute(self) -> bool:
        return self.schedule.absolute

    @property
    def length(self) -> int | None:
        budget = self.schedule.length
        return budget if self.in_budget or budget is None else budget + self._warmup_steps

    @property
    def is_resolved(self) -> bool:
        fraction_of_nothing = isinstance(self.num_warmup_steps, float) and self.schedule.length is None
        return self.schedule.is_resolved and not fraction_of_nothing

    @property
    def _warmup_steps(self) -> int:
        return as_steps(self.num_warmup_steps, self.schedule.length or 0)

    @cached_property
    def _main(self) -> Schedule:
        budget = self.schedule.length
        if budget is None or not self.in_budget:
            return self.schedule
        return self.schedule.stretched(max(budget - self._warmup_steps, 0))

    def stretched(self, num_steps: int) -> Warmup:
        amount = self.num_warmup_steps
        if isinstance(amount, float):
            amount = round(amount * num_steps if self.in_budget else num_steps * amount / (1.0 + amount))
        schedule = self.schedule.stretched(max(num_steps - amount, 0))
        return Warmup(schedule, amount, start=self.start, in_budget=False)

    def __call__(self, step: float) -> float:
        if not self.is_resolved:
            raise unresolved(self)
        warmup = self._warmup_steps
        if step >= warmup:
            return self._main(step - warmup)
        return self._main(0) * (self.start + (1.0 - self.start) * step / warmup)

    def momentum_schedule(self) -> Schedule | None:
        if not self.is_resolved:
            raise unresolved(self)
        momentum = self._main.momentum_schedule()
        return None if momentum is None else Joined((Constant(momentum(0)), momentum), (self._warmup_steps,))


@dataclass(frozen=True)
class WarmupStableDecay(Budgeted):
    r"""Linear warm-up, a constant 1, and a decay at the end.

    Args:
        num_steps: optimizer steps of the run, or None to fill them in later.
        num_warmup_steps: an integer is a number of steps, a float a fraction of the run.
        num_decay_steps: likewise. A run too short for both keeps the warm-up and shortens the decay.
        decay: shape of the decay, stretched over it.
        start: first value of the warm-up, in [0, 1].

    >>> wsd = WarmupStableDecay(num_steps=10, num_warmup_steps=2, num_decay_steps=4)
    >>> [wsd(step) for step in range(11)]
    [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]

    References: Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training
    Strategies", 2024 (arXiv:2404.06395), section 4. Differs from the paper: the decay is linear and takes a fifth of
    the run by default.
    """

    num_warmup_steps: int | float = 0.05
    num_decay_steps: int | float = 0.2
    decay: Schedule = field(default=Linear())
    start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        replace_field(self, "num_warmup_steps", as_amount("num_warmup_steps", self.num_warmup_steps))
        replace_field(self, "num_decay_steps", as_amount("num_decay_steps", self.num_decay_steps))
        check_number("start", self.start, low=0.0, high=1.0)

    @cached_property
    def _phases(self) -> Schedule:
        if self.num_steps is None:
            raise unresolved(self)
        warmup = as_steps(self.num_warmup_steps, self.num_steps)
        stable = max(self.num_steps - as_steps(self.num_decay_steps, self.num_steps) - warmup, 0)
        main = Joined((Constant(), self.decay), (stable,)).stretched(max(self.num_steps - warmup, 0))
        return Warmup(main, warmup, start=self.start, in_budget=False)

    def __call__(self, step: float) -> float:
        return self._phases(step)

    def momentum_schedule(self) -> Schedule | None:
        return self._phases.momentum_schedule()


@dataclass(frozen=True)
class Sampled(Schedule):
    """A profile at a sampling rate: its value is read at some points only and held between them.

    The value at a step is the profile's at the last sample point at or before it; step 0 is always one. The usual
    schedules are one profile at two extremes: every step gives linear, cosine or REX, two or three samples give step
    schedules.

    Args:
        schedule: the profile.
        rate: when it is sampled. An integer: every so many steps. A float: every such fraction of the run. A sequence:
            at these points, rising, each a step (integer) or a fraction of the run (float).

    >>> from lightning_autolr.schedules import Rex
    >>> fifty_seventyfive = Sampled(Rex(num_steps=100), rate=(0.5, 0.75))
    >>> [round(fifty_seventyfive(step), 3) for step in (0, 49, 50, 74, 75, 99)]
    [1.0, 1.0, 0.667, 0.667, 0.4, 0.4]
    >>> round(Sampled(Rex(num_steps=100), rate=0.1)(59), 3)
    0.667

    References: Chen, Wolfe and Kyrillidis, "REX: Revisiting Budgeted Training with an Improved Schedule", section 3.
    """

    schedule: Schedule
    rate: int | float | tuple[int | float, ...] = 1

    def __post_init__(self) -> None:
        if isinstance(self.rate, (int, float)):
            rate: int | float | tuple[int | float, ...] = as_amount("rate", self.rate)
            if rate == 0:
                raise ValueError(f"Expected rate > 0, got rate={self.rate!r}.")
        else:
            rate = tuple(as_amount("rate entry", point) for point in self.rate)
        replace_field(self, "rate", rate)

    @property
    def _amounts(self) -> tuple[int | float, ...]:
        return self.rate if isinstance(self.rate, tuple) else (self.rate,)

    @property
    def absolute(self) -> bool:
        return self.schedule.absolute

    @property
    def length(self) -> int | None:
        return self.schedule.length

    @property
    def is_resolved(self) -> bool:
        fraction_of_nothing = self.length is None and any(isinstance(a, float) for a in self._amounts)
        return self.schedule.is_resolved and not fraction_of_nothing

    def stretched(self, num_steps: int) -> Sampled:
        schedule = self.schedule.stretched(num_steps)
        if schedule.length is not None:
            return Sampled(schedule, self.rate)
        if isinstance(self.rate, tuple):  # an endless schedule does not remember what the fractions are of
            return Sampled(schedule, tuple(as_steps(point, num_steps) for point in self.rate))
        return Sampled(schedule, max(as_steps(self.rate, num_steps), 1))

    def __call__(self, step: float) -> float:
        if not self.is_resolved:
            raise unresolved(self)
        total = self.length or 0
        at = [amount * total if isinstance(amount, float) else amount for amount in self._amounts]
        step += 1e-6  # 0.07 * 100 is a little more than 7: a sample point must not miss its own step
        if not isinstance(self.rate, tuple):
            return self.schedule(math.floor(step / at[0]) * at[0] if at[0] else 0)
        return self.schedule(max((point for point in at if point <= step), default=0))

    def momentum_schedule(self) -> Schedule | None:
        momentum = self.schedule.momentum_schedule()
        if momentum is None:
            return None
        sampled = Sampled(momentum, self.rate)
        return sampled if sampled.is_resolved or self.length is None else sampled.stretched(self.length)


@dataclass(frozen=True)
class Shifted(Schedule):
    """A schedule read from a later step on: what a run does from there.

    Args:
        schedule: any schedule.
        by: steps to leave out, >= 0.

    Stretching keeps the share that is left out, if the schedule's number of steps was known, and the steps otherwise.

    >>> [Shifted(Linear(num_steps=4), by=2)(step) for step in (0, 1, 2)]
    [0.5, 0.25, 0.0]
    """

    schedule: Schedule
    by: int = 0

    def __post_init__(self) -> None:
        replace_field(self, "by", as_count("by", self.by))

    @property
    def absolute(self) -> bool:
        return self.schedule.absolute

    @property
    def length(self) -> int | None:
        length = self.schedule.length
        return None if length is None else max(length - self.by, 0)

    @property
    def is_resolved(self) -> bool:
        return self.schedule.is_resolved

    def stretched(self, num_steps: int) -> Shifted:
        by = round(self.by * num_steps / self.length) if self.length else self.by
        return Shifted(self.schedule.stretched(by + num_steps), by)

    def __call__(self, step: float) -> float:
        return self.schedule(self.by + step)

    def momentum_schedule(self) -> Schedule | None:
        momentum = self.schedule.momentum_schedule()
        return None if momentum is None else Shifted(momentum, self.by)
