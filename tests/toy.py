"""The smallest driver: runs any search on a problem of the zoo, and checks that the search keeps the rules.

What a Trainer does with a network, this does with plain gradient descent on a vector, in the same words: real steps
happen in ``Train``, private ones in ``Probe`` and ``LineProbe``, and nothing private is left behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_autolr.core.range_rules import RangeSuggestion
from lightning_autolr.core.requests import (
    Answer,
    Evaluation,
    LineProbe,
    LineResult,
    Probe,
    ProbeResult,
    Request,
    Requests,
    Run,
    Status,
    Train,
    TrainResult,
    diverged,
)
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.range_test import RangeTest
from tests.zoo import Problem, Vector

REAL, DRAW, VALIDATION, HOLDOUT = range(4)  # where a batch comes from


@dataclass(frozen=True)
class State:
    """Weights, and the learning rate of every step that made them, real or private."""

    w: Vector
    path: tuple[float, ...] = ()


@dataclass(frozen=True)
class ToyRun:
    """What came of a run.

    Args:
        trace: every request and its answer, in order. The end of the run may have cut the last ``Train`` short.
        train_lrs: the learning rate of every real step, undone ones included.
        losses: the training loss before every real step.
        search_steps: private optimizer steps.
        state: the final weights.
        path: the learning rate of every step that made the final weights.
        kept: ids of the states that were never released.
        most_kept: how many states were held at once, at most.
        finished: the search returned; otherwise the run ended while it still had a request.
    """

    trace: list[tuple[Request, Answer]]
    train_lrs: list[float]
    losses: list[float]
    search_steps: int
    state: Vector
    path: tuple[float, ...]
    kept: tuple[str, ...]
    most_kept: int
    finished: bool


def run_toy(
    search: AbstractSearch,
    problem: Problem,
    total_steps: int | None = None,
    seed: int = 0,
    **facts: Any,
) -> ToyRun:
    """Run ``search`` until it returns or ``total_steps`` real steps are made (undone ones count, as in a Trainer).

    The same problem, seed and requests give the same answers. ``facts`` are the other fields of :class:`Run`; with
    ``count_search=True`` private steps count towards ``total_steps`` as well.
    """
    run = Run(total_steps=total_steps, **{"lr": 0.1, **facts})
    toy = _Toy(problem, run, seed)
    requests, trace = search.requests(run), []
    request = next(requests, None)
    with np.errstate(over="ignore", invalid="ignore"):
        while request is not None:
            answer = toy.answer(request)
            trace.append((request, answer))
            try:
                request = requests.send(answer)
            except StopIteration:
                request = None
            if toy.steps_left() <= 0:  # the run is over, whatever else the search would like
                requests.close()
                break
    return ToyRun(
        trace=trace,
        train_lrs=toy.train_lrs,
        losses=toy.losses,
        search_steps=toy.search_steps,
        state=toy.state.w,
        path=toy.state.path,
        kept=tuple(toy.kept),
        most_kept=toy.most_kept,
        finished=request is None,
    )


@dataclass
class Ranged(AbstractSearch):
    """A range test as a search of its own, and with ``apply`` training at what it suggests."""

    test: RangeTest
    apply: bool = False
    suggestion: RangeSuggestion | None = None

    def requests(self, run: Run) -> Requests:
        self.suggestion = yield from self.test.measure()
        if self.apply and self.suggestion.lr is not None:
            yield Train(self.suggestion.lr, None, reason=self.suggestion.reason)


@dataclass
class _Toy:
    problem: Problem
    run: Run
    seed: int
    train_lrs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    search_steps: int = 0
    kept: dict[str, State] = field(default_factory=dict)
    most_kept: int = 0
    num_kept: int = 0

    def __post_init__(self) -> None:
        self.state = State(np.asarray(self.problem.start, dtype=np.float64))

    def steps_left(self) -> float:
        total = math.inf if self.run.total_steps is None else self.run.total_steps
        return total - len(self.train_lrs) - self.search_steps * self.run.count_search

    def answer(self, request: Request) -> Answer:
        match request:
            case Probe():
                return self.probe(request)
            case LineProbe():
                return self.line_probe(request)
            case Train():
                return self.train(request)

    def train(self, request: Train) -> TrainResult:
        if request.start is not None:
            self.state = self.find(request.start)
        self.release(request.release)
        start = self.keep(self.state) if request.keep_start else None
        num_steps = min(request.num_steps or math.inf, self.steps_left())
        assert math.isfinite(num_steps), "Train(num_steps=None) needs a run that ends."
        # nobody looks at the others
        guarded = request.diverges is None and (request.keep_start or request.stop_above is not None)
        losses: list[float] = []
        status = Status.OK
        for step in range(int(num_steps)):
            batch = self.shift(REAL, len(self.train_lrs))
            rate, loss = request.lr * factor(request, step), self.problem.loss(self.state.w - batch)
            self.state = self.step(self.state, rate, batch)
            losses.append(loss)
            self.train_lrs.append(rate)
            if guarded and diverged(loss, request.stop_above):
                status = Status.DIVERGED
                break
        if request.diverges and len(losses) == request.num_steps:
            status = Status.DIVERGED
        self.losses += losses
        return TrainResult(losses=tuple(losses), status=status, start=start)

    def probe(self, request: Probe) -> ProbeResult:
        state = self.state if request.start is None else self.find(request.start)
        losses: list[float] = []
        evaluations: list[Evaluation] = []
        status = Status.OK
        for step in range(request.num_steps):
            if step and request.evaluate_every and step % request.evaluate_every == 0:
                evaluations += self.evaluate(request, state, step)
            batch = self.shift(DRAW, request.draw, request.offset + step)
            losses.append(self.problem.loss(state.w - batch))
            state = self.step(state, request.lr * factor(request, step), batch)
            self.search_steps += 1
            if diverged(losses[-1], request.stop_above):
                status = Status.DIVERGED
                break
        else:
            if request.evaluate == "train":
                evaluations.append(Evaluation.of_training(losses))
            else:
                evaluations += self.evaluate(request, state, request.num_steps)
        self.release(request.release)
        end = self.keep(state) if request.keep_end else None
        return ProbeResult(losses=tuple(losses), evaluations=tuple(evaluations), status=status, end=end)

    def line_probe(self, request: LineProbe) -> LineResult:
        batches = [self.shift(DRAW, request.draw, step) for step in range(request.horizon + 1)]
        start = self.state if request.start is None else self.find(request.start)

        def moved(lr: float) -> Vector:
            state = start
            for batch in batches[:-1]:
                state = self.step(state, lr, batch)
            self.search_steps += request.horizon
            return state.w

        def loss(w: Vector) -> float:
            if request.evaluate_on == "validation":
                return float(np.mean(self.evaluation_losses(w, VALIDATION)))
            return self.problem.loss(w - batches[-1 if request.evaluate_on == "next" else -2])

        here = start.w
        if request.exact:
            points = [moved(request.lr * f) for f in request.factors]
        else:
            direction = moved(request.lr) - here
            points = [here + f * direction for f in request.factors]
        return LineResult(base=self.problem.loss(here - batches[0]), losses=tuple(loss(w) for w in points))

    def evaluate(self, request: Probe, state: State, step: int) -> list[Evaluation]:
        if request.evaluate == "none":
            return []
        assert self.run.has_validation or request.evaluate != "validation", "there are no validation batches."
        source = (VALIDATION,) if request.evaluate == "validation" else (HOLDOUT, request.draw)
        return [Evaluation(step=step, losses=self.evaluation_losses(state.w, *source))]

    def evaluation_losses(self, w: Vector, *source: int) -> tuple[float, ...]:
        """Four batches, centred so that the best weights are where the problem has them."""
        shifts = np.stack([self.shift(*source, i) for i in range(4)])
        return tuple(self.problem.loss(w - s) for s in shifts - shifts.mean(axis=0))

    def step(self, state: State, lr: float, batch: Vector) -> State:
        return State(state.w - lr * self.problem.gradient(state.w - batch), (*state.path, lr))

    def shift(self, *source: int) -> Vector:
        """The batch of this source: the same numbers for the same source, whatever happened before."""
        if self.problem.noise == 0:
            return np.zeros(len(self.problem.start))
        generator = np.random.default_rng((self.seed, *source))
        return self.problem.noise * generator.standard_normal(len(self.problem.start))

    def find(self, name: str) -> State:
        assert name in self.kept, f"Expected one of the kept states {sorted(self.kept)}, got {name!r}."
        return self.kept[name]

    def keep(self, state: State) -> str:
        self.num_kept += 1
        name = f"s{self.num_kept}"
        self.kept[name] = state
        self.most_kept = max(self.most_kept, len(self.kept))
        return name

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            self.find(name)
            del self.kept[name]


def factor(request: Probe | Train, step: int) -> float:
    value = request.shape(step)
    assert 0 <= value < math.inf, f"Expected a finite shape >= 0 at step {step}, got {value}."
    return value
