"""A range test: the loss over the learning rate, and the interval that was suggested."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_autolr.core.range_rules import RangeSuggestion
from lightning_autolr.report.figures.axes import limit_losses, log_axis
from lightning_autolr.report.figures.style import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    add_legend,
    line_key,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["range_test_figure"]


@styled
def range_test_figure(suggestion: RangeSuggestion) -> Figure:
    """The climbs of a range test: the loss after each step against its learning rate, and the suggested interval.

    Args:
        suggestion: with its curves.
    """
    figure, (axes,) = new_figure((1,))
    colors = [BLUE, ORANGE, PURPLE, SKY, "black"]
    shown: list[float] = []
    for number, curve in enumerate(suggestion.curves):
        color = colors[number % len(colors)]
        axes.plot(curve.lrs, curve.losses, color=color, linewidth=0.6, alpha=0.45)
        axes.plot(curve.lrs[: len(curve.smoothed)], curve.smoothed, color=color, linewidth=1.6)
        shown += curve.smoothed
        if curve.edge is not None:
            axes.axvline(curve.edge, color=RED, linestyle=":", linewidth=1)
    log_axis(axes, "x")
    if suggestion.lr is not None and suggestion.lower is not None and suggestion.upper is not None:
        axes.axvspan(suggestion.lower, suggestion.upper, color=GREEN, alpha=0.15, linewidth=0)
        axes.axvline(suggestion.lr, color=GREEN, linestyle="--")
    limit_losses(axes, shown)
    axes.set(xlabel="learning rate", ylabel="training loss after the step")
    found = "no suggestion" if suggestion.lr is None else f"suggestion {suggestion.lr:.3g}"
    figure.suptitle(
        f"range test, {len(suggestion.curves)} climb{'s' * (len(suggestion.curves) != 1)}: {found}", fontsize=9
    )
    add_legend(
        figure,
        ("climb, smoothed", line_key(BLUE)),
        ("suggestion and interval", line_key(GREEN, linestyle="--")) if suggestion.lr is not None else None,
        ("loss begins to rise", line_key(RED, linestyle=":"))
        if any(c.edge is not None for c in suggestion.curves)
        else None,
    )
    return figure
