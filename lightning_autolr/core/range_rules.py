r"""What a learning-rate range test says: curves, rules, a suggestion with its interval, or none with the reason.

The test (Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, section 3.3) trains while the
learning rate climbs and looks at the loss. Everything here is measured in decades of the learning rate and in
differences of the loss, never in ratios of losses: they may be negative, and nothing changes when all are shifted or
scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

__all__ = [
    "MODES",
    "RULES",
    "Mode",
    "RangeCurve",
    "RangeSuggestion",
    "Rule",
    "divergence",
    "ladder",
    "smooth",
    "suggest",
]

Array = NDArray[np.float64]
Mode = Literal["exponential", "linear"]
Rule = Literal["steepest", "valley", "minimum", "edge"]

MODES: tuple[Mode, ...] = ("exponential", "linear")
_SURE = 4.0  # standard errors that make a fall or a rise


def ladder(min_lr: float, max_lr: float, num_steps: int, mode: Mode = "exponential") -> Array:
    """The learning rates of the test, both ends included, shape ``(num_steps,)``.

    >>> ladder(1e-8, 1, 5).tolist()
    [1e-08, 1e-06, 0.0001, 0.01, 1.0]
    >>> ladder(1e-3, 1, 5, "linear").tolist()
    [0.001, 0.25075, 0.5005, 0.75025, 1.0]
    """
    space = np.geomspace if mode == "exponential" else np.linspace
    return np.asarray(space(min_lr, max_lr, num_steps))


def divergence(losses: Sequence[float]) -> tuple[int | None, float]:
    r"""Where the loss ran away, as an index into the losses (None: it did not), and the loss that counts as that.

    The limit is :math:`\min + 2\,(\text{first} - \min) + 6\,\sigma`: all that was won is lost, and as much again, and
    more than the noise. First and minimum are taken from running medians of five, and :math:`\sigma` from the median
    size of the second differences, so that single outliers do nothing. Works for losses of any sign and size, where a
    ratio ("four times the best") does not.

    >>> divergence([-1.0, -1.5, -2.0, -2.5, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0])[0]
    7
    >>> divergence([2.0, 1.0, 1.5])[0] is None
    True
    """
    y = np.asarray(losses, dtype=np.float64)
    broken = np.flatnonzero(~np.isfinite(y))
    end = int(broken[0]) if broken.size else len(y)
    if end == 0:
        return 0, math.inf
    # less than a window of the median cannot tell a rise from an outlier
    level = ndimage.median_filter(y[:end], size=5, mode="reflect") if end >= 5 else np.full(end, np.median(y[:end]))
    low = level.min()
    limit = low + 2 * (level[0] - low) + 6 * _noise(y[:end])
    above = np.flatnonzero(level > limit)
    index = int(above[0]) if above.size else end if broken.size else None
    return index, float(limit)


class Smooth(NamedTuple):
    """Local lines: values, slopes per decade, and the standard error of a value for noise of size 1, each ``(n,)``."""

    values: Array
    slopes: Array
    errors: Array


def smooth(lrs: ArrayLike, losses: ArrayLike, width: float = 0.4) -> Smooth:
    r"""Fit a line over the decades around each point, with tricube weights that end ``width`` decades away.

    Where points are sparse (a linear ladder at its lower end) the window grows to hold two neighbours. Values and
    slopes are exact for straight lines, at the ends of the curve too.

    Args:
        lrs: rising, > 0, shape ``(n,)``, n >= 3.
        losses: shape ``(n,)``.
        width: decades, > 0.

    >>> smooth([0.1, 1.0, 10.0, 100.0], [4.0, 3.0, 2.0, 1.0]).slopes.round(6).tolist()
    [-1.0, -1.0, -1.0, -1.0]

    References: Cleveland, "Robust locally weighted regression and smoothing scatterplots", JASA 74, 1979.
    """
    x, y = np.log10(lrs), np.asarray(losses, dtype=np.float64)
    distance = x - x[:, None]  # one row per point, one column per neighbour
    near = np.sort(np.abs(distance), axis=1)[:, 2:3]
    weight = np.clip(1 - (np.abs(distance) / np.maximum(width, 1.25 * near)) ** 3, 0, None) ** 3
    s0, s1, s2 = (np.sum(weight * distance**k, axis=1, keepdims=True) for k in range(3))
    determinant = s0 * s2 - s1**2
    value = weight * (s2 - s1 * distance) / determinant
    slope = weight * (s0 * distance - s1) / determinant
    return Smooth(value @ y, slope @ y, np.sqrt(np.sum(value**2, axis=1)))


@dataclass(frozen=True)
class RangeCurve:
    """One run up the ladder, until its end or until the loss ran away. Shapes ``(n,)``.

    Args:
        lrs: the learning rate of each step.
        losses: the loss *after* that step. (The loss of a step is computed before its update, so this is the next
            step's. Lightning's finder pairs a step's rate with the loss before it, one rung too high.)
        smoothed: see :func:`smooth`; losses above the limit of :func:`divergence` count as that limit.
        slopes: per decade of the learning rate, smoothed over twice the width.
        diverged: the loss ran away.
        fell: ``smoothed`` falls below its first value by more than noise.
        edge: the largest learning rate at which the loss did not yet rise; None if it never rose for good.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...] = ()
    slopes: tuple[float, ...] = ()
    diverged: bool = False
    fell: bool = False
    edge: float | None = None

    @property
    def bottom(self) -> int:
        """Index of the lowest smoothed loss."""
        return int(np.argmin(self.smoothed))

    @property
    def descent(self) -> tuple[int, int]:
        """First and last index of the main fall.

        Of the stretches of unbroken fall, down to the lowest smoothed loss, the one that wins most; without its first and
        last twentieth of loss, which may take decades.
        """
        y = np.asarray(self.smoothed[: self.bottom + 1])
        parts = np.split(np.arange(len(y)), np.flatnonzero(np.diff(y) >= 0) + 1)
        main = max(parts, key=lambda part: float(y[part[0]] - y[part[-1]]))
        won = (y[main[0]] - y[main]) / max(y[main[0]] - y[main[-1]], np.finfo(float).tiny)
        return int(main[won <= 0.05][-1]), int(main[np.argmax(won >= 0.95)] if won[-1] else main[-1])

    @property
    def onset(self) -> float | None:
        """The learning rate at which the main fall begins, if there is one."""
        return self.lrs[self.descent[0]] if self.fell else None

    @classmethod
    def measured(cls, lrs: Sequence[float], losses: Sequence[float], width: float = 0.4) -> RangeCurve:
        """Make a curve of the training losses before each step, as a probe answers them.

        Args:
            lrs: learning rate of each step, rising.
            losses: loss before each step; as many as steps were made, at most ``len(lrs)``.
            width: see :func:`smooth`.
        """
        index, limit = divergence(losses)
        # up to the first loss above the limit; then the rest says nothing more
        after = np.asarray(losses[1 : len(losses) if index is None else index + 1], dtype=np.float64)
        x = np.asarray(lrs[: len(after)], dtype=np.float64)
        rates, raw = tuple(x.tolist()), tuple(after.tolist())
        if len(x) < 3:
            return cls(rates, raw, diverged=index is not None)
        y = np.where(np.isfinite(after), np.minimum(after, limit), limit)
        values, _, errors = smooth(x, y, width)
        slopes = smooth(x, y, 2 * width).slopes  # a slope is noisier than a value
        bottom, noise = int(np.argmin(values)), _noise(y)
        fall, rise = values[0] - values[bottom], values[-1] - values[bottom]
        fell = fall > _SURE * noise * math.hypot(errors[0], errors[bottom])
        rose = index is not None or rise > max(0.1 * fall, _SURE * noise * math.hypot(errors[-1], errors[bottom]))
        # smoothing says which valley, the losses themselves say where in it: on a falling-then-rising curve without
        # noise the lowest loss is always within the window of the lowest smoothed one
        window = np.flatnonzero(np.abs(np.log10(x / x[bottom])) <= width)
        lowest = window[y[window] == y[window].min()][-1]
        return cls(
            lrs=rates,
            losses=raw,
            smoothed=tuple(values.tolist()),
            slopes=tuple(slopes.tolist()),
            diverged=index is not None,
            fell=bool(fell),
            edge=float(x[lowest]) if rose else None,
        )


