"""A search among candidates: their scores, and the Gaussian process that chose among them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_autolr.core.surrogate import FitError, Observation, observe, posterior
from lightning_autolr.report.figures.axes import Array, log_axis, mark_diverged
from lightning_autolr.report.figures.style import (
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    RED,
    add_legend,
    line_key,
    new_figure,
    styled,
)
from lightning_autolr.report.inspect.searches import Candidate, Search

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["candidates_figure"]

_WIDTH = 64  # characters of a line above a figure


@styled
def candidates_figure(search: Search) -> Figure:
    """The candidates of one search with their scores, and the Gaussian process that chose among them.

    Bars are standard errors of the paired differences to the best candidate. The process is fitted again to the scores of
    this search, as the search did; the panel below shows what it would gain from a further candidate.

    Args:
        search: at least two candidates.
    """
    model = _surrogate(search)
    figure, panels = new_figure((3, 1) if model else (1,))
    top = panels[0]
    finite = [c for c in search.candidates if math.isfinite(c.score)]
    failed = [c for c in search.candidates if not math.isfinite(c.score)]
    heights = [c.score for c in finite]
    errors = any(c.stderr is not None for c in finite)
    if model is not None:
        lrs, mean, std, gain = model
        top.fill_between(lrs, mean - 2 * std, mean + 2 * std, color=BLUE, alpha=0.15, linewidth=0)
        top.plot(lrs, mean, color=BLUE)
        panels[1].fill_between(lrs, 0, gain, color=PURPLE, alpha=0.35, linewidth=0)
        panels[1].plot(lrs, gain, color=PURPLE)
        panels[1].set_ylabel("expected\ngain")
        panels[1].set_ylim(bottom=0)
        heights += [float(x) for x in mean]
    top.errorbar(
        [c.lr for c in finite], [c.score for c in finite], yerr=[c.stderr or 0.0 for c in finite],
        fmt="o", color="black", markersize=5, capsize=3, elinewidth=1, zorder=4,
    )  # fmt: skip
    if search.train is not None:
        for axes in panels:
            axes.axvline(search.train.lr, color=GREEN, linestyle="--", zorder=1)
    mark_diverged(top, [c.lr for c in failed])
    _limit_scores(top, finite, heights, len(failed) > 0)
    low, high = top.get_ylim()
    before = [] if search.base is None or not low < search.base < high else [search.base]
    for base in before:
        top.axhline(base, color=GREY, linestyle=":")
    log_axis(panels[-1], "x")
    panels[-1].set_xlabel("learning rate")
    top.set_ylabel("\n".join(textwrap.wrap(_score_name(search), 20)))
    title = f"search at step {search.step:,}: {len(search.candidates)} candidates"
    if search.train is not None:
        title += f", chosen {search.train.lr:.3g}\n" + "\n".join(
            textwrap.wrap(search.train.reason, _WIDTH, max_lines=2, placeholder=" ...")
        )
    figure.suptitle(title.strip(), fontsize=9)
    add_legend(
        figure,
        ("candidate ± error of the difference to the best" if errors else "candidate", line_key("black", "o")),
        ("posterior mean ± 2 std", line_key(BLUE)) if model else None,
        ("chosen", line_key(GREEN, linestyle="--")) if search.train is not None else None,
        ("before the search", line_key(GREY, linestyle=":")) if before else None,
        ("diverged", line_key(RED, "x")) if failed else None,
    )
    return figure


def _surrogate(search: Search) -> tuple[Array, Array, Array, Array] | None:
    """Learning rates, and there: mean, standard deviation and the improvement to expect on the best candidate.

    Where scores are losses on evaluation batches, the process is fitted to the best candidate and its two neighbours with
    their errors, as the search does; where they are forecasts, to all of them. None when there is too little to fit.
    """
    ranked, best = sorted(search.candidates, key=lambda c: c.lr), search.best
    if best is not None and search.horizon is None:
        at = ranked.index(best)
        ranked = ranked[max(at - 1, 0) : at + 2]
    finite = [c for c in ranked if math.isfinite(c.score)]
    if best is None or len({c.lr for c in ranked}) < 3 or len(finite) < 2:
        return None
    if search.horizon is None and all(c.evaluations for c in finite):
        observations = observe({c.lr: c.result for c in ranked})
    else:
        observations = [Observation(c.lr, c.score) for c in ranked]
    bounds = (ranked[0].lr, ranked[-1].lr)
    lrs = np.geomspace(*bounds, 121)
    try:
        found = posterior(observations, bounds, [*lrs.tolist(), best.lr])
    except FitError:
        return None
    return lrs, found.mean[:-1], found.std[:-1], found.expected_improvement(over=len(lrs))[:-1]


def _score_name(search: Search) -> str:
    """What the candidates were judged by."""
    if search.horizon is not None:
        return f"loss forecast to step {search.horizon:,}"
    return search.evaluated_by or "mean training loss"


def _limit_scores(axes: Axes, finite: Sequence[Candidate], heights: Sequence[float], failed: bool) -> None:
    """All scores with their bars; the band may go beyond."""
    tops = [c.score + (c.stderr or 0.0) for c in finite] + list(heights)
    bottoms = [c.score - (c.stderr or 0.0) for c in finite] + list(heights)
    if not tops:
        return
    low, high = min(bottoms), max(tops)
    room = (high - low) or abs(high) or 1.0
    axes.set_ylim(low - 0.12 * room, high + (0.2 if failed else 0.1) * room)
