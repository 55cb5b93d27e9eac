"""Pictures of a run, out of its trace: what was tried, what was expected of it, what was chosen.

Every function takes plain values and returns a new matplotlib ``Figure`` of 720 x 540 pixels, with letters that can be
read at half of that, the size at which TensorBoard shows it first. Nothing global is touched, pyplot is not used.
:func:`figures_of` picks the ones that fit a trace.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from lightning_autolr.core.minimum import Explanation, PastMinimum, explain
from lightning_autolr.core.range_rules import RangeSuggestion
from lightning_autolr.core.requests import LineProbe, Status, Train
from lightning_autolr.core.surrogate import FitError, Observation, Posterior, posterior
from lightning_autolr.report.inspect import Candidate, Piece, Search, pieces_of, range_suggestion, searches_of
from lightning_autolr.report.trace import Entry
from lightning_autolr.schedules import Segment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "autowu_figure",
    "beam_figure",
    "candidates_figure",
    "drawings_of",
    "drawings_of_search",
    "factors_figure",
    "figures_of",
    "probes_figure",
    "range_test_figure",
    "save_figure",
    "schedule_figure",
]

Array = NDArray[np.float64]
Drawing = Callable[[], "Figure"]
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
_MOST_POINTS = 300  # of a curve; more cannot be told apart
_MANY_TIMES = 15  # from the lowest loss to the highest one: then their axis is logarithmic
_MOST_TESTS = 8  # of AutoWU's tests that are repeated for its figure
_FEWEST_LOSSES = 10  # for one of them
_TICKS = (
    (3.0, (1.0,)),
    (1.7, (1.0, 3.0)),
    (0.5, (1.0, 2.0, 5.0)),
    (0.0, (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)),
)
_WIDTH = 64  # characters of a line above a figure
_ANNEALED = 1000  # an anneal to zero is shown down to this part of the largest learning rate


def figures_of(trace: Sequence[Entry], segments: Sequence[Segment]) -> dict[str, Figure]:
    """All figures that fit a trace, by name.

    ``schedule`` for every run that trained; ``candidates_000`` and ``probes_000`` for each search among candidates;
    ``range_test_000`` for each range test; ``beam``, ``factors`` and ``autowu`` where there was such a search.

    Args:
        trace: every request and its answer.
        segments: the schedule, undone segments included.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return {name: draw() for name, draw in drawings_of(trace, segments).items()}


def drawings_of(trace: Sequence[Entry], segments: Sequence[Segment]) -> dict[str, Drawing]:
    """The figures of :func:`figures_of`, not drawn yet: a long run may have more of them than anyone wants to see."""
    searches, pieces = searches_of(trace, segments), pieces_of(trace, segments)
    drawings: dict[str, Drawing] = {}
    if pieces:
        drawings["schedule"] = functools.partial(schedule_figure, pieces, searches)
    rounds = [s for s in searches if s.kind == "beam"]
    if rounds:
        drawings["beam"] = functools.partial(beam_figure, rounds)
    decisions = [s for s in searches if s.kind == "factors"]
    if decisions:
        drawings["factors"] = functools.partial(factors_figure, decisions)
    if any(_is_autowu(piece) for piece in pieces):
        drawings["autowu"] = functools.partial(autowu_figure, pieces)
    for search in searches:
        for name, draw in drawings_of_search(search).items():
            drawings[f"{name}_{search.number:03d}"] = draw
    return drawings


def drawings_of_search(search: Search) -> dict[str, Drawing]:
    """The figures of one search alone, not drawn yet: ``candidates`` and ``probes``, or ``range_test``, or nothing."""
    if search.kind == "range test":
        return {"range_test": lambda: range_test_figure(range_suggestion(search))}
    if search.kind != "candidates" or len(search.candidates) < 2:
        return {}
    return {
        "candidates": functools.partial(candidates_figure, search),
        "probes": functools.partial(probes_figure, search),
    }


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the ending of ``path`` says how: ``.png``, ``.svg``, ``.pdf``."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def _styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Run with matplotlib's settings changed for the time being."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        with _matplotlib().rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError(
            'Expected matplotlib for figures, got none. Install it: pip install "lightning-autolr[plots]".'
        ) from error
    return matplotlib


# -- the whole run ------------------------------------------------------------------------------------------------------


