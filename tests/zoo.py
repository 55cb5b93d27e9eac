"""Problems whose answer is known: which learning rate is best, which one diverges, what is left after so many steps.

A problem is minimised by gradient descent, ``w <- w - lr * gradient(w - shift)``, where ``shift`` plays the batch:
it is normal with standard deviation ``noise`` (0: every batch is the same), as in the noisy quadratic model of Schaul,
Zhang and LeCun, "No more pesky learning rates", 2013, section 3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Problem(ABC):
    """A function of the weights and the place to start from."""

    start: tuple[float, ...] = (1.0,)
    noise: float = 0.0

    @abstractmethod
    def loss(self, w: Vector) -> float: ...

    @abstractmethod
    def gradient(self, w: Vector) -> Vector: ...


@dataclass(frozen=True)
class Quadratic(Problem):
    r""":math:`f(w) = \tfrac12 \sum_i h_i (w_i - w^*)^2`: diverges exactly above ``lr = 2 / max(h)``."""

    curvature: tuple[float, ...] = (1.0,)
    optimum: float = 0.0
    floor: float = 0.0

    def loss(self, w: Vector) -> float:
        return self.floor + float(0.5 * np.sum(np.asarray(self.curvature) * (w - self.optimum) ** 2))

    def gradient(self, w: Vector) -> Vector:
        return np.asarray(self.curvature) * (w - self.optimum)

    def expected_loss(self, lrs: list[float] | tuple[float, ...]) -> float:
        r"""The mean of ``loss`` over the batches after one step at each of ``lrs``.

        Each coordinate's second moment obeys :math:`m \leftarrow (1 - \eta h)^2 m + (\eta h)^2 \sigma^2`.
        """
        h = np.asarray(self.curvature)
        moment = (np.asarray(self.start) - self.optimum) ** 2
        for lr in lrs:
            moment = (1 - lr * h) ** 2 * moment + (lr * h * self.noise) ** 2
        return self.floor + float(0.5 * np.sum(h * moment))


@dataclass(frozen=True)
class Cliff(Problem):
    r""":math:`f(w) = \tfrac14 \sum_i w_i^4`: from ``w0`` it blows up exactly above ``lr = 2 / w0**2``.

    The best next step is ``lr = 1 / w**2``: it grows as the weights shrink, so a warm-up is right.
    """

    start: tuple[float, ...] = (2.0,)

    def loss(self, w: Vector) -> float:
        return float(0.25 * np.sum(w**4))

    def gradient(self, w: Vector) -> Vector:
        return w**3


@dataclass(frozen=True)
class Plateau(Problem):
    r""":math:`f(w) = 1 - e^{-|w|^2 / 2}`, started where no learning rate up to 1e3 changes the loss by 1e-9."""

    start: tuple[float, ...] = (9.0,)

    def loss(self, w: Vector) -> float:
        return float(1 - np.exp(-0.5 * np.sum(w**2)))

    def gradient(self, w: Vector) -> Vector:
        return np.asarray(w * np.exp(-0.5 * np.sum(w**2)))


def off_centre() -> Quadratic:
    """The minimum is at 3, the curvature 4: one step at ``lr = 0.25`` solves it, more than 0.5 diverges."""
    return Quadratic(start=(-1.0,), curvature=(4.0,), optimum=3.0)


def noisy_quadratic(dimensions: int = 50, noise: float = 0.1) -> Quadratic:
    """Curvatures ``1, 1/2, 1/3, ...``: a high constant rate is best early, and annealing it is best late."""
    curvature = tuple(1 / i for i in range(1, dimensions + 1))
    return Quadratic(start=(1.0,) * dimensions, curvature=curvature, noise=noise)
