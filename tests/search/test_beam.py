from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from lightning_autolr.core.requests import (
    Answer,
    Evaluation,
    Probe,
    ProbeResult,
    Request,
    Run,
    Status,
    Train,
    TrainResult,
    decode,
)
from lightning_autolr.schedules import to_plain
from lightning_autolr.search.base import replay
from lightning_autolr.search.beam import BeamSearch
from tests.toy import run_toy
from tests.zoo import Cliff, Quadratic, noisy_quadratic

QUADRATIC = Quadratic()  # half w squared, from w = 1
GOLDEN = BeamSearch(beam_size=2, factors=(2, 1, 0.5), interval=1, objective="validation", start_lrs=(0.1, 0.4))

Trace = Iterable[tuple[Request, Answer]]


def rounds(trace: Trace) -> list[tuple[list[tuple[Probe, ProbeResult]], tuple[Train, TrainResult]]]:
    """Each round's first probes (survivors that are trained again left out) and its real training."""
    result: list[Any] = []
    probes: list[Any] = []
    for request, answer in trace:
        if isinstance(request, Train):
            result.append((probes, (request, answer)))
            probes = []
        elif "child" in request.label:
            probes.append((request, answer))
    return result


@pytest.mark.parametrize("keep_ends", [False, True])
def test_the_published_algorithm_on_half_w_squared(keep_ends: bool) -> None:
    search = BeamSearch(2, (2, 1, 0.5), 1, "validation", (0.1, 0.4), keep_ends=keep_ends)
    first, second, third, _ = rounds(run_toy(search, QUADRATIC, 4).trace)
    # loss and learning rate of all children; of the two at 0.2 from the same weights one is enough
    expected = [(0.02, 0.8), (0.18, 0.4), (0.32, 0.2), (0.405, 0.1), (0.45125, 0.05)]
    got = sorted((answer.loss, probe.lr) for probe, answer in first[0])
    assert [value for pair in got for value in pair] == pytest.approx([value for pair in expected for value in pair])
    assert first[1][0].lr == 0.8
    losses = sorted(answer.loss for _, answer in second[0])
    assert losses[:4] == pytest.approx([0.0008, 0.0072, 0.0072, 0.0072])
    assert len(losses) == 6  # M x N: the parents differ, so equal rates are two children
    assert {probe.lr for probe, answer in second[0] if answer.loss == pytest.approx(0.0072)} == {0.4, 0.8, 1.6}
    assert second[1][0].lr == 0.8
    assert min(answer.loss for _, answer in third[0]) == pytest.approx(3.2e-5)
    assert third[1][0].lr == 0.8


def test_the_model_follows_the_best_path_with_real_steps_only() -> None:
    run = run_toy(GOLDEN, QUADRATIC, 4)
    assert run.train_lrs[:3] == [0.8] * 3
    assert run.losses == pytest.approx([0.5, 0.02, 0.0008, 3.2e-5])
    assert run.path == tuple(run.train_lrs)
    assert run.search_steps == 5 + 1 + 2 * (6 + 1) + 6  # one child double at first, no survivor at last


def test_a_jump_to_a_better_branch() -> None:
    # Round 1 keeps 0.4 and 0.2, in this order; in round 2 the best child of all is made of the second one.
    best_second = Recorder({(None, 0.4): 1.0, (None, 0.2): 2.0, ("a", 0.2): 0.5})
    requests = BeamSearch(2, (2, 1, 0.5), 10).requests(Run(lr=0.2))
    jumps = [train.start for train, _ in best_second.drive(requests, 2)]
    assert jumps == [None, "a"]


@dataclass
class Recorder:
    """Answers with given scores by (start, lr), 9 otherwise."""

    scores: dict[tuple[str | None, float], float]

    def drive(self, requests: Any, num_rounds: int) -> list[tuple[Train, TrainResult]]:
        trained: list[tuple[Train, TrainResult]] = []
        names = iter("abcdefgh")
        request = next(requests)
        while True:
            answer: Answer
            if isinstance(request, Train):
                answer = TrainResult((1.0,) * 10, start="undo" if request.keep_start else None)
                trained.append((request, answer))
                if len(trained) == num_rounds:
                    return trained
            else:
                loss = self.scores.get((request.start, request.lr), 9.0)
                answer = ProbeResult((loss,) * 10, end=next(names) if request.keep_end else None)
            request = requests.send(answer)