@_styled
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
    figure, (top, bottom) = _panels((1.15, 1))
    undone_steps = sum(p.segment.num_steps for p in pieces if p.segment.undone)
    searched = [s for s in searches if s.steps]
    for number, piece in enumerate(pieces):
        steps = _thinned(piece.segment.num_steps)
        lrs = np.array([piece.segment(int(t)) for t in steps])
        style: dict[str, Any] = {"color": GREY, "linestyle": ":"} if piece.segment.undone else {"color": BLUE}
        x = np.append(piece.start + steps, piece.stop)
        top.plot(x, np.append(lrs, lrs[-1:]), drawstyle="steps-post" if len(x) < 20 else "default", **style)
        if number and not piece.segment.undone and not pieces[number - 1].segment.undone:
            before = pieces[number - 1].segment
            top.plot([piece.start] * 2, [before(before.num_steps - 1), lrs[0]], color=BLUE, linewidth=0.8)
    for piece in pieces:
        for axes in (top, bottom) if piece.segment.undone else ():
            axes.axvspan(
                piece.start, piece.stop, facecolor="0.93", edgecolor="0.75", hatch="///", linewidth=0, zorder=0
            )
    _log_axis(top, floor=_floor(pieces))
    top.set_ylabel("learning rate")
    if searched:
        above = [1.03] * len(searched)
        marks: dict[str, Any] = {"color": ORANGE, "markersize": 6, "clip_on": False}
        top.plot([s.step for s in searched], above, "v", transform=top.get_xaxis_transform(), **marks)
    for start, losses, undone in _stretches(pieces):
        _loss_curve(bottom, start, losses, GREY if undone else BLUE)
    looks = [(s.step, s.base) for s in searches if s.kind == "look" and s.base is not None]
    bottom.plot([x for x, _ in looks], [y for _, y in looks], "o", color=PURPLE, markersize=3.5, zorder=4)
    shown = [x for p in pieces if not p.segment.undone for x in p.losses] + [y for _, y in looks]
    _loss_limits(bottom, shown)
    bottom.set(xlabel="optimizer step of the run", ylabel="training loss", xlim=(0, max(1, pieces[-1].stop)))
    total = sum(p.segment.num_steps for p in pieces) - undone_steps
    probed = sum(s.steps for s in searched)
    parts = [f"{total:,} steps trained"]
    parts += [f"{probed:,} of private search"] if probed else []
    parts += [f"{undone_steps:,} undone"] if undone_steps else []
    figure.suptitle(", ".join(parts), fontsize=9)
    _legend(
        figure,
        ("learning rate and loss", _line(BLUE)),
        ("searched here", _line(ORANGE, "v")) if searched else None,
        ("undone", _patch(facecolor="0.93", edgecolor="0.6", hatch="///")) if undone_steps else None,
        ("loss on the evaluation batches", _line(PURPLE, "o")) if looks else None,
    )
    return figure


