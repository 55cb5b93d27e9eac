from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pytest

from lightning_autolr.core.range_rules import RangeSuggestion, Rule, ladder
from lightning_autolr.core.requests import (
    Probe,
    ProbeResult,
    Request,
    Requests,
    Run,
    Status,
    Train,
    TrainResult,
    decode,
)
from lightning_autolr.schedules import to_plain
from lightning_autolr.search.base import AbstractSearch, replay
from lightning_autolr.search.range_test import RangeTest
from tests.toy import Ranged, ToyRun, run_toy
from tests.zoo import Plateau, Problem, Quadratic, Vector, noisy_quadratic


def measured(test: RangeTest, problem: Problem, apply: bool = False) -> tuple[RangeSuggestion, ToyRun]:
    search = Ranged(test, apply)
    run = run_toy(search, problem, 300)
    assert search.suggestion is not None
    return search.suggestion, run


def measure(test: RangeTest, problem: Problem) -> RangeSuggestion:
    return measured(test, problem)[0]


def climbed(run: ToyRun, draw: int = 0) -> list[float]:
    probes = [request for request, _ in run.trace if isinstance(request, Probe) and request.draw == draw]
    return [probe.lr * probe.shape(step) for probe in probes for step in range(probe.num_steps)]


@pytest.mark.parametrize("mode", ["exponential", "linear"])
@pytest.mark.parametrize("chunk", [1, 7, 10, 1000])
def test_the_climb_is_the_ladder_however_it_is_cut(mode: Any, chunk: int) -> None:
    search = RangeTest(min_lr=1e-3, max_lr=1.0, num_steps=40, mode=mode, repeats=1, chunk=chunk)
    _, run = measured(search, Quadratic())
    assert climbed(run) == pytest.approx(ladder(1e-3, 1, 40, mode))
    probes = [request for request, _ in run.trace if isinstance(request, Probe)]
    assert [probe.offset for probe in probes] == list(range(0, 40, chunk))
    assert run.search_steps == 40


