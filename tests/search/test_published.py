"""AutoLRS as published: its stage plan, its counters, what it chooses, and what it does when things diverge."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_autolr.core.requests import (
    Evaluation,
    Probe,
    ProbeResult,
    Request,
    Run,
    Status,
    Train,
    TrainResult,
)
from lightning_autolr.search.published import PublishedAutoLRS, forecast_of
from lightning_autolr.search.range_test import RangeTest
from tests.toy import Ranged, ToyRun, run_toy
from tests.zoo import Cliff, Plateau, Quadratic, noisy_quadratic, off_centre

PAPER = PublishedAutoLRS(min_lr=1e-3, max_lr=1e-1)
SMALL = PublishedAutoLRS(min_lr=1e-3, max_lr=1.9, tau=100, tau_max=200, num_candidates=4)


def probes(run: ToyRun, stage: int = 0) -> list[tuple[Probe, ProbeResult]]:
    return [(q, a) for q, a in run.trace if isinstance(q, Probe) and isinstance(a, ProbeResult) and q.stage == stage]


def trains(run: ToyRun) -> list[Train]:
    return [request for request, _ in run.trace if isinstance(request, Train)]


# -- the plan ------------------------------------------------------------------------------------------------


def test_the_published_stages() -> None:
    stages = list(itertools.islice(PAPER.plan(Run()), 6))
    assert [s.tau for s in stages] == [s.num_steps for s in stages] == [1000, 2000, 4000, 8000, 8000, 8000]
    assert [s.probe_steps for s in stages] == [100, 200, 400, 800, 800, 800]
    assert [s.search_steps for s in stages] == [1000, 2000, 4000, 8000, 8000, 8000]
    assert [s.signal for s in stages] == ["train"] * 4 + ["validation"] * 2
    assert not any(s.note or s.is_last for s in stages)


@pytest.mark.parametrize(("total", "number"), [(2000, 1), (14000, 3), (30000, 4), (136850, 10)])
def test_how_many_stages_fit_with_their_search(total: int, number: int) -> None:
    stages = list(PAPER.plan(Run(total_steps=total, count_search=True)))
    assert len(stages) == number
    assert stages[-1].num_steps == stages[-1].tau + (10850 if total == 136850 else 0)


def test_the_last_stage_takes_the_rest() -> None:
    stages = list(PAPER.plan(Run(total_steps=10_000)))
    assert [(s.tau, s.num_steps) for s in stages] == [(1000, 1000), (2000, 2000), (4000, 7000)]


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(1, 3000),
    tau=st.integers(1, 300),
    growth=st.integers(1, 9),
    candidates=st.integers(1, 12),
    fraction=st.floats(0.01, 0.9),
    count_search=st.booleans(),
)
def test_a_plan_uses_up_the_run(
    total: int, tau: int, growth: int, candidates: int, fraction: float, count_search: bool
) -> None:
    search = PublishedAutoLRS(
        1e-3, 1e-1, tau=tau, tau_max=tau * growth, num_candidates=candidates, probe_fraction=fraction
    )
    stages = list(search.plan(Run(total_steps=total, count_search=count_search)))
    used = sum(s.num_steps + (s.search_steps if count_search else 0) for s in stages)
    assert used == total
    assert [s.number for s in stages] == list(range(len(stages)))
    assert [s.is_last for s in stages] == [False] * (len(stages) - 1) + [True]
    for stage in stages:
        shrunk = len(stages) == 1 and "shrunk" in stage.note
        assert stage.tau == min(tau * 2**stage.number, tau * growth) or shrunk
        assert stage.num_steps >= stage.tau, "no training part is cut short"
        assert stage.num_candidates == 0 or stage.probe_steps < stage.tau


@pytest.mark.parametrize(("count_search", "tau", "training"), [(False, 500, 500), (True, 250, 250)])
def test_a_run_shorter_than_a_stage_shrinks_it_and_says_so(count_search: bool, tau: int, training: int) -> None:
    (stage,) = PAPER.plan(Run(total_steps=500, count_search=count_search))
    assert (stage.tau, stage.num_steps) == (tau, training)
    assert "shrunk" in stage.note


# -- what it does --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run() -> ToyRun:
    """Stages of 100, 200 and 200 steps."""
    return run_toy(SMALL, noisy_quadratic(10), 500)


def test_counters(run: ToyRun) -> None:
    """Exactly tau' steps at each candidate, exactly tau at each choice, one kept state at a time."""
    for stage, tau in enumerate((100, 200, 200)):
        found = probes(run, stage)
        assert [len(result.losses) for _, result in found] == [tau // 10] * 4
        assert len({probe.lr for probe, _ in found}) == 4
        assert len({result.losses[0] for _, result in found}) == 1, "all start from the same weights and batch"
    chosen = [train.lr for train in trains(run)]
    assert run.path == tuple(np.repeat(chosen, (100, 200, 200)).tolist())
    assert run.search_steps == 4 * (10 + 20 + 20)
    assert run.most_kept == 1


def test_candidates_of_a_stage_share_their_batches(run: ToyRun) -> None:
    draws = [{probe.draw for probe, _ in probes(run, stage)} for stage in range(3)]
    assert [len(d) for d in draws] == [1, 1, 1]
    assert len(set.union(*draws)) == 3


@pytest.mark.parametrize("kappa", [1e6, 1.96])
@pytest.mark.parametrize("seed", range(2))
def test_it_chooses_the_tried_rate_closest_to_the_best(kappa: float, seed: int) -> None:
    """With plain gradient descent the loss is (1 - lr)^(2 t) / 2: what counts is |1 - lr|."""
    search = PublishedAutoLRS(1e-3, 1.9, tau=100, num_candidates=5, kappa=kappa, seed=seed)
    run = run_toy(search, Quadratic(), 100)
    best = min((probe.lr for probe, _ in probes(run)), key=lambda lr: abs(1 - lr))
    (train,) = trains(run)
    assert train.lr == best
    assert run.losses == pytest.approx([0.5 * (1 - best) ** (2 * t) for t in range(100)])


def test_a_huge_kappa_tries_both_bounds() -> None:
    tried = [probe.lr for probe, _ in probes(run_toy(SMALL, noisy_quadratic(10), 100))]
    assert {min(tried), max(tried)} == {1e-3, 1.9}


def test_a_candidate_that_diverges_stops_at_once_and_is_not_chosen() -> None:
    """The cliff is at lr = 0.5 for both; one blows up within ten steps, the other only explodes."""
    cliff, steep = run_toy(SMALL, Cliff(), 100), run_toy(SMALL, off_centre(), 100)
    failed = [result for probe, result in probes(cliff) if probe.lr > 0.5]
    assert failed
    assert all(result.status is Status.DIVERGED and len(result.losses) < 10 for result in failed)
    assert any(probe.lr > 0.5 and result.status is Status.OK for probe, result in probes(steep))
    for run in (cliff, steep):
        assert trains(run)[0].lr < 0.5
        assert run.losses[-1] < run.losses[0]


def test_a_plateau_gives_no_reason_and_no_harm() -> None:
    run = run_toy(SMALL, Plateau(), 100)
    assert run.losses == pytest.approx([1.0] * 100, abs=1e-9)
    assert 1e-3 <= trains(run)[0].lr <= 1.9


def test_noise_is_survived() -> None:
    problem = noisy_quadratic(20, noise=0.3)
    run = run_toy(SMALL, problem, 100)
    assert problem.loss(run.state) < problem.loss(np.ones(20))


@pytest.mark.parametrize(
    "search",
    [
        PublishedAutoLRS(1e-3, 1e-1, tau=50, num_candidates=1),
        PublishedAutoLRS(1e-2, 1e-2, tau=50),
        PublishedAutoLRS(1e-3, 1e-1, tau=1, tau_max=1, probe_fraction=0.9),
    ],
)
def test_without_a_choice_there_is_no_search(search: PublishedAutoLRS) -> None:
    run = run_toy(search, Quadratic(), 30)
    assert run.search_steps == 0
    assert run.path == pytest.approx((0.01,) * 30)


def test_the_warm_up_is_linear_and_not_searched() -> None:
    search = PublishedAutoLRS(1e-3, 0.5, tau=20, num_candidates=2, warmup_steps=5, warmup_lr=0.1)
    run = run_toy(search, Quadratic(), 30)
    assert run.train_lrs[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert len(run.train_lrs) == 30
    once = run_toy(PublishedAutoLRS(1e-3, 0.5, tau=20, num_candidates=2, warmup_steps=1), Quadratic(), 30)
    assert once.train_lrs[0] == 0.5
    with pytest.raises(ValueError, match="longer than its warm-up"):
        run_toy(search, Quadratic(), 5)


def test_search_that_counts() -> None:
    run = run_toy(SMALL, noisy_quadratic(10), 500, count_search=True)
    assert run.search_steps + len(run.train_lrs) == 500
    assert run.finished
    assert all(train.num_steps is not None for train in trains(run)), "the run ends with the search"


def test_a_run_without_end_goes_on() -> None:
    requests = SMALL.requests(Run())
    request = next(requests)
    sizes: list[int | None] = []
    while len(sizes) < 4:
        if isinstance(request, Train):
            sizes.append(request.num_steps)
            request = requests.send(TrainResult((1.0,) * (request.num_steps or 0), start="undo"))
        else:
            request = requests.send(result(request, 1.0))
    assert sizes == [100, 200, 200, 200]


def test_a_short_run_with_few_candidates() -> None:
    search = PublishedAutoLRS(1e-3, 0.3, tau=20, num_candidates=3)
    run = run_toy(search, Quadratic(), 60)
    assert [len(probes(run, stage)) for stage in range(2)] == [3, 3]
    assert [train.num_steps for train in trains(run)] == [20, None]
    assert len(run.path) == 60


# -- bounds that nobody gave -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "searched"),
    [
        ({}, (None, None)),
        ({"min_lr": 1e-3}, (1e-3, None)),
        ({"max_lr": 0.5}, (None, 0.5)),
        ({"max_lr": 1e-5}, (1e-5 / 10, 1e-5)),  # far below where the loss begins to fall
        ({"min_lr": 50.0}, (50.0, 500.0)),  # far above where it runs away
    ],
)
def test_a_bound_that_is_missing_is_found_and_one_that_is_given_holds(given: Any, searched: Any) -> None:
    search = PublishedAutoLRS(**given, tau=40, tau_max=40, num_candidates=4, seed=2)
    test = Ranged(RangeTest(num_steps=40, repeats=1, seed=10**6 + 2))
    climb = run_toy(test, noisy_quadratic()).trace
    run = run_toy(search, noisy_quadratic(), 40)
    assert [(q, a) for q, a in run.trace if isinstance(q, Probe) and q.kind == "range test"] == climb
    assert test.suggestion is not None
    low, high = (a or b for a, b in zip(searched, test.suggestion.bounds, strict=True))
    known = run_toy(replace(search, min_lr=low, max_lr=high), noisy_quadratic(), 40)
    assert [q.lr for q, _ in run.trace[len(climb) :]] == [q.lr for q, _ in known.trace]
    assert run.losses == known.losses
    tried = [q.lr for q, _ in probes(known)]
    assert len(set(tried)) == 4
    assert low <= min(tried) < max(tried) <= high
    assert all(train.reason for train in trains(run))


def test_the_plan_says_that_there_is_a_range_test() -> None:
    run = Run(total_steps=1000)
    assert PublishedAutoLRS().describe(run) == f"a range test of 100 steps, then {PAPER.describe(run)}"
    assert PublishedAutoLRS().describe(Run(total_steps=1)).startswith("a range test of 10 steps, then ")


# -- what it forecasts ---------------------------------------------------------------------------------------


def test_auto_forecasts_validation_losses_once_the_stages_stop_growing(run: ToyRun) -> None:
    for stage, expected in enumerate((0, 0, 20)):
        assert {len(result.evaluations) for _, result in probes(run, stage)} == {expected}
    assert {stage.signal for stage in SMALL.plan(Run(total_steps=500, has_validation=False))} == {"train"}


def test_sixteen_evaluations_and_no_more_are_forecast() -> None:
    search = PublishedAutoLRS(1e-3, 0.1, tau=1000, num_candidates=2, objective="validation")
    run = run_toy(search, Quadratic(), 1000)
    for probe, result in probes(run):
        assert [e.step for e in result.evaluations] == [*range(6, 97, 6), 100]
        exact = 0.5 * (1 - probe.lr) ** 2000
        assert (probe.forecast_horizon, probe.estimator) == (1000, "bounded")
        assert forecast_of(probe, result).value == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("objective", ["train", "validation", "holdout"])
def test_the_objective_decides_what_is_evaluated(objective: Any) -> None:
    search = PublishedAutoLRS(1e-3, 0.5, tau=40, num_candidates=2, objective=objective)
    kinds = {probe.evaluate for probe, _ in probes(run_toy(search, noisy_quadratic(5), 40))}
    assert kinds == {"none" if objective == "train" else objective}


@pytest.mark.parametrize(("estimator", "value"), [("bounded", 0.500091), ("reference", 0.384604)])
def test_the_estimator_is_a_choice(estimator: Any, value: float) -> None:
    losses = tuple((2 * np.exp(-0.01 * np.arange(100)) + 0.5).tolist())
    search = PublishedAutoLRS(1e-3, 1e-1, estimator=estimator)
    probe = next(search.requests(Run(total_steps=1000)))
    assert isinstance(probe, Probe)
    assert forecast_of(probe, ProbeResult(losses)).value == pytest.approx(value, abs=1e-6)


def test_validation_needs_batches() -> None:
    search = PublishedAutoLRS(1e-3, 0.1, objective="validation")
    with pytest.raises(ValueError, match="Expected validation batches"):
        run_toy(search, Quadratic(), 100, has_validation=False)


# -- when things diverge -------------------------------------------------------------------------------------


def result(request: Request, level: float) -> ProbeResult:
    """A probe whose losses fall from 2 to ``level``; it diverges if ``level`` is not finite."""
    assert isinstance(request, Probe)
    if not math.isfinite(level):
        return ProbeResult((2.0, math.nan), status=Status.DIVERGED)
    losses = tuple((level + (2 - level) * np.exp(-np.arange(request.num_steps))).tolist())
    return ProbeResult(losses, (Evaluation(request.num_steps, (level,)),))


def answer_probes(requests: Any, request: Any, level: Any) -> tuple[list[Probe], Train]:
    """Answer the probes of a stage by ``level(lr)``, and return them and the request for training."""
    asked = []
    while isinstance(request, Probe):
        asked.append(request)
        request = requests.send(result(request, level(request.lr)))
    return asked, request


DIVERGED = TrainResult((2.0, 9.0), status=Status.DIVERGED, start="undo")


def test_training_that_diverges_is_undone_until_a_rate_holds() -> None:
    search = PublishedAutoLRS(1e-3, 1.0, tau=100, tau_max=100, num_candidates=5)
    requests: Any = search.requests(Run(total_steps=1000))
    tried, first = answer_probes(requests, next(requests), lambda lr: 1.0 / (1 + lr))  # higher looks better
    rates = sorted(probe.lr for probe in tried)
    assert (first.lr, first.start, first.keep_start) == (rates[-1], None, True)
    assert first.stop_above == pytest.approx(6.0), "thrice the loss at the start"

    second = requests.send(DIVERGED)
    assert (second.lr, second.start, second.keep_start) == (rates[-2], "undo", False)
    assert second.stop_above == first.stop_above
    assert f"{first.lr:.3g} diverged" in second.reason

    third = requests.send(DIVERGED)
    assert (third.lr, third.start) == (pytest.approx(rates[-2] / 10), "undo")

    following = requests.send(TrainResult((1.0,) * 100))
    assert following.release == ("undo",)
    again, train = answer_probes(requests, following, lambda lr: 1.0 / (1 + lr))
    assert max(probe.lr for probe in again) == pytest.approx(rates[-2] / 2)
    assert train.release == (), "a state is released once"


def test_at_the_lowest_rate_nothing_lower_is_tried() -> None:
    """Every rate of this range diverges, slowly: too slowly for the probes to see."""
    search = PublishedAutoLRS(2.05, 2.3, tau=200, tau_max=200, num_candidates=3, probe_fraction=0.01)
    run = run_toy(search, Quadratic(), 500)
    assert len(run.train_lrs) == 500
    undone = [train for train in trains(run) if train.start is not None]
    assert undone[-1].lr == 2.05
    assert not undone[-1].keep_start
    assert undone[-1].stop_above is None


def test_lost_steps_are_taken_from_the_run() -> None:
    search = PublishedAutoLRS(1e-3, 1.0, tau=100, tau_max=100, num_candidates=2)
    requests: Any = search.requests(Run(total_steps=250))
    _, first = answer_probes(requests, next(requests), lambda lr: 1.0 / (1 + lr))
    second = requests.send(TrainResult((2.0,) * 60 + (math.nan,), Status.DIVERGED, "undo"))
    assert (first.num_steps, second.num_steps) == (100, 100)
    last = requests.send(TrainResult((1.0,) * 100))
    assert isinstance(last, Train), "89 steps are left: too few for a stage"
    assert (last.num_steps, last.lr) == (None, second.lr)
    assert "no search" in last.reason


def test_all_candidates_diverge() -> None:
    search = PublishedAutoLRS(1e-3, 1.0, tau=100, tau_max=100, num_candidates=3)
    requests: Any = search.requests(Run(total_steps=1000))
    _, first = answer_probes(requests, next(requests), lambda lr: 0.5)
    tried, second = answer_probes(requests, requests.send(TrainResult((1.0,) * 100, start="a")), lambda lr: math.inf)
    smallest = min(probe.lr for probe in tried)
    assert second.lr == pytest.approx(max(1e-3, min(first.lr / 10, smallest / 2)))
    assert "all 3 candidates diverged" in second.reason
    third = requests.send(TrainResult((1.0,) * 100, start="b"))
    if smallest / 2 > 1e-3:
        assert max(probe.lr for probe in answer_probes(requests, third, lambda lr: 0.5)[0]) <= smallest / 2
    else:
        assert isinstance(third, Train)
        assert "no search" in third.reason


def test_all_candidates_of_the_first_stage_diverge() -> None:
    requests = SMALL.requests(Run(total_steps=1000))
    _, train = answer_probes(requests, next(requests), lambda lr: math.nan)
    assert train.lr == 1e-3


def test_a_failed_fit_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_autolr.core import surrogate

    def fail(model: Any) -> None:
        raise surrogate.FitError("no such luck")

    monkeypatch.setattr(surrogate, "_fit", fail)
    labels = [probe.label for probe, _ in probes(run_toy(SMALL, noisy_quadratic(5), 100))]
    assert not any("no such luck" in label for label in labels[:2])  # of one score there is nothing to learn
    assert all("no such luck" in label for label in labels[2:])


def test_the_seed_decides_the_first_candidates() -> None:
    def firsts(seed: int) -> list[float]:
        search = PublishedAutoLRS(1e-3, 1.0, tau=20, tau_max=20, num_candidates=2, seed=seed)
        run = run_toy(search, Quadratic(), 60)
        return [probes(run, stage)[0][0].lr for stage in range(3)]

    assert firsts(0) == firsts(0)
    assert len({*firsts(0), *firsts(1)}) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lr": 0.0}, "0 < min_lr <= max_lr"),
        ({"min_lr": 1.0}, "0 < min_lr <= max_lr"),
        ({"min_lr": -1.0, "max_lr": None}, "0 < min_lr <= max_lr"),
        ({"min_lr": None, "max_lr": math.nan}, "0 < min_lr <= max_lr"),
        ({"max_lr": math.nan}, "0 < min_lr <= max_lr"),
        ({"max_lr": math.inf}, "0 < min_lr <= max_lr"),
        ({"tau": 0}, "1 <= tau <= tau_max"),
        ({"tau": 9000}, "1 <= tau <= tau_max"),
        ({"num_candidates": 0}, "num_candidates from 1"),
        ({"probe_fraction": 0.0}, "probe_fraction < 1"),
        ({"probe_fraction": 1.0}, "probe_fraction < 1"),
        ({"kappa": -1.0}, "kappa >= 0"),
        ({"kappa": math.nan}, "kappa >= 0"),
        ({"objective": "accuracy"}, "objective"),
        ({"estimator": "spline"}, "estimator"),
        ({"warmup_steps": -1}, "warmup_steps >= 0"),
        ({"warmup_lr": 0.0}, "warmup_lr > 0"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PublishedAutoLRS(**{"min_lr": 1e-3, "max_lr": 1e-1, **options})