@_styled
def beam_figure(rounds: Sequence[Search]) -> Figure:
    """The tree of learning rates: who was tried from where, who survived, and the path that was trained.

    Args:
        rounds: of a beam search, in order.
    """
    figure, (top, bottom) = _panels((2, 1))
    nodes: dict[str | None, tuple[float, float]] = {}  # where each kept state stands; None is the real run
    parents = {child.start for search in rounds for child in search.candidates}
    parents |= {search.train.start for search in rounds if search.train is not None}
    tried: list[Any] = []
    kept: list[Any] = []
    path: list[Any] = []
    jumps: list[Any] = []  # where the run went on from another state than its own
    for number, search in enumerate(rounds):
        x = float(search.step)
        length = _length(rounds, number)
        if None not in nodes:
            middle = math.exp(float(np.mean([math.log(child.lr) for child in search.candidates])))
            nodes[None] = (x, middle)
        ends = dict(nodes)
        for child in search.candidates:
            edge = [(x, nodes.get(child.start, nodes[None])[1]), (x + length, child.lr)]
            (kept if child.end in parents and child.end is not None else tried).append(edge)
            if child.end is not None:
                ends[child.end] = edge[1]
            if not math.isfinite(child.score):
                top.plot(*edge[1], "x", color=RED, markersize=6, zorder=5)
        if search.train is not None:
            origin = nodes.get(search.train.start, nodes[None])[1]
            jumps.append([(x, nodes[None][1]), (x, origin)])
            path.append([(x, origin), (x + length, search.train.lr)])
            ends[None] = path[-1][1]
        nodes = {name: (x + length, lr) for name, (_, lr) in ends.items()}
    collection = _matplotlib().collections.LineCollection
    for lines, style in (
        (tried, {"colors": GREY, "linewidths": 0.7}),
        (kept, {"colors": SKY, "linewidths": 1.4}),
        (path, {"colors": BLUE, "linewidths": 2.4}),
        (jumps, {"colors": BLUE, "linewidths": 1, "linestyles": ":"}),
    ):
        top.add_collection(collection(lines, zorder=3, capstyle="round", **style))
    ends_of = [edge[1] for edge in (*tried, *kept)]
    top.plot([x for x, _ in ends_of], [y for _, y in ends_of], "o", color=GREY, markersize=2.5, zorder=2)
    if path:
        top.plot(
            [edge[1][0] for edge in path], [edge[1][1] for edge in path], "o", color=BLUE, markersize=4.5, zorder=4
        )
    top.autoscale_view()
    _log_axis(top)
    top.set_ylabel("learning rate")
    scores = [(s.step + _length(rounds, i), c.score) for i, s in enumerate(rounds) for c in s.candidates]
    finite = [(x, y) for x, y in scores if math.isfinite(y)]
    if finite:
        bottom.plot([x for x, _ in finite], [y for _, y in finite], "o", color=GREY, markersize=2.5)
    best = [(s.step + _length(rounds, i), s.best.score) for i, s in enumerate(rounds) if s.best is not None]
    bottom.plot([x for x, _ in best], [y for _, y in best], "o-", color=BLUE, markersize=4)
    _loss_limits(bottom, [y for _, y in finite])
    bottom.set(xlabel="optimizer step of the run", ylabel="score of a child\n(loss)")
    children = sum(len(s.candidates) for s in rounds)
    figure.suptitle(f"beam search: {len(rounds)} rounds, {children} children tried", fontsize=9)
    _legend(
        figure,
        ("trained, and the best score", _line(BLUE, "o", linestyle="-")),
        ("survived", _line(SKY)) if kept else None,
        ("tried", _line(GREY, "o", linestyle="-")),
        ("diverged", _line(RED, "x")) if len(finite) < len(scores) else None,
    )
    return figure


@_styled
def factors_figure(decisions: Sequence[Search]) -> Figure:
    """The learning rate over the decisions of a factor search, and what the losses said about each factor.

    Args:
        decisions: in order, each with its last line probe.
    """
    figure, (top, bottom) = _panels((1, 1.15))
    probes = [search.entries[-1].request for search in decisions]
    factors = np.array(sorted({factor for p in probes if isinstance(p, LineProbe) for factor in p.factors}))
    numbers = np.arange(1, len(decisions) + 1)
    chosen = np.array([math.nan if s.train is None else s.train.lr for s in decisions])
    ruled = np.array([p.lr for p in probes])
    top.plot(np.append(0.5, numbers), np.append(ruled[0], chosen), "o-", color=BLUE, markersize=3.5)
    _log_axis(top)
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
    bottom.xaxis.set_major_locator(_matplotlib().ticker.MaxNLocator(integer=True, min_n_ticks=1))
    bar = figure.colorbar(mesh, ax=[top, bottom], label="loss (standardised, dark is low)", ticks=(-2, 0, 2), pad=0.01)
    bar.outline.set_visible(False)
    last = decisions[-1].step
    figure.suptitle(f"factor search: {len(decisions)} decisions in {last:,} steps", fontsize=9)
    _legend(
        figure,
        ("learning rate after the decision", _line(BLUE, "o", linestyle="-")),
        ("what it was multiplied by", _line("white", "o", markeredgecolor="black")),
        ("loss not finite", _patch(facecolor="0.6")) if np.isnan(scores).any() else None,
    )
    return figure


