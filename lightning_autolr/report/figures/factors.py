"""A search among factors: the learning rate over its decisions, and what the losses said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_autolr.core.requests import LineProbe
from lightning_autolr.report.figures.axes import Array, log_axis
from lightning_autolr.report.figures.style import (
    BLUE,
    add_legend,
    line_key,
    load_matplotlib,
    new_figure,
    patch_key,
    styled,
)
from lightning_autolr.report.inspect.searches import Search

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["factors_figure"]


@styled
def factors_figure(decisions: Sequence[Search]) -> Figure:
    """The learning rate over the decisions of a factor search, and what the losses said about each factor.

    Args:
        decisions: in order, each with its last line probe.
    """
    figure, (top, bottom) = new_figure((1, 1.15))
    probes = [search.entries[-1].request for search in decisions]
    factors = np.array(sorted({factor for p in probes if isinstance(p, LineProbe) for factor in p.factors if factor}))
    numbers = np.arange(1, len(decisions) + 1)
    chosen = np.array([math.nan if s.train is None else s.train.lr for s in decisions])
    ruled = np.array([p.lr for p in probes])
    top.plot(np.append(0.5, numbers), np.append(ruled[0], chosen), "o-", color=BLUE, markersize=3.5)
    log_axis(top)
    top.set_ylabel("learning rate")
    scores = np.full((len(factors), len(decisions)), math.nan)
    for column, search in enumerate(decisions):
        rows = [int(np.argmin(np.abs(np.log(factors * ruled[column] / c.lr)))) for c in search.candidates]
        losses = np.array([c.score for c in search.candidates])
        finite = np.isfinite(losses)
        spread = losses[finite].std() if finite.any() else 0.0
        scores[rows, column] = np.where(
            finite, (losses - losses[finite].mean()) / (spread or 1.0) if finite.any() else 0, math.nan
        )
    bottom.grid(False)
    bottom.set_facecolor("0.6")  # what is not finite has no cell
    mesh = bottom.pcolormesh(
        np.append(numbers - 0.5, numbers[-1] + 0.5), _edges(factors), scores, cmap="cividis", vmin=-2, vmax=2
    )
    bottom.plot(numbers, chosen / ruled, "o", color="white", markeredgecolor="black", markersize=4.5)
    bottom.set_yscale("log")
    bottom.minorticks_off()
    bottom.set_yticks(factors, [f"x {factor:.3g}" for factor in factors])
    bottom.set(xlabel="decision", ylabel="factor on the update", xlim=(0.5, len(decisions) + 0.5))
    bottom.xaxis.set_major_locator(load_matplotlib().ticker.MaxNLocator(integer=True, min_n_ticks=1))
    bar = figure.colorbar(mesh, ax=[top, bottom], label="loss (standardised, dark is low)", ticks=(-2, 0, 2), pad=0.01)
    bar.outline.set_visible(False)
    last = decisions[-1].step
    figure.suptitle(f"factor search: {len(decisions)} decisions in {last:,} steps", fontsize=9)
    add_legend(
        figure,
        ("learning rate after the decision", line_key(BLUE, "o", linestyle="-")),
        ("what it was multiplied by", line_key("white", "o", markeredgecolor="black")),
        ("loss not finite", patch_key(facecolor="0.6")) if np.isnan(scores).any() else None,
    )
    return figure


def _edges(factors: Array) -> Array:
    """Borders of cells around values on a logarithmic axis."""
    if len(factors) == 1:
        return np.asarray(factors[0] * np.array([0.7, 1.4]))
    logs = np.log(factors)
    steps = np.diff(logs, prepend=2 * logs[0] - logs[1], append=2 * logs[-1] - logs[-2]) / 2
    return np.asarray(np.exp(np.append(logs - steps[:-1], logs[-1] + steps[-1])))
