"""Pictures of a run, out of its trace: what was tried, what was expected of it, what was chosen.

Every function takes plain values and returns a new matplotlib ``Figure`` of 720 x 540 pixels, with letters that can be
read at half of that, the size at which TensorBoard shows it first. Nothing global is touched, pyplot is not used.
:func:`figures_of` picks the ones that fit a trace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_autolr.core.record import Entry
from lightning_autolr.report.figures.autowu import autowu_figure, is_autowu
from lightning_autolr.report.figures.beam import beam_figure
from lightning_autolr.report.figures.candidates import candidates_figure
from lightning_autolr.report.figures.factors import factors_figure
from lightning_autolr.report.figures.probes import probes_figure
from lightning_autolr.report.figures.range_test import range_test_figure
from lightning_autolr.report.figures.schedule import schedule_figure
from lightning_autolr.report.inspect.reading import pieces_of, range_suggestion, searches_of
from lightning_autolr.report.inspect.searches import Search
from lightning_autolr.schedules import Segment

if TYPE_CHECKING:
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

Drawing = Callable[[], "Figure"]


def figures_of(trace: Sequence[Entry], segments: Sequence[Segment]) -> dict[str, Figure]:
    """All figures that fit a trace, by name.

    ``schedule`` for every run that trained; ``candidates_000`` and ``probes_000`` for each search among candidates
    (``coarse_candidates_000`` and ``coarse_probes_000`` for a coarse one);
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
    if any(is_autowu(piece) for piece in pieces):
        drawings["autowu"] = functools.partial(autowu_figure, pieces)
    for search in searches:
        for name, draw in drawings_of_search(search).items():
            drawings[f"{name}_{search.number:03d}"] = draw
    return drawings


def drawings_of_search(search: Search) -> dict[str, Drawing]:
    """The figures of one search alone, not drawn yet: ``candidates`` and ``probes``, or ``range_test``, or nothing.

    Where a coarse search goes before another one at the same step, its names begin with ``coarse_``.
    """
    if search.kind == "range test":
        return {"range_test": lambda: range_test_figure(range_suggestion(search))}
    if search.kind != "candidates" or len(search.candidates) < 2:
        return {}
    prefix = "coarse_" if search.is_coarse else ""
    return {
        f"{prefix}candidates": functools.partial(candidates_figure, search),
        f"{prefix}probes": functools.partial(probes_figure, search),
    }


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the ending of ``path`` says how: ``.png``, ``.svg``, ``.pdf``."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target
