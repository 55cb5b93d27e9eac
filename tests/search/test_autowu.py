from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from benchmarks.autowu_switch import CURVES, drive, position
from lightning_autolr.core.minimum import Hyperparameters, Regression
from lightning_autolr.core.requests import Answer, Request, Requests, Run, Status, Train, TrainResult, decode
from lightning_autolr.schedules import Constant, Cosine, HalfCosine, Linear, OneCycle, Rex, to_plain
from lightning_autolr.search import autowu
from lightning_autolr.search.autowu import AutoWU, WarmupRange
from lightning_autolr.search.base import AbstractSearch, ReplayError, replay
from tests.toy import run_toy
from tests.zoo import Quadratic, noisy_quadratic

THOUSAND = Run(total_steps=1000)  # W = 500
Losses = Callable[[int, float], float]  # of step and learning rate


def run(requests: Generator[Request, Any, Any], losses: Losses, total: int = 1000) -> list[tuple[Train, TrainResult]]:
    """Answer until the search or the run ends. A loss that is not finite or too high ends the segment, if guarded."""
    record: list[tuple[Train, TrainResult]] = []
    step, request = 0, next(requests, None)
    while request is not None and step < total:
        assert isinstance(request, Train)
        made: list[float] = []
        status = Status.OK
        for i in range(min(request.num_steps or total, total - step)):
            made.append(losses(step, request.lr * request.shape(i)))
            step += 1
            if request.stop_above is not None and not made[-1] <= request.stop_above:
                status = Status.DIVERGED
                break
        start = f"s{len(record)}" if request.keep_start else None
        record.append((request, TrainResult(tuple(made), status, start)))
        try:
            request = requests.send(record[-1][1])
        except StopIteration:
            request = None
    return record


def lrs(record: Sequence[tuple[Train, TrainResult]]) -> list[float]:
    return [train.lr * train.shape(i) for train, answer in record for i in range(len(answer.losses))]


