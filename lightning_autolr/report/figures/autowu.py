"""AutoWU's warm-up: the losses, and how sure it was that their minimum is past."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_autolr.core.minimum import Explanation, PastMinimum, explain
from lightning_autolr.report.figures.axes import limit_losses, log_axis, rate_curve
from lightning_autolr.report.figures.style import BLUE, GREEN, GREY, RED, SKY, add_legend, line_key, new_figure, styled
from lightning_autolr.report.inspect.searches import Piece

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["autowu_figure", "is_autowu"]

_MOST_TESTS = 8  # of AutoWU's tests that are repeated for its figure
_FEWEST_LOSSES = 10  # for one of them


@styled
def autowu_figure(pieces: Sequence[Piece]) -> Figure:
    """AutoWU's warm-up: the losses, the Gaussian process through them, and the probability that their minimum is past.

    Some of its tests are repeated on the losses of the trace, with one draw each and the default options of
    :class:`~lightning_autolr.core.minimum.PastMinimum`.

    Args:
        pieces: the real training, with AutoWU's warm-up in it.

    Raises:
        ValueError: no piece of AutoWU's warm-up.
    """
    climb = [piece for piece in pieces if is_autowu(piece)]
    if not climb:
        raise ValueError("Expected a warm-up of AutoWU, got none.")
    figure, (top, middle, bottom) = new_figure((1.6, 1, 1.1))
    begin, end = climb[0].start, climb[-1].stop
    found = _explained(climb)
    for piece in pieces:
        if piece.start >= begin:
            x = piece.start + np.arange(len(piece.losses))
            top.plot(x, piece.losses, color=SKY if piece.start < end else GREY, linewidth=0.7)
            steps, lrs, style = rate_curve(piece)
            bottom.plot(steps, lrs, **style)
    if found is not None:
        low, high = found.mean - 2 * found.std, found.mean + 2 * found.std
        top.fill_between(begin + found.grid, low, high, color=BLUE, alpha=0.2, linewidth=0)
        top.plot(begin + found.grid, found.mean, color=BLUE)
        for axes in (top, middle, bottom):
            axes.axvline(begin + found.argmin, color=GREEN, linestyle="--")
        middle.plot(begin + found.tested, found.probability, "o-", color=BLUE, markersize=4)
    for axes in (top, middle, bottom):
        axes.axvline(end, color=RED)
    middle.axhline(0.95, color=GREY, linewidth=0.8)
    limit_losses(top, [loss for piece in climb for loss in piece.losses])
    top.set_ylabel("training loss")
    middle.set(ylabel="P(minimum\npast)", ylim=(-0.05, 1.05))
    log_axis(bottom, floor=climb[0].segment(0))
    bottom.set(ylabel="learning\nrate", xlabel="optimizer step of the run")
    bottom.set_xlim(begin, min(pieces[-1].stop, begin + 2 * (end - begin)))
    after = next((p for p in pieces if p.start >= end and not p.segment.undone), None)
    figure.suptitle(
        f"warm-up from step {begin:,} to {end:,}" + ("" if after is None else f", then at {after.segment.lr:.3g}"),
        fontsize=9,
    )
    add_legend(
        figure,
        ("loss", line_key(SKY)),
        ("Gaussian process, ± 2 std", line_key(BLUE)) if found else None,
        ("its minimum", line_key(GREEN, linestyle="--")) if found else None,
        ("end of the warm-up", line_key(RED)),
    )
    return figure


def is_autowu(piece: Piece) -> bool:
    """Whether a piece belongs to a warm-up that looks for a minimum."""
    return piece.train is not None and piece.train.kind == "climb"


def _explained(climb: Sequence[Piece]) -> Explanation | None:
    """Some of AutoWU's tests, the last one among them; None when there were too few losses for any."""
    losses = [loss for piece in climb for loss in piece.losses]
    ends = np.cumsum([len(piece.losses) for piece in climb])
    useful = [int(n) for n in ends if np.isfinite(losses[:n]).sum() >= _FEWEST_LOSSES]
    if not useful:
        return None
    tested = sorted({useful[round(i)] for i in np.linspace(0, len(useful) - 1, _MOST_TESTS)})
    return explain(losses, tested, PastMinimum(num_tests=1))
