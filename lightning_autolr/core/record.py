"""What a search leaves behind: the trace, the schedule it found, and what it cost.

``trace.jsonl`` has one line per answered request and is written as the run goes; ``schedule.json`` can be replayed;
``summary.json`` has the account. Only rank 0 writes.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_autolr.core.requests import Answer, Request, decode
from lightning_autolr.schedules import Constant, Segment, Tabulated, to_plain

__all__ = ["Cost", "Entry", "Record", "account_of", "read_leftover", "read_trace", "set_aside", "summary_of"]

_LEFTOVER = "leftover.jsonl"
_PLAIN = ("global_step", "search_steps", "seconds", "fingerprint", "eval_batches")


@dataclass
class Cost:
    """What the search used up."""

    steps: int = 0
    eval_batches: int = 0
    seconds: float = 0.0
    steps_undone: int = 0


@dataclass(frozen=True)
class Entry:
    """One answered request.

    Args:
        request: what was asked for.
        answer: what came of it.
        global_step: ``trainer.global_step`` at which the request was begun.
        search_steps: private and undone steps of the whole run so far, this request included.
        seconds: how long it took.
        fingerprint: of the weights from which a probe started; empty for real training.
        eval_batches: evaluation batches of the whole run so far, this request included; 0 in traces of earlier versions.
    """

    request: Request
    answer: Answer
    global_step: int
    search_steps: int
    seconds: float
    fingerprint: str = ""
    eval_batches: int = 0

    def to_json(self) -> dict[str, Any]:
        own = {k: getattr(self, k) for k in _PLAIN}
        return {"request": to_plain(self.request), "answer": to_plain(self.answer), **own}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Entry:
        return cls(**{**line, "request": decode(line["request"]), "answer": decode(line["answer"])})


class Record:
    """The trace and the schedule, in memory and in ``folder`` (None: in memory only)."""

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self.trace: list[Entry] = []
        self.segments: list[Segment] = []

    def set_aside(self) -> str | None:
        """Rename a folder with the record of an earlier fit, lest this one is written over it; returns the new name."""
        if self.folder is None or not os.path.exists(os.path.join(self.folder, "trace.jsonl")):
            return None
        os.rename(self.folder, other := _free_name(self.folder))
        return other

    def add(self, entry: Entry) -> None:
        self.trace.append(entry)
        if self.folder is not None:
            with open(self._path("trace.jsonl"), "a") as file:
                file.write(json.dumps(entry.to_json()) + "\n")

    def add_segment(self, segment: Segment) -> None:
        self.segments.append(segment)
        self.write_schedule()

    def go_back(self, index: int, as_left: bool = False) -> int:
        """Mark all segments as undone but those on the way to a state.

        Args:
            index: the state is the one before this segment; see :class:`~lightning_autolr.schedules.Segment`.
            as_left: likewise.

        Returns:
            How many more steps are undone than before; fewer than none where the state lies on a way that was taken back.
        """
        before, way = self._num_undone, self._way_to(index, as_left)
        self.segments[:] = [replace(s, undone=i not in way) for i, s in enumerate(self.segments)]
        self.write_schedule()
        return self._num_undone - before

    @property
    def _num_undone(self) -> int:
        return sum(s.num_steps for s in self.segments if s.undone)

    def _way_to(self, index: int, as_left: bool) -> set[int]:
        way = set[int]()
        while index > 0:
            segment = self.segments[index] if index < len(self.segments) else None
            if segment is not None and segment.back_to is not None and not as_left:
                index, as_left = segment.back_to, segment.as_left
            else:
                index, as_left = index - 1, False
                way.add(index)
        return way

    def write_schedule(self, *unfinished: Segment) -> None:
        segments = (*self.segments, *unfinished)
        if self.folder is not None and segments:
            Tabulated(segments).to_file(self._path("schedule.json"))

    def write_summary(self, summary: dict[str, Any]) -> None:
        if self.folder is not None:
            with open(self._path("summary.json"), "w") as file:
                json.dump(summary, file, indent=2)

    def restart(self, leftover: Sequence[Entry] = ()) -> None:
        """Write the files anew: after a resume they hold what the checkpoint knew.

        Args:
            leftover: what a killed run had found out since. Kept in a file of its own, lest the next kill loses it.
        """
        if self.folder is not None:
            _write(self._path(_LEFTOVER), leftover)  # first, so that an answer is in one of the files at any moment
            _write(self._path("trace.jsonl"), self.trace)
            self.write_schedule()

    def finish(self) -> None:
        """The run has ended as it should: nothing is left over."""
        if self.folder is not None and os.path.exists(self._path(_LEFTOVER)):
            os.remove(self._path(_LEFTOVER))

    def _path(self, name: str) -> str:
        assert self.folder is not None
        os.makedirs(self.folder, exist_ok=True)
        return os.path.join(self.folder, name)


def set_aside(folder: str, name: str) -> str | None:
    """Move one file of an earlier fit into a folder of its own, lest this fit writes over it; returns that folder, if any.

    A search moves all of its folder, see :meth:`Record.set_aside`, before others are asked; what lies in it then may be of
    this fit.
    """
    if not os.path.exists(old := os.path.join(folder, name)):
        return None
    os.makedirs(other := _free_name(folder))
    os.rename(old, os.path.join(other, name))
    return other


def _free_name(folder: str) -> str:
    return next(name for n in itertools.count(1) if not os.path.exists(name := f"{folder}-{n}"))


def read_trace(path: str) -> list[Entry]:
    """The entries of a ``trace.jsonl``; a last line that a crash cut short is left out."""
    entries = []
    with open(path) as file:
        for line in file:
            if not line.endswith("\n"):
                break
            entries.append(Entry.from_json(json.loads(line)))
    return entries


def read_leftover(folder: str, num_known: int) -> list[Entry]:
    """What a killed run found out after its last checkpoint, which knew ``num_known`` entries."""
    found: list[Entry] = []
    for name, skip in (("trace.jsonl", num_known), (_LEFTOVER, 0)):
        if os.path.exists(path := os.path.join(folder, name)):
            found += read_trace(path)[skip:]
    return found


def _write(path: str, entries: Sequence[Entry]) -> None:
    draft = f"{path}.{os.getpid()}.tmp"
    with open(draft, "w") as file:
        file.writelines(json.dumps(entry.to_json()) + "\n" for entry in entries)
    os.replace(draft, path)


def summary_of(segments: Sequence[Segment], cost: Cost) -> dict[str, Any]:
    """The account of a run: what was trained, what was tried, what it took."""
    kept = [s for s in segments if not s.undone]
    return {
        "schedule_steps": sum(s.num_steps for s in kept),
        "search_steps": cost.steps + cost.steps_undone,
        "probe_steps": cost.steps,
        "undone_steps": cost.steps_undone,
        "eval_batches": cost.eval_batches,
        "search_seconds": cost.seconds,
        "learning_rates": [_peak(s) for s in kept],
    }


def _peak(segment: Segment) -> float:
    """The learning rate that shapes of factors multiply; a rate of 0, and a shape of rates, stand in the shape alone."""
    shape = segment.shape
    if shape.absolute:
        return max(map(shape, range(segment.num_steps)), default=0.0)
    return segment.lr * shape(0) if isinstance(shape, Constant) else segment.lr


def account_of(summary: Mapping[str, Any]) -> list[str]:
    """What a run took, as phrases. Steps of search are the private ones; undone steps were training, and count as trained.

    Args:
        summary: as :func:`summary_of` makes it; what is 0 or missing is not spoken of.

    >>> account_of({"schedule_steps": 900, "undone_steps": 100, "probe_steps": 50, "search_seconds": 1.5})
    ['1,000 steps trained, 100 of them undone', '50 private steps of search (5% of the steps trained)', '1.5 s in search']
    """
    undone, private = summary.get("undone_steps", 0), summary.get("probe_steps", 0)
    trained = summary["schedule_steps"] + undone
    phrases = [f"{trained:,} steps trained" + (f", {undone:,} of them undone" if undone else "")]
    if private:
        phrases.append(f"{private:,} private steps of search ({private / max(1, trained):.0%} of the steps trained)")
    if batches := summary.get("eval_batches", 0):
        phrases.append(f"{batches:,} evaluation batches")
    if seconds := summary.get("search_seconds", 0.0):
        phrases.append(f"{seconds:.1f} s in search")
    return phrases
