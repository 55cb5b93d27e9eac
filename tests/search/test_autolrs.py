"""Search early, hold, undo, anneal: on problems whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_autolr.core.requests import Evaluation, Probe, ProbeResult, Run, Status, Train, TrainResult
from lightning_autolr.core.surrogate import Suggestion
from lightning_autolr.schedules import Cosine, WarmupStableDecay
from lightning_autolr.search import ladder as ladder_module
from lightning_autolr.search.autolrs import AutoLRS, Plan
from lightning_autolr.search.autowu import AutoWU
from lightning_autolr.search.base import replay
from lightning_autolr.search.ladder import Ladder
from lightning_autolr.search.ratchet import Guarded, Ratchet
from tests.toy import ToyRun, run_toy
from tests.zoo import Quadratic, noisy_quadratic, off_centre


def guarded(**options: Any) -> Guarded:
    return Guarded(AutoLRS(**options))


def probes(run: ToyRun) -> list[tuple[Probe, ProbeResult]]:
    return [(q, a) for q, a in run.trace if isinstance(q, Probe) and q.num_steps > 0 and not q.permuted]


def segments(run: ToyRun) -> list[Train]:
    return [q for q, _ in run.trace if isinstance(q, Train)]


@pytest.mark.parametrize("curvature", [0.01, 1.0, 100.0])
def test_the_peak_is_right_at_any_scale(curvature: float) -> None:
    # One coordinate: the best constant rate is 1 / h, rates above 2 / h diverge; an annealed probe bears a little more.
    run = run_toy(guarded(), Quadratic(curvature=(curvature,)), total_steps=2000, lr=0.1 / curvature)
    peak = segments(run)[0].lr
    assert 0.5 / curvature < 2.0 * peak < 2.2 / curvature
    assert run.finished
    assert not run.kept


def test_a_bad_start_is_climbed_out_of() -> None:
    for start in (1e-6, 1e-4, 30.0, 1e4):
        run = run_toy(guarded(), Quadratic(), total_steps=4000, lr=start)
        assert 0.3 < 2 * segments(run)[0].lr < 3.0, start


def hardly_learning() -> Quadratic:
    """Most of its loss cannot be got rid of, so no candidate leaves what looks like a plateau."""
    return replace(noisy_quadratic(), floor=100.0)


def test_all_candidates_share_batches_and_length() -> None:
    run = run_toy(guarded(), hardly_learning(), total_steps=2000)
    tried = [q for q, _ in probes(run)]
    plan = AutoLRS().plan(2000)
    coarse = [q for q in tried if q.num_steps == plan.coarse_steps]
    fine = [q for q in tried if q.num_steps >= plan.probe_steps]
    assert len(coarse) + len(fine) == len(tried)
    for same in (coarse, fine):
        assert len({(q.draw, q.offset, q.num_steps, q.shape, q.start) for q in same}) == 1
        assert len({q.lr for q in same}) == len(same) > 2
    assert {q.draw for q in coarse} == {q.draw for q in fine}


@pytest.mark.parametrize("total", [400, 2000, 20_000])
def test_where_short_candidates_learn_no_long_ones_are_made(total: int) -> None:
    run = run_toy(guarded(), noisy_quadratic(), total_steps=total, lr=1e-3)
    tried = [q for q, _ in probes(run)]
    assert {(q.num_steps, q.kind) for q in tried} == {(AutoLRS().plan(total).coarse_steps, "coarse")}
    best = min(probes(run), key=lambda pair: pair[1].loss)[0].lr
    beside = sorted(q.lr / best for q in tried if q.lr != best and 0.1 < q.lr / best < 10.0)
    assert beside
    assert all(1 / 6.25 <= ratio <= 6.25 for ratio in beside)


def test_however_close_they_shall_be_there_are_no_more_than_were_asked_for() -> None:
    run = run_toy(AutoLRS(step=1.01, num_candidates=3), noisy_quadratic(), total_steps=2000, lr=1e-3)
    assert sum("between" in q.label for q, _ in probes(run)) == 3
    assert run.search_steps <= AutoLRS(step=1.01, num_candidates=3).plan(2000).search_steps


def test_between() -> None:
    ladder = Ladder(1e-9, 1e9, 10.0)
    for lr, loss in ((0.1, 3.0), (1.0, 1.0), (10.0, math.inf)):
        ladder.add(lr, ProbeResult((3.0,), (Evaluation(1, (loss,)),)))
    assert ladder.between(6.0) == pytest.approx(math.sqrt(10))
    ladder.add(math.sqrt(10), ProbeResult((3.0,), (Evaluation(1, (2.0,)),)))
    assert ladder.between(6.0) == pytest.approx(math.sqrt(0.1))
    ladder.add(math.sqrt(0.1), ProbeResult((3.0,), (Evaluation(1, (2.0,)),)))
    assert ladder.between(6.0) is None
    assert Ladder(1.0, 2.0, 10.0, results={1.0: ProbeResult((3.0,), (Evaluation(1, (2.0,)),))}).between(6.0) is None


@pytest.mark.parametrize(
    ("total", "learns", "divisor"),
    [(200, True, 2.0), (1000, False, 2.0), (5000, False, 2.0), (1000, True, 2 * 4**0.2), (5000, True, 2 * 25**0.2)],
)
def test_the_shorter_a_candidate_the_lower_the_peak(total: int, learns: bool, divisor: float) -> None:
    run = run_toy(AutoLRS(), noisy_quadratic() if learns else hardly_learning(), total_steps=total)
    (only,) = segments(run)
    assert f"divided by {divisor:.3g} since a run is longer" in only.reason


def test_few_candidates_are_enough_from_far_off() -> None:
    """A ladder that has only risen takes its next step twice as far (in decades)."""
    ladder = Ladder(1e-9, 1e9, 2.0, widen_after=3)
    for number, lr in enumerate((1.0, 2.0, 4.0, 16.0)):
        ladder.add(lr, ProbeResult((1.0,), (Evaluation(1, (9.0 - number, 9.1 - number)),)))
    assert ladder.climb() == 64.0
    ladder = Ladder(1e-9, 1e9, 2.0)
    for number, lr in enumerate((1.0, 2.0, 4.0)):
        ladder.add(lr, ProbeResult((1.0,), (Evaluation(1, (9.0 - number, 9.1 - number)),)))
    assert ladder.climb() == 8.0


def test_a_fallback_of_the_surrogate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> Suggestion:
        return Suggestion(lr=0.3, reason="the fit failed")

    monkeypatch.setattr(ladder_module, "suggest", fails)
    run = run_toy(AutoLRS(coarse_steps=0), noisy_quadratic(), total_steps=2000, lr=0.5)
    assert [q.lr for q, _ in probes(run) if "(the fit failed)" in q.label] == [0.3]


def test_short_runs_have_one_ladder_in_factors_of_ten() -> None:
    assert AutoLRS().plan(399) == Plan(0, 10, 4)
    assert AutoLRS().plan(160).probe_steps == 10
    assert AutoLRS().plan(60).probe_steps == 3
    assert AutoLRS().plan(400) == Plan(10, 16, 4)
    assert AutoLRS(coarse_steps=7).plan(200).coarse_steps == 7
    run = run_toy(AutoLRS(), noisy_quadratic(), total_steps=200, lr=1e-3)
    assert [q.lr for q, _ in probes(run)] == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])
    assert segments(run)[0].lr > 0.03


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_while_nothing_is_learnt_the_ladder_climbs(noise: float) -> None:
    """On a plateau low rates differ by noise; none of them is better for that, least of all one that trains nothing."""

    def add(ladder: Ladder, lr: float, loss: float) -> None:
        jitter = (noise * (-1) ** len(ladder.results), -2 * noise * (-1) ** len(ladder.results), noise)
        ladder.add(lr, ProbeResult((2.3,), (Evaluation(1, tuple(loss + x for x in jitter)),)))

    ladder = Ladder(1e-9, 1e9, 10.0)
    for lr, loss in ((1e-3, 2.3), (1e-2, 2.3 + 0.1 * noise), (1e-1, 2.2)):
        add(ladder, lr, loss)
        assert ladder.climb() == pytest.approx(10 * lr)
    add(ladder, 1.0, 3.0)
    assert ladder.climb() is None
    assert ladder.best == 0.1


def test_a_lower_rate_has_to_be_better_by_more_than_the_noise() -> None:
    worse, better = Evaluation(1, (2.1, 2.5)), Evaluation(1, (2.0, 2.5))
    ladder = Ladder(1e-9, 1e9, 10.0)
    ladder.add(1e-3, ProbeResult((2.3,), (better,)))
    ladder.add(1e-2, ProbeResult((2.3,), (worse,)))
    assert ladder.best == 1e-3
    assert ladder.climb() == pytest.approx(0.1)  # 0.05 +- 0.05: no worse
    ladder.add(0.1, ProbeResult((2.3,), (Evaluation(1, (9.0, 9.5)),)))
    assert ladder.climb() is None
    ladder.results[1e-2] = ProbeResult((2.3,), (Evaluation(1, (2.2, 2.6)),))
    assert ladder.climb() == pytest.approx(1e-4)  # 0.15 +- 0.05


@pytest.mark.parametrize("lr", [1e-6, 0.1, 100.0])
@pytest.mark.parametrize("total", [5000, 20_000])
def test_the_search_keeps_to_its_budget(lr: float, total: int) -> None:
    run = run_toy(AutoLRS(), noisy_quadratic(), total_steps=total, lr=lr)
    assert run.search_steps <= 0.06 * total
    assert sum(q.num_steps for q, _ in probes(run)) <= 0.06 * total


@given(total=st.integers(1, 30_000), candidates=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_the_plan_keeps_the_budget(total: int, candidates: int) -> None:
    plan = AutoLRS(num_candidates=candidates).plan(total)
    assert plan.probe_steps >= 1
    assert Ratchet().stage_steps(total) >= 1
    shares = (400, 0.25), (1250, 0.37), (5000, 0.23), (math.inf, 0.06)
    share = next(share for below, share in shares if total < below) if candidates <= 4 else 0.85
    assert plan.search_steps <= share * total + candidates


@pytest.mark.parametrize("total", [1, 2, 11, 60, 999])
@pytest.mark.parametrize("ratchet", [True, False])
def test_every_step_is_trained_and_the_end_is_small(total: int, ratchet: bool) -> None:
    run = run_toy(guarded() if ratchet else AutoLRS(), Quadratic(), total_steps=total)
    assert len(run.train_lrs) == total
    assert not run.kept
    if total >= 60:
        assert run.train_lrs[-1] < 0.1 * max(run.train_lrs)


def test_search_counts_towards_the_total_when_asked() -> None:
    run = run_toy(guarded(), noisy_quadratic(), total_steps=1000, count_search=True)
    assert len(run.train_lrs) + run.search_steps == 1000
    assert run.train_lrs[-1] < 0.1 * max(run.train_lrs)


def test_the_schedule_is_warm_up_hold_anneal() -> None:
    run = run_toy(AutoLRS(anneal_fraction=0.5, anneal=Cosine()), Quadratic(), total_steps=400)
    shape = WarmupStableDecay(num_steps=400, num_warmup_steps=0.1, num_decay_steps=0.5, decay=Cosine(), start=0.1)
    assert run.train_lrs == [segments(run)[0].lr * shape(step) for step in range(400)]


def test_candidates_that_all_diverge_leave_a_small_rate() -> None:
    search = guarded(num_candidates=3).requests(Run(total_steps=100, lr=1.0))
    request, lrs = next(search), []
    while isinstance(request, Probe) and request.num_steps:
        lrs.append(request.lr)
        request = search.send(ProbeResult((math.nan,), (), Status.DIVERGED))
    assert lrs == sorted(lrs, reverse=True)
    train = search.send(ProbeResult(evaluations=(Evaluation(0, (1.0, 1.1)),)))
    assert train.lr == pytest.approx(min(lrs) / 10 / 2.0)
    assert "diverged" in train.reason


def test_bounds_are_kept() -> None:
    run = run_toy(guarded(min_lr=1e-3, max_lr=0.05), Quadratic(), total_steps=500, lr=10.0)
    assert all(1e-3 <= q.lr <= 0.05 for q, _ in probes(run))
    fixed = run_toy(guarded(min_lr=0.2, max_lr=0.2), Quadratic(), total_steps=100)
    assert not probes(fixed)
    assert segments(fixed)[0].lr == pytest.approx(0.2)  # caution does not leave the bounds


def test_an_unknown_end_is_held() -> None:
    search = Guarded(AutoLRS(tau=200), Ratchet(longest_stage=20)).requests(Run(total_steps=None, lr=0.1))
    request, trained = next(search), []
    for number in range(60):
        if isinstance(request, Train):
            trained.append(request)
            answer = TrainResult((1.0,) * 20, start=f"s{number}")
        else:
            answer = ProbeResult((1.0,) * request.num_steps, (Evaluation(0, (1.0 / (1 + number), 1.0 / (1 + number))),))
        request = search.send(answer)
    assert len(trained) > 10
    assert all(q.num_steps == 20 and q.shape(0) == q.shape(19) == 1.0 for q in trained)


def test_after_autowu() -> None:
    search = guarded(warmup=AutoWU(min_lr=1e-4, max_lr=1.0, test_every=10))
    run = run_toy(search, noisy_quadratic(), total_steps=600)
    assert len(run.train_lrs) == 600
    first = next(i for i, (q, _) in enumerate(run.trace) if isinstance(q, Probe) and q.num_steps)
    warm = [q for q, _ in run.trace[:first] if isinstance(q, Train)]
    assert warm
    assert warm[0].lr == pytest.approx(1e-4)
    assert not run.kept


def test_replays() -> None:
    search = guarded()
    run = run_toy(search, off_centre(), total_steps=300)
    for k in range(len(run.trace)):
        assert replay(search.requests(Run(total_steps=300, lr=0.1)), run.trace[:k]) == run.trace[k][0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau": 0},
        {"num_candidates": 0},
        {"min_lr": -1.0},
        {"min_lr": 1.0, "max_lr": 0.1},
        {"max_lr": math.nan},
        {"search_budget": 0.0},
        {"search_budget": 1.0},
        {"probe_steps": 0},
        {"step": 1.0},
        {"warmup_fraction": 1.0},
        {"anneal_fraction": 0.0},
        {"caution": 0.0},
    ],
)
def test_says_no(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        replace(AutoLRS(), **wrong)


def test_needs_validation() -> None:
    with pytest.raises(ValueError, match="'train' or 'holdout'"):
        next(AutoLRS(objective="validation").requests(Run(total_steps=10, has_validation=False)))


@pytest.mark.parametrize(
    ("total", "has_validation"), [(40, True), (40, False), (390, True), (400, False), (1000, True)]
)
def test_what_scores_candidates(total: int, has_validation: bool) -> None:
    """Their training losses, of ten steps at least where there is another choice; never of one, which knows no rate."""
    run = run_toy(AutoLRS(), Quadratic(), total_steps=total, has_validation=has_validation)
    for request, answer in probes(run):
        own = request.num_steps >= 10 or not has_validation
        assert request.evaluate == ("train" if own else "validation")
        assert request.num_steps >= (2 if own else 1)
        if own and answer.status is Status.OK:
            assert answer.evaluations == (Evaluation.of_training(answer.losses),)
    assert 0.05 < segments(run)[0].lr < 2.0  # 1.0 is best, 0.1 configured


@pytest.mark.parametrize("total", [40, 400, 700, 1000])
def test_a_small_budget_without_validation(total: int) -> None:
    search = AutoLRS(search_budget=0.05)
    run = run_toy(search, Quadratic(), total_steps=total, has_validation=False)
    assert all(request.evaluate == "train" for request, _ in probes(run))
    assert min(request.num_steps for request, _ in probes(run)) >= 2


def test_the_plan_without_validation_is_the_one_that_is_made() -> None:
    assert "at most 4 candidates of 1 " in AutoLRS().describe(Run(30))
    assert "at most 4 candidates of 2 " in AutoLRS().describe(Run(30, has_validation=False))


def test_one_step_has_no_training_loss_to_score() -> None:
    for name in ("probe_steps", "coarse_steps"):
        with pytest.raises(ValueError, match="Expected candidates of 2 steps or more with objective='train'"):
            AutoLRS(objective="train", **{name: 1})
        assert AutoLRS(**{name: 1}).plan(1000)


@pytest.mark.parametrize("total", [50, 100, 399, 400, 1000, 3000, 20_000])
@pytest.mark.parametrize("budget", [0.01, 0.02, 0.1, 0.3])
def test_a_budget_that_was_asked_for_is_kept(total: int, budget: float) -> None:
    plan = AutoLRS(search_budget=budget).plan(total)
    assert plan.search_steps <= max(budget * total, plan.max_probes)
    assert plan.search_steps > budget * total - plan.max_probes - 1


def test_the_plan_says_that_autowu_goes_first() -> None:
    said = AutoLRS(warmup=AutoWU(min_lr=1e-5, max_lr=1.0)).describe(Run(total_steps=1000))
    assert said.startswith("AutoWU finds")
    assert "order of magnitude" not in said


@pytest.mark.parametrize("bounds", [{"min_lr": 2.0}, {"max_lr": 0.05}, {"min_lr": 0.01, "max_lr": 0.02}])
def test_bounds_are_kept_after_a_warm_up_too(bounds: dict[str, float]) -> None:
    search = guarded(warmup=AutoWU(min_lr=1e-3, max_lr=1.0, test_every=10), **bounds)
    run = run_toy(search, Quadratic(), total_steps=2000)
    low, high = bounds.get("min_lr", 0.0), bounds.get("max_lr", math.inf)
    assert all(low <= q.lr <= high for q, _ in probes(run))
    assert low <= segments(run)[-1].lr <= high


def test_equal_bounds_leave_nothing_to_choose() -> None:
    run = run_toy(AutoLRS(min_lr=0.3, max_lr=0.3), Quadratic(), total_steps=500)
    assert not probes(run)
    assert segments(run)[0].lr == 0.3
    assert segments(run)[0].reason.startswith("Nothing to choose from")


def peak_of(search: AutoLRS, first: float, permuted: ProbeResult) -> tuple[float, float, list[Probe]]:
    """The best candidate's learning rate, the peak, and what was asked, where 0.1 is best and the first loss is given."""
    requests = search.requests(Run(total_steps=2000, lr=0.1))
    request, asked = next(requests), []
    while isinstance(request, Probe):
        asked.append(request)
        scores = tuple(abs(math.log(request.lr / 0.1)) + first + 0.01 * i for i in range(4))
        answer = ProbeResult((first,) * request.num_steps, (Evaluation(request.num_steps, scores),))
        request = requests.send(permuted if request.permuted else answer)
    return min(asked, key=lambda q: abs(math.log(q.lr / 0.1))).lr, request.lr, asked


