"""From the trace of a run to its searches and its pieces of real training.

The trace has requests and answers in a row. Those between two pieces of real training are put together by what was asked
for, parts of one probe become one candidate, and scores are formed as the search formed them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from lightning_autolr.core.losses import paired
from lightning_autolr.core.range_rules import RangeCurve, RangeSuggestion, suggest
from lightning_autolr.core.record import Entry
from lightning_autolr.core.requests import LineProbe, LineResult, Probe, ProbeResult, Request, Status, Train
from lightning_autolr.report.inspect.searches import Candidate, Kind, Piece, Search
from lightning_autolr.schedules import Segment
from lightning_autolr.search.published import forecast_of
from lightning_autolr.search.range_test import RangeTest

__all__ = ["pieces_of", "range_suggestion", "searches_of"]

Parts = list[tuple[Probe, ProbeResult]]


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
    trained, before = 0, None
    for entry in trace:
        if pending and isinstance(entry.request, Probe) and entry.request.permuted:
            pending[-1][1].append(entry)  # a step of the search, which asks what the network has learnt: no candidate
            continue
        if not isinstance(entry.request, Train):
            kind = _kind(entry.request)
            if not pending or pending[-1][0] != kind or not _is_comparable(entry.request, before):
                pending.append((kind, []))
            pending[-1][1].append(entry)
            before = entry.request
            continue
        found += _read(pending, found, step, entry.request)
        pending = []
        made = len(entry.answer.losses)
        step += segments[trained].num_steps if trained < len(segments) else made
        trained += 1
    return [*found, *_read(pending, found, step, upcoming)]


def range_suggestion(search: Search) -> RangeSuggestion:
    """What the climbs of a range test say, by the rule that the run used (an older trace has none: the default one)."""
    rule = next((probe.rule for probe, _ in _probes(search.entries) if probe.rule is not None), RangeTest.rule)
    curves = []
    for climb in _chains(search.entries):
        lrs = [probe.lr * probe.shape(i) for probe, answer in climb for i in answer.loss_steps]
        losses = [loss for _, answer in climb for loss in answer.losses]
        if climb[-1][1].status is Status.DIVERGED:
            losses.append(math.inf)
        curves.append(RangeCurve.measured(lrs, losses))
    return suggest(curves, rule)


def _kind(request: Probe | LineProbe) -> Kind:
    if isinstance(request, LineProbe):
        return "factors"
    if request.kind in ("range test", "beam"):
        return request.kind
    return "look" if request.kind == "look" or not request.num_steps else "candidates"


def _is_comparable(request: Request, before: Request | None) -> bool:
    """Whether their scores can be told against each other: candidates of one kind and length, or parts of them."""
    if not isinstance(request, Probe) or not isinstance(before, Probe) or _kind(request) != "candidates":
        return True
    if request.kind != before.kind:
        return False
    return request.offset > 0 or before.offset > 0 or request.num_steps == before.num_steps


def _probes(entries: Iterable[Entry]) -> Parts:
    return [
        (e.request, e.answer) for e in entries if isinstance(e.request, Probe) and isinstance(e.answer, ProbeResult)
    ]


def _chains(entries: Iterable[Entry]) -> list[Parts]:
    """Probes that made steps, those made in parts put together: a part goes on from a kept end at its own offset."""
    chains: list[Parts] = []
    open_ends: dict[str, Parts] = {}
    for probe, answer in _probes(entries):
        if not probe.num_steps or probe.permuted:
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
        decides = kind != "candidates" or all(later != "candidates" for later, _ in pending[index + 1 :])
        came_of_it = train if decides else None
        search = Search(number, kind, entries[0].request.stage, step, tuple(entries), (), came_of_it, base)
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
        steps=sum(answer.num_steps for _, answer in parts),
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
    losses = dict(zip(request.factors, answer.losses, strict=True))
    candidates = tuple(
        Candidate(request.lr * factor, loss if math.isfinite(loss) else math.inf, label=f"factor {factor:g}")
        for factor, loss in losses.items()
        if factor > 0
    )
    same = answer.base if request.evaluate_on == "same" and request.horizon == 1 else None  # else it is another batch's
    return replace(search, candidates=candidates, base=losses.get(0.0, same))


def _with_errors(search: Search) -> Search:
    """Standard errors of the differences to the best candidate, on the same evaluation batches."""
    best = search.best
    if best is None or not best.evaluations or search.horizon is not None:
        return search

    def error(candidate: Candidate) -> float | None:
        if candidate is best or not candidate.evaluations or not math.isfinite(candidate.score):
            return None
        if min(len(c.evaluations[-1].losses) for c in (best, candidate)) < 2:
            return None  # zero is what a search makes of it; a reader would take that for a measurement
        return paired(best.result, candidate.result)[1]

    return replace(search, candidates=tuple(replace(c, stderr=error(c)) for c in search.candidates))


def _with_forecasts(search: Search) -> Search:
    """Scores of the published method: losses forecast to the end of the stage, with the fit that the run used."""
    chains = _chains(search.entries)
    horizons = {probe.forecast_horizon for chain in chains for probe, _ in chain}
    if None in horizons or len(horizons) != 1 or any(len(chain) > 1 for chain in chains):
        return search
    forecasts = [forecast_of(*chain[0]) for chain in chains]
    scored = zip(search.candidates, forecasts, strict=True)
    candidates = tuple(replace(c, score=f.value, forecast=f) for c, f in scored)
    return replace(search, candidates=candidates, horizon=horizons.pop())
