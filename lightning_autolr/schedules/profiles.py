"""Profiles of a budget: pure functions p(s) of the progress s = step / num_steps.

The form, and most of the formulas, are those of Chen, Wolfe and Kyrillidis, "REX: Revisiting Budgeted Training with an
Improved Schedule", MLSys 2022 (arXiv:2107.04197), sections 3 and 4.1: a schedule is a profile, stretched to the run's
own budget, times a sampling rate (:class:`~lightning_autolr.schedules.Sampled`).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_autolr.schedules.base import Profile, Schedule, as_floats, check_number, replace_field


@dataclass(frozen=True)
class _Decay(Profile):
    """A profile that falls from 1; ``end`` raises its lowest value from 0: end + (1 - end) p(s)."""

    end: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("end", self.end, low=0.0, high=1.0)

    def _above_end(self, p: float) -> float:
        return self.end + (1.0 - self.end) * p


@dataclass(frozen=True)
class Linear(_Decay):
    r"""Linear decay, :math:`p(s) = 1 - s`.

    Args:
        num_steps: optimizer steps of the run, or None to fill them in later.
        end: value at the end, in [0, 1].

    >>> [Linear(num_steps=4)(step) for step in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    References: Li, Yumer and Ramanan, "Budgeted Training", ICLR 2020 (arXiv:1905.04753).
    """

    def profile(self, s: float) -> float:
        return self._above_end(1.0 - s)


@dataclass(frozen=True)
class Cosine(_Decay):
    r"""Half a cosine, :math:`p(s) = \frac{1}{2} (1 + \cos \pi s)`, and no restart.

    Args:
        num_steps: optimizer steps of the run, or None to fill them in later.
        end: value at the end, in [0, 1].

    >>> round(Cosine(num_steps=100)(25), 6)
    0.853553

    References: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, equation 5.
    """

    def profile(self, s: float) -> float:
        return self._above_end(0.5 * (1.0 + math.cos(math.pi * s)))


@dataclass(frozen=True)
class Polynomial(_Decay):
    r"""Polynomial decay, :math:`p(s) = (1 - s)^\alpha`.

    Args:
        num_steps: optimizer steps of the run, or None to fill them in later.
        power: :math:`\alpha \ge 0`; 1 is :class:`Linear`.
        end: value at the end, in [0, 1].

    >>> Polynomial(num_steps=4, power=2)(2)
    0.25
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("power", self.power, low=0.0)

    def profile(self, s: float) -> float:
        return self._above_end((1.0 - s) ** self.power)


@dataclass(frozen=True)
class Rex(_Decay):
    r"""Reflected exponential decay, :math:`p(s) = \frac{z}{(1 - d) + d z}` with :math:`z = 1 - s`.

    The paper's form is ``d = 0.5``: :math:`(1 - s) / (\frac{1}{2} + \frac{1}{2} (1 - s))`. Many ports use ``d = 0.9``,
    which holds the learning rate much longer, and some restart after the last step; this one never does.

    Args:
        num_steps: optimizer steps of the run, or None to fill them in later.
        d: in [0, 1): 0 is :class:`Linear`, larger holds the learning rate longer.
        end: value at the end, in [0, 1].

    >>> [round(Rex(num_steps=4)(step), 3) for step in range(5)]
    [1.0, 0.857, 0.667, 0.4, 0.0]

    References: Chen, Wolfe and Kyrillidis, "REX: Revisiting Budgeted Training with an Improved Schedule", section 4.1.
    """

    d: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.d < 1.0:
            raise ValueError(f"Expected 0 <= d < 1 (0.5 is the paper's REX), got d={self.d!r}.")

    def profile(self, s: float) -> float:
        z = 1.0 - s
        return self._above_end(z / ((1.0 - self.d) + self.d * z))


@dataclass(frozen=True)
class DelayedLinear(_Decay):
    r"""Constant up to progress :math:`X`, then linear: :math:`p(s) = \min(1, (1 - s) / (1 - X))`.

    Args:
        num_steps: optimizer steps of the run, or None to fill them in later.
        delay: :math:`X` in [0, 1): the share of the run before the decay.
        end: value at the end, in [0, 1].

    >>> [DelayedLinear(num_steps=4, delay=0.5)(step) for step in range(5)]
    [1.0, 1.0, 1.0, 0.5, 0.0]

    References: the REX paper, section 3 and figure 3.
    """

    delay: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.delay < 1.0:
            raise ValueError(f"Expected 0 <= delay < 1, got delay={self.delay!r}.")

    def profile(self, s: float) -> float:
        return self._above_end(min(1.0, (1.0 - s) / (1.0 - self.delay)))


@dataclass(frozen=True)
class Exponential(Profile):
    r"""Exponential, :math:`p(s) = e^{\gamma s}`.

    Args:
        num_steps: optimizer steps of the run, or None to fill them in later.
        gamma: :math:`\gamma`; -3 is the best found in the REX paper. A positive one climbs: ``gamma=log(high / low)``
            is the ramp of a learning-rate range test.

    >>> round(Exponential(num_steps=10)(10), 6)
    0.049787

    References: the REX paper, section 4.1.
    """

    gamma: float = -3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, high=700.0)  # e^709.8 is the largest float

    def profile(self, s: float) -> float:
        return math.exp(self.gamma * s)


