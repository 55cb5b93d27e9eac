"""The whole run: learning rate and training loss, what was undone, and where it was searched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_autolr.core.record import account_of
from lightning_autolr.report.figures.axes import (
    MOST_POINTS,
    limit_losses,
    log_axis,
    plot_points,
    rate_curve,
    running_mean,
)
from lightning_autolr.report.figures.style import (
    BLUE,
    GREY,
    ORANGE,
    PURPLE,
    add_legend,
    line_key,
    new_figure,
    patch_key,
    styled,
)
from lightning_autolr.report.inspect.searches import Piece, Search

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["schedule_figure"]

_ANNEALED = 1000  # an anneal to zero is shown down to this part of the largest learning rate


@styled
def schedule_figure(pieces: Sequence[Piece], searches: Sequence[Search] = ()) -> Figure:
    """The learning rate of every real step, and the training loss, with undone segments and the moments of search.

    Args:
        pieces: the real training, at least one piece.
        searches: their moments are marked above the learning rate; evaluations between segments are shown as dots.

    Raises:
        ValueError: no pieces.
    """
    if not pieces:
        raise ValueError("Expected at least one piece of real training, got none.")
    figure, (top, bottom) = new_figure((1.15, 1))
    undone_steps = sum(p.segment.num_steps for p in pieces if p.segment.undone)
    searched = [s for s in searches if s.steps]
    looks = [s for s in searches if s.kind == "look" and s.base is not None]
    for number, piece in enumerate(pieces):
        steps, lrs, style = rate_curve(piece)
        x = np.append(steps, piece.stop)
        top.plot(x, np.append(lrs, lrs[-1:]), drawstyle="steps-post" if len(x) < 20 else "default", **style)
        if number and not piece.segment.undone and not pieces[number - 1].segment.undone:
            top.plot([piece.start] * 2, [pieces[number - 1].ends[1], lrs[0]], color=BLUE, linewidth=0.8)
    for piece in pieces:
        for axes in (top, bottom) if piece.segment.undone else ():
            axes.axvspan(
                piece.start, piece.stop, facecolor="0.93", edgecolor="0.75", hatch="///", linewidth=0, zorder=0
            )
    log_axis(top, floor=_floor(pieces))
    top.set_ylabel("learning rate")
    if searched:
        above = [1.03] * len(searched)
        marks: dict[str, Any] = {"color": ORANGE, "markersize": 6, "clip_on": False}
        top.plot([s.step for s in searched], above, "v", transform=top.get_xaxis_transform(), **marks)
    for start, losses, undone in _stretches(pieces):
        _loss_curve(bottom, start, losses, GREY if undone else BLUE)
    shown = [x for p in pieces if not p.segment.undone for x in p.losses]
    limit_losses(bottom, shown + _plot_looks(bottom, looks))
    bottom.set(xlabel="optimizer step of the run", ylabel="training loss", xlim=(0, max(1, pieces[-1].stop)))
    kept = sum(p.segment.num_steps for p in pieces) - undone_steps
    probed = sum(s.steps for s in searched)
    account = account_of({"schedule_steps": kept, "undone_steps": undone_steps, "probe_steps": probed})
    figure.suptitle("\n".join(account), fontsize=9)
    add_legend(
        figure,
        ("learning rate and loss", line_key(BLUE)),
        ("searched here", line_key(ORANGE, "v")) if searched else None,
        ("undone", patch_key(facecolor="0.93", edgecolor="0.6", hatch="///")) if undone_steps else None,
        (looks[-1].evaluated_by, line_key(PURPLE, "o")) if looks else None,
    )
    return figure


def _plot_looks(axes: Axes, looks: Sequence[Search]) -> list[float]:
    """Dots, and the losses among them; scores that are no losses have an axis of their own."""
    points = [(look.step, look.base) for look in looks if look.base is not None]
    style: dict[str, Any] = {"color": PURPLE, "markersize": 3.5, "zorder": 4}
    if not looks or not looks[-1].score_name:
        plot_points(axes, points, **style)
        return [y for _, y in points]
    right = axes.twinx()
    plot_points(right, points, **style)
    right.set_ylabel(looks[-1].score_name, color=PURPLE)
    return []


def _floor(pieces: Sequence[Piece]) -> float | None:
    """The smallest learning rate to show: an anneal to zero would take all the room on a logarithmic axis."""
    rates = [p.segment(step) for p in pieces for step in (0, p.segment.num_steps // 2)]
    middles = [min(p.segment(p.segment.num_steps // 2), p.segment.lr) for p in pieces]
    return min([max(rates) / _ANNEALED, *(lr for lr in middles if lr > 0)]) if max(rates) > 0 else None


def _stretches(pieces: Sequence[Piece]) -> list[tuple[int, list[float], bool]]:
    """First step and losses of neighbouring pieces which were all kept or all undone, and which of both."""
    found: list[tuple[int, list[float], bool]] = []
    for piece in pieces:
        undone = piece.segment.undone
        if found and found[-1][2] == undone and found[-1][0] + len(found[-1][1]) == piece.start:
            found[-1][1].extend(piece.losses)
        else:
            found.append((piece.start, list(piece.losses), undone))
    return found


def _loss_curve(axes: Axes, start: int, losses: Sequence[float], color: str) -> None:
    """The mean of each small window, and from lowest to highest in it."""
    y = np.asarray(losses, dtype=np.float64)
    if not len(y):
        return
    windows = np.array_split(np.arange(len(y)), min(len(y), MOST_POINTS))
    x = [start + float(w.mean()) for w in windows]
    if len(y) > MOST_POINTS:
        axes.fill_between(
            x, [y[w].min() for w in windows], [y[w].max() for w in windows], color=color, alpha=0.2, linewidth=0
        )
    elif len(y) > 20:
        axes.plot(x, y, color=color, alpha=0.35, linewidth=0.7)
        axes.plot(x, running_mean(y, len(y) // 15), color=color)
        return
    axes.plot(x, [float(y[w].mean()) for w in windows], color=color)