@pytest.mark.parametrize(
    ("first", "permuted", "factor"),
    [
        (1.0, (5.0,), 2.0),
        (4.8, (5.0,), 0.5),
        (5.5, (5.0,), 0.5),
        (-300.0, (100.0,), 2.0),  # a log-likelihood
        (-100.0, (-99.0,), 0.5),
        (1.0, (math.nan,), 0.5),
        (1.0, (math.inf,), 0.5),
        (1.0, (), 0.5),
    ],
)
def test_a_trained_network_wants_a_higher_peak_than_its_probes(
    first: float, permuted: tuple[float, ...], factor: float
) -> None:
    best, peak, asked = peak_of(AutoLRS(), first, ProbeResult(permuted))
    assert {q.num_steps for q in asked} == ({10, 1} if factor > 1 else {10, 50, 1})  # a trained one is on no plateau
    assert peak == pytest.approx(factor * best, rel=0.2)
    assert [(q.num_steps, q.draw) for q in asked if q.permuted] == [(1, asked[0].draw)]


def test_whether_it_is_trained_is_not_asked_where_it_does_not_matter() -> None:
    trained = ProbeResult((9.0,))
    best, peak, asked = peak_of(AutoLRS(caution=1.0), 1.0, trained)
    assert not any(q.permuted for q in asked)
    assert peak == pytest.approx(best, rel=0.2)
    assert not any(q.permuted for q in peak_of(AutoLRS(probe_steps=8), 1.0, trained)[2])
    assert peak_of(AutoLRS(max_lr=0.12), 1.0, trained)[1] <= 0.12