def steepest(curve: RangeCurve) -> float | None:
    """Where the loss falls fastest per decade of the learning rate, within the main fall."""
    first, last = curve.descent
    return curve.lrs[first + int(np.argmin(curve.slopes[first : last + 1]))]


def valley(curve: RangeCurve) -> float | None:
    """The middle of the main fall, in decades."""
    first, last = curve.descent
    return math.sqrt(curve.lrs[first] * curve.lrs[last])


def minimum(curve: RangeCurve) -> float | None:
    """A tenth of the learning rate with the lowest loss."""
    return curve.lrs[curve.bottom] / 10


def edge(curve: RangeCurve) -> float | None:
    """A quarter of the learning rate from which on the loss rises.

    On a quadratic that edge is 2 / h and 1 / h is best; the other half is for the steps that a loss takes to show it.
    """
    return None if curve.edge is None else curve.edge / 4


RULES: dict[Rule, Callable[[RangeCurve], float | None]] = {
    "steepest": steepest,
    "valley": valley,
    "minimum": minimum,
    "edge": edge,
}


@dataclass(frozen=True)
class RangeSuggestion:
    """What the test says.

    Args:
        lr: the suggested learning rate, the geometric middle of the repeats; None if the curves support none.
        lower: the lowest of the repeats' suggestions; None without one.
        upper: the highest.
        reason: one sentence: how it was found, or why there is none.
        curves: one for each repeat.
    """

    lr: float | None
    lower: float | None
    upper: float | None
    reason: str
    curves: tuple[RangeCurve, ...] = ()

    @property
    def bounds(self) -> tuple[float, float]:
        """Where to search when nobody says it: wide, and known also when there is no suggestion.

        The upper bound is three times the divergence edge (the middle of the repeats'), or the top of the ladder if the
        loss never rose: a rate a little beyond the edge of a climb may still be the best to anneal from. The lower
        bound is where the loss begins to fall, and at least three decades below the upper one: later in training lower
        rates than now are wanted.

        Raises:
            ValueError: no curve has a finite loss.
        """
        if not any(curve.lrs for curve in self.curves):
            raise ValueError(
                "Expected finite training losses at the bottom of the ladder, got none: lower `min_lr`, or look for what makes "
                "the network's own loss infinite."
            )
        edges = [curve.edge for curve in self.curves if curve.edge is not None]
        onsets = [curve.onset for curve in self.curves if curve.onset is not None]
        upper = (
            3 * _middle(edges) if 2 * len(edges) > len(self.curves) else max(c.lrs[-1] for c in self.curves if c.lrs)
        )
        return min([upper / 1000, *onsets]), upper