class Counter:
    """Answers at random, checks every id, and counts the states alive at once: released first, as the engine does."""

    def __init__(self, seed: int, diverges: float = 0.1) -> None:
        self.random = random.Random(seed)
        self.diverges = diverges
        self.alive: set[str] = set()
        self.most = 0
        self.after_training: list[int] = []
        self.names = (f"s{i}" for i in itertools.count())

    def drive(self, search: BeamSearch, num_rounds: int) -> Counter:
        requests = search.requests(Run(lr=0.1))
        request = next(requests)
        while len(self.after_training) < num_rounds:
            request = requests.send(self.answer(request))
        return self

    def answer(self, request: Request) -> Answer:
        assert isinstance(request, Probe | Train)
        assert request.start is None or request.start in self.alive
        assert set(request.release) <= self.alive
        bad = self.random.random() < self.diverges
        status = Status.DIVERGED if bad else Status.OK
        keep = request.keep_start if isinstance(request, Train) else request.keep_end and not bad
        name = next(self.names) if keep else None
        self.alive -= set(request.release)
        self.alive |= {name} if name else set()
        self.most = max(self.most, len(self.alive))
        losses = (self.random.random(),) * (request.num_steps or 1)
        if isinstance(request, Train):
            self.after_training.append(len(self.alive))
            return TrainResult(losses, status, name)
        return ProbeResult(losses, (Evaluation(1, losses),), status, name)


@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
@pytest.mark.parametrize("keep_ends", [False, True])
def test_how_many_states_are_kept(beam_size: int, keep_ends: bool) -> None:
    search = BeamSearch(beam_size, (4, 2, 1, 0.5, 0.25), 2, keep_ends=keep_ends)
    counters = [Counter(seed).drive(search, 20) for seed in range(40)]
    promised = 1 if beam_size == 1 else 2 * beam_size if keep_ends else beam_size
    assert max(counter.most for counter in counters) == promised
    assert max(itertools.chain.from_iterable(counter.after_training for counter in counters)) == beam_size


def test_how_many_states_a_run_keeps() -> None:
    run = run_toy(BeamSearch(3, (2, 1, 0.5), 5), noisy_quadratic(), 100)
    assert run.most_kept == 3
    assert len(run.kept) <= 3


def test_cost_of_a_round() -> None:
    lean, fast = (run_toy(BeamSearch(3, (2, 1, 0.5), 5, keep_ends=k), noisy_quadratic(), 60) for k in (False, True))
    for run, per_round in ((lean, 9 + 2), (fast, 9)):
        by_round = [
            sum(isinstance(request, Probe) and request.stage == number for request, _ in run.trace)
            for number in range(12)
        ]
        assert by_round[2:11] == [per_round] * 9
        assert by_round[11] == 9  # nothing comes after the last round: no survivors
        assert run.search_steps == 5 * sum(by_round)
        assert len(run.train_lrs) == 60
    assert lean.train_lrs == fast.train_lrs
    assert np.array_equal(lean.state, fast.state)


def test_all_children_of_a_round_see_the_same_batches() -> None:
    for number, (probes, _) in enumerate(rounds(run_toy(BeamSearch(interval=5, seed=7), noisy_quadratic(), 50).trace)):
        assert {(p.draw, p.stage, p.num_steps, p.evaluate) for p, _ in probes} == {(7 + number, number, 5, "none")}


def test_it_beats_the_start_rate_and_can_go_up_and_down() -> None:
    problem = noisy_quadratic()
    run = run_toy(BeamSearch(interval=10, objective="validation", start_lrs=(0.01,)), problem, 300)
    assert max(run.train_lrs) > 5 * run.train_lrs[0]  # up first
    assert run.train_lrs[-1] < 0.5 * max(run.train_lrs)  # and down in the end
    assert problem.loss(run.state) < problem.expected_loss([0.01] * 300)


def test_the_last_round_is_as_short_as_the_run() -> None:
    run = run_toy(BeamSearch(interval=7), noisy_quadratic(), 20)
    assert [train.num_steps for train in (r for r, _ in run.trace) if isinstance(train, Train)] == [7, 7, 6]
    assert len(run.train_lrs) == 20


def test_a_rest_too_short_to_tell_children_apart_is_trained_as_it_is() -> None:
    run = run_toy(BeamSearch(beam_size=1, interval=10), Quadratic(), total_steps=41, lr=0.02)
    assert [q.num_steps for q, _ in run.trace if isinstance(q, Train)][-1] is None
    last, before = [q.lr for q, _ in reversed(run.trace) if isinstance(q, Train)][:2]
    assert last == before
    with pytest.raises(ValueError, match="Expected an epoch of 2 steps or more"):
        next(BeamSearch().requests(Run(total_steps=10, lr=0.1, steps_per_epoch=1)))


def test_one_epoch_is_the_published_interval() -> None:
    trace = run_toy(BeamSearch(), noisy_quadratic(), 20, steps_per_epoch=10).trace
    assert {request.num_steps for request, _ in trace if isinstance(request, Probe | Train)} == {10}
    assert trace[0][0].lr == 0.2  # the optimizer's own rate times the first factor
    with pytest.raises(ValueError, match="interval=<number of steps>"):
        next(BeamSearch().requests(Run()))


