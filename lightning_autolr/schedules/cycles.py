"""Schedules that come back: cyclic learning rates and warm restarts. They have no end of their own."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from lightning_autolr.schedules.base import (
    Schedule,
    as_amount,
    as_steps,
    check_number,
    replace_field,
    unresolved,
)
from lightning_autolr.schedules.profiles import as_momentum


@dataclass(frozen=True)
class Cyclic(Schedule):
    r"""Cyclical learning rates: up and down between two values.

    With :math:`c = \lfloor 1 + t / 2h \rfloor` (the cycle) and :math:`x = |t / h - 2 c + 1|`, the factor is
    :math:`\text{low} + (\text{high} - \text{low}) \max(0, 1 - x) \cdot \text{scale}`, where scale is 1
    (``triangular``), :math:`2^{1 - c}` (``triangular2``) or :math:`\gamma^t` (``exp_range``). Training is best ended at
    the end of a cycle.

    Args:
        step_size: :math:`h`, optimizer steps of half a cycle (2 to 8 epochs' worth is the advice), or a float: that
            fraction of the run.
        low: lowest factor, >= 0. The default is the paper's 0.001 / 0.006.
        high: highest factor, >= 0.
        mode: what scales the height of a cycle.
        gamma: :math:`\gamma` in (0, 1], for ``exp_range``.
        momentum: lowest and highest momentum, cycled the opposite way as torch's ``CyclicLR`` does with (0.8, 0.9);
            None, as in the paper, leaves the momentum alone.

    >>> [Cyclic(step_size=2, low=0.0)(step) for step in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.0]

    References: Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017 (arXiv:1506.01186).
    """

    step_size: int | float = 2000
    low: float = 1.0 / 6.0
    high: float = 1.0
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: float = 1.0
    momentum: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        replace_field(self, "step_size", _as_period("step_size", self.step_size))
        check_number("low", self.low, low=0.0)
        check_number("high", self.high, low=0.0)
        if self.mode not in ("triangular", "triangular2", "exp_range"):
            raise ValueError(f"Expected mode triangular, triangular2 or exp_range, got mode={self.mode!r}.")
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(f"Expected 0 < gamma <= 1, got gamma={self.gamma!r}.")
        if self.momentum is not None:
            replace_field(self, "momentum", as_momentum(self.momentum))

    @property
    def is_resolved(self) -> bool:
        return not isinstance(self.step_size, float)

    def stretched(self, num_steps: int) -> Cyclic:
        return dataclasses.replace(self, step_size=max(as_steps(self.step_size, num_steps), 1))

    def __call__(self, step: float) -> float:
        if not self.is_resolved:
            raise unresolved(self)
        cycle = math.floor(1 + step / (2 * self.step_size))
        height = max(0.0, 1.0 - abs(step / self.step_size - 2 * cycle + 1))
        return self.low + (self.high - self.low) * height * self._scale(step, cycle)

    def _scale(self, step: float, cycle: int) -> float:
        if self.mode == "triangular2":
            return math.ldexp(1.0, 1 - cycle)  # 2^(1 - cycle), which may underflow to 0 but not overflow
        return self.gamma**step if self.mode == "exp_range" else 1.0

    def momentum_schedule(self) -> Schedule | None:
        if self.momentum is None:
            return None
        low, high = self.momentum
        return dataclasses.replace(self, low=high, high=low, momentum=None)


@dataclass(frozen=True)
class WarmRestarts(Schedule):
    r"""Cosine annealing with warm restarts (SGDR).

    :math:`\text{low} + \frac{1}{2} (1 - \text{low}) (1 + \cos(\pi T_{cur} / T_i))`; when :math:`T_{cur}` reaches
    :math:`T_i` it starts again at 1 with :math:`T_{i+1} = \text{mult} \cdot T_i`.

    Args:
        period: :math:`T_0`, optimizer steps until the first restart, or a float: that fraction of the run.
        mult: each period is so many times as long as the one before, an integer >= 1.
        low: lowest factor, in [0, 1].

    >>> [round(WarmRestarts(period=10, mult=2)(step), 3) for step in (0, 5, 10, 20, 30)]
    [1.0, 0.5, 1.0, 0.5, 1.0]

    References: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, equation 5.
    """

    period: int | float
    mult: int = 1
    low: float = 0.0

    def __post_init__(self) -> None:
        replace_field(self, "period", _as_period("period", self.period))
        if isinstance(self.mult, float) or self.mult < 1:
            raise ValueError(f"Expected an integer mult >= 1, got mult={self.mult!r}.")
        check_number("low", self.low, low=0.0, high=1.0)

    @property
    def is_resolved(self) -> bool:
        return not isinstance(self.period, float)

    def stretched(self, num_steps: int) -> WarmRestarts:
        return dataclasses.replace(self, period=max(as_steps(self.period, num_steps), 1))

    def __call__(self, step: float) -> float:
        if not self.is_resolved:
            raise unresolved(self)
        period = self.period
        if self.mult == 1:
            step = step % period
        while step >= period:
            step, period = step - period, period * self.mult
        return self.low + 0.5 * (1.0 - self.low) * (1.0 + math.cos(math.pi * step / period))


def _as_period(name: str, value: int | float) -> int | float:
    amount = as_amount(name, value)
    if amount == 0:
        raise ValueError(f"Expected {name} > 0, got {name}={value!r}.")
    return amount
