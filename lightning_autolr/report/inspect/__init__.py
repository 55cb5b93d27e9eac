"""What a run tried, what it chose, why, and at what cost: read from its trace.

``RUN_DIR/autolr`` (or the folder itself) holds ``trace.jsonl``, ``schedule.json`` and ``summary.json``. Reading them needs no
Trainer and changes nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_autolr.report.inspect.inspection import Inspection, inspect_run
from lightning_autolr.report.inspect.reading import pieces_of, range_suggestion, searches_of
from lightning_autolr.report.inspect.searches import Candidate, Piece, Search

__all__ = [
    "Candidate",
    "Inspection",
    "Piece",
    "Search",
    "inspect_run",
    "main",
    "pieces_of",
    "range_suggestion",
    "searches_of",
]

_WIDTH = 140


def main(run_dir: str, csv: str | None = None, figures: str | None = None) -> Inspection:
    """Print what a run tried, what it chose, why, and at what cost.

    Args:
        run_dir: folder of the run, such as ``lightning_logs/version_0``.
        csv: file to write all rows to.
        figures: folder to write all figures to, as PNG.
    """
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH)  # a file has no width to fit in
    inspection = inspect_run(run_dir)
    console.print(inspection)
    if csv is not None:
        console.print(f"Rows: {inspection.to_csv(csv)}", soft_wrap=True)
    if figures is not None:
        from lightning_autolr.report.figures import drawings_of, range_test_figure, save_figure

        drawings = drawings_of(inspection.trace, inspection.segments)
        for name, draw in drawings.items():
            save_figure(draw(), Path(figures) / f"{name}.png")
        for at, found in inspection.range_tests:
            save_figure(range_test_figure(found), Path(figures) / f"range_test_{at.replace(' ', '_')}.png")
        number = len(drawings) + len(inspection.range_tests)
        console.print(f"{number} figure{'s' * (number != 1)}: {figures}", soft_wrap=True)
    return inspection
