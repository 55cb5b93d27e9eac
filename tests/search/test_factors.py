from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lightning_autolr.core.requests import LineProbe, LineResult, Run, Train, TrainResult, decode
from lightning_autolr.core.scores import scored_factor
from lightning_autolr.schedules import to_plain
from lightning_autolr.search.base import replay
from lightning_autolr.search.factors import FactorSearch
from tests.toy import ToyRun, run_toy
from tests.zoo import Quadratic, noisy_quadratic

THREE = (2.0, 1.0, 0.5)
QUADRATIC = Quadratic()  # half w squared: one step of lr 1 solves it, more than 2 diverges


def decisions(run: ToyRun) -> list[Train]:
    return [request for request, _ in run.trace if isinstance(request, Train)]


def lrs(run: ToyRun) -> list[float]:
    return [train.lr for train in decisions(run)]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (5.0, [3.656846, 2.684067, 1.981431, 1.477422, 1.123326, 0.893913, 0.799179, 0.800147, 0.799974, 0.800005]),
        (0.01, [0.015256, 0.023272, 0.035496, 0.054130, 0.082519]),
    ],
)
def test_the_published_rule_settles_where_two_candidates_tie(start: float, expected: list[float], exact: bool) -> None:
    # at lr = 0.8 the losses at lr x 2 and lr x 0.5 are equal: (1 - 1.6)**2 == (1 - 0.4)**2
    search = FactorSearch(THREE, every=1, initial_lr=start, outlier_clip=None, exact=exact)
    assert lrs(run_toy(search, QUADRATIC, len(expected))) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("start", [1e-4, 5.0])
def test_the_default_rule_finds_a_rate_that_converges(start: float) -> None:
    run = run_toy(FactorSearch(every=1, initial_lr=start), QUADRATIC, 60)
    assert 0.5 < run.train_lrs[-1] < 1.5
    assert abs(run.state[0]) < 1e-6


def test_the_cap_does_not_move_the_fixed_point() -> None:
    assert lrs(run_toy(FactorSearch(THREE, every=1, initial_lr=0.5), QUADRATIC, 20))[-1] == pytest.approx(0.8, abs=1e-6)


def test_every_epoch_is_the_published_frequency() -> None:
    run = run_toy(FactorSearch(THREE), QUADRATIC, 20, lr=0.1, steps_per_epoch=5)
    assert [type(request) for request, _ in run.trace] == [LineProbe, Train] * 4
    assert {train.num_steps for train in decisions(run)} == {5}
    assert run.search_steps == 4  # one direction each
    assert run.trace[0][0].lr == 0.1


def test_each_decision_draws_its_own_batches_and_asks_where_it_was_told() -> None:
    search = FactorSearch(THREE, every=2, horizon=3, exact=True, evaluate_on="same")
    probes = [r for r, _ in run_toy(search, QUADRATIC, 6).trace if isinstance(r, LineProbe)]
    assert [(p.draw, p.stage, p.horizon, p.exact, p.evaluate_on) for p in probes] == [
        (i, i, 3, True, "same") for i in range(3)
    ]


def test_smoothing_spreads_a_decision_and_keeps_its_total() -> None:
    requests = FactorSearch(THREE, every=1, smoothing=0.5, guard=None).requests(Run(lr=0.1))
    clear, silent = LineResult(1.0, (0.0, 1.0, 1.0)), LineResult(1.0, (1.0, 1.0, 1.0))
    factor = scored_factor(THREE, clear.losses, 1.0)
    next(requests)
    got = [requests.send(clear).lr]
    for _ in range(40):
        requests.send(None)
        got.append(requests.send(silent).lr)
    assert got[:3] == pytest.approx([0.1 * factor**0.5, 0.1 * factor**0.75, 0.1 * factor**0.875])
    assert got[-1] == pytest.approx(0.1 * factor)


def test_back_off_doubles_the_interval_while_nothing_changes() -> None:
    requests = FactorSearch(THREE, every=3, back_off=0.02, guard=None).requests(Run(lr=0.1))
    steps = []
    for losses in [(1.0, 1.0, 1.0)] * 5 + [(0.0, 1.0, 1.0)] + [(1.0, 1.0, 1.0)]:
        next(requests)
        steps.append(requests.send(LineResult(1.0, losses)).num_steps)
    assert steps == [6, 12, 24, 24, 24, 3, 6]


def test_start_rounds_put_a_bad_start_right_before_the_first_real_step() -> None:
    # from lr = 9 one decision leaves a rate that still diverges
    once = run_toy(FactorSearch(every=5, initial_lr=9.0, guard=None), QUADRATIC, 5)
    assert abs(once.state[0]) > 1
    search = FactorSearch(every=5, initial_lr=9.0, start_rounds=10)
    run = run_toy(search, QUADRATIC, 10)
    first = next(i for i, (request, _) in enumerate(run.trace) if isinstance(request, Train))
    assert 1 < first <= 10
    assert run.train_lrs[0] < 2
    assert max(run.losses) == run.losses[0]
    assert [type(request) for request, _ in run.trace[first:]] == [Train, LineProbe, Train]


@pytest.mark.parametrize("start", [9.0, 10.0])
def test_the_guard_undoes_what_ran_away(start: float) -> None:
    """From 9 one decision leaves a rate that diverges within a segment: every rate above 2 does."""
    run = run_toy(FactorSearch(every=20, initial_lr=start), QUADRATIC, 400)
    first, second = (request for request, _ in run.trace[1:3])
    assert isinstance(first, Train)
    assert isinstance(second, Train)
    assert first.stop_above == 4 * 0.5
    assert (second.lr, second.start, second.keep_start) == (first.lr / 4, run.trace[1][1].start, False)
    assert run.train_lrs[-1] < 2
    assert abs(run.state[0]) < 1e-3
    assert run.most_kept == 1
    unguarded = run_toy(FactorSearch(every=20, initial_lr=start, guard=None), QUADRATIC, 400)
    assert max(run.losses) < 1e-6 * max(unguarded.losses)
    assert unguarded.most_kept == 0


