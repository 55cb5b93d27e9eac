r"""Refined schedules: from the gradient norms of one run to the learning rates of the next.

Defazio, Cutkosky, Mehta and Mishchenko, "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement", 2023
(arXiv:2310.07831). The theory bounds the last iterate of a convex problem with known length T; small steps are taken
where gradients are large, and the end always goes to zero. Warm-up and fast final annealing come out by themselves;
where all norms are equal, linear decay does.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import median_filter

from lightning_autolr.schedules import Linear, Points, Segment, Tabulated

__all__ = ["refine_online", "refine_schedule", "refined_values", "smoothed_norms"]

Floats = NDArray[np.float64]
Norm = Literal["l1", "l2"]


def refined_values(norms: ArrayLike, power: float) -> Floats:
    r"""The closed form :math:`\eta_t = w_t \sum_{p > t} w_p / \sum_p w_p` with :math:`w_t = G_t^{-q}`.

    Args:
        norms: :math:`G_1 \dots G_T`, each finite and > 0, shape ``(T,)``.
        power: :math:`q`: 2 for l2 norms (SGD), 1 for l1 norms (Adam family).

    Returns:
        :math:`\eta_1 \dots \eta_T`, shape ``(T,)``, each >= 0, the last 0. Their scale is that of :math:`w`: divide by
        the maximum for factors.

    Raises:
        ValueError: a norm is not finite or not > 0.

    >>> refined_values([1, 1, 1, 1, 1], power=2).round(3).tolist()
    [0.8, 0.6, 0.4, 0.2, 0.0]
    """
    values = np.asarray(norms, dtype=np.float64)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"Expected gradient norms that are finite and > 0, got {values}; see `smoothed_norms`.")
    weights = values**-power
    after = np.append(np.cumsum(weights[:0:-1])[::-1], 0.0)  # after[t] is the sum of the weights behind t
    refined: Floats = weights * after / weights.sum()
    return refined


def smoothed_norms(norms: ArrayLike, smoothing: float = 0.1, num_steps: int | None = None) -> Floats:
    r"""Norms without bad values, through a median filter.

    Its width is :math:`2 \lfloor \lfloor \tau T \rfloor / 2 \rfloor + 1`, that is 1 (no smoothing) for :math:`\tau T <
    2`. Values that are not finite, or negative, are interpolated from their neighbours, so that the length stays T;
    values below 1e-12 of the median are raised to that. The right end is reflected, because the last values decide the
    sum behind each step and must not be biased towards older ones; the left end is held.

    Differs from the authors' processing: they also cut the first and last two values, which was due to their logging,
    and took the width from a plot's 10,000 points instead of T.

    Args:
        norms: shape ``(n,)``.
        smoothing: :math:`\tau` in [0, 1): width of the filter as a share of the run; 0 does not smooth.
        num_steps: :math:`T`; None is n.

    Returns:
        Shape ``(n,)``, each > 0.

    Raises:
        ValueError: no norm is finite and > 0, or ``smoothing`` is out of its range.

    >>> smoothed_norms([1.0, float("nan"), 3.0], smoothing=0).tolist()
    [1.0, 2.0, 3.0]
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"Expected smoothing in [0, 1), got {smoothing=}.")
    values = _cleaned(norms)
    width = 2 * (int(smoothing * (num_steps or len(values)) + 1e-9) // 2) + 1  # 0.29 * 100 is a little less than 29
    if width == 1:
        return values
    padded = np.pad(values, (0, 2 * width), mode="reflect") if len(values) > 1 else np.repeat(values, 1 + 2 * width)
    smoothed: Floats = median_filter(padded, size=width, mode="nearest")[: len(values)]
    return smoothed


def refine_schedule(norms: ArrayLike, *, norm: Norm = "l2", smoothing: float = 0.1) -> Tabulated:
    r"""The refined schedule of a run, from the gradient norms of an earlier one.

    Log one norm per optimizer step: unscaled under mixed precision, after all-reduce, of the accumulated gradient,
    before clipping. The earlier run can have any schedule; linear decay is the paper's. The peak learning rate is not
    refined: it is still to be tuned.

    Args:
        norms: one per optimizer step, shape ``(T,)``.
        norm: which norm they are: ``"l2"`` (SGD, weights :math:`G^{-2}`) or ``"l1"`` (Adam family, weights
            :math:`G^{-1}`).
        smoothing: width of the median filter as a share of the run, see :func:`smoothed_norms`.

    Returns:
        A table of factors with maximum 1 over T steps; ``.stretched(num_steps)`` reads it by relative progress.

    Raises:
        ValueError: no norm is finite and > 0, or an option is out of range.

    >>> schedule = refine_schedule([1.0] * 5, smoothing=0)
    >>> [round(schedule(step), 2) for step in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]

    References: Defazio et al. 2023 (arXiv:2310.07831).
    """
    smoothed = smoothed_norms(norms, smoothing)
    num_steps = len(smoothed)
    if smoothing > 0.0 and smoothing * num_steps < 2.0:
        warnings.warn(
            f"{num_steps} gradient norms are too few to be smoothed over {smoothing:.0%} of them: the refined schedule "
            "follows their noise. Log a longer run.",
            stacklevel=2,
        )
    # One more value for the end of the budget, so that step t of T reads value t exactly.
    values = Points((*_factors(smoothed, norm).tolist(), 0.0 if num_steps > 1 else 1.0), num_steps)
    return Tabulated((Segment(num_steps, 1.0, values),), absolute=False)


def refine_online(
    norms: ArrayLike,
    num_steps: int,
    *,
    previous: float | None = None,
    norm: Norm = "l2",
    smoothing: float = 0.1,
    max_growth: float = 1.1,
) -> Segment:
    r"""Refinement within one run: the rest of the schedule, from the norms so far.

    Not in the paper, which needs a run beforehand: this is our own method. The last smoothed norm is assumed to last
    until the end; then :func:`refined_values` over all T steps makes the rest a straight line to zero, whose height
    this returns. Call it every so often (every 1 % of the run) and follow the last answer.

    Args:
        norms: one for each optimizer step made so far, shape ``(n,)`` with n <= T; n = 0 gives linear decay from 1.
        num_steps: :math:`T`, optimizer steps of the whole run.
        previous: the factor of the step before, which the new one may exceed by ``max_growth`` at most; None: no limit.
        norm: see :func:`refine_schedule`.
        smoothing: see :func:`smoothed_norms`; the share is of T.
        max_growth: largest ratio of the new factor to the previous one, >= 1. Falls are not limited.

    Returns:
        The factors of the remaining ``T - n`` steps, as a segment that starts at its own step 0.

    Raises:
        ValueError: more norms than steps, or no norm is finite and > 0.

    >>> refine_online([1.0, 1.0], num_steps=5, smoothing=0)(0)
    0.5
    """
    known = np.asarray(norms, dtype=np.float64)
    done = len(known)
    if not 0 <= done <= num_steps:
        raise ValueError(f"Expected at most num_steps norms, got {done} norms and {num_steps=}.")
    if max_growth < 1.0:
        raise ValueError(f"Expected max_growth >= 1, got {max_growth=}.")
    left = num_steps - done
    factor = 1.0
    if done and left:
        smoothed = smoothed_norms(known, smoothing, num_steps)
        factor = float(_factors(np.append(smoothed, np.full(left, smoothed[-1])), norm)[done])
    if previous is not None:
        factor = min(factor, max_growth * previous)
    # With equal weights ahead the formula is linear, and 0 at the last step.
    return Segment(left, factor, Linear(max(left - 1, 0)))


def _factors(norms: Floats, norm: Norm) -> Floats:
    if norm not in ("l1", "l2"):
        raise ValueError(f"Expected norm 'l1' or 'l2', got {norm=}.")
    if len(norms) == 1:
        return np.ones(1)  # the formula says 0: no training at all
    values = refined_values(norms / norms.min(), power=1.0 if norm == "l1" else 2.0)
    factors: Floats = values / values.max()
    return factors


def _cleaned(norms: ArrayLike) -> Floats:
    values = np.asarray(norms, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"Expected one norm per step, shape (T,), got shape {values.shape}.")
    good = np.isfinite(values) & (values >= 0.0)
    if not (values[good] > 0.0).any():
        raise ValueError(f"Expected a gradient norm that is finite and > 0, got none among {len(values)}.")
    steps = np.arange(len(values))
    filled = np.interp(steps, steps[good], values[good])
    return np.maximum(filled, 1e-12 * np.median(filled[filled > 0.0]))
