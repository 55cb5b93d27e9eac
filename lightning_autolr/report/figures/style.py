"""What all figures have in common: matplotlib itself, colours, sizes, letters, and the legend below the axes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "RED",
    "SKY",
    "add_legend",
    "line_key",
    "load_matplotlib",
    "new_figure",
    "patch_key",
    "styled",
]

P = ParamSpec("P")
T = TypeVar("T")

# Okabe and Ito's colours: they can be told apart with any colour vision, and in print.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#999999",
)

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.3,
}


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Run with matplotlib's settings changed for the time being."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        with load_matplotlib().rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def load_matplotlib() -> Any:
    """matplotlib, imported when something is drawn: all but the figures works without it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError(
            'Expected matplotlib for figures, got none. Install it: pip install "lightning-autolr[plots]".'
        ) from error
    return matplotlib


def new_figure(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure of 720 x 540 pixels and its axes, one below the other, of these heights to one another."""
    figure: Figure = load_matplotlib().figure.Figure(figsize=(4.8, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))
    return figure, list(axes[:, 0])


def add_legend(figure: Figure, *items: tuple[str, Any] | None) -> None:
    """Below the axes, where it hides nothing."""
    known = [item for item in items if item is not None]
    handles, labels = [handle for _, handle in known], [label for label, _ in known]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, columnspacing=1.2)


def line_key(color: str, marker: str = "", linestyle: str = "", **style: Any) -> Any:
    """What stands for a line or its marks in a legend."""
    lines = load_matplotlib().lines
    style.setdefault("markersize", 6 if marker in ("v", "x", "D") else 5)
    return lines.Line2D([], [], color=color, marker=marker, linestyle=linestyle or ("none" if marker else "-"), **style)


def patch_key(**style: Any) -> Any:
    """What stands for an area in a legend."""
    return load_matplotlib().patches.Patch(**{"linewidth": 0, **style})
