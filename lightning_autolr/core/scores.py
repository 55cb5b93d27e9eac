r"""From the losses at several multiples of one update to one factor on the learning rate.

The losses are normalised over the factors to :math:`x_i`, turned into scores :math:`s_i = e^{-x_i / T}`, and averaged
geometrically:

.. math:: F = \exp\Bigl(\frac{\sum_i s_i \ln f_i}{\sum_i s_i}\Bigr), \qquad \eta \leftarrow F \eta .

The method is algorithm 1 of "Automated Learning Rate Scheduling with In-Training Information" (POSTECH CSED538, 2024).
It scores one virtual step per factor; the paper says "Normalize" without a formula, and its code uses the z-score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

__all__ = ["Normalization", "clip_outliers", "normalize", "scored_factor", "weighted_geometric_mean"]

Array = NDArray[np.float64]
Normalization = Literal["zscore", "zscore_population", "minmax", "softmax", "sum", "rank", "improvement"]

_HUGE = 1e100  # as good as infinite, and its square still fits into a double


def scored_factor(
    factors: Sequence[float],
    losses: Sequence[float],
    base: float | None = None,
    *,
    normalization: Normalization = "zscore",
    temperature: float = 1.0,
    outlier_clip: float | None = 3.0,
) -> float:
    r"""The factor on the learning rate that these losses speak for, between the smallest and the largest.

    - Losses that are not finite (or above 1e100) score zero. If there are no others, the smallest factor is returned.
    - Equal losses say nothing: 1. (The published code divides 0 by 0 there.)
    - A single factor is returned as it is, whatever its loss.

    With every normalisation but ``"softmax"`` and ``"sum"``, adding a constant to all losses (``base`` included) or
    multiplying all by a positive one changes nothing.

    Args:
        factors: multiples of the learning rate, each > 0, shape ``(n,)``.
        losses: loss after the step at each of them, shape ``(n,)``.
        base: loss before the step, on the same batch; ``"improvement"`` needs it.
        normalization: see :func:`normalize`.
        temperature: T > 0. Towards 0 the factor with the lowest loss wins alone, towards infinity all count the same.
        outlier_clip: see :func:`clip_outliers`; None clips nothing, as published.

    Raises:
        ValueError: lengths that differ, a factor or temperature <= 0, a clip < 0, or ``"improvement"`` without a base.

    >>> round(scored_factor([2, 1, 0.5], [1.0, 0.9, 1.2]), 6)
    1.17163
    >>> scored_factor([2, 1, 0.5], [float("nan"), float("inf"), float("nan")])
    0.5
    """
    f, y = np.asarray(factors, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if f.shape != y.shape or f.ndim != 1 or f.size == 0 or not (f > 0).all():
        raise ValueError(f"Expected as many losses as factors, all factors > 0, got {factors=} and {losses=}.")
    if not temperature > 0 or (outlier_clip is not None and not outlier_clip >= 0):
        raise ValueError(
            f"Expected temperature > 0 and outlier_clip >= 0 or None, got {temperature=} and {outlier_clip=}."
        )
    usable = np.abs(y) < _HUGE  # False for NaN
    if f.size == 1 or not usable.any():
        return float(f.min())
    y = y[usable]
    if usable.all() and _equal(y):
        return 1.0
    if base is not None and not abs(base) < _HUGE:
        base = np.inf
    if outlier_clip is not None:
        y = clip_outliers(y, outlier_clip)
    x = normalize(y, normalization, base)
    # the scores matter up to a common factor only: without the minimum nothing overflows at small temperatures
    return weighted_geometric_mean(f[usable], np.exp(-(x - x.min()) / temperature))


def weighted_geometric_mean(factors: ArrayLike, scores: ArrayLike) -> float:
    r""":math:`\exp(\sum_i s_i \ln f_i / \sum_i s_i)`.

    >>> round(weighted_geometric_mean([2, 1, 0.5], [1, 1, 1]), 12)
    1.0
    """
    return float(np.exp(np.average(np.log(factors), weights=np.asarray(scores, dtype=np.float64))))


def clip_outliers(losses: ArrayLike, strength: float = 3.0) -> Array:
    r"""Cap every loss at :math:`m + k\,(m - \min \ell)`, with the losses' median m and ``strength`` k.

    One exploding candidate then does not dominate mean and standard deviation and make the others look equal. Where half of
    the losses equal the lowest, they say nothing that could be drowned, and nothing is capped.

    >>> clip_outliers([100.0, 0.9, 1.05]).round(6).tolist()
    [1.5, 0.9, 1.05]
    """
    y = np.asarray(losses, dtype=np.float64)
    low, middle = y.min(), np.median(y)
    return np.asarray(np.minimum(y, middle + strength * (middle - low)) if middle > low else y)


def normalize(losses: ArrayLike, how: Normalization = "zscore", base: float | None = None) -> Array:
    r"""Put losses on a common scale; lower stays better.

    ======================= =========================================== ==============================================
    ``how``                 formula                                     remarks
    ======================= =========================================== ==============================================
    ``"zscore"``            :math:`(\ell - \bar\ell) / \sigma_{n-1}`    the published code's; never beyond
                                                                        :math:`\pm (n - 1) / \sqrt n`
    ``"zscore_population"`` :math:`(\ell - \bar\ell) / \sigma_n`        a little stronger
    ``"minmax"``            :math:`(\ell - \min) / (\max - \min)`       in [0, 1]: weak
    ``"softmax"``           :math:`e^{\ell} / \sum e^{\ell}`            scores nearly equal; depends on the scale
    ``"sum"``               :math:`\ell / \sum |\ell|`                  as weak; depends on the level
    ``"rank"``              rank / (n - 1), ties share theirs           no outliers, no magnitudes
    ``"improvement"``       :math:`(\ell - \min) / |b - \min|`          in units of the best step's gain; needs ``base``
    ======================= =========================================== ==============================================

    Args:
        losses: finite losses, shape ``(n,)``.
        how: one of the above.
        base: loss before the step.

    Returns:
        Shape ``(n,)``; zeros if the losses are equal.

    >>> normalize([1.0, 0.9, 1.2]).round(6).tolist()
    [-0.218218, -0.872872, 1.091089]
    """
    if how not in get_args(Normalization):
        raise ValueError(f"Expected one of {get_args(Normalization)}, got {how!r}.")
    if how == "improvement" and base is None:
        raise ValueError("Expected the loss before the step for 'improvement', got base=None.")
    y = np.asarray(losses, dtype=np.float64)
    if _equal(y):
        return np.zeros_like(y)
    low = y.min()
    spread: Array = np.asarray((y - low) / np.ptp(y))  # in [0, 1]: squares of tiny losses would underflow
    match how:
        case "zscore":
            return np.asarray(stats.zscore(spread, ddof=1))
        case "zscore_population":
            return np.asarray(stats.zscore(spread))
        case "minmax":
            return spread
        case "softmax":
            return np.asarray(special.softmax(y))
        case "sum":
            return np.asarray(y / np.abs(y).sum())
        case "rank":
            return np.asarray((stats.rankdata(y) - 1) / (y.size - 1))
        case _:
            assert base is not None
            return np.asarray(spread / max(abs(base - low) / np.ptp(y), 1e-12))


def _equal(y: Array) -> bool:
    return bool(np.ptp(y) <= 1e-12 * np.abs(y).max())
