"""What a run tried, what it chose, why, and at what cost: read from its trace.

``RUN_DIR/autolr`` (or the folder itself) holds ``trace.jsonl``, ``schedule.json`` and ``summary.json``. Reading them needs no
Trainer and changes nothing.
"""

from __future__ import annotations

from lightning_autolr.report.inspect.inspection import Inspection, inspect_run
from lightning_autolr.report.inspect.reading import pieces_of, range_suggestion, searches_of
from lightning_autolr.report.inspect.searches import Candidate, Piece, Search

__all__ = [
    "Candidate",
    "Inspection",
    "Piece",
    "Search",
    "inspect_run",
    "pieces_of",
    "range_suggestion",
    "searches_of",
]
