"""What a run consists of: searches with their candidates, and pieces of real training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightning_autolr.core.forecast import Forecast
from lightning_autolr.core.record import Entry
from lightning_autolr.core.requests import Evaluation, Probe, ProbeResult, Status, Train, private_steps
from lightning_autolr.schedules import Segment

__all__ = ["Candidate", "Kind", "Piece", "Search", "late_loss", "steps_of"]

_MOST_LOOKED_AT = 200  # steps of a piece

Kind = Literal["candidates", "beam", "factors", "range test", "look"]


@dataclass(frozen=True)
class Candidate:
    """One learning rate that was tried.

    Args:
        lr: learning rate (of a range test: the largest one that was reached).
        score: what it was judged by, lower is better: the loss of its evaluation, its forecast, its mean training loss, or
            the loss at its point of a line probe; inf when it diverged.
        stderr: standard error of the difference to the best candidate, over pairs of evaluation batches (or of
            its own, where their numbers differ); None for the best one itself, and where there are fewer than two.
        steps: private steps it took.
        status: how it ended.
        losses: training loss before each of its steps.
        evaluations: losses on the evaluation batches, after some of its steps, or those of the second half of its own.
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

    @property
    def result(self) -> ProbeResult:
        """What the search was told of it, its parts put together."""
        return ProbeResult(self.losses, self.evaluations, self.status, self.end)


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
        return sum(steps_of(entry) for entry in self.entries)

    @property
    def is_coarse(self) -> bool:
        """Whether its candidates are to find the order of magnitude only, for others to find the learning rate."""
        return self.train is None and any(
            isinstance(entry.request, Probe) and entry.request.kind == "coarse" for entry in self.entries
        )

    @property
    def score_name(self) -> str:
        """What the evaluations are where they are not losses, see :class:`~lightning_autolr.core.requests.Evaluation`."""
        return next((evaluation.name for evaluation in self._evaluations()), "")

    @property
    def evaluated_by(self) -> str:
        """What the evaluations are, for figures; empty where there are none."""
        if not any(self._evaluations()):
            return ""
        own = any(isinstance(entry.request, Probe) and entry.request.evaluate == "train" for entry in self.entries)
        return "mean training loss, second half" if own else f"{self.score_name or 'loss'} on the evaluation batches"

    def _evaluations(self) -> Iterator[Evaluation]:
        answers = (entry.answer for entry in self.entries if isinstance(entry.answer, ProbeResult))
        return (evaluation for answer in answers for evaluation in answer.evaluations)

    @property
    def seconds(self) -> float:
        return math.fsum(entry.seconds for entry in self.entries)

    @property
    def best(self) -> Candidate | None:
        """The candidate of the lowest score (ties: of the lowest losses); None when there is none that did not diverge."""
        best = min(self.candidates, key=lambda c: (c.score, c.forecast.tail if c.forecast else 0.0), default=None)
        return best if best is not None and math.isfinite(best.score) else None

    def chose(self, candidate: Candidate) -> bool:
        """Whether the real training went on with this candidate's learning rate, and from where it had started."""
        same_start = self.kind != "beam" or self.train is None or candidate.start == self.train.start
        return self.train is not None and same_start and math.isclose(candidate.lr, self.train.lr, rel_tol=1e-9)


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

    @property
    def ends(self) -> tuple[float, float]:
        """Learning rates of the first and of the last step."""
        return self.segment(0), self.segment(max(self.segment.num_steps - 1, 0))

    @property
    def peak(self) -> float:
        """The highest learning rate, of some of the steps where there are many."""
        last = max(self.segment.num_steps - 1, 0)
        return max(map(self.segment, range(0, last + 1, 1 + last // _MOST_LOOKED_AT)))


def late_loss(pieces: Sequence[Piece]) -> float | None:
    """Mean of the last losses of neighbouring pieces, as many as a tenth of the last piece; None when there are none.

    >>> late_loss([Piece(0, Segment(20, 0.1), losses=(5.0,) * 18 + (2.0, 1.0))])
    1.5
    """
    losses = [loss for piece in pieces for loss in piece.losses]
    return float(np.mean(losses[-max(1, len(pieces[-1].losses) // 10) :])) if losses else None


def steps_of(entry: Entry) -> int:
    """Private steps of a request; 0 for real training."""
    return private_steps(entry.request, entry.answer)