def test_the_guard_changes_nothing_in_a_good_run() -> None:
    one, other = (run_toy(FactorSearch(every=5, guard=guard), noisy_quadratic(), 100) for guard in (4.0, None))
    assert one.train_lrs == other.train_lrs
    assert np.array_equal(one.state, other.state)


def test_the_guard_knows_losses_below_zero() -> None:
    requests = FactorSearch(every=5, guard=3.0).requests(Run(lr=0.1))
    next(requests)
    assert requests.send(LineResult(-2.0, (-2.0,) * 5)).stop_above == pytest.approx(2.0)
    assert isinstance(requests.send(TrainResult((-2.0,) * 5, start="a")), LineProbe)
    after = requests.send(LineResult(math.nan, (math.nan,) * 5))
    assert (after.stop_above, after.release) == (2.0, ("a",))


def test_the_rate_stays_within_the_bounds_and_comes_to_rest_on_them() -> None:
    low = run_toy(FactorSearch(every=1, initial_lr=0.01, max_lr=0.3), QUADRATIC, 12)  # the optimum is above
    assert max(low.train_lrs) == low.train_lrs[-1] == 0.3
    high = run_toy(FactorSearch(every=1, initial_lr=9.0, min_lr=1.5), QUADRATIC, 12)  # the optimum is below
    assert min(high.train_lrs) == high.train_lrs[-1] == 1.5
    # the start value is moved into the bounds
    assert next(FactorSearch(every=1, max_lr=0.01).requests(Run(lr=1.0))).lr == 0.01


def test_a_step_into_nan_shrinks_the_rate() -> None:
    requests = FactorSearch(every=1, guard=None).requests(Run(lr=1.0))
    for expected in (0.25, 0.0625):
        next(requests)
        assert requests.send(LineResult(math.nan, (math.nan,) * 5)).lr == pytest.approx(expected)


def test_the_shuffled_arm_knows_nothing_and_costs_the_same() -> None:
    # the same losses every time: the real arm makes the same decision each time, the other one wanders
    def run(**options: Any) -> list[float]:
        requests = FactorSearch(THREE, every=1, max_lr=1e90, min_lr=1e-90, guard=None, **options).requests(Run(lr=1.0))
        rates = [1.0]
        for _ in range(400):
            next(requests)
            rates.append(requests.send(LineResult(1.0, (0.7, 0.8, 0.95))).lr)
        return rates

    factor = scored_factor(THREE, (0.7, 0.8, 0.95), 1.0)
    steady = np.diff(np.log(run()))
    assert steady == pytest.approx(np.full(400, math.log(factor)))
    walk = np.diff(np.log(run(shuffle_scores=True)))
    orders = [scored_factor(THREE, order, 1.0) for order in itertools.permutations((0.7, 0.8, 0.95))]
    assert set(walk.round(6)) == set(np.log(orders).round(6))
    assert abs(walk.mean()) < 4 * walk.std() / 20  # the six orders cancel
    assert run(shuffle_scores=True) == run(shuffle_scores=True)
    assert run(shuffle_scores=True) != run(shuffle_scores=True, seed=1)


def test_the_information_matters() -> None:
    problem = noisy_quadratic(noise=0.0)
    informed = run_toy(FactorSearch(every=5, initial_lr=0.01), problem, 200)
    control = FactorSearch(every=5, initial_lr=0.01, shuffle_scores=True)
    walks = [run_toy(replace(control, seed=seed), problem, 200) for seed in range(5)]
    assert problem.loss(informed.state) < 0.5 * min(problem.loss(walk.state) for walk in walks)


def test_a_recorded_search_is_continued() -> None:
    search = FactorSearch(every=5, shuffle_scores=True)
    run = Run(total_steps=50, lr=0.1)
    trace = run_toy(search, noisy_quadratic(), 50, lr=0.1).trace
    record = [(decode(to_plain(request)), decode(to_plain(answer))) for request, answer in trace]
    assert replay(search.requests(run), record[:7]) == record[7][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": ()}, "distinct factors"),
        ({"factors": (1.0, 1.0)}, "distinct factors"),
        ({"factors": (2.0, 0.0)}, "distinct factors"),
        ({"min_lr": 1.0, "max_lr": 0.1}, "min_lr < max_lr"),
        ({"every": 0}, "every"),
        ({"every": "step"}, "every"),
        ({"horizon": 0}, "horizon"),
        ({"start_rounds": 0}, "start_rounds"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"back_off": 0.0}, "back_off"),
        ({"guard": 1.0}, "guard"),
        ({"temperature": 0.0}, "temperature"),
        ({"normalize": "mean"}, "Expected one of"),
        ({"outlier_clip": -1.0}, "outlier_clip"),
        ({"initial_lr": 0.0}, "initial_lr"),
        ({"initial_lr": 100.0}, "initial_lr"),
        ({"evaluate_on": "x"}, "evaluate_on"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FactorSearch(**options)


def test_what_the_run_must_offer() -> None:
    with pytest.raises(ValueError, match="every=<number of steps>"):
        next(FactorSearch().requests(Run()))
    with pytest.raises(ValueError, match="validation batches"):
        next(FactorSearch(every=1, evaluate_on="validation").requests(Run(has_validation=False)))


def test_a_list_with_a_hidden_drift_is_pointed_out() -> None:
    with pytest.warns(UserWarning, match=r"multiplied by 0\.8706"):
        FactorSearch((4, 2, 1, 0.5, 0.125))
