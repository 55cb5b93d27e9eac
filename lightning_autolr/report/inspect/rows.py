"""A run as rows of plain values, for CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_autolr.report.inspect.searches import Candidate, Piece, Search, late_loss

__all__ = ["rows_of", "write_rows"]

_COLUMNS = (
    "what",
    "search",
    "stage",
    "step",
    "lr",
    "lr_end",
    "num_steps",
    "score",
    "stderr",
    "status",
    "best",
    "chosen",
    "undone",
    "seconds",
    "label",
    "reason",
)


def rows_of(searches: Sequence[Search], pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """One row per candidate and per piece of real training, in the order of the run, values unformatted."""
    timeline: list[tuple[int, int, list[dict[str, Any]]]] = []
    timeline += [(s.step, 0, [_candidate_row(s, c) for c in s.candidates]) for s in searches]
    timeline += [(p.start, 1, [_piece_row(p)]) for p in pieces]
    return [row for _, _, rows in sorted(timeline, key=lambda item: item[:2]) for row in rows]


def write_rows(rows: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Write rows as CSV; an empty cell means that there is no such value."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return target


def _candidate_row(search: Search, candidate: Candidate) -> dict[str, Any]:
    return {
        "what": search.kind,
        "search": search.number,
        "stage": search.stage,
        "step": search.step,
        "lr": candidate.lr,
        "num_steps": candidate.steps,
        "score": candidate.score,
        "stderr": "" if candidate.stderr is None else candidate.stderr,
        "status": candidate.status.value,
        "best": search.best is candidate,
        "chosen": search.chose(candidate),
        "seconds": search.seconds / len(search.candidates),
        "label": candidate.label,
    }


def _piece_row(piece: Piece) -> dict[str, Any]:
    segment = piece.segment
    first, last = piece.ends
    loss = late_loss([piece])
    row: dict[str, Any] = {
        "what": "train",
        "step": piece.start,
        "lr": first,
        "lr_end": last,
        "num_steps": segment.num_steps,
        "score": "" if loss is None else loss,
        "status": piece.status.value,
        "undone": segment.undone,
    }
    if piece.train is not None:
        row |= {"stage": piece.train.stage, "label": piece.train.label, "reason": piece.train.reason}
    return row