@_styled
def autowu_figure(pieces: Sequence[Piece]) -> Figure:
    """AutoWU's warm-up: the losses, the Gaussian process through them, and the probability that their minimum is past.

    Some of its tests are repeated on the losses of the trace, with one draw each and the default options of
    :class:`~lightning_autolr.core.minimum.PastMinimum`.

    Args:
        pieces: the real training, with AutoWU's warm-up in it.

    Raises:
        ValueError: no piece of AutoWU's warm-up.
    """
    climb = [piece for piece in pieces if _is_autowu(piece)]
    if not climb:
        raise ValueError("Expected a warm-up of AutoWU, got none.")
    figure, (top, middle, bottom) = _panels((1.6, 1, 1.1))
    begin, end = climb[0].start, climb[-1].stop
    found = _explained(climb)
    for piece in pieces:
        if piece.start >= begin:
            x = piece.start + np.arange(len(piece.losses))
            top.plot(x, piece.losses, color=SKY if piece.start < end else GREY, linewidth=0.7)
            steps = _thinned(piece.segment.num_steps)
            lrs = [piece.segment(int(t)) for t in steps]
            style: dict[str, Any] = {"color": GREY, "linestyle": ":"} if piece.segment.undone else {"color": BLUE}
            bottom.plot(piece.start + steps, lrs, **style)
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
    _loss_limits(top, [loss for piece in climb for loss in piece.losses])
    top.set_ylabel("training loss")
    middle.set(ylabel="P(minimum\npast)", ylim=(-0.05, 1.05))
    _log_axis(bottom, floor=climb[0].segment(0))
    bottom.set(ylabel="learning\nrate", xlabel="optimizer step of the run")
    bottom.set_xlim(begin, min(pieces[-1].stop, begin + 2 * (end - begin)))
    after = next((p for p in pieces if p.start >= end and not p.segment.undone), None)
    figure.suptitle(
        f"warm-up from step {begin:,} to {end:,}" + ("" if after is None else f", then at {after.segment.lr:.3g}"),
        fontsize=9,
    )
    _legend(
        figure,
        ("loss", _line(SKY)),
        ("Gaussian process, ± 2 std", _line(BLUE)) if found else None,
        ("its minimum", _line(GREEN, linestyle="--")) if found else None,
        ("end of the warm-up", _line(RED)),
    )
    return figure


# -- one search ---------------------------------------------------------------------------------------------------------


@_styled
def candidates_figure(search: Search) -> Figure:
    """The candidates of one search with their scores, and the Gaussian process that chose among them.

    Bars are standard errors of the paired differences to the best candidate. The process is fitted again to the scores of
    this search, as the search did; the panel below shows what it would gain from a further candidate.

    Args:
        search: at least two candidates.
    """
    model = _surrogate(search)
    figure, panels = _panels((3, 1) if model else (1,))
    top = panels[0]
    finite = [c for c in search.candidates if math.isfinite(c.score)]
    failed = [c for c in search.candidates if not math.isfinite(c.score)]
    heights = [c.score for c in finite]
    errors = any(c.stderr is not None for c in finite)
    if model is not None:
        lrs, found, gain = model
        mean, std = np.array(found.mean), np.array(found.std)
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
    _mark_diverged(top, [c.lr for c in failed])
    _score_limits(top, finite, heights, len(failed) > 0)
    low, high = top.get_ylim()
    before = [] if search.base is None or not low < search.base < high else [search.base]
    for base in before:
        top.axhline(base, color=GREY, linestyle=":")
    _log_axis(panels[-1], "x")
    panels[-1].set_xlabel("learning rate")
    top.set_ylabel("\n".join(textwrap.wrap(_score_name(search), 20)))
    title = f"search at step {search.step:,}: {len(search.candidates)} candidates"
    if search.train is not None:
        title += f", chosen {search.train.lr:.3g}\n" + "\n".join(
            textwrap.wrap(search.train.reason, _WIDTH, max_lines=2, placeholder=" ...")
        )
    figure.suptitle(title.strip(), fontsize=9)
    _legend(
        figure,
        ("candidate ± error of the difference to the best" if errors else "candidate", _line("black", "o")),
        ("posterior mean ± 2 std", _line(BLUE)) if model else None,
        ("chosen", _line(GREEN, linestyle="--")) if search.train is not None else None,
        ("before the search", _line(GREY, linestyle=":")) if before else None,
        ("diverged", _line(RED, "x")) if failed else None,
    )
    return figure


