"""A run in words: tables of what was trained and why, and of what was tried and chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import TYPE_CHECKING, Any

from lightning_autolr.core.range_rules import RangeSuggestion
from lightning_autolr.core.record import account_of
from lightning_autolr.core.requests import Status
from lightning_autolr.report.inspect.searches import Candidate, Piece, Search, late_loss

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["account_table", "range_table", "trained_table", "tried_table"]

_MOST_ROWS = 40  # of a printed table; the CSV has all
_JUMP = 1.5  # from one piece to the next: less is the same schedule going on


def account_table(title: str, account: dict[str, Any], ended: bool) -> Table:
    """Steps and seconds, see :func:`~lightning_autolr.core.record.account_of`.

    Args:
        title: of the table.
        account: what a run's summary has.
        ended: False says that this is not the whole run.
    """
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for phrase in account_of(account):
        table.add_row(phrase)
    if not ended:
        table.add_row("the run did not end: this is what was written until then")
    return table


def trained_table(pieces: Sequence[Piece], searches: Sequence[Search]) -> Table:
    """One row per piece of real training, or one for several between which nothing was decided."""
    evaluated = _named("evaluated", (s for s in searches if s.kind == "look"))
    table = _table("What was trained, and why", "#", "steps", "learning rate<", "loss", evaluated, "<", "why<")
    looks = {s.step: s.base for s in searches if s.kind == "look"}
    searched = {s.step for s in searches if s.steps}
    for first, last in _shortened(_runs_of(pieces, searched), table):
        run = pieces[first : last + 1]
        loss = late_loss(run)
        undone = run[0].segment.undone
        marks = ["undone"] * undone + ["diverged"] * (run[-1].status is Status.DIVERGED)
        train = run[0].train
        table.add_row(
            f"{first}" if first == last else f"{first}-{last}",
            f"{run[0].start:,}-{run[-1].stop:,}",
            _course(run),
            "" if loss is None else f"{loss:.4g}",
            "" if (base := looks.get(run[-1].stop)) is None else f"{base:.4g}",
            ", ".join(marks),
            train.reason or train.label if train else "not finished",
            style="dim" if undone else None,
        )
    return table


def tried_table(searches: Sequence[Search]) -> Table:
    """One row per candidate, with what was chosen."""
    score = _named("score", (s for s in searches if s.candidates))
    columns = ("step", "search<", "learning rate", score, "error", "steps", "s", "<")
    table = _table("What was tried, and what was chosen", *columns)
    pairs = [pair for search in searches for pair in _tried(search)]
    last = None
    for search, candidate, chosen in _shortened(pairs, table):
        if search is not last and last is not None:
            table.add_section()
        words = {
            "best": search.best is candidate,
            "chosen": chosen,
            "diverged": candidate.status is Status.DIVERGED,
        }
        table.add_row(
            f"{search.step:,}" if search is not last else "",
            f"{search.number}: {search.kind}" if search is not last else "",
            _number(candidate.lr),
            f"{candidate.score:.5g}" if math.isfinite(candidate.score) else "",
            "" if candidate.stderr is None else f"± {candidate.stderr:.2g}",
            f"{candidate.steps:,}" if candidate.steps else "",
            f"{search.seconds:.1f}" if search is not last else "",
            ", ".join(word for word, holds in words.items() if holds),
            style="bold" if chosen else None,
        )
        last = search
    return table


def range_table(tests: Sequence[tuple[str, RangeSuggestion]]) -> Table:
    """One row per range test: the moment of each, and what it suggested."""
    table = _table("Range tests", "at<", "learning rate", "interval<", "why<")
    for at, found in tests:
        ends = [_number(lr) for lr in (found.lower, found.upper) if lr is not None]
        interval = " to ".join(ends)
        table.add_row(at, "none" if found.lr is None else _number(found.lr), interval, found.reason)
    return table


def _named(column: str, searches: Iterable[Search]) -> str:
    """A column's name, with what its numbers are where they are no losses."""
    return ", ".join([column, *sorted({search.score_name for search in searches} - {""})])


def _tried(search: Search) -> list[tuple[Search, Candidate, bool]]:
    """Candidates with whether each was chosen, by learning rate; what was chosen without having been tried is among them."""
    rows = [(search, candidate, search.chose(candidate)) for candidate in search.candidates]
    if rows and search.train is not None and not any(chosen for _, _, chosen in rows):
        rows.append((search, Candidate(search.train.lr, math.inf), True))
    return sorted(rows, key=lambda row: row[1].lr)


def _table(title: str, *columns: str) -> Table:
    """An empty table; a name that ends in "<" makes a column of words, the others hold numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name.removesuffix("<"), justify="left" if name.endswith("<") else "right", overflow="fold")
    return table


def _runs_of(pieces: Sequence[Piece], searched: Set[int]) -> list[tuple[int, int]]:
    """First and last of neighbouring pieces between which nothing was decided: the learning rate goes on, none was undone."""
    runs: list[tuple[int, int]] = []
    for index, piece in enumerate(pieces):
        before = pieces[index - 1] if index else None
        if before is not None and _goes_on(before, piece) and piece.start not in searched:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs


def _goes_on(before: Piece, piece: Piece) -> bool:
    last, first = before.ends[1], piece.ends[0]
    return (
        before.segment.undone == piece.segment.undone
        and piece.segment.back_to is None
        and before.status is piece.status is Status.OK
        and max(last, first) <= _JUMP * min(last, first)
    )


def _course(pieces: Sequence[Piece]) -> str:
    """Learning rates at both ends, and between them the highest if it is higher than either."""
    first, last = pieces[0].ends[0], pieces[-1].ends[1]
    peak = max(max(*piece.ends, piece.peak) for piece in pieces)
    values = [_number(lr) for lr in ((first, peak, last) if peak > 1.01 * max(first, last) else (first, last))]
    return " to ".join(dict.fromkeys(values))


def _shortened(rows: list[Any], table: Table) -> Iterator[Any]:
    """The first and last rows of a long table, and in between how many are not shown."""
    half = _MOST_ROWS // 2
    for index, row in enumerate(rows):
        if len(rows) <= _MOST_ROWS or index < half or index >= len(rows) - half:
            yield row
        elif index == half:
            table.add_section()
            table.add_row("...", f"{len(rows) - 2 * half} more")
            table.add_section()


def _number(lr: float) -> str:
    return f"{lr:.3g}"