def finish(warmup: Generator[Request, Any, WarmupRange], losses: Losses) -> WarmupRange:
    found: list[WarmupRange] = []

    def requests() -> Requests:
        found.append((yield from warmup))

    run(requests(), losses)
    return found[0]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the statistics by given verdicts and positions of the minimum."""

    def install(verdicts: Iterator[bool] | Sequence[bool], argmins: Sequence[float] = (0.8,)) -> None:
        answers = iter(verdicts)

        class Scripted:
            def __init__(self, *options: Any) -> None: ...

            def __call__(self, losses: Sequence[float]) -> Regression:
                nothing = np.zeros(2)
                return Regression(
                    nothing, nothing, nothing, nothing, np.array(argmins), next(answers), Hyperparameters()
                )

        monkeypatch.setattr(autowu, "PastMinimum", Scripted)

    return install


def flat(step: int, lr: float) -> float:
    return 1.0


@pytest.mark.parametrize("guard", [4.0, None])
def test_the_learning_rate_grows_by_a_constant_factor(guard: float | None, script: Any) -> None:
    script(itertools.repeat(False))
    made = lrs(run(AutoWU(guard=guard).requests(THOUSAND), flat))[:500]
    np.testing.assert_allclose(made, 1e-5 * 1.0232929923 ** np.arange(500), rtol=1e-7)
    golden = {0: 1e-5, 1: 1.0232930e-5, 100: 1e-4, 250: 3.1622777e-3, 400: 0.1}
    np.testing.assert_allclose([made[t] for t in golden], list(golden.values()), rtol=1e-6)
    assert AutoWU().lr_at(500, 500) == pytest.approx(1.0)


def test_linear_growth(script: Any) -> None:
    script(itertools.repeat(False))
    search = AutoWU(growth="linear", min_lr=0.1, max_lr=0.6, guard=None)
    np.testing.assert_allclose(lrs(run(search.requests(THOUSAND), flat))[:500], 0.1 + np.arange(500) * 1e-3)


def test_the_learning_rate_goes_back_to_the_mean_over_the_draws(script: Any) -> None:
    script(itertools.repeat(True), argmins=(0.78, 0.8, 0.8, 0.82, 0.79))
    found = finish(AutoWU(test_every=100).warmup(THOUSAND), flat)  # three times yes: at step 300, at 1e-2
    assert found.lr == pytest.approx(2.487959e-3, rel=1e-6)
    assert (found.outcome, found.num_steps) == ("minimum", 301)  # 1 to give up the kept state
    assert found.bounds == pytest.approx((2.487959e-4, 1e-2 / 1.0232929923))


@pytest.mark.parametrize(
    ("verdicts", "patience", "num_tests"),
    [("yynyyy", 3, 6), ("yyy", 3, 3), ("nnynyy", 2, 6), ("ny", 1, 2)],
)
def test_patience_counts_verdicts_in_a_row(verdicts: str, patience: int, num_tests: int, script: Any) -> None:
    script([v == "y" for v in verdicts])
    found = finish(AutoWU(test_every=20, patience=patience, guard=None).warmup(THOUSAND), flat)
    assert (found.outcome, found.num_steps) == ("minimum", 20 * num_tests)


def test_then_any_schedule_takes_it_to_zero_over_the_rest_of_the_run(script: Any) -> None:
    expected = {0: 2.5118864e-3, 175: 2.1440292e-3, 350: 1.2559432e-3, 525: 3.678572e-4}
    for decay in (Cosine(), Rex(), Linear(), Constant(0.5), HalfCosine()):
        script(itertools.repeat(True))
        search = AutoWU(test_every=100, guard=None, decay=decay)
        made = lrs(run(search.requests(THOUSAND), flat))
        assert len(made) == 1000
        shape = decay.stretched(700)
        np.testing.assert_allclose(made[300:], [2.5118864315e-3 * shape(s) for s in range(700)], rtol=1e-9)
        if decay == Cosine():
            np.testing.assert_allclose([made[300 + s] for s in expected], list(expected.values()), rtol=1e-6)


def test_the_guard_changes_no_learning_rate_of_a_good_run(script: Any) -> None:
    for options in ({}, {"immediate_cooldown": False}):
        made = []
        for guard in (4.0, None):
            script(itertools.repeat(True))
            search = AutoWU(test_every=100, guard=guard, **options)  # type: ignore[arg-type]
            made.append(lrs(run(search.requests(THOUSAND), flat)))
        assert made[0][:300] == made[1][:300]
        # one step later, the step that gives up the kept state
        shape = search._shape(1000, 699)
        np.testing.assert_allclose(made[0][301:], [made[0][300] * shape(s) for s in range(699)], rtol=1e-12)


def test_constant_then_cosine(script: Any) -> None:
    script(itertools.repeat(True))
    search = AutoWU(test_every=100, guard=None, immediate_cooldown=False, cooldown_fraction=0.2)
    made = np.array(lrs(run(search.requests(THOUSAND), flat)))[300:] / 2.5118864315e-3
    np.testing.assert_allclose(made[:500], 1.0, rtol=1e-9)
    np.testing.assert_allclose(made[500:], [Cosine(num_steps=200)(s) for s in range(200)], atol=1e-9)


def test_momentum_of_the_decay_is_asked_for(script: Any) -> None:
    script(itertools.repeat(True))
    record = run(AutoWU(test_every=100, decay=OneCycle()).requests(THOUSAND), flat)
    momenta = [t.momentum(i) for t, a in record for i in range(len(a.losses)) if t.momentum is not None]
    expected = OneCycle(num_steps=699).momentum_schedule()
    assert expected is not None
    np.testing.assert_allclose(momenta, [expected(s) for s in range(699)], rtol=1e-12)


def test_plateaus_lower_a_held_learning_rate(script: Any) -> None:
    """Epochs of 20 steps; the loss stays the same, so every third epoch without gain halves the learning rate."""
    script(itertools.repeat(True))
    search = AutoWU(
        test_every=100, guard=None, immediate_cooldown=False, plateau_factor=0.5, plateau_patience=2, decay=Linear()
    )
    run_ = Run(total_steps=1000, steps_per_epoch=20)
    made = np.array(lrs(run(search.requests(run_), flat)))[300:] / 2.5118864315e-3
    # the first epoch is the best one so far, the three after it bring nothing, and again
    epochs = [1.0] * 4 + [0.5**k for k in range(1, 8) for _ in range(3)]
    np.testing.assert_allclose(made[:500], np.repeat(epochs, 20)[:500], rtol=1e-9)
    np.testing.assert_allclose(made[500:], 0.5**8 * (1 - np.arange(200) / 200), rtol=1e-9)

    script(itertools.repeat(True))
    falling = lrs(run(search.requests(run_), lambda step, lr: math.exp(-step / 100)))[300:800]
    assert len(set(falling)) == 1


def test_without_a_minimum_it_goes_on_from_the_last_estimate(script: Any) -> None:
    script(itertools.repeat(False), argmins=(0.9,))
    found = finish(AutoWU(guard=None).warmup(THOUSAND), flat)
    assert (found.outcome, found.num_steps) == ("none", 500)
    assert found.lr == pytest.approx(1e-5 * 1e5**0.9)


def test_the_published_rules(script: Any) -> None:
    epochs = Run(total_steps=1000, steps_per_epoch=100)
    script(itertools.repeat(True))
    made = lrs(run(AutoWU(compat=True).requests(epochs), flat))
    now = 1e-5 * 1.0232929923**299  # of the last step, not of the step to come
    start = 1e-5 * (now / 1e-5) ** 0.8
    # the scheduler that follows has made a step when the first batch comes, and ends at 0 sharp
    np.testing.assert_allclose(made[300:], [start * Cosine(num_steps=700)(s + 1) for s in range(700)], rtol=1e-7)
    assert made[-1] == 0.0

    script(itertools.repeat(False), argmins=(0.1,))
    found = finish(AutoWU(compat=True).warmup(epochs), flat)
    assert (found.outcome, found.num_steps) == ("none", 500)
    assert found.lr == pytest.approx(1e-5 * 1.0232929923**499)  # near max_lr, whatever the losses say

    script(itertools.repeat(True))
    held = lrs(run(AutoWU(compat=True, immediate_cooldown=False).requests(epochs), flat))
    np.testing.assert_allclose(held[300:800], start, rtol=1e-7)
    np.testing.assert_allclose(held[800:], [start * Cosine(num_steps=200)(s + 1) for s in range(200)], rtol=1e-7)


def test_tests_come_every_epoch_but_often_enough() -> None:
    def interval(total: int, **facts: Any) -> int | None:
        options = {name: facts.pop(name) for name in ("test_every", "compat") if name in facts}
        return next(AutoWU(**options).requests(Run(total_steps=total, **facts))).num_steps  # type: ignore[union-attr]

    assert interval(1000) == 25  # W / 20
    assert interval(1000, steps_per_epoch=12) == 12
    assert interval(1000, steps_per_epoch=400) == 25
    assert interval(100_000, steps_per_epoch=1) == 500  # W / 100
    assert interval(10) == 1
    assert interval(1000, steps_per_epoch=12, test_every=7) == 7
    assert interval(1000, steps_per_epoch=400, compat=True) == 400
    with pytest.raises(ValueError, match="known length of an epoch"):
        interval(1000, compat=True)


# --- the guard -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_warm_up_from_the_last_good_state(script: Any) -> None:
    script(itertools.repeat(False), argmins=(0.95,))
    record = run(AutoWU().requests(THOUSAND), lambda step, lr: 2 - step / 1000 if lr < 0.0099 else math.nan)
    assert [a.status for t, a in record if t.label == "warm-up"][-2:] == [Status.DIVERGED, Status.OK]
    # 0.0099 is passed at step 300, the first of its segment: the state before it is good, the rate there is not
    assert len(record[12][1].losses) == 1
    back = record[13][0]
    assert back.start == record[12][1].start
    assert back.release == (back.start,)
    assert back.lr == pytest.approx(1e-5 * 1e5 ** (0.95 * 301 / 500))
    assert len(lrs(record)) == 1000


def test_a_loss_that_runs_away_goes_back_to_its_lowest_point(script: Any) -> None:
    script(itertools.repeat(False), argmins=(1.0,))

    def losses(step: int, lr: float) -> float:
        return 3 - step / 100 if step < 200 else 1 + 0.05 * (step - 200)

    record = run(AutoWU(test_every=50).requests(THOUSAND), losses)
    # The mean over about 50 losses is lowest at the end of the fourth segment: the state there is kept until the end.
    number = next(i for i, (t, _) in enumerate(record) if t.start is not None)
    assert [t.keep_start for t, _ in record[:number]] == [True] * 5 + [False] * (number - 5)
    assert 300 <= 50 * number <= 400  # four times as high
    back = record[number][0]
    assert back.start == record[4][1].start
    assert back.lr == pytest.approx(1e-5 * 1e5 ** (200 / 500))  # no higher than where that state was
    assert "back to step 200" in back.reason


@pytest.mark.parametrize(("verdicts", "goes_back"), [("yyy", True), ("nnnnnnnnny", True), ("nnnnnnnnnn", False)])
def test_the_state_goes_back_when_the_loss_has_risen(verdicts: str, goes_back: bool, script: Any) -> None:
    script([v == "y" for v in verdicts])
    rising = run(AutoWU(test_every=50).requests(THOUSAND), lambda step, lr: 1 + abs(step - 75) / 1000)
    kept = rising[2][1].start  # before step 100, as the mean over 50 losses is then lowest
    last = next(t for t, _ in rising if t.stage == 1)
    assert last.start == (kept if goes_back else None)
    assert last.release == (kept,)


@pytest.mark.parametrize(("shift", "scale"), [(0, 1), (-100, 1), (0, 1e-3), (0, 1e3)])
def test_noise_does_not_look_like_running_away(shift: float, scale: float, script: Any) -> None:
    script(itertools.repeat(False))
    noise = np.random.default_rng(0).exponential(size=1000)  # heavy: as large as the loss itself
    found = finish(AutoWU(test_every=1).warmup(THOUSAND), lambda step, lr: scale * float(noise[step]) + shift)
    assert found.outcome == "none"


def test_losses_around_zero_may_cross_it(script: Any) -> None:
    script(itertools.repeat(False))
    found = finish(AutoWU().warmup(THOUSAND), lambda step, lr: 10 * math.cos(step / 40) * math.exp(-step / 60))
    assert found.outcome == "none"


def test_a_decay_that_runs_away_begins_again_at_half(script: Any) -> None:
    script(itertools.repeat(True), argmins=(1.0,))
    limit = 0.3e-2  # the warm-up finds 1e-2

    def losses(step: int, lr: float) -> float:
        return math.inf if step > 300 and lr > limit else 1 + 0.1 * math.sin(step)

    record = run(AutoWU(test_every=100).requests(THOUSAND), losses)
    decay = [t for t, _ in record if t.label == "decay"]
    assert [t.lr for t in decay] == pytest.approx([1e-2, 0.5e-2, 0.25e-2, 0.25e-2])
    assert decay[0].keep_start
    assert {t.start for t in decay[1:3]} == {record[4][1].start}
    assert decay[3].release == (record[4][1].start,)
    assert len(lrs(record)) == 1000


def test_no_state_is_kept_without_a_guard(script: Any) -> None:
    script(itertools.repeat(True))
    record = run(AutoWU(guard=None).requests(THOUSAND), flat)
    assert not any(t.keep_start or t.start or t.release or t.stop_above for t, _ in record)


# --- with the real statistics --------------------------------------------------------------------------------------------

SEARCH = AutoWU(test_every=10)


@pytest.mark.parametrize("name", ["noisy", "plateau first", "diverging", "flattening"])
def test_the_minimum_of_a_curve_is_found(name: str) -> None:
    curve = CURVES[name]
    found, _ = drive(SEARCH, curve, seed=0, total_steps=200)
    if curve.minimum is None:
        assert found.outcome == "none"
    else:
        assert found.outcome == ("diverged" if name == "diverging" else "minimum")
        assert curve.minimum <= (found.num_steps - 1) / 100 <= 1.0
        assert abs(position(found.lr) - curve.minimum) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVES)
def test_the_switch_comes_in_its_window(name: str) -> None:
    curve = CURVES[name]
    for seed in range(5):
        found, _ = drive(AutoWU(seed=seed), curve, seed, total_steps=400)
        if curve.minimum is None:
            assert found.outcome == "none"
        else:
            assert curve.minimum <= (found.num_steps - 1) / 200 <= curve.window


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_unit_of_the_loss_does_not_move_the_switch(scale: float) -> None:
    one, _ = drive(SEARCH, CURVES["noisy"], seed=1, total_steps=120)
    other, _ = drive(SEARCH, CURVES["noisy"], seed=1, total_steps=120, scale=scale)
    assert (other.num_steps, other.outcome) == (one.num_steps, one.outcome)
    assert other.lr == pytest.approx(one.lr, rel=1e-3)


def test_a_run_is_continued_anywhere() -> None:
    search = AutoWU(test_every=8, patience=1)
    problem = noisy_quadratic(5)
    record = run_toy(search, problem, total_steps=80).trace
    assert len({t.label for t, _ in record}) == 2
    again = [(decode(to_plain(request)), decode(to_plain(answer))) for request, answer in record]
    for length in (0, 1, len(record) - 1):
        following = record[length][0]
        assert replay(search.requests(Run(total_steps=80)), again[:length]) == following
    with pytest.raises(ReplayError):
        replay(dataclasses.replace(search, max_lr=2.0).requests(Run(total_steps=80)), again)


def test_gradient_descent_is_brought_back_from_beyond_its_limit() -> None:
    """On this quadratic everything above 0.2 diverges, and the warm-up goes up to 100."""
    result = run_toy(AutoWU(max_lr=100.0, test_every=5), Quadratic(curvature=(10.0, 0.1), start=(1.0, 1.0)), 200)
    assert max(result.train_lrs) > 0.2  # it did go beyond
    assert 0.01 < max(result.path[-50:]) < 0.2
    assert result.kept == ()
    assert result.most_kept <= 1
    assert result.losses[-1] < 0.05
    assert len(result.train_lrs) == 200


def test_another_search_goes_on_where_the_warm_up_ended(script: Any) -> None:
    script(itertools.repeat(True))

    @dataclasses.dataclass(frozen=True)
    class Then(AbstractSearch):
        def requests(self, run: Run) -> Requests:
            found = yield from AutoWU(test_every=10).warmup(run)
            yield Train(found.lr, None, label=f"{found.bounds[0]:.1e} to {found.bounds[1]:.1e}")

    result = run_toy(Then(), noisy_quadratic(3), total_steps=100)
    low, high = (float(b) for b in result.trace[-1][0].label.split(" to "))
    assert low < result.train_lrs[-1] <= high * 1.1
    assert result.kept == ()


# --- options -------------------------------------------------------------------------------------------------------------


def test_a_run_of_unknown_length_is_refused() -> None:
    with pytest.raises(ValueError, match="known length, got total_steps=None"):
        next(AutoWU().requests(Run(total_steps=None)))


def test_losses_must_come() -> None:
    requests = AutoWU().requests(THOUSAND)
    next(requests)
    with pytest.raises(ValueError, match="Return them from `training_step`"):
        requests.send(TrainResult(skipped=tuple(range(25))))


@pytest.mark.parametrize(
    "options",
    [
        {"min_lr": 0.0},
        {"max_lr": 1e-6},
        {"max_warmup_fraction": 1.0},
        {"cooldown_fraction": 0.0},
        {"growth": "cubic"},
        {"confidence": 1.0},
        {"num_tests": 0},
        {"patience": 0},
        {"test_every": 0},
        {"plateau_factor": 0.0},
        {"plateau_patience": -1},
        {"guard": 1.0},
        {"seed": -1},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        AutoWU(**options)


@pytest.mark.parametrize("total", [1, 2, 3, 12])
@pytest.mark.parametrize("search", [AutoWU(), AutoWU(guard=None), AutoWU(immediate_cooldown=False)])
def test_the_shortest_runs_end(total: int, search: AutoWU) -> None:
    record = run(search.requests(Run(total_steps=total)), flat, total)
    assert len(lrs(record)) == total


def test_half_cosine() -> None:
    assert decode(to_plain(HalfCosine(num_steps=40))) == HalfCosine(num_steps=40)
    golden = [0.5, 0.308658, 0.146447, 0.038060, 0]
    np.testing.assert_allclose([HalfCosine(num_steps=400)(s) for s in range(0, 401, 100)], golden, atol=5e-7)


def test_every_request_survives_the_journal(script: Any) -> None:
    script(itertools.repeat(True))
    record: list[tuple[Request, Answer]] = [*run(AutoWU(growth="linear").requests(THOUSAND), flat)]
    assert [decode(to_plain(r)) for r, _ in record] == [r for r, _ in record]
