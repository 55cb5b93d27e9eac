"""Traces of searches on the problems of the zoo, and one written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_autolr.core.record import Entry, Record
from lightning_autolr.core.requests import Answer, Evaluation, Probe, ProbeResult, Request, Status, Train, TrainResult
from lightning_autolr.schedules import Segment
from lightning_autolr.search.base import AbstractSearch
from tests.toy import run_toy
from tests.zoo import Problem


def entries_of(pairs: Sequence[tuple[Request, Answer]]) -> list[Entry]:
    """A second for each request; ``global_step`` counts the real steps."""
    made, entries = 0, []
    for request, answer in pairs:
        entries.append(Entry(request, answer, made, search_steps=0, seconds=1.0))
        made += len(answer.losses) if isinstance(answer, TrainResult) else 0
    return entries


def segments_of(pairs: Sequence[tuple[Request, Answer]]) -> list[Segment]:
    """The segments that a Trainer would have recorded, undone ones included."""
    record = Record(None)
    kept_at: dict[str, tuple[int, bool]] = {}
    for request, answer in pairs:
        here = len(record.segments)
        if isinstance(request, Probe) and isinstance(answer, ProbeResult):
            if answer.end is not None and request.num_steps == 0 and request.start is None:
                kept_at[answer.end] = here, False
        elif isinstance(request, Train) and isinstance(answer, TrainResult):
            back_to, as_left = None, False
            if request.start in kept_at:
                back_to, has_gone_back = kept_at[request.start]
                later = record.segments[back_to:]
                as_left = bool(later) and later[0].back_to is not None and not has_gone_back
                record.go_back(back_to, as_left)
            if answer.start is not None:
                kept_at[answer.start] = here, True
            record.add_segment(
                Segment(
                    len(answer.losses),
                    request.lr,
                    request.shape,
                    back_to=back_to if back_to != here else None,
                    diverged=answer.status is Status.DIVERGED,
                    as_left=as_left,
                )
            )
    return record.segments


def recorded(
    search: AbstractSearch, problem: Problem, total_steps: int | None = None, **facts: Any
) -> tuple[list[Entry], list[Segment]]:
    run = run_toy(search, problem, total_steps, **facts)
    return entries_of(run.trace), segments_of(run.trace)


def probe(lr: float, losses: Sequence[float], evaluation: Sequence[float], **options: Any) -> tuple[Probe, ProbeResult]:
    evaluations = (Evaluation(len(losses), tuple(evaluation)),) if evaluation else ()
    return Probe(lr, len(losses), **options), ProbeResult(tuple(losses), evaluations)


def diverged(lr: float, losses: Sequence[float]) -> tuple[Probe, ProbeResult]:
    return Probe(lr, len(losses)), ProbeResult(tuple(losses), (), Status.DIVERGED)


def named(pairs: Sequence[tuple[Request, Answer]], name: str) -> list[tuple[Request, Answer]]:
    """The same, with scores that are no losses."""

    def of(answer: Answer) -> Answer:
        if not isinstance(answer, ProbeResult):
            return answer
        return replace(answer, evaluations=tuple(replace(e, name=name) for e in answer.evaluations))

    return [(request, of(answer)) for request, answer in pairs]


LOOK = Probe(1.0, 0, label="ratchet", kind="look")


def by_hand() -> list[tuple[Request, Answer]]:
    """Four candidates, two stages of which the second is undone and the last one made at half the learning rate."""
    return [
        (LOOK, ProbeResult(evaluations=(Evaluation(0, (3.0, 3.0, 3.0)),))),
        probe(0.01, [3.0, 2.9], [2.0, 3.0, 4.0]),
        probe(0.1, [3.0, 2.0], [1.0, 1.0, 1.0]),
        probe(0.3, [3.0, 2.5], [1.5, 1.5, 1.5]),
        diverged(1.0, [3.0, 2e30]),
        (Train(0.1, 4, keep_start=True, reason="The best of 4."), TrainResult((3.0, 2.0, 1.5, 1.25), start="a")),
        (LOOK, ProbeResult(evaluations=(Evaluation(0, (1.0, 1.0, 1.0)),))),
        (Train(0.1, 4, keep_start=True, stage=1, reason="Good."), TrainResult((1.0, 2.0, 3.0, 4.0), start="b")),
        (LOOK, ProbeResult(evaluations=(Evaluation(0, (4.0, 4.0, 4.0)),))),
        (Train(0.05, 2, start="b", stage=1, reason="Worse, so undone."), TrainResult((1.0, 0.75))),
    ]
