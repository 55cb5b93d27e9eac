"""Beam search over the learning rate: the adaptive learning-rate tree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning_autolr.core.requests import Probe, ProbeResult, Request, Requests, Run, Status, Train, TrainResult
from lightning_autolr.search.base import AbstractSearch

__all__ = ["BeamSearch"]

_RETRIES = 10  # rounds in a row without a finite child, before training goes on at the smallest rate tried


@dataclass(frozen=True)
class BeamSearch(AbstractSearch):
    r"""Train each of M states at N learning rates, keep the M best children, go on from the best.

    One round:

    1. Each state m has a learning rate :math:`\eta_m`. Its children are trained privately for ``interval`` steps at
       :math:`\eta_m r_1 \ldots \eta_m r_N`, all on the same batches.
    2. The M children with the lowest loss are the next round's states. Ties go to the earlier state, then to the
       earlier factor. Children of one state with equal learning rates are one child.
    3. The real run goes to the best child's parent and makes that child's steps for real: on its own batches, with its
       loggers and counters. It then stands for the best child, whose private end is not kept.

    So the Trainer counts real steps only, and its model has made as many. Where the best child's parent is a kept state
    and not the run's own, the run jumps to it: what that state went through before was private, on other batches. With
    M = 1 this never happens.

    **Cost** of a round, in intervals: M N for the children, M - 1 to train the other survivors once more, since their
    ends were not kept the first time, and 1 real one. **Memory**: at most M kept states, beside the engine's copy of
    the real run while it probes. With ``keep_ends`` nothing is trained twice, and at most 2 M states are kept. A state
    is given up in the first request after which nothing can need it. M = 1 keeps the real run's undo, no more.

    If no child of a round is finite, the round is repeated with all learning rates times the smallest factor. If the
    real run diverges where its child did not, the next best state takes over, or with M = 1 the segment is undone.

    Differs from the paper (Takase, Oyama and Kurihara, "Effective neural network training with adaptive learning rate
    based on training loss", Neural Networks 101, 2018): there the best child *is* the model, and M N states are alive
    at once. Here its steps are made again for real: private ones leave no trace in logs, counters and data order.

    Args:
        beam_size: M >= 1.
        factors: r_1 ... r_N, distinct and > 0, one of them below 1.
        interval: optimizer steps in a round; None is one epoch, as published.
        objective: "train", the mean training loss of the interval, as published; or the loss at its end on the
            validation batches or on held-out training batches.
        start_lrs: learning rates of the first round, at most M; None is the optimizer's own.
        min_lr: smallest learning rate, > 0; children beyond the bounds are moved to them.
        max_lr: largest learning rate.
        keep_ends: keep the ends of children while they are among the M best, instead of training survivors again.
        seed: number of the first round's draw of batches.

    Raises:
        ValueError: options out of range; from :meth:`requests`, an epoch of unknown length, or no validation batches.

    >>> requests = BeamSearch(beam_size=1, factors=(2, 0.5), interval=10).requests(Run(total_steps=100, lr=0.1))
    >>> probe = next(requests)
    >>> probe.lr, probe.num_steps
    (0.2, 10)
    >>> probe = requests.send(ProbeResult(losses=(1.0,) * 10))
    >>> train = requests.send(ProbeResult(losses=(0.9,) * 10))
    >>> train.lr, train.num_steps
    (0.05, 10)
    """

    beam_size: int = 2
    factors: tuple[float, ...] = (2.0, 1.0, 0.5)
    interval: int | None = None
    objective: Literal["train", "validation", "holdout"] = "train"
    start_lrs: tuple[float, ...] | None = None
    min_lr: float = 1e-7
    max_lr: float = 10.0
    keep_ends: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.beam_size < 1 or self.seed < 0:
            raise ValueError(
                f"Expected beam_size >= 1 and seed >= 0, got beam_size={self.beam_size!r} and seed={self.seed!r}."
            )
        if len(set(self.factors)) < len(self.factors) or not 0 < min(self.factors, default=0) < 1:
            raise ValueError(f"Expected distinct factors > 0, one of them below 1, got factors={self.factors!r}.")
        if not 0 < self.min_lr < self.max_lr < math.inf:
            raise ValueError(f"Expected 0 < min_lr < max_lr, got min_lr={self.min_lr!r} and max_lr={self.max_lr!r}.")
        if self.start_lrs is not None and not (
            0 < len(self.start_lrs) <= self.beam_size and all(self._within(lr) == lr for lr in self.start_lrs)
        ):
            raise ValueError(
                f"Expected 1 to {self.beam_size} start_lrs within the bounds, got start_lrs={self.start_lrs!r}."
            )
        if self.objective not in ("train", "validation", "holdout"):
            raise ValueError(
                f"Expected objective 'train', 'validation' or 'holdout', got objective={self.objective!r}."
            )
        if self.interval is not None and self.interval < self._shortest:
            raise ValueError(
                f"Expected interval >= {self._shortest} for objective={self.objective!r}, got interval={self.interval!r}."
            )

    @property
    def _shortest(self) -> int:
        """Steps of a round: the first training loss is the same for all children, as their steps come after it."""
        return 2 if self.objective == "train" else 1

    def requests(self, run: Run) -> Requests:
        """Probe M x N children, train survivors again, train for real; until the run ends."""
        interval = run.steps_per_epoch if self.interval is None else self.interval
        if interval is None:
            raise ValueError("Expected an epoch of known length, got none. Give interval=<number of steps>.")
        if interval < self._shortest:
            raise ValueError(
                f"Expected an epoch of {self._shortest} steps or more for objective={self.objective!r}, got {interval}. Give "
                "interval=<number of steps>."
            )
        if self.objective == "validation" and not run.has_validation:
            raise ValueError(
                "Expected validation batches for objective='validation', got none. Use 'train' or 'holdout'."
            )
        beam = [_State(None, self._within(lr)) for lr in self.start_lrs or (run.lr,)]
        left = math.inf if run.total_steps is None else run.total_steps
        kept, failures = _Kept(), 0
        for number in itertools.count():
            if left < 1:
                return
            steps = int(min(interval, left))
            width = self.beam_size if left > steps else 1  # nothing comes after the last round
            candidates = self._candidates(beam)
            cost = len(candidates) + (1 if self.keep_ends else width)
            if steps < self._shortest or (run.count_search and left < steps * cost):
                # too few steps to tell children apart, or the search would leave none to train with
                yield Train(lr=beam[0].lr, num_steps=None, start=beam[0].start, release=kept.give_up(()), stage=number)
                return
            this = _Round(self, kept, number, steps, len(candidates))
            best = yield from self._best(candidates, width, this)
            if run.count_search:
                left -= this.steps_made
            if not best and failures < _RETRIES:
                failures += 1
                beam = [replace(state, lr=self._within(state.lr * min(self.factors))) for state in beam]
                continue
            failures = 0
            winner = best[0] if best else _Child(beam[0], min(child.lr for child in candidates))
            survivors = [_State(child.end, child.lr) for child in best[1:]]
            answer: TrainResult = yield Train(
                lr=winner.lr,
                num_steps=steps,
                start=winner.parent.start,
                # undoing the segment: a kept parent is there already
                keep_start=winner.parent.start is None,
                release=kept.give_up({winner.parent.start, *(state.start for state in survivors)}),
                stage=number,
                label=f"beam search, round {number + 1}",
                reason=f"lowest {self.objective} loss {winner.score:.4g} of {len(candidates)} children",
            )
            kept.add(answer.start)
            left -= max(answer.num_steps, 1)
            if answer.status is Status.OK:
                beam = [_State(None, winner.lr), *survivors]
            else:
                undo = winner.parent.start or answer.start
                beam = survivors or [_State(undo, self._within(winner.lr * min(self.factors)))]

    def _best(self, candidates: Sequence[_Child], width: int, this: _Round) -> Generator[Request, Any, list[_Child]]:
        """The ``width`` best finite children, best first, all but the first with their end state."""
        best: list[_Child] = []
        keep_ends = self.keep_ends and width > 1
        for i, child in enumerate(candidates):
            # the winner's parent is where the real run goes, the others' is where they are trained again
            parents = [c.parent.start for c in (best[:1] if keep_ends else best)]
            pending = [
                c.parent.start for c in (candidates[i:] if best else candidates)
            ]  # none is finite: all try again
            scored = yield from this.probe(
                child, keep_ends, {*parents, *pending, *(c.end for c in best)}, f"child {i + 1}"
            )
            if math.isfinite(scored.score):
                best = sorted([*best, scored], key=lambda c: c.score)[:width]
        for i, child in enumerate(best[1:], start=1):
            if child.end is None:
                needed = {best[0].parent.start, *(c.parent.start for c in best[i + 1 :]), *(c.end for c in best)}
                again = yield from this.probe(child, True, needed, f"survivor {i}")
                best[i] = replace(child, end=again.end)
        return [best[0], *(c for c in best[1:] if c.end is not None)] if best else []

    def _candidates(self, beam: Sequence[_State]) -> list[_Child]:
        children: list[_Child] = []
        for state, factor in itertools.product(beam, self.factors):
            lr = self._within(state.lr * factor)
            if not any(c.parent.start == state.start and math.isclose(c.lr, lr, rel_tol=1e-9) for c in children):
                children.append(_Child(state, lr))
        return children

    def _within(self, lr: float) -> float:
        return min(max(lr, self.min_lr), self.max_lr)


@dataclass(frozen=True)
class _State:
    """One of the M states; ``start`` is None for the real run's."""

    start: str | None
    lr: float


@dataclass(frozen=True)
class _Child:
    parent: _State
    lr: float
    score: float = math.inf
    end: str | None = None


@dataclass
class _Kept:
    """The ids that the driver keeps for us."""

    names: list[str] = field(default_factory=list)

    def add(self, name: str | None) -> None:
        if name is not None:
            self.names.append(name)

    def give_up(self, needed: Collection[str | None]) -> tuple[str, ...]:
        released = tuple(name for name in self.names if name not in needed)
        self.names = [name for name in self.names if name in needed]
        return released


@dataclass
class _Round:
    search: BeamSearch
    kept: _Kept
    number: int
    steps: int
    num_children: int
    steps_made: int = 0

    def probe(
        self, child: _Child, keep_end: bool, needed: Collection[str | None], what: str
    ) -> Generator[Request, Any, _Child]:
        """Train one child privately and score it; ``needed`` are the states that must still be there afterwards."""
        objective = self.search.objective
        answer: ProbeResult = yield Probe(
            lr=child.lr,
            num_steps=self.steps,
            draw=self.search.seed + self.number,
            start=child.parent.start,
            keep_end=keep_end,
            evaluate="none" if objective == "train" else objective,
            stage=self.number,
            label=f"beam search, round {self.number + 1}, {what} of {self.num_children}, lr {child.lr:.2g}",
            kind="beam",
            release=self.kept.give_up(needed),
        )
        self.kept.add(answer.end)
        self.steps_made += answer.num_steps
        return replace(child, score=_mean(answer) if objective == "train" else answer.loss, end=answer.end)


def _mean(answer: ProbeResult) -> float:
    if answer.status is not Status.OK or not answer.losses:
        return math.inf
    mean = math.fsum(answer.losses) / len(answer.losses)
    return mean if math.isfinite(mean) else math.inf
