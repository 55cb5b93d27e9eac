"""The folder of a run, read: everything that it left behind, as rows and as tables."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_autolr.core.range_rules import RangeCurve, RangeSuggestion
from lightning_autolr.core.record import Entry, read_trace
from lightning_autolr.core.requests import Train, decode
from lightning_autolr.report.inspect.reading import pieces_of, range_suggestion, searches_of
from lightning_autolr.report.inspect.rows import rows_of, write_rows
from lightning_autolr.report.inspect.searches import Piece, Search, steps_of
from lightning_autolr.report.inspect.tables import account_table, range_table, trained_table, tried_table
from lightning_autolr.schedules import Segment, Tabulated

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

__all__ = ["Inspection", "inspect_run"]


@dataclass(frozen=True)
class Inspection:
    """What a run left behind, in tables. ``rich.print`` shows it; :meth:`to_csv` writes every row.

    Args:
        folder: where the files lie.
        trace: every request and its answer.
        segments: the schedule, undone segments included.
        summary: the account at the end of the run; empty when the run did not get there.
        range_tests: moment (such as "epoch 0") and suggestion of each test of a ``RangeTestCallback``.
    """

    folder: Path
    trace: tuple[Entry, ...] = ()
    segments: tuple[Segment, ...] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    range_tests: tuple[tuple[str, RangeSuggestion], ...] = ()

    @property
    def searches(self) -> list[Search]:
        return searches_of(self.trace, self.segments)

    @property
    def pieces(self) -> list[Piece]:
        return pieces_of(self.trace, self.segments)

    def account(self) -> dict[str, Any]:
        """Steps and seconds, from the summary or, when the run was cut off, as far as the trace goes."""
        undone = sum(s.num_steps for s in self.segments if s.undone)
        probed = sum(steps_of(e) for e in self.trace if not isinstance(e.request, Train))
        known = {
            "schedule_steps": sum(s.num_steps for s in self.segments) - undone,
            "search_steps": probed + undone,
            "probe_steps": probed,
            "undone_steps": undone,
            "search_seconds": math.fsum(e.seconds for e in self.trace if not isinstance(e.request, Train)),
        }
        return {**known, **self.summary}

    def rows(self) -> list[dict[str, Any]]:
        """One row per candidate and per piece of real training, in the order of the run, values unformatted."""
        return rows_of(self.searches, self.pieces)

    def to_csv(self, path: str | Path) -> Path:
        """Write :meth:`rows`; an empty cell means that there is no such value."""
        return write_rows(self.rows(), path)

    def tables(self) -> list[Table]:
        """The account, what was trained and why, what was tried and what was chosen."""
        searches = self.searches
        tests = [(f"step {s.step}", range_suggestion(s)) for s in searches if s.kind == "range test"]
        tests += self.range_tests
        tried = [s for s in searches if s.kind != "range test"]
        ended = bool(self.summary) or not self.trace
        return [
            *([account_table(f"{self.folder}", self.account(), ended)] if self.trace or self.segments else []),
            *([trained_table(self.pieces, searches)] if self.segments else []),
            *([tried_table(tried)] if any(s.candidates for s in tried) else []),
            *([range_table(tests)] if tests else []),
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in self.tables():
            yield table
            yield ""


def inspect_run(run_dir: str | Path) -> Inspection:
    """Read what a run left in ``run_dir`` or ``run_dir/autolr``.

    Raises:
        FileNotFoundError: there is nothing of ours.
    """
    for folder in (Path(run_dir), Path(run_dir) / "autolr"):
        trace, tests = folder / "trace.jsonl", folder / "range_test.json"
        if trace.is_file() or tests.is_file():
            schedule, summary = folder / "schedule.json", folder / "summary.json"
            return Inspection(
                folder=folder,
                trace=tuple(read_trace(str(trace))) if trace.is_file() else (),
                segments=Tabulated.from_file(schedule).segments if schedule.is_file() else (),
                summary=json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {},
                range_tests=_read_range_tests(tests) if tests.is_file() else (),
            )
    raise FileNotFoundError(
        f"Expected a trace.jsonl in {run_dir} or {Path(run_dir) / 'autolr'}, got none. Give the folder of a run: it is the one "
        "in which its logger writes, such as lightning_logs/version_0."
    )


def _read_range_tests(path: Path) -> tuple[tuple[str, RangeSuggestion], ...]:
    def plain(value: dict[str, Any], *without: str) -> dict[str, Any]:
        return {name: decode(v) for name, v in value.items() if name not in ("type", *without)}

    tests = []
    for test in json.loads(path.read_text(encoding="utf-8")):
        found = test["suggestion"]
        curves = tuple(RangeCurve(**plain(curve)) for curve in found["curves"])
        tests.append((f"{test['unit']} {test['at']}", RangeSuggestion(**plain(found, "curves"), curves=curves)))
    return tuple(tests)