@_styled
def probes_figure(search: Search) -> Figure:
    """The training losses of the candidates of one search, with their forecasts or their evaluations.

    Args:
        search: at least one candidate.
    """
    figure, (axes,) = _panels((1,))
    matplotlib = _matplotlib()
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
        smooth = _running_mean(y, max(1, len(y) // 10))
        axes.plot(first + np.arange(len(y)), smooth, color=color, linewidth=1.6)
        if candidate.status is Status.OK or search.best is None:
            shown += [x for x in smooth if math.isfinite(x)]
        longest = max(longest, len(y))
        evaluations = [(e.step, e.mean) for e in candidate.evaluations if math.isfinite(e.mean)]
        axes.plot(
            [x for x, _ in evaluations],
            [y for _, y in evaluations],
            "o",
            color=color,
            markersize=4,
            markeredgecolor="black",
        )
        if not forecasts:
            shown += [y for _, y in evaluations]
        if candidate.status is Status.DIVERGED:
            _mark_diverged(axes, [first + len(y) - 1])
        if search.horizon is not None and candidate.forecast is not None and math.isfinite(candidate.forecast.value):
            x, curve = _forecast_curve(candidate, search.horizon)
            axes.plot(x, curve, color=color, linestyle="--", linewidth=1)
            axes.plot(
                search.horizon,
                candidate.forecast.value,
                "D",
                color=color,
                markersize=5,
                markeredgecolor="black",
                zorder=5,
            )
            shown.append(candidate.forecast.value)
    if forecasts:
        axes.axvspan(1, longest, color="0.95", zorder=0)
        _log_axis(axes, "x")
    _loss_limits(axes, shown)
    axes.set(xlabel="step of the probe" + (" (log scale; grey: made)" if forecasts else ""), ylabel="training loss")
    bar = figure.colorbar(mappable, ax=axes, label="learning rate", pad=0.03)
    bar.outline.set_visible(False)
    _log_axis(bar.ax)
    chosen = search.train is not None and low <= search.train.lr <= high
    if search.train is not None and chosen:
        bar.ax.plot(
            -0.35, search.train.lr, ">", color=RED, markersize=8, clip_on=False, transform=bar.ax.get_yaxis_transform()
        )
    figure.suptitle(f"search at step {search.step:,}: probes of {longest:,} steps", fontsize=9)
    evaluated = any(c.evaluations for c in search.candidates)
    _legend(
        figure,
        ("training loss, running mean", _line("0.4")),
        ("loss on the evaluation batches", _line("0.4", "o", markeredgecolor="black")) if evaluated else None,
        (f"forecast to step {search.horizon:,}", _line("0.4", "D", linestyle="--", markeredgecolor="black"))
        if forecasts
        else None,
        ("diverged", _line(RED, "x")) if any(c.status is Status.DIVERGED for c in search.candidates) else None,
        ("chosen", _line(RED, ">")) if chosen else None,
    )
    return figure


@_styled
def range_test_figure(suggestion: RangeSuggestion) -> Figure:
    """The climbs of a range test: the loss after each step against its learning rate, and the suggested interval.

    Args:
        suggestion: with its curves.
    """
    figure, (axes,) = _panels((1,))
    colors = [BLUE, ORANGE, PURPLE, SKY, "black"]
    shown: list[float] = []
    for number, curve in enumerate(suggestion.curves):
        color = colors[number % len(colors)]
        axes.plot(curve.lrs, curve.losses, color=color, linewidth=0.6, alpha=0.45)
        axes.plot(curve.lrs[: len(curve.smoothed)], curve.smoothed, color=color, linewidth=1.6)
        shown += curve.smoothed
        if curve.edge is not None:
            axes.axvline(curve.edge, color=RED, linestyle=":", linewidth=1)
    _log_axis(axes, "x")
    if suggestion.lr is not None and suggestion.lower is not None and suggestion.upper is not None:
        axes.axvspan(suggestion.lower, suggestion.upper, color=GREEN, alpha=0.15, linewidth=0)
        axes.axvline(suggestion.lr, color=GREEN, linestyle="--")
    _loss_limits(axes, shown)
    axes.set(xlabel="learning rate", ylabel="training loss after the step")
    found = "no suggestion" if suggestion.lr is None else f"suggestion {suggestion.lr:.3g}"
    figure.suptitle(
        f"range test, {len(suggestion.curves)} climb{'s' * (len(suggestion.curves) != 1)}: {found}", fontsize=9
    )
    _legend(
        figure,
        ("climb, smoothed", _line(BLUE)),
        ("suggestion and interval", _line(GREEN, linestyle="--")) if suggestion.lr is not None else None,
        ("loss begins to rise", _line(RED, linestyle=":"))
        if any(c.edge is not None for c in suggestion.curves)
        else None,
    )
    return figure


# -- what is drawn ------------------------------------------------------------------------------------------------------


def _surrogate(search: Search) -> tuple[Array, Posterior, Array] | None:
    """Learning rates, posterior and expected improvement there; None when there is too little to fit.

    Where scores are losses on evaluation batches, the process is fitted to the best candidate and its two neighbours with
    their errors, as the search does; where they are forecasts, to all of them.
    """
    ranked = sorted(search.candidates, key=lambda c: c.lr)
    if search.horizon is None and search.best is not None:
        at = ranked.index(search.best)
        ranked = ranked[max(at - 1, 0) : at + 2]
    finite = [c for c in ranked if math.isfinite(c.score)]
    if len({c.lr for c in ranked}) < 3 or len(finite) < 2:
        return None
    errors = [c.stderr for c in finite if c.stderr is not None]
    typical = float(np.median(errors)) if errors else None

    def observed(candidate: Candidate) -> Observation:
        error = candidate.stderr if candidate.stderr is not None else typical
        return Observation(candidate.lr, candidate.score, None if error is None else max(error, 1e-12) ** 2)

    bounds = (ranked[0].lr, ranked[-1].lr)
    lrs = np.geomspace(*bounds, 121)
    tried = [c.lr for c in ranked]
    try:
        found = posterior([observed(c) for c in ranked], bounds, [float(x) for x in np.clip(lrs, *bounds)] + tried)
    except FitError:
        return None
    best = len(lrs) + int(np.argmin(found.mean[len(lrs) :]))
    gains = [found.gain(i, best) for i in range(len(lrs))]
    gain, std = np.array([g for g, _ in gains]), np.maximum([s for _, s in gains], 1e-12)
    z = gain / std
    improvement = np.maximum(gain * norm.cdf(z) + std * norm.pdf(z), 0)
    n = len(lrs)
    return lrs, Posterior(found.mean[:n], tuple(row[:n] for row in found.covariance[:n])), np.asarray(improvement)


def _explained(climb: Sequence[Piece]) -> Explanation | None:
    """Some of AutoWU's tests, the last one among them; None when there were too few losses for any."""
    losses = [loss for piece in climb for loss in piece.losses]
    lrs = [piece.segment(i) for piece in climb for i in range(len(piece.losses))]
    ends = np.cumsum([len(piece.losses) for piece in climb])
    useful = [int(n) for n in ends if np.isfinite(losses[:n]).sum() >= _FEWEST_LOSSES]
    if not useful:
        return None
    tested = sorted({useful[round(i)] for i in np.linspace(0, len(useful) - 1, _MOST_TESTS)})
    return explain(losses, lrs, tested, PastMinimum(num_tests=1))


def _is_autowu(piece: Piece) -> bool:
    """Whether a piece belongs to a warm-up that looks for a minimum."""
    train: Train | None = piece.train
    return train is not None and train.label == "warm-up" and train.reason.startswith("The learning rate grows")


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


def _floor(pieces: Sequence[Piece]) -> float | None:
    """The smallest learning rate to show: an anneal to zero would take all the room on a logarithmic axis."""
    rates = [p.segment(step) for p in pieces for step in (0, p.segment.num_steps // 2)]
    middles = [min(p.segment(p.segment.num_steps // 2), p.segment.lr) for p in pieces]
    return min([max(rates) / _ANNEALED, *(lr for lr in middles if lr > 0)]) if max(rates) > 0 else None


def _score_name(search: Search) -> str:
    if search.horizon is not None:
        return f"loss forecast to step {search.horizon:,}"
    if any(c.evaluations for c in search.candidates):
        return "loss on the evaluation batches"
    return "mean training loss"


def _length(rounds: Sequence[Search], number: int) -> float:
    """Real steps of a round; of the last one, those of its probes."""
    if number + 1 < len(rounds) and rounds[number + 1].step > rounds[number].step:
        return float(rounds[number + 1].step - rounds[number].step)
    return float(max((len(c.losses) for c in rounds[number].candidates), default=1))


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


# -- how it is drawn ----------------------------------------------------------------------------------------------------


def _panels(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    figure: Figure = _matplotlib().figure.Figure(figsize=(4.8, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))
    return figure, list(axes[:, 0])


def _legend(figure: Figure, *items: tuple[str, Any] | None) -> None:
    """Below the axes, where it hides nothing."""
    known = [item for item in items if item is not None]
    handles, labels = [handle for _, handle in known], [label for label, _ in known]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, columnspacing=1.2)


def _line(color: str, marker: str = "", linestyle: str = "", **style: Any) -> Any:
    lines = _matplotlib().lines
    style.setdefault("markersize", 6 if marker in ("v", "x", "D") else 5)
    return lines.Line2D([], [], color=color, marker=marker, linestyle=linestyle or ("none" if marker else "-"), **style)


def _patch(**style: Any) -> Any:
    return _matplotlib().patches.Patch(**{"linewidth": 0, **style})


def _log_axis(axes: Axes, which: Literal["x", "y"] = "y", floor: float | None = None) -> None:
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
    ticker = _matplotlib().ticker
    decades = math.log10(high / low)
    between = next(subs for most, subs in _TICKS if decades > most)
    axis.set_major_locator(ticker.LogLocator(subs=between, numticks=8))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _loss_limits(axes: Axes, losses: Sequence[float]) -> None:
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


def _mark_diverged(axes: Axes, positions: Sequence[float]) -> None:
    """At the upper edge, whatever the scale is."""
    style: dict[str, Any] = {"color": RED, "markersize": 7, "markeredgewidth": 2}
    if positions:
        axes.plot(positions, [0.97] * len(positions), "x", transform=axes.get_xaxis_transform(), **style)


def _score_limits(axes: Axes, finite: Sequence[Candidate], heights: Sequence[float], failed: bool) -> None:
    """All scores with their bars; the band may go beyond."""
    tops = [c.score + (c.stderr or 0.0) for c in finite] + list(heights)
    bottoms = [c.score - (c.stderr or 0.0) for c in finite] + list(heights)
    if not tops:
        return
    low, high = min(bottoms), max(tops)
    room = (high - low) or abs(high) or 1.0
    axes.set_ylim(low - 0.12 * room, high + (0.2 if failed else 0.1) * room)


def _loss_curve(axes: Axes, start: int, losses: Sequence[float], color: str) -> None:
    """The mean of each small window, and from lowest to highest in it."""
    y = np.asarray(losses, dtype=np.float64)
    if not len(y):
        return
    windows = np.array_split(np.arange(len(y)), min(len(y), _MOST_POINTS))
    x = [start + float(w.mean()) for w in windows]
    if len(y) > _MOST_POINTS:
        axes.fill_between(
            x, [y[w].min() for w in windows], [y[w].max() for w in windows], color=color, alpha=0.2, linewidth=0
        )
    elif len(y) > 20:
        axes.plot(x, y, color=color, alpha=0.35, linewidth=0.7)
        axes.plot(x, _running_mean(y, len(y) // 15), color=color)
        return
    axes.plot(x, [float(y[w].mean()) for w in windows], color=color)


def _running_mean(y: Array, half: int) -> Array:
    """Over ``half`` neighbours on either side, fewer at the ends."""
    if not len(y):
        return y
    sums = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    reach = np.minimum(half, np.minimum(i, len(y) - 1 - i))
    return np.asarray((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))


def _thinned(num_steps: int) -> Array:
    """Steps of a segment, few enough to draw, first and last included."""
    return np.unique(np.linspace(0, max(num_steps - 1, 0), min(max(num_steps, 1), _MOST_POINTS)).round())


def _edges(factors: Array) -> Array:
    """Borders of cells around values on a logarithmic axis."""
    if len(factors) == 1:
        return np.asarray(factors[0] * np.array([0.7, 1.4]))
    logs = np.log(factors)
    steps = np.diff(logs, prepend=2 * logs[0] - logs[1], append=2 * logs[-1] - logs[-2]) / 2
    return np.asarray(np.exp(np.append(logs - steps[:-1], logs[-1] + steps[-1])))
