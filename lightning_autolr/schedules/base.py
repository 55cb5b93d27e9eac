"""What a schedule is: a frozen value that turns an optimizer step into a factor."""

from __future__ import annotations

import dataclasses
import math
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

B = TypeVar("B", bound="Budgeted")


@dataclass(frozen=True)
class Schedule(ABC):
    """A value: optimizer step, counted from 0, to a factor on the learning rate.

    A schedule remembers nothing, so a resumed run needs only the step. Equal fields make equal schedules; they print
    themselves, pickle, hash, and load from YAML by ``class_path``. To vary one, wrap it (:class:`Scaled`,
    :class:`Warmup`, :class:`Sampled`, :class:`Joined`).

    A number of steps may be left open (``num_steps=None``) or given as a fraction of the run; :meth:`stretched` fills
    it in:

    >>> from lightning_autolr.schedules import Cosine, Warmup
    >>> schedule = Warmup(Cosine(), num_warmup_steps=0.1)
    >>> schedule.is_resolved
    False
    >>> [round(schedule.stretched(10)(step), 2) for step in (0, 1, 10)]
    [0.0, 1.0, 0.0]
    """

    @abstractmethod
    def __call__(self, step: float) -> float:
        """The factor at ``step`` (>= 0; between two optimizer steps too). Past the end it is the value at the end.

        Raises:
            ValueError: a number of steps is still open.
        """

    @property
    def absolute(self) -> bool:
        """Whether the values are learning rates themselves, not factors on the configured one."""
        return False

    @property
    def length(self) -> int | None:
        """The optimizer steps it is made for; None for an endless schedule, or while that number is open."""
        return None

    @property
    def is_resolved(self) -> bool:
        """Whether it can be called; if not, a number of steps is open and :meth:`stretched` fills it in."""
        return True

    def stretched(self, num_steps: int) -> Schedule:
        """The same schedule over ``num_steps`` optimizer steps; an endless one is returned as it is.

        Fractions follow the new total, steps that were given as numbers of steps (a warm-up of 500) stay, and the last
        piece takes what is left. When a run gets longer, stretch the schedule that the user wrote, not a stretched one.
        """
        return self

    def momentum_schedule(self) -> Schedule | None:
        """The momentum (SGD) or first beta (Adam family) at each step, if this schedule asks for one."""
        return None


@dataclass(frozen=True)
class Constant(Schedule):
    """The same factor at every step.

    Args:
        value: the factor, >= 0.

    >>> Constant()(1000)
    1.0
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        check_number("value", self.value, low=0.0)

    def __call__(self, step: float) -> float:
        return self.value


@dataclass(frozen=True)
class Budgeted(Schedule):
    """A schedule whose shape spans a budget of ``num_steps`` optimizer steps (None: filled in later)."""

    num_steps: int | None = None

    def __post_init__(self) -> None:
        if self.num_steps is not None:
            replace_field(self, "num_steps", as_count("num_steps", self.num_steps))

    @property
    def length(self) -> int | None:
        return self.num_steps

    @property
    def is_resolved(self) -> bool:
        return self.num_steps is not None

    def stretched(self: B, num_steps: int) -> B:
        return dataclasses.replace(self, num_steps=num_steps)


@dataclass(frozen=True)
class Profile(Budgeted):
    """A continuous function p(s) of the progress s = step / num_steps, held at p(1) past the end.

    With ``num_steps=0`` it is p(0) at every step.
    """

    @abstractmethod
    def profile(self, s: float) -> float:
        """The factor at progress ``s`` in [0, 1]."""

    def __call__(self, step: float) -> float:
        if self.num_steps is None:
            raise unresolved(self)
        return self.profile(min(max(step / self.num_steps, 0.0), 1.0) if self.num_steps else 0.0)


def unresolved(schedule: Schedule) -> ValueError:
    return ValueError(
        f"Expected a known number of steps, got {schedule}. Give it `num_steps`, or fill in the total of the run with "
        "`schedule.stretched(total_steps)`."
    )


def replace_field(value: Any, name: str, content: Any) -> None:
    """Set a field of a frozen dataclass; for ``__post_init__`` only, to bring arguments into their normal form."""
    object.__setattr__(value, name, content)


def check_number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"Expected a finite {name} in [{low:g}, {high:g}], got {name}={value!r}.")


def as_count(name: str, value: int, low: int = 0) -> int:
    """A plain int out of anything integral (NumPy's too)."""
    try:
        count = operator.index(value)
    except TypeError:
        count = low - 1
    if count < low:
        raise ValueError(f"Expected {name} to be an integer >= {low}, got {name}={value!r}.")
    return count


def as_amount(name: str, value: int | float) -> int | float:
    """A number of steps (an integer) or a fraction of the run (a float in [0, 1])."""
    if isinstance(value, float):
        if not 0.0 <= value <= 1.0:
            raise ValueError(
                f"Expected {name} to be an integer (steps) or a float in [0, 1] (fraction of the run), "
                f"got {name}={value!r}."
            )
        return float(value)
    return as_count(name, value)


def as_steps(amount: int | float, total: int) -> int:
    """Steps out of an amount, given the steps of the run."""
    return round(amount * total) if isinstance(amount, float) else amount


def as_floats(name: str, values: Any, low: float = -math.inf, high: float = math.inf) -> tuple[float, ...]:
    floats = tuple(float(v) for v in values)
    for value in floats:
        check_number(f"{name} entry", value, low, high)
    return floats
