"""A beam search: the tree of learning rates, and the path through it that was trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lightning_autolr.report.figures.axes import limit_losses, log_axis, plot_points
from lightning_autolr.report.figures.style import (
    BLUE,
    GREY,
    RED,
    SKY,
    add_legend,
    line_key,
    load_matplotlib,
    new_figure,
    styled,
)
from lightning_autolr.report.inspect.searches import Search

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["beam_figure"]

_Point = tuple[float, float]
_Edge = tuple[_Point, _Point]


@styled
def beam_figure(rounds: Sequence[Search]) -> Figure:
    """The tree of learning rates: who was tried from where, who survived, and the path that was trained.

    Args:
        rounds: of a beam search, in order.
    """
    figure, (top, bottom) = new_figure((2, 1))
    tree = _tree_of(rounds)
    collection = load_matplotlib().collections.LineCollection
    for lines, style in (
        (tree.tried, {"colors": GREY, "linewidths": 0.7}),
        (tree.kept, {"colors": SKY, "linewidths": 1.4}),
        (tree.path, {"colors": BLUE, "linewidths": 2.4}),
        (tree.jumps, {"colors": BLUE, "linewidths": 1, "linestyles": ":"}),
    ):
        top.add_collection(collection(lines, zorder=3, capstyle="round", **style))
    plot_points(top, [end for _, end in (*tree.tried, *tree.kept)], color=GREY, markersize=2.5, zorder=2)
    plot_points(top, [end for _, end in tree.path], color=BLUE, markersize=4.5, zorder=4)
    plot_points(top, tree.diverged, "x", color=RED, markersize=6, zorder=5)
    top.autoscale_view()
    log_axis(top)
    top.set_ylabel("learning rate")
    scores = [(s.step + _length(rounds, i), c.score) for i, s in enumerate(rounds) for c in s.candidates]
    finite = [(x, y) for x, y in scores if math.isfinite(y)]
    plot_points(bottom, finite, color=GREY, markersize=2.5)
    best = [(s.step + _length(rounds, i), s.best.score) for i, s in enumerate(rounds) if s.best is not None]
    plot_points(bottom, best, "o-", color=BLUE, markersize=4)
    limit_losses(bottom, [y for _, y in finite])
    bottom.set(xlabel="optimizer step of the run", ylabel=f"score of a child\n({rounds[-1].score_name or 'loss'})")
    children = sum(len(s.candidates) for s in rounds)
    figure.suptitle(f"beam search: {len(rounds)} rounds, {children} children tried", fontsize=9)
    add_legend(
        figure,
        ("trained, and the best score", line_key(BLUE, "o", linestyle="-")),
        ("survived", line_key(SKY)) if tree.kept else None,
        ("tried", line_key(GREY, "o", linestyle="-")),
        ("diverged", line_key(RED, "x")) if len(finite) < len(scores) else None,
    )
    return figure


@dataclass(frozen=True)
class _Tree:
    """Edges from a parent to a child, each end as (step of the run, learning rate).

    Args:
        tried: children that were given up.
        kept: children that had children, or from which the run went on.
        path: what was trained.
        jumps: where the run went on from another state than its own.
        diverged: ends of the children without a finite score.
    """

    tried: list[_Edge] = field(default_factory=list)
    kept: list[_Edge] = field(default_factory=list)
    path: list[_Edge] = field(default_factory=list)
    jumps: list[_Edge] = field(default_factory=list)
    diverged: list[_Point] = field(default_factory=list)


def _tree_of(rounds: Sequence[Search]) -> _Tree:
    """Where each child of each round began and ended."""
    nodes: dict[str | None, _Point] = {}  # where each kept state stands; None is the real run
    parents = {child.start for search in rounds for child in search.candidates}
    parents |= {search.train.start for search in rounds if search.train is not None}
    tree = _Tree()
    for number, search in enumerate(rounds):
        x = float(search.step)
        length = _length(rounds, number)
        if None not in nodes:
            middle = math.exp(float(np.mean([math.log(child.lr) for child in search.candidates])))
            nodes[None] = (x, middle)
        ends = dict(nodes)
        for child in search.candidates:
            edge = ((x, nodes.get(child.start, nodes[None])[1]), (x + length, child.lr))
            (tree.kept if child.end in parents and child.end is not None else tree.tried).append(edge)
            if not math.isfinite(child.score):
                tree.diverged.append(edge[1])
            if child.end is not None:
                ends[child.end] = edge[1]
        if search.train is not None:
            origin = nodes.get(search.train.start, nodes[None])[1]
            tree.jumps.append(((x, nodes[None][1]), (x, origin)))
            tree.path.append(((x, origin), (x + length, search.train.lr)))
            ends[None] = tree.path[-1][1]
        nodes = {name: (x + length, lr) for name, (_, lr) in ends.items()}
    return tree


def _length(rounds: Sequence[Search], number: int) -> float:
    """Real steps of a round; of the last one, those of its probes."""
    if number + 1 < len(rounds) and rounds[number + 1].step > rounds[number].step:
        return float(rounds[number + 1].step - rounds[number].step)
    return float(max((len(c.losses) for c in rounds[number].candidates), default=1))