@pytest.mark.parametrize("curvature", [0.3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("num_steps", [40, 100, 300])
@pytest.mark.parametrize("mode", ["exponential", "linear"])
def test_the_divergence_edge_is_found_within_one_rung(curvature: float, num_steps: int, mode: Any) -> None:
    edge = 2 / curvature
    search = RangeTest(1e-3 * edge, 100 * edge, num_steps, mode, repeats=1)
    curve = measure(search, Quadratic(curvature=(curvature,))).curves[0]
    lrs = ladder(search.min_lr, search.max_lr, num_steps, mode)
    below = lrs[lrs <= edge * (1 + 1e-9)][-1]  # gradient descent makes the loss smaller up to 2 / h, and only there
    assert curve.diverged
    if len(lrs[lrs <= edge]) > 3:
        assert curve.edge == pytest.approx(below)
    else:  # a linear ladder that is too coarse there
        assert curve.edge is None or curve.edge <= lrs[np.searchsorted(lrs, edge)]


@dataclass(frozen=True)
class Negative(Quadratic):
    """Below zero at its best, as log-likelihoods are."""

    def loss(self, w: Vector) -> float:
        return super().loss(w) - 5


def test_the_sign_of_the_loss_does_not_matter() -> None:
    search = RangeTest(1e-3, 100, repeats=1)
    one, other = measure(search, Quadratic(noise=0.1)), measure(search, Negative(noise=0.1))
    assert min(other.curves[0].losses) < 0
    assert other.lr == pytest.approx(one.lr)
    assert other.curves[0].edge == one.curves[0].edge
    assert other.curves[0].lrs == one.curves[0].lrs


def test_it_stops_soon_after_the_loss_ran_away() -> None:
    search = RangeTest(1e-3, 1e6, num_steps=200, repeats=1, chunk=10)
    found, run = measured(search, Quadratic())
    assert found.curves[0].diverged
    assert run.search_steps < len(found.curves[0].lrs) + 20 < 120


def test_without_divergence_the_whole_ladder_is_climbed() -> None:
    search = RangeTest(1e-4, 1e-2, repeats=2)
    found, run = measured(search, Quadratic())
    assert run.search_steps == 200
    assert [curve.edge for curve in found.curves] == [None, None]
    assert "never rises up to" in found.reason
    assert found.bounds[1] == pytest.approx(ladder(1e-4, 1e-2, 100)[98])


def test_repeats_see_other_batches_and_give_an_interval() -> None:
    search = RangeTest(1e-3, 100, repeats=5, seed=3)
    found, run = measured(search, noisy_quadratic(noise=0.3))
    probes = [request for request, _ in run.trace if isinstance(request, Probe)]
    assert {(probe.kind, probe.rule) for probe in probes if probe.num_steps} == {("range test", "minimum")}
    assert sorted({probe.draw for probe in probes if probe.num_steps}) == [3, 4, 5, 6, 7]
    assert found.lr is not None
    assert found.lower is not None
    assert found.upper is not None
    assert found.lower < found.lr < found.upper < 10 * found.lower
    # 0.2 to 2: a tenth of, and up to, what the sharpest direction can bear
    assert 0.05 < found.lr < 0.5


@pytest.mark.parametrize("rule", get_args(Rule))
def test_the_suggestion_is_good_to_train_at(rule: Rule) -> None:
    problem = noisy_quadratic()
    _, run = measured(RangeTest(1e-5, 100, rule=rule), problem, apply=True)
    best = min(problem.expected_loss([lr] * 300) for lr in np.geomspace(1e-4, 2, 40))
    start = problem.expected_loss([])
    assert start - problem.expected_loss(run.train_lrs) > 0.9 * (start - best)


@pytest.mark.parametrize("problem", [Plateau(), Quadratic(start=(0.0,), noise=1.0)])
def test_a_curve_that_says_nothing_gives_no_suggestion(problem: Problem) -> None:
    found = measure(RangeTest(1e-5, 1e-2), problem)
    assert found.lr is None
    assert "never fell" in found.reason


def test_it_leaves_nothing_behind() -> None:
    _, run = measured(RangeTest(1e-3, 100), noisy_quadratic())
    assert run.finished
    assert not run.train_lrs
    assert not run.kept
    assert run.state.tolist() == [1.0] * 50


class Keeper:
    """A driver that keeps the ends of diverged probes as well, and keeps before it releases."""

    def __init__(self) -> None:
        self.alive: list[str] = []
        self.most = self.count = 0

    def drive(self, requests: Generator[Request, Any, Any], losses: Sequence[float]) -> Keeper:
        request: Request | None = next(requests)
        while request is not None:
            assert isinstance(request, Probe)
            assert request.start is None or request.start in self.alive
            name = f"s{self.count}" if request.keep_end else None
            self.count += 1
            self.alive += [name] if name else []
            self.most = max(self.most, len(self.alive))
            for old in request.release:
                self.alive.remove(old)
            seen = losses[request.offset : request.offset + request.num_steps]
            broken = next((i for i, loss in enumerate(seen) if not math.isfinite(loss)), None)
            status = Status.OK if broken is None else Status.DIVERGED
            seen = seen if broken is None else seen[: broken + 1]
            try:
                request = requests.send(ProbeResult(losses=tuple(seen), status=status, end=name))
            except StopIteration:
                request = None
        return self


@pytest.mark.parametrize("end", [math.inf, math.nan, 1e6, 1.0])
@pytest.mark.parametrize("length", [1, 10, 39, 40, 99])
def test_two_states_at_most_and_none_in_the_end(end: float, length: int) -> None:
    losses = [*np.linspace(2, 1, length), *[end] * (100 - length)]
    keeper = Keeper().drive(RangeTest().measure(), losses)
    assert keeper.most <= 2
    assert not keeper.alive


@pytest.mark.parametrize("skipped", [{4, 9}, {0, 1, 2, 3, 4}, {*range(0, 10, 2)}])
def test_skipped_batches_do_not_move_it(skipped: set[int]) -> None:
    """A skipped step gives no loss and changes nothing: rates go with the losses of their own steps."""
    found = []
    for skips in (set(), skipped):
        climb, lr, answer = RangeTest(repeats=1).measure(), 1e-9, None
        while True:
            try:
                probe = climb.send(answer)
            except StopIteration as end:
                found.append(end.value.lr)
                break
            losses = []
            for step in range(probe.num_steps):
                if step not in skips:  # the loss of the weights after the step before
                    losses.append(2 - math.exp(-(math.log10(lr / 0.1) ** 2)) + 3 * lr**2)
                    lr = probe.lr * probe.shape(step)
            answer = ProbeResult(tuple(losses), end="end", skipped=tuple(sorted(skips)))
    assert found[1] == pytest.approx(found[0], rel=0.5)


def test_other_searches_use_it_for_bounds() -> None:
    class Bounded(AbstractSearch):
        def requests(self, run: Run) -> Requests:
            suggestion = yield from RangeTest(1e-4, 1e3, repeats=1).measure()
            lower, upper = suggestion.bounds
            yield Train(lr=math.sqrt(lower * upper), num_steps=None, reason=f"{lower} {upper}")

    trace = run_toy(Bounded(), Quadratic(curvature=(4.0,)), 20).trace
    request, answer = trace[-1]
    assert isinstance(request, Train)
    assert isinstance(answer, TrainResult)
    lower, upper = map(float, request.reason.split())
    assert lower < 0.25 < 0.5 < upper < 5


def test_a_recorded_search_is_continued() -> None:
    search = Ranged(RangeTest(1e-3, 100), apply=True)
    trace = run_toy(search, noisy_quadratic(), 10).trace
    record = [(decode(to_plain(request)), decode(to_plain(answer))) for request, answer in trace]
    for length in range(len(record)):
        assert replay(search.requests(Run(total_steps=10, lr=0.1)), record[:length]) == record[length][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lr": 1.0, "max_lr": 0.1}, "min_lr < max_lr"),
        ({"min_lr": 0.0}, "min_lr"),
        ({"max_lr": math.inf}, "max_lr"),
        ({"num_steps": 9}, "num_steps"),
        ({"repeats": 0}, "repeats"),
        ({"chunk": 0}, "chunk"),
        ({"seed": -1}, "seed"),
        ({"mode": "log"}, "mode"),
        ({"rule": "best"}, "rule"),
        ({"width": 0.0}, "width"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RangeTest(**options)