@dataclass(frozen=True)
class Step(Profile):
    r"""A fall at chosen points, :math:`p(s) = f^n` where n points are at or before s.

    Args:
        num_steps: optimizer steps of the run, or None to fill them in later.
        factor: :math:`f`, in [0, 1].
        at: points of progress in [0, 1], rising.

    >>> [round(Step(num_steps=100)(step), 3) for step in (49, 50, 74, 75)]
    [1.0, 0.1, 0.1, 0.01]

    References: the REX paper, section 4.1 (x 0.1 at 50 % and 75 %).
    """

    factor: float = 0.1
    at: tuple[float, ...] = (0.5, 0.75)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("factor", self.factor, low=0.0, high=1.0)
        replace_field(self, "at", as_floats("at", self.at, low=0.0, high=1.0))
        if list(self.at) != sorted(self.at):
            raise ValueError(f"Expected rising points, got at={self.at!r}.")

    def profile(self, s: float) -> float:
        return self.factor ** bisect.bisect_right(self.at, s)


@dataclass(frozen=True, init=False)
class Points(Profile):
    """Straight lines through equally spaced values: the first at step 0, the last at step ``num_steps``.

    Args:
        values: at least one, each finite and >= 0.
        num_steps: optimizer steps of the run, or None to fill them in later.

    >>> [Points((0.0, 1.0, 0.5), num_steps=4)(step) for step in range(6)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    """

    values: tuple[float, ...] = ()

    def __init__(self, values: Sequence[float], num_steps: int | None = None) -> None:
        replace_field(self, "num_steps", num_steps)
        super().__post_init__()
        replace_field(self, "values", as_floats("values", values, low=0.0))
        if not self.values:
            raise ValueError("Expected at least one value, got values=().")

    def profile(self, s: float) -> float:
        position = s * (len(self.values) - 1)
        nearest = round(position)
        if abs(position - nearest) < 1e-9:  # a step that has its own value gets exactly that, whatever s was rounded to
            return self.values[nearest]
        left = int(position)
        return self.values[left] + (position - left) * (self.values[left + 1] - self.values[left])

    def __repr__(self) -> str:
        shown = self.values if len(self.values) <= 8 else (*self.values[:3], ..., *self.values[-2:])
        inner = ", ".join("..." if v is ... else repr(v) for v in shown)
        count = "" if len(self.values) <= 8 else f" [{len(self.values)} values]"
        return f"Points(values=({inner}{',' if len(self.values) == 1 else ''}){count}, num_steps={self.num_steps})"


@dataclass(frozen=True)
class OneCycle(Profile):
    r"""Linearly up to 1 at half time and back, with momentum the opposite way.

    :math:`p(s) = \text{start} + (1 - \text{start}) (1 - |2 s - 1|)`; the momentum goes from its high to its low value
    and back (:meth:`momentum_schedule`).

    Args:
        num_steps: optimizer steps of the run, or None to fill them in later.
        start: value at both ends, in [0, 1].
        momentum: lowest and highest momentum, each in [0, 1); None leaves the momentum alone.

    >>> cycle = OneCycle(num_steps=4)
    >>> [round(cycle(step), 2) for step in range(5)]
    [0.1, 0.55, 1.0, 0.55, 0.1]
    >>> [round(cycle.momentum_schedule()(step), 2) for step in range(5)]
    [0.95, 0.9, 0.85, 0.9, 0.95]

    Differs from torch's ``OneCycleLR``: no annealing below the start value, because the form is that of the REX paper
    (section 4.1), which takes it from Smith and Topin, "Super-Convergence", 2018 (arXiv:1708.07120). To add that phase,
    join a decay: ``Joined((OneCycle(), Scaled(Linear(), 0.1)), (0.9,))``.
    """

    start: float = 0.1
    momentum: tuple[float, float] | None = (0.85, 0.95)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("start", self.start, low=0.0, high=1.0)
        if self.momentum is not None:
            replace_field(self, "momentum", as_momentum(self.momentum))

    def profile(self, s: float) -> float:
        return self.start + (1.0 - self.start) * (1.0 - abs(2.0 * s - 1.0))

    def momentum_schedule(self) -> Schedule | None:
        if self.momentum is None:
            return None
        low, high = self.momentum
        return Points((high, low, high), self.num_steps)


def as_momentum(momentum: tuple[float, float]) -> tuple[float, float]:
    """Lowest and highest momentum as plain floats.

    Raises:
        ValueError: not 0 <= low <= high < 1.
    """
    low, high = (float(m) for m in momentum)
    if not 0.0 <= low <= high < 1.0:
        raise ValueError(f"Expected momentum=(low, high) with 0 <= low <= high < 1, got momentum={momentum!r}.")
    return low, high


@dataclass(frozen=True)
class HalfCosine(Profile):
    r"""The second half of a half cosine, :math:`p(s) = \frac{1}{2} (1 + \cos \frac{\pi}{2} (1 + s))`: from 1/2 to 0.

    Args:
        num_steps: optimizer steps of the run, or None to fill them in later.

    >>> [round(HalfCosine(num_steps=4)(step), 6) for step in range(5)]
    [0.5, 0.308658, 0.146447, 0.03806, 0.0]

    References: ``cooldown_type="half_cosine"`` of AutoWU's published code. It halves the learning rate at once.
    """

    def profile(self, s: float) -> float:
        return 0.5 * (1.0 + math.cos(0.5 * math.pi * (1.0 + s)))
