"""The training losses of the candidates of a search, and where they were expected to lead."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lightning_autolr.core.requests import Status
from lightning_autolr.report.figures.axes import Array, limit_losses, log_axis, mark_diverged, plot_points, running_mean
from lightning_autolr.report.figures.style import RED, add_legend, line_key, load_matplotlib, new_figure, styled
from lightning_autolr.report.inspect.searches import Candidate, Search

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["probes_figure"]


@styled
def probes_figure(search: Search) -> Figure:
    """The training losses of the candidates of one search, with their forecasts or their evaluations.

    Args:
        search: at least one candidate.
    """
    figure, (axes,) = new_figure((1,))
    matplotlib = load_matplotlib()
    lrs = [c.lr for c in search.candidates]
    low, high = min(lrs), max(lrs)
    scale = matplotlib.colors.LogNorm(low if low < high else low / 1.1, high if low < high else high * 1.1)
    # without the palest tenth of the colours
    colors = matplotlib.colors.ListedColormap(matplotlib.colormaps["cividis"](np.linspace(0, 0.9, 256)))
    mappable = matplotlib.cm.ScalarMappable(scale, colors)
    forecasts = search.horizon is not None
    first = 1 if forecasts else 0  # a logarithmic axis has no 0
    shown: list[float] = []
    longest = 1
    for candidate in search.candidates:
        color = mappable.to_rgba(candidate.lr)
        y = np.array(candidate.losses)
        axes.plot(first + np.arange(len(y)), y, color=color, linewidth=0.6, alpha=0.35)
        smooth = running_mean(y, max(1, len(y) // 10))
        axes.plot(first + np.arange(len(y)), smooth, color=color, linewidth=1.6)
        if candidate.status is Status.OK or search.best is None:
            shown += [x for x in smooth if math.isfinite(x)]
        longest = max(longest, len(y))
        evaluations = [(e.step, e.mean) for e in candidate.evaluations if math.isfinite(e.mean) and not e.name]
        plot_points(axes, evaluations, color=color, markersize=4, markeredgecolor="black")
        if not forecasts:
            shown += [y for _, y in evaluations]
        if candidate.status is Status.DIVERGED:
            mark_diverged(axes, [first + len(y) - 1])
        if search.horizon is not None and candidate.forecast is not None and math.isfinite(candidate.forecast.value):
            x, curve = _forecast_curve(candidate, search.horizon)
            axes.plot(x, curve, color=color, linestyle="--", linewidth=1)
            end = [(search.horizon, candidate.forecast.value)]
            plot_points(axes, end, "D", color=color, markersize=5, markeredgecolor="black", zorder=5)
            shown.append(candidate.forecast.value)
    if forecasts:
        axes.axvspan(1, longest, color="0.95", zorder=0)
        log_axis(axes, "x")
    limit_losses(axes, shown)
    axes.set(xlabel="step of the probe" + (" (log scale; grey: made)" if forecasts else ""), ylabel="training loss")
    bar = figure.colorbar(mappable, ax=axes, label="learning rate", pad=0.03)
    bar.outline.set_visible(False)
    log_axis(bar.ax)
    chosen = search.train is not None and low <= search.train.lr <= high
    if search.train is not None and chosen:
        bar.ax.plot(
            -0.35, search.train.lr, ">", color=RED, markersize=8, clip_on=False, transform=bar.ax.get_yaxis_transform()
        )
    figure.suptitle(f"search at step {search.step:,}: probes of {longest:,} steps", fontsize=9)
    evaluated = search.evaluated_by and not search.score_name  # what is no loss has no place on an axis of losses
    add_legend(
        figure,
        ("training loss, running mean", line_key("0.4")),
        (search.evaluated_by, line_key("0.4", "o", markeredgecolor="black")) if evaluated else None,
        (f"forecast to step {search.horizon:,}", line_key("0.4", "D", linestyle="--", markeredgecolor="black"))
        if forecasts
        else None,
        ("diverged", line_key(RED, "x")) if any(c.status is Status.DIVERGED for c in search.candidates) else None,
        ("chosen", line_key(RED, ">")) if chosen else None,
    )
    return figure


def _forecast_curve(candidate: Candidate, horizon: int) -> tuple[Array, Array]:
    """The fitted exponential from the first loss to the horizon; where none was believed, its level."""
    forecast, evaluations = candidate.forecast, candidate.evaluations
    assert forecast is not None
    every = evaluations[0].step if evaluations else 1
    x = np.geomspace(every, max(horizon, every + 1), 200)
    if forecast.a is None or forecast.b is None or forecast.c is None:
        return x[[0, -1]], np.full(2, forecast.value)
    # evaluation i comes after (i + 1) * every steps; loss i is drawn at i + 1
    return x, forecast.a * np.exp(forecast.b * (x / every - 1)) + forecast.c
