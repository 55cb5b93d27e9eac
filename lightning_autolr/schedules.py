"""Schedules as values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule(ABC):
    @abstractmethod
    def __call__(self, step: int) -> float: ...


@dataclass(frozen=True)
class Constant(Schedule):
    value: float = 1.0

    def __call__(self, step: int) -> float:
        return self.value