def test_bounds_merge_the_children_that_reach_them() -> None:
    run = run_toy(BeamSearch(1, (4, 2, 1, 0.5), 5, min_lr=0.1, max_lr=0.3), noisy_quadratic(), 5, lr=0.15)
    assert [probe.lr for probe, _ in rounds(run.trace)[0][0]] == [0.3, 0.15, 0.1]


def test_ties_go_to_the_earlier_state_then_to_the_earlier_factor() -> None:
    requests = BeamSearch(2, (2, 1, 0.5), 10).requests(Run(lr=0.2))
    first, second = (train for train, _ in Recorder({}).drive(requests, 2))
    assert (first.lr, first.start) == (0.4, None)
    assert (second.lr, second.start) == (0.8, None)


def test_children_that_diverge_are_worst() -> None:
    run = run_toy(BeamSearch(2, (8, 1, 0.5), 8, start_lrs=(0.3,)), Cliff(), 16)
    for probes, (train, _) in rounds(run.trace):
        assert train.lr in {probe.lr for probe, answer in probes if answer.status is Status.OK}
    assert any(answer.status is Status.DIVERGED for answer in (a for _, a in run.trace))


def test_when_all_children_diverge_the_round_is_repeated_lower() -> None:
    search = BeamSearch(1, (2, 1, 0.5), 10, start_lrs=(8.0,))
    run = run_toy(search, Cliff(), 20)  # blows up above lr = 0.5
    tried = [(r.draw, r.lr) for r, _ in run.trace if isinstance(r, Probe)]
    assert tried[:6] == [(0, 10.0), (0, 8.0), (0, 4.0), (1, 8.0), (1, 4.0), (1, 2.0)]
    assert run.train_lrs[0] == 0.5
    assert np.isfinite(run.state).all()


def test_when_nothing_is_ever_finite_training_goes_on_at_a_small_rate() -> None:
    counter = Counter(0, diverges=1.1).drive(BeamSearch(2, (2, 0.5), 5), 3)
    assert counter.most <= 3


@pytest.mark.parametrize("beam_size", [1, 2])
def test_a_real_segment_that_diverges_is_left(beam_size: int) -> None:
    search = BeamSearch(beam_size, (2, 1, 0.5), 10)
    requests = search.requests(Run(lr=0.2))
    request = next(requests)
    names = iter("abcdefgh")
    while isinstance(request, Probe):
        answer = ProbeResult((1 / request.lr,) * 10, end=next(names) if request.keep_end else None)
        request = requests.send(answer)
    assert isinstance(request, Train)
    assert (request.lr, request.keep_start) == (0.4, True)
    after = requests.send(TrainResult((1.0, math.nan), Status.DIVERGED, start="undo"))
    assert isinstance(after, Probe)
    if beam_size == 1:
        assert (after.start, after.lr, after.release) == ("undo", 0.4, ())  # half of 0.4, times 2
    else:
        assert (after.start, after.lr, after.release) == ("a", 0.4, ("undo",))  # the survivor, 0.2, times 2


def test_search_that_counts_leaves_steps_to_train_with() -> None:
    run = run_toy(BeamSearch(2, (2, 1, 0.5), 5), noisy_quadratic(), 200, count_search=True)
    assert run.search_steps + len(run.train_lrs) == 200
    request, _ = run.trace[-1]
    assert isinstance(request, Train)
    assert request.num_steps is None


@pytest.mark.parametrize("keep_ends", [False, True])
def test_a_recorded_search_is_continued(keep_ends: bool) -> None:
    search = BeamSearch(3, interval=5, keep_ends=keep_ends)
    trace = run_toy(search, noisy_quadratic(), 50).trace
    record = [(decode(to_plain(request)), decode(to_plain(answer))) for request, answer in trace]
    for length in range(0, len(record), 7):
        assert replay(search.requests(Run(total_steps=50, lr=0.1)), record[:length]) == record[length][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size"),
        ({"seed": -1}, "seed"),
        ({"factors": ()}, "factors"),
        ({"factors": (2.0, 1.0)}, "below 1"),
        ({"factors": (0.5, 0.5)}, "distinct"),
        ({"factors": (2.0, -0.5)}, "> 0"),
        ({"min_lr": 1.0, "max_lr": 0.1}, "min_lr < max_lr"),
        ({"start_lrs": (0.1, 0.2, 0.3)}, "1 to 2 start_lrs"),
        ({"start_lrs": (20.0,)}, "within the bounds"),
        ({"objective": "loss"}, "objective"),
        ({"interval": 1}, "interval >= 2"),
        ({"interval": 0, "objective": "validation"}, "interval >= 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeamSearch(**options)


def test_validation_needs_validation_batches() -> None:
    with pytest.raises(ValueError, match="validation batches"):
        next(BeamSearch(interval=5, objective="validation").requests(Run(has_validation=False)))
