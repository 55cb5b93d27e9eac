r"""What the loss will be at the end of the stage, from its first steps.

AutoLRS (Jin et al., "AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on the Fly", ICLR 2021,
arXiv 2105.10762) assumes that under a constant learning rate the loss falls like

.. math:: L(t) = a\,e^{bt} + c, \qquad b < 0,

fits the curve to the first :math:`\tau'` losses of a stage and reads it at the stage's end :math:`\tau`. Two fits of it
live here. Both are least squares; they differ in how far they trust a short, noisy series.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import UnivariateSpline
from scipy.optimize import minimize, minimize_scalar

__all__ = ["Forecast", "forecast"]

Estimator = Literal["bounded", "reference"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Forecast:
    """The loss expected at the end of a stage.

    Args:
        value: the forecast; inf when a loss was not finite.
        tail: mean of the last tenth of the series: what was reached, with nothing extrapolated. It breaks ties.
        stderr: standard error of ``value``, extrapolation included; inf where nothing is known about it.
        a: amplitude of the fitted curve, or None when no curve was fitted or none was believed.
        b: its rate per index, < 0.
        c: its level at the end of time.
        reason: why ``value`` is not the fitted curve's; empty when it is.
    """

    value: float
    tail: float
    stderr: float = math.inf
    a: float | None = None
    b: float | None = None
    c: float | None = None
    reason: str = ""


def forecast(
    losses: Sequence[float] | Array,
    horizon: float,
    *,
    estimator: Estimator = "bounded",
    floor: float | None = None,
    jump_factor: float | None = 10.0,
    single_outlier: bool = False,
) -> Forecast:
    r"""Extrapolate a loss series to index ``horizon``.

    ``"bounded"`` is variable projection: for a fixed rate :math:`\lambda = -b` the best :math:`a` and :math:`c` are a
    linear regression, so only :math:`\lambda` is searched for: on a logarithmic grid of 201 points in [1/horizon, 1],
    then within the best cell. A slower rate could not be told from a straight line, which would fall for ever.

    Differs from the paper: the smallest rate is bounded, the forecast never falls below ``floor``, and it is replaced
    by ``tail`` when its standard error exceeds twice the change of the loss that the curve explains, because
    extrapolation by a factor of ten from a noisy series otherwise picks the candidate with the luckiest noise. The
    standard error averages over all rates, each weighted by its likelihood: near the bound it is far from linear.

    ``"reference"`` is the fit of the authors' code: an outlier filter by smoothing splines, then Nelder-Mead on
    :math:`\ln\lambda`, with no bounds and no doubts. ``floor`` and ``jump_factor`` do not apply to it.

    Args:
        losses: the series, at least one value; index 0 is the loss before the first step.
        horizon: the index to forecast, > 0.
        estimator: ``"bounded"`` or ``"reference"``.
        floor: the smallest possible loss; None takes 0 if no loss is negative, and no floor otherwise.
        jump_factor: when a loss exceeds so many times the first one, no curve is fitted and ``tail`` is the forecast.
            None turns the rule off.
        single_outlier: let the reference filter remove one point at most, as its authors do for validation losses,
            instead of ten times 3 %.

    Raises:
        ValueError: an empty series or a horizon that is not positive.

    >>> import math
    >>> round(forecast([2 * math.exp(-0.01 * t) + 0.5 for t in range(100)], 1000).value, 6)
    0.500091
    """
    if len(losses) == 0 or not 0 < horizon < math.inf:
        raise ValueError(f"Expected at least one loss and a finite horizon > 0, got {len(losses)=} and {horizon=}.")
    if estimator not in ("bounded", "reference"):
        raise ValueError(f"Expected estimator 'bounded' or 'reference', got {estimator=}.")
    y = np.asarray(losses, dtype=np.float64)
    if not np.all(np.isfinite(y)):
        return Forecast(value=math.inf, tail=math.inf, reason="a loss is not finite")
    last = y[-max(1, len(y) // 10) :]
    nothing = Forecast(value=float(last.mean()), tail=float(last.mean()))
    if np.ptp(y) <= 1e-12 * np.max(np.abs(y)):
        return replace(nothing, stderr=0.0 if len(y) > 1 else math.inf, reason="the loss is constant")
    if len(y) < 4:
        return replace(nothing, reason=f"{len(y)} losses cannot determine three unknowns")
    if estimator == "reference":
        return _fit_reference(y, horizon, nothing, single_outlier)
    if jump_factor is not None and y.max() > jump_factor * y[0] > 0:
        return replace(nothing, reason=f"the loss rose above {jump_factor:g} times its start")
    if floor is None:
        floor = 0.0 if y.min() >= 0 else -math.inf
    return _fit_bounded(y, horizon, nothing, floor)


def _fit_bounded(y: Array, horizon: float, nothing: Forecast, floor: float) -> Forecast:
    """Variable projection (Golub and Pereyra 1973) over a bounded rate."""
    t = np.arange(len(y), dtype=np.float64)

    def project(log_rates: Array) -> tuple[Array, Array, Array, Array]:
        """For each rate: a, c, the sum of squared residuals and the forecast's variance in units of the noise's."""
        rates = np.exp(log_rates)[:, None]
        column = np.exp(-rates * t)
        mean = column.mean(axis=1)
        centred = column - mean[:, None]
        power = np.maximum(np.sum(centred**2, axis=1), np.finfo(np.float64).tiny)
        a = centred @ (y - y.mean()) / power
        c = y.mean() - a * mean
        rest = np.sum((y - a[:, None] * column - c[:, None]) ** 2, axis=1)
        leverage = 1 / len(y) + (np.exp(-rates[:, 0] * horizon) - mean) ** 2 / power
        return a, c, rest, leverage

    grid = np.linspace(min(-math.log(horizon), 0.0), 0.0, 201)
    best = int(np.argmin(project(grid)[2]))
    inner = minimize_scalar(
        lambda u: float(project(np.array([u]))[2][0]),
        bounds=(grid[max(best - 1, 0)], grid[min(best + 1, 200)]),
        method="bounded",
        options={"xatol": 1e-10},
    )
    rates = np.append(grid, inner.x)
    a, c, rest, leverage = project(rates)
    i = int(np.argmin(rest))
    values = a * np.exp(-np.exp(rates) * horizon) + c
    rate, value = math.exp(rates[i]), max(float(values[i]), floor)
    if value - floor < 1e-6 * np.ptp(y):
        value = floor  # rounding must not rank candidates that all get there

    noise = max(rest[i] / (len(y) - 3), np.finfo(np.float64).eps * float(y @ y))
    weights = np.exp(-(rest - rest[i]) / (2 * noise))
    stderr = math.sqrt(float(np.average((np.maximum(values, floor) - value) ** 2 + noise * leverage, weights=weights)))
    explained = abs(float(a[i])) * -math.expm1(-rate * (len(y) - 1))
    if stderr > 2 * explained:
        reason = f"the fit may be off by {stderr:.3g}, while the loss has moved by {explained:.3g}"
        return replace(nothing, stderr=stderr, reason=reason)
    return replace(nothing, value=value, stderr=stderr, a=float(a[i]), b=-rate, c=float(c[i]))


def _fit_reference(y: Array, horizon: float, nothing: Forecast, single_outlier: bool) -> Forecast:
    """The fit of github.com/YuchenJin/autolrs, behaviour for behaviour.

    With losses of order one scipy's default smoothing keeps a single polynomial piece: its splines are parabolas. The
    filter therefore takes the steep early points of a good curve for outliers, which biases the forecast low.
    """
    x = np.arange(len(y), dtype=np.float64)
    kept_x, kept_y = _drop_early_outliers(x, y, single_outlier)
    smooth = _spline(kept_x, kept_y, x)

    def solve(log_rate: float) -> tuple[Array, float]:
        columns = np.column_stack([np.exp(-math.exp(log_rate) * x), np.ones_like(x)])
        solution = np.linalg.lstsq(columns, smooth, rcond=None)[0]
        # The sum is taken here, because lstsq returns none for a column that is constant to rounding.
        return solution, float(np.sum((columns @ solution - smooth) ** 2))

    # Beyond e^-40 and e^40 the column is constant, and its rate means nothing.
    found: Any = minimize(
        lambda u: solve(float(u[0]))[1],
        x0=[0.0],
        method="Nelder-Mead",
        bounds=[(-40.0, 40.0)],
        options={"xatol": 1e-5, "fatol": 1e-5, "initial_simplex": [[0.0], [0.00025]]},
    )
    (a, c), _ = solve(float(found.x[0]))
    b = -math.exp(float(found.x[0]))
    return replace(nothing, value=float(a * math.exp(b * horizon) + c), a=float(a), b=b, c=float(c))


def _drop_early_outliers(x: Array, y: Array, single: bool) -> tuple[Array, Array]:
    """Remove the points farthest from a smoothing parabola, in the first half of the series only."""
    first_half = x[(len(x) - 1) // 2]
    for _ in range(1 if single else 10):
        number = 1 if single else round(0.03 * len(x))
        if len(x) - number < 4:
            break
        distance = np.abs(y - _spline(x, y, x))
        worst = np.argsort(distance, kind="stable")[len(x) - number :]
        keep = np.ones(len(x), dtype=bool)
        keep[worst[worst < first_half]] = False
        x, y = x[keep], y[keep]
    return x, y


def _spline(x: Array, y: Array, at: Array) -> Array:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # FITPACK's advice on the smoothing factor, which is fixed here
        return np.asarray(UnivariateSpline(x, y, k=2)(at), dtype=np.float64)