def suggest(curves: Sequence[RangeCurve], rule: Rule = "minimum") -> RangeSuggestion:
    """Apply a rule to each curve and take the middle. More than half of the curves must support it.

    Args:
        curves: at least one.
        rule: one of ``RULES``.

    Raises:
        ValueError: no curves, or an unknown rule.
    """
    if not curves or rule not in RULES:
        raise ValueError(
            f"Expected at least one curve and a rule out of {list(RULES)}, got {len(curves)} and {rule!r}."
        )
    doubts = [_doubt(curve, rule) for curve in curves]
    found = [RULES[rule](curve) for curve, doubt in zip(curves, doubts, strict=True) if not doubt]
    lrs = [lr for lr in found if lr is not None]
    if 2 * len(lrs) <= len(curves):
        reason = "; ".join(dict.fromkeys(doubt for doubt in doubts if doubt))
        return RangeSuggestion(None, None, None, f"no suggestion: {reason}", tuple(curves))
    lr = _middle(lrs)
    edges = [curve.edge for curve in curves if curve.edge is not None]
    rises = f"rises from {_middle(edges):.3g} on" if edges else f"never rises up to {curves[0].lrs[-1]:.3g}"
    reason = f"{rule} rule, {len(lrs)} of {len(curves)} repeats from {min(lrs):.3g} to {max(lrs):.3g}; the loss {rises}"
    return RangeSuggestion(lr, min(lrs), max(lrs), reason, tuple(curves))


def _doubt(curve: RangeCurve, rule: Rule) -> str:
    """Why this curve supports no suggestion, or nothing."""
    if not curve.smoothed:
        return "the loss ran away within three steps: lower min_lr"
    if rule == "edge":
        return "" if curve.edge is not None else "the loss never rose: raise max_lr"
    return "" if curve.fell else "the loss never fell by more than its noise"


def _middle(values: Sequence[float]) -> float:
    return float(10 ** np.median(np.log10(values)))


def _noise(y: Array) -> float:
    """Standard deviation of the noise on a smooth curve, from the median size of its second differences.

    Never below the rounding of single precision, so that a flat loss stays flat.
    """
    found = 1.4826 / math.sqrt(6) * float(np.median(np.abs(np.diff(y, 2)))) if len(y) > 2 else 0.0
    return max(found, 1e-7 * float(np.median(np.abs(y))))
