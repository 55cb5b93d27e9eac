"""What a run tried, what it chose, why, and at what cost: read from its trace.

``RUN_DIR/autolr`` (or the folder itself) holds ``trace.jsonl``, ``schedule.json`` and ``summary.json``. Reading them needs no
Trainer and changes nothing.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import lightning_autolr.search.autowu  # noqa: F401  (defines schedules that stand in traces)
from lightning_autolr.core.forecast import Forecast
from lightning_autolr.core.range_rules import RULES, RangeCurve, RangeSuggestion, Rule, suggest
from lightning_autolr.core.requests import Evaluation, LineProbe, LineResult, Probe, ProbeResult, Status, Train, decode
from lightning_autolr.report.trace import Entry, read_trace
from lightning_autolr.schedules import Segment, Tabulated
from lightning_autolr.search.published import PublishedAutoLRS, Stage

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

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

Kind = Literal["candidates", "beam", "factors", "range test", "look"]

_MOST_ROWS = 40  # of a printed table; the CSV has all
_WIDTH = 140
_JUMP = 1.5  # from one piece to the next: less is the same schedule going on


@dataclass(frozen=True)
class Candidate:
    """One learning rate that was tried.

    Args:
        lr: learning rate (of a range test: the largest one that was reached).
        score: what it was judged by, lower is better: the loss of its evaluation, its forecast, its mean training loss, or
            the loss at its point of a line probe; inf when it diverged.
        stderr: standard error of the paired difference to the best candidate, over the evaluation batches; None for the
            best one itself, and where there are no pairs.
        steps: private steps it took.
        status: how it ended.
        losses: training loss before each of its steps.
        evaluations: losses on the evaluation batches, after some of its steps.
        forecast: the curve that was fitted to its losses, where the score is a forecast.
        start: id of the state it started from; None is the real run's.
        end: id of the state at its end, when it was kept.
        label: what the progress bar said.
    """

    lr: float
    score: float
    stderr: float | None = None
    steps: int = 0
    status: Status = Status.OK
    losses: tuple[float, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    forecast: Forecast | None = None
    start: str | None = None
    end: str | None = None
    label: str = ""


@dataclass(frozen=True)
class Search:
    """What was tried at one moment of the run.

    Args:
        number: 0, 1, ... among the searches of the run; a look has the number of the search after it.
        kind: "candidates" (probes with a learning rate each), "beam" (children of one round), "factors" (one line probe),
            "range test" (climbs), or "look" (an evaluation of the weights as they are).
        stage: number of the stage, as the search counts.
        step: real steps made before.
        entries: what was asked for and answered.
        candidates: in the order of trying.
        train: the real training that came of it; None if the run ended before.
        base: loss of the weights as they were, where it was measured.
        horizon: step for which the scores are forecasts, if they are.
    """

    number: int
    kind: Kind
    stage: int
    step: int
    entries: tuple[Entry, ...]
    candidates: tuple[Candidate, ...] = ()
    train: Train | None = None
    base: float | None = None
    horizon: int | None = None

    @property
    def steps(self) -> int:
        """Private steps, those of probes that were made twice included."""
        return sum(_steps(entry) for entry in self.entries)

    @property
    def seconds(self) -> float:
        return math.fsum(entry.seconds for entry in self.entries)

    @property
    def best(self) -> Candidate | None:
        """The candidate of the lowest score (ties: of the lowest losses); None when there is none that did not diverge."""
        best = min(self.candidates, key=lambda c: (c.score, c.forecast.tail if c.forecast else 0.0), default=None)
        return best if best is not None and math.isfinite(best.score) else None


@dataclass(frozen=True)
class Piece:
    """A segment of real training, with what was asked for and what came of it.

    Args:
        start: real steps made before.
        segment: steps, learning rate and shape; whether it was undone.
        train: the request; None for a segment that was not finished.
        losses: training loss before each step.
        status: how it ended.
    """

    start: int
    segment: Segment
    train: Train | None = None
    losses: tuple[float, ...] = ()
    status: Status = Status.OK

    @property
    def stop(self) -> int:
        return self.start + self.segment.num_steps


def pieces_of(trace: Sequence[Entry], segments: Sequence[Segment]) -> list[Piece]:
    """The real training of a run, in order. Segments beyond the trace are there; training beyond the segments is not."""
    trained = [entry for entry in trace if isinstance(entry.request, Train)]
    pieces: list[Piece] = []
    for index, segment in enumerate(segments):
        start = pieces[-1].stop if pieces else 0
        if index < len(trained):
            request, answer = trained[index].request, trained[index].answer
            pieces.append(Piece(start, segment, request, answer.losses, answer.status))  # type: ignore[arg-type, union-attr]
        else:
            pieces.append(Piece(start, segment))
    return pieces


def searches_of(
    trace: Sequence[Entry], segments: Sequence[Segment] = (), upcoming: Train | None = None, step: int = 0
) -> list[Search]:
    """The searches of a run, or of a part of its trace, in order.

    Args:
        trace: entries; the first one is not in the middle of a search.
        segments: of the same part. Without them the steps between searches are counted by their losses.
        upcoming: the real training that comes after the trace, if it is known.
        step: real steps made before the first entry.
    """
    found: list[Search] = []
    pending: list[tuple[Kind, list[Entry]]] = []
    trained = 0
    for entry in trace:
        if not isinstance(entry.request, Train):
            kind = _kind(entry.request)
            if not pending or pending[-1][0] != kind:
                pending.append((kind, []))
            pending[-1][1].append(entry)
            continue
        found += _read(pending, found, step, entry.request)
        pending = []
        made = len(entry.answer.losses)
        step += segments[trained].num_steps if trained < len(segments) else made
        trained += 1
    return [*found, *_read(pending, found, step, upcoming)]


def range_suggestion(search: Search) -> RangeSuggestion:
    """What the climbs of a range test say, by the rule that the run used (the "valley" rule where that is not known)."""
    said = "" if search.train is None else search.train.reason
    rule: Rule = next((rule for rule in RULES if said.startswith(f"{rule} rule")), "valley")
    curves = []
    for climb in _chains(search.entries):
        lrs = [probe.lr * probe.shape(i) for probe, _ in climb for i in range(probe.num_steps)]
        losses = [loss for _, answer in climb for loss in answer.losses]
        if climb[-1][1].status is Status.DIVERGED:
            losses.append(math.inf)
        curves.append(RangeCurve.measured(lrs, losses))
    return suggest(curves, rule)


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
        probed = sum(_steps(e) for e in self.trace if not isinstance(e.request, Train))
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
        timeline: list[tuple[int, int, list[dict[str, Any]]]] = []
        timeline += [(s.step, 0, [_candidate_row(s, c) for c in s.candidates]) for s in self.searches]
        timeline += [(p.start, 1, [_piece_row(p)]) for p in self.pieces]
        return [row for _, _, rows in sorted(timeline, key=lambda item: item[:2]) for row in rows]

    def to_csv(self, path: str | Path) -> Path:
        """Write :meth:`rows`; an empty cell means that there is no such value."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(self.rows())
        return target

    def tables(self) -> list[Table]:
        """The account, what was trained and why, what was tried and what was chosen."""
        return [
            *([self._account_table()] if self.trace or self.segments else []),
            *([self._trained_table()] if self.segments else []),
            *([self._tried_table()] if any(s.candidates for s in self.searches if s.kind != "range test") else []),
            *([self._range_table()] if self.range_tests or any(s.kind == "range test" for s in self.searches) else []),
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in self.tables():
            yield table
            yield ""

    def _account_table(self) -> Table:
        from rich.table import Table

        account = self.account()
        share = account["search_steps"] / max(1, account["schedule_steps"])
        table = Table(title=f"{self.folder}", show_header=False, title_justify="left")
        table.add_row("steps trained", f"{account['schedule_steps']:,}")
        table.add_row("steps of search", f"{account['search_steps']:,} ({share:.0%} of those trained)")
        if account["undone_steps"]:
            table.add_row("", f"of them {account['undone_steps']:,} of training that was undone")
        if "eval_batches" in account:
            table.add_row("evaluation batches", f"{account['eval_batches']:,}")
        table.add_row("time in search", f"{account['search_seconds']:.1f} s")
        if not self.summary and self.trace:
            table.add_row("", "the run did not end: this is what was written until then")
        return table

    def _trained_table(self) -> Table:
        table = _table("What was trained, and why", "#", "steps", "learning rate<", "loss", "evaluated", "<", "why<")
        looks = {s.step: s.base for s in self.searches if s.kind == "look"}
        pieces = self.pieces
        searched = {s.step for s in self.searches if s.steps}
        for first, last in _shortened(_runs_of(pieces, searched), table):
            run = pieces[first : last + 1]
            losses = [loss for piece in run for loss in piece.losses]
            tail = losses[-max(1, len(run[-1].losses) // 10) :]
            undone = run[0].segment.undone
            marks = ["undone"] * undone + ["diverged"] * (run[-1].status is Status.DIVERGED)
            train = run[0].train
            table.add_row(
                f"{first}" if first == last else f"{first}-{last}",
                f"{run[0].start:,}-{run[-1].stop:,}",
                _course([piece.segment for piece in run]),
                f"{np.mean(tail):.4g}" if tail else "",
                "" if (base := looks.get(run[-1].stop)) is None else f"{base:.4g}",
                ", ".join(marks),
                train.reason or train.label if train else "not finished",
                style="dim" if undone else None,
            )
        return table

    def _tried_table(self) -> Table:
        columns = ("step", "search<", "learning rate", "score", "error", "steps", "s", "<")
        table = _table("What was tried, and what was chosen", *columns)
        pairs = [pair for search in self.searches if search.kind != "range test" for pair in _tried(search)]
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

    def _range_table(self) -> Table:
        table = _table("Range tests", "at<", "learning rate", "interval<", "why<")
        inside = ((f"step {s.step}", range_suggestion(s)) for s in self.searches if s.kind == "range test")
        for at, found in (*inside, *self.range_tests):
            ends = [_number(lr) for lr in (found.lower, found.upper) if lr is not None]
            interval = " to ".join(ends)
            table.add_row(at, "none" if found.lr is None else _number(found.lr), interval, found.reason)
        return table


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


# -- reading the trace --------------------------------------------------------------------------------------------------


def _kind(request: Probe | LineProbe) -> Kind:
    if isinstance(request, LineProbe):
        return "factors"
    if request.label.startswith("range test"):
        return "range test"
    if request.label.startswith("beam search"):
        return "beam"
    return "candidates" if request.num_steps else "look"


def _steps(entry: Entry) -> int:
    """Private steps of a request; 0 for real training."""
    if isinstance(entry.request, LineProbe):
        return entry.request.horizon * (len(entry.request.factors) if entry.request.exact else 1)
    return len(entry.answer.losses) if isinstance(entry.answer, ProbeResult) else 0


Parts = list[tuple[Probe, ProbeResult]]


def _probes(entries: Iterable[Entry]) -> Parts:
    return [
        (e.request, e.answer) for e in entries if isinstance(e.request, Probe) and isinstance(e.answer, ProbeResult)
    ]


def _chains(entries: Iterable[Entry]) -> list[Parts]:
    """Probes that made steps, those made in parts put together: a part goes on from a kept end at its own offset."""
    chains: list[Parts] = []
    open_ends: dict[str, Parts] = {}
    for probe, answer in _probes(entries):
        if not probe.num_steps:
            continue
        chain = open_ends.pop(probe.start or "", None) if probe.offset else None
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append((probe, answer))
        if answer.end is not None:
            open_ends[answer.end] = chain
    return chains


def _read(
    pending: Sequence[tuple[Kind, list[Entry]]], found: Sequence[Search], step: int, train: Train | None
) -> Iterator[Search]:
    """The searches out of all that was asked for between two pieces of real training."""
    looks = [a.loss for kind, entries in pending if kind == "look" for _, a in _probes(entries) if a.evaluations]
    base = looks[-1] if looks else None  # all of them see the same weights
    before = sum(search.kind != "look" for search in found)
    for index, (kind, entries) in enumerate(pending):
        number = before + sum(earlier != "look" for earlier, _ in pending[:index])
        search = Search(number, kind, entries[0].request.stage, step, tuple(entries), (), train, base)
        if kind == "look":
            yield search
        elif kind == "factors":
            yield _read_factors(search)
        elif kind == "range test":
            yield replace(search, candidates=tuple(map(_climb, _chains(entries))))
        elif kind == "beam":
            yield _with_errors(replace(search, candidates=tuple(_children(entries))))
        else:
            yield _with_errors(_with_forecasts(replace(search, candidates=tuple(map(_candidate, _chains(entries))))))


def _candidate(parts: Parts) -> Candidate:
    """The parts of one probe as one candidate, scored by its last evaluation, or else by its mean training loss."""
    (first, _), (_, last) = parts[0], parts[-1]
    losses = tuple(loss for _, answer in parts for loss in answer.losses)
    mean = float(np.mean(losses)) if losses and last.status is Status.OK else math.inf
    score = last.loss if last.evaluations or last.status is Status.DIVERGED else mean
    return Candidate(
        lr=first.lr,
        score=score if math.isfinite(score) else math.inf,
        steps=len(losses),
        status=last.status,
        losses=losses,
        evaluations=tuple(
            replace(e, step=e.step + probe.offset - first.offset) for probe, answer in parts for e in answer.evaluations
        ),
        start=first.start,
        end=last.end,
        label=first.label,
    )


def _climb(parts: Parts) -> Candidate:
    """A climb of a range test, by the learning rate that it reached."""
    probe, answer = parts[-1]
    candidate = _candidate(parts)
    reached = probe.lr * probe.shape(max(len(answer.losses) - 1, 0))
    return replace(candidate, lr=reached, score=min(candidate.losses, default=math.inf))


def _children(entries: Sequence[Entry]) -> Iterator[Candidate]:
    """Children of one round; a survivor that was trained twice is one child, with the second one's end."""
    children: dict[tuple[str | None, float], Candidate] = {}
    for part in _probes(entries):
        child = _candidate([part])
        was = children.get((child.start, child.lr))
        if was is not None:
            child = replace(was, end=child.end, steps=was.steps + child.steps)
        children[child.start, child.lr] = child
    yield from children.values()


def _read_factors(search: Search) -> Search:
    """Line probes between two pieces of training: the last one decided, the others had their learning rate moved before."""
    request, answer = search.entries[-1].request, search.entries[-1].answer
    assert isinstance(request, LineProbe)
    assert isinstance(answer, LineResult)
    candidates = tuple(
        Candidate(request.lr * factor, loss if math.isfinite(loss) else math.inf, label=f"factor {factor:g}")
        for factor, loss in zip(request.factors, answer.losses, strict=True)
    )
    return replace(search, candidates=candidates, base=answer.base)


def _with_errors(search: Search) -> Search:
    """Standard errors of the differences to the best candidate, on the same evaluation batches."""
    best = search.best
    if best is None or not best.evaluations or search.horizon is not None:
        return search
    reference = np.asarray(best.evaluations[-1].losses)

    def error(candidate: Candidate) -> float | None:
        if candidate is best or not candidate.evaluations or not math.isfinite(candidate.score):
            return None
        losses = np.asarray(candidate.evaluations[-1].losses)
        if len(losses) != len(reference) or len(losses) < 2:
            return None
        return float((losses - reference).std(ddof=1) / math.sqrt(len(losses)))

    return replace(search, candidates=tuple(replace(c, stderr=error(c)) for c in search.candidates))


def _with_forecasts(search: Search) -> Search:
    """Scores of the published method: losses forecast to the end of the stage, with the fit that the run used."""
    said = "" if search.train is None else search.train.reason
    found = re.search(r"forecast.* after (\d+) steps", said)
    probes = [probe for probe, _ in _probes(search.entries)]
    if found is None or not all(p.evaluate == "none" or p.evaluate_every for p in probes):
        return search
    horizon = int(found[1])
    signal = "train" if probes[0].evaluate == "none" else probes[0].evaluate
    stage = Stage(search.stage, horizon, horizon, len(probes), probes[0].num_steps, signal)
    searched: Search = search
    for estimator in ("bounded", "reference"):  # which one it was does not stand in the trace, but its result does
        method = PublishedAutoLRS(min_lr=1e-12, max_lr=1e12, estimator=estimator)
        forecasts = [method.forecast(stage, answer) for _, answer in _probes(search.entries)]
        scored = zip(search.candidates, forecasts, strict=True)
        candidates = tuple(replace(c, score=f.value, forecast=f) for c, f in scored)
        searched = replace(search, candidates=candidates, horizon=horizon)
        if searched.best is not None and f"{searched.best.score:.4g}" in said:
            break
    return searched


def _read_range_tests(path: Path) -> tuple[tuple[str, RangeSuggestion], ...]:
    def plain(value: dict[str, Any], *without: str) -> dict[str, Any]:
        return {name: decode(v) for name, v in value.items() if name not in ("type", *without)}

    tests = []
    for test in json.loads(path.read_text(encoding="utf-8")):
        found = test["suggestion"]
        curves = tuple(RangeCurve(**plain(curve)) for curve in found["curves"])
        tests.append((f"{test['unit']} {test['at']}", RangeSuggestion(**plain(found, "curves"), curves=curves)))
    return tuple(tests)


# -- tables -------------------------------------------------------------------------------------------------------------

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
        "chosen": _is_chosen(search, candidate),
        "seconds": search.seconds / len(search.candidates),
        "label": candidate.label,
    }


def _piece_row(piece: Piece) -> dict[str, Any]:
    segment = piece.segment
    tail = piece.losses[-max(1, len(piece.losses) // 10) :]
    row: dict[str, Any] = {
        "what": "train",
        "step": piece.start,
        "lr": segment(0),
        "lr_end": segment(max(segment.num_steps - 1, 0)),
        "num_steps": segment.num_steps,
        "score": float(np.mean(tail)) if tail else "",
        "status": piece.status.value,
        "undone": segment.undone,
    }
    if piece.train is not None:
        row |= {"stage": piece.train.stage, "label": piece.train.label, "reason": piece.train.reason}
    return row


def _tried(search: Search) -> list[tuple[Search, Candidate, bool]]:
    """Candidates with whether each was chosen, by learning rate; what was chosen without having been tried is among them."""
    rows = [(search, candidate, _is_chosen(search, candidate)) for candidate in search.candidates]
    if rows and search.train is not None and not any(chosen for _, _, chosen in rows):
        rows.append((search, Candidate(search.train.lr, math.inf), True))
    return sorted(rows, key=lambda row: row[1].lr)


def _is_chosen(search: Search, candidate: Candidate) -> bool:
    same_start = search.kind != "beam" or search.train is None or candidate.start == search.train.start
    return search.train is not None and same_start and math.isclose(candidate.lr, search.train.lr, rel_tol=1e-9)


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
    last, first = before.segment(max(before.segment.num_steps - 1, 0)), piece.segment(0)
    return (
        before.segment.undone == piece.segment.undone
        and piece.segment.back_to is None
        and before.status is piece.status is Status.OK
        and max(last, first) <= _JUMP * min(last, first)
    )


def _course(segments: Sequence[Segment]) -> str:
    """Learning rates at both ends, and between them the highest if it is higher than either."""
    first, last = segments[0](0), segments[-1](max(segments[-1].num_steps - 1, 0))
    peak = max(segment(step) for segment in segments for step in (0, max(segment.num_steps - 1, 0)))
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
