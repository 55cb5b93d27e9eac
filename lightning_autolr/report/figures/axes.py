"""Axes that suit learning rates and losses, and what is drawn in more than one figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_autolr.report.figures.style import BLUE, GREY, RED, load_matplotlib
from lightning_autolr.report.inspect.searches import Piece

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = [
    "MOST_POINTS",
    "Array",
    "limit_losses",
    "log_axis",
    "mark_diverged",
    "plot_points",
    "rate_curve",
    "running_mean",
]

Array = NDArray[np.float64]

MOST_POINTS = 300  # of a curve; more cannot be told apart
_MANY_TIMES = 15  # from the lowest loss to the highest one: then their axis is logarithmic
_TICKS = (
    (3.0, (1.0,)),
    (1.7, (1.0, 3.0)),
    (0.5, (1.0, 2.0, 5.0)),
    (0.0, (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)),
)


def log_axis(axes: Axes, which: Literal["x", "y"] = "y", floor: float | None = None) -> None:
    """A logarithmic axis for what is drawn already, from ``floor`` on."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    getattr(axes, f"set_{which}scale")("log", nonpositive="mask")
    low, high = axis.get_view_interval()
    if floor is not None and low < floor < high:
        low = floor
    if high < 1.3 * low:  # a constant
        low, high = low / 1.5, high * 1.5
    getattr(axes, f"set_{which}lim")(low, high)
    _log_ticks(axis, low, high)


def _log_ticks(axis: Axis, low: float, high: float) -> None:
    """Plain numbers, more of them between the powers of ten where there are few powers."""
    ticker = load_matplotlib().ticker
    decades = math.log10(high / low)
    between = next(subs for most, subs in _TICKS if decades > most)
    axis.set_major_locator(ticker.LogLocator(subs=between, numticks=8))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def limit_losses(axes: Axes, losses: Sequence[float]) -> None:
    """Show nearly all of these losses: a few exploded ones would flatten the rest."""
    finite = np.array([x for x in losses if x is not None and math.isfinite(x)])
    if not len(finite):
        return
    low, high = float(finite.min()), float(np.quantile(finite, 0.995))
    if low > 0 and high > _MANY_TIMES * low:
        low, high = max(low, high * 1e-6) / 1.3, high * 1.3
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(low, high)
        _log_ticks(axes.yaxis, low, high)
    elif high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.08 * (high - low))


def plot_points(axes: Axes, points: Sequence[tuple[float, float]], style: str = "o", **more: Any) -> None:
    """Pairs of x and y, as marks unless the style says otherwise."""
    axes.plot([x for x, _ in points], [y for _, y in points], style, **more)


def mark_diverged(axes: Axes, positions: Sequence[float]) -> None:
    """At the upper edge, whatever the scale is."""
    style: dict[str, Any] = {"color": RED, "markersize": 7, "markeredgewidth": 2}
    if positions:
        axes.plot(positions, [0.97] * len(positions), "x", transform=axes.get_xaxis_transform(), **style)


def rate_curve(piece: Piece) -> tuple[Array, Array, dict[str, Any]]:
    """Steps of the run, few enough to draw, first and last of the piece included; the learning rates there; their line."""
    num_steps = piece.segment.num_steps
    steps = np.unique(np.linspace(0, max(num_steps - 1, 0), min(max(num_steps, 1), MOST_POINTS)).round())
    lrs = np.array([piece.segment(int(t)) for t in steps])
    style = {"color": GREY, "linestyle": ":"} if piece.segment.undone else {"color": BLUE}
    return piece.start + steps, lrs, style


def running_mean(y: Array, half: int) -> Array:
    """Over ``half`` neighbours on either side, fewer at the ends."""
    if not len(y):
        return y
    sums = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    reach = np.minimum(half, np.minimum(i, len(y) - 1 - i))
    return np.asarray((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
