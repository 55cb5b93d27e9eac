"""Schedules: their formulas, their algebra, and that each survives a file, a process and a config."""

from __future__ import annotations

import io
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

import lightning_autolr.schedules as schedules
from lightning_autolr.core.requests import Train, decode
from lightning_autolr.schedules import (
    Constant,
    Cosine,
    Cyclic,
    DelayedLinear,
    Exponential,
    HalfCosine,
    Joined,
    Linear,
    OneCycle,
    Points,
    Polynomial,
    Rex,
    Sampled,
    Scaled,
    Schedule,
    Segment,
    Shifted,
    Step,
    Tabulated,
    WarmRestarts,
    Warmup,
    WarmupStableDecay,
    from_plain,
    to_lr_scheduler,
    to_plain,
)

TABLE = Tabulated((Segment(3, 0.1), Segment(4, 0.3, Linear(4), undone=True), Segment(5, 1 / 3, Cosine(5), back_to=1)))

# Every kind of schedule; a new one is one line here.
ZOO: list[Schedule] = [
    Constant(0.5),
    Linear(20),
    Cosine(20, end=0.1),
    Exponential(20),
    Step(20, at=(0.25, 0.5)),
    Polynomial(20, power=1.7),
    Rex(20, d=0.9),
    HalfCosine(20),
    DelayedLinear(20, delay=0.75),
    OneCycle(20),
    Points((0.2, 1.0, 0.4, 0.0), 20),
    Cyclic(step_size=7, momentum=(0.8, 0.9)),
    Cyclic(step_size=7, mode="triangular2"),
    Cyclic(step_size=7, mode="exp_range", gamma=0.99),
    WarmRestarts(period=4, mult=2, low=0.01),
    WarmupStableDecay(20),
    WarmupStableDecay(20, num_warmup_steps=3, num_decay_steps=8, decay=Cosine(), start=0.1),
    Warmup(Rex(20), num_warmup_steps=5),
    Warmup(OneCycle(20), num_warmup_steps=0.25, start=0.5, in_budget=False),
    Joined((Linear(10), Constant(), Warmup(Cyclic(step_size=3), 2)), (10, 15)),
    Scaled(Joined((Points((0.1, 1.0), 5), Cosine(15)), (5,)), 2.0),
    Shifted(WarmupStableDecay(30), by=10),
    Shifted(Cyclic(step_size=7, momentum=(0.8, 0.9)), by=3),
    Sampled(Cosine(20)),
    Sampled(Rex(20), rate=0.1),
    Sampled(Warmup(Linear(20), 0.1), rate=(0.3, 10, 0.7)),
    Sampled(Cyclic(step_size=5), rate=3),
    Tabulated((Segment(5, 1.0, Linear()), Segment(15, 0.5, momentum=Constant(0.9))), absolute=False),
    TABLE,
    Warmup(TABLE.kept(), num_warmup_steps=4),
]

FRACTIONS: list[Schedule] = [
    Linear(),
    Cosine(end=0.1),
    Rex(),
    OneCycle(),
    Points((1.0, 0.5, 0.0)),
    WarmupStableDecay(),
    Warmup(Rex(), num_warmup_steps=0.1),
    Warmup(Rex(), num_warmup_steps=0.1, in_budget=False),
    Warmup(Constant(), num_warmup_steps=0.1),
    Joined((Linear(), Cosine()), (0.25,)),
    Scaled(Exponential(), 0.3),
    Sampled(Rex(), rate=(0.5, 0.75)),
    Cyclic(step_size=0.25),
    WarmRestarts(period=0.1, mult=2),
]

OPEN = [
    *FRACTIONS,
    Warmup(Rex(), num_warmup_steps=5),
    WarmupStableDecay(num_warmup_steps=5, decay=Cosine()),
    Joined((Linear(), Constant(), Step()), (5, 0.5)),
    Shifted(Cosine(), by=5),
    Sampled(Cyclic(step_size=2), rate=0.25),
    Sampled(Constant(), rate=(0.1, 3)),
]


def kind(value: object) -> str:
    return type(value).__name__


every = pytest.mark.parametrize("schedule", ZOO, ids=kind)


def values(schedule: Schedule, num_steps: int) -> list[float]:
    return [schedule(step) for step in range(num_steps)]


def at_progress(profile: Schedule, *progress: float, num_steps: int = 1000) -> list[float]:
    return [profile.stretched(num_steps)(s * num_steps) for s in progress]


def group(lr: float | torch.Tensor = 1.0) -> dict[str, Any]:
    return {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr}


def sgd(*groups: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups or [group()], lr=1.0, momentum=0.9)


def follow(scheduler: Any, num_steps: int, key: str = "lr") -> list[list[float]]:
    """What each group trains with at each step."""
    seen = []
    for _ in range(num_steps):
        seen.append([float(g[key]) for g in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


# -- formulas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (Rex(), (1, 0.947368, 0.857143, 0.666667, 0.4, 0.181818, 0.019802, 0)),
        (Rex(d=0.9), (1, 0.989011, 0.967742, 0.909091, 0.769231, 0.526316, 0.091743, 0)),
        (Rex(d=0.0), (1, 0.9, 0.75, 0.5, 0.25, 0.1, 0.01, 0)),
        (Linear(), (1, 0.9, 0.75, 0.5, 0.25, 0.1, 0.01, 0)),
        (Polynomial(power=2), (1, 0.81, 0.5625, 0.25, 0.0625, 0.01, 0.0001, 0)),
        (Cosine(), (1, 0.975528, 0.853553, 0.5, 0.146447, 0.024472, 0.000247, 0)),
        (Exponential(), (1, 0.740818, 0.472367, 0.223130, 0.105399, 0.067206, 0.051303, 0.049787)),
    ],
    ids=kind,
)
def test_profiles(profile: Schedule, expected: Sequence[float]) -> None:
    assert at_progress(profile, 0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1) == pytest.approx(expected, abs=1e-6)


def test_rex() -> None:
    expected = (1, 0.947368, 0.888889, 0.823529, 0.75, 0.666667, 0.571429, 0.461538, 0.333333, 0.181818, 0)
    assert values(Rex(10), 11) == pytest.approx(expected, abs=1e-6)
    assert Rex(10)(9) == pytest.approx(2 / 11)  # the last step that is trained
    many = 10_000
    assert sum(values(Rex(many), many)) / many == pytest.approx(2 * (1 - math.log(2)), abs=1e-4)
    for step in range(10):
        assert Rex(10)(step) / Linear(10)(step) == pytest.approx(1 / (1 - step / 20))


@pytest.mark.parametrize("decay", [Linear, Cosine, Polynomial, Rex, DelayedLinear])
def test_end_is_the_lowest_value(decay: Callable[..., Schedule]) -> None:
    raised, plain = decay(10, end=0.2), decay(10)
    assert [raised(0), raised(10), raised(11)] == pytest.approx([1.0, 0.2, 0.2])
    assert raised(6) == pytest.approx(0.2 + 0.8 * plain(6))


def test_step() -> None:
    assert at_progress(Step(), 0.49, 0.5, 0.74, 0.75) == pytest.approx([1, 0.1, 0.1, 0.01])
    wide_resnet = Step(200, factor=0.2, at=(0.3, 0.6, 0.8))
    assert [wide_resnet(e) for e in (59, 60, 119, 120, 159, 160)] == pytest.approx([1, 0.2, 0.2, 0.04, 0.04, 0.008])


@pytest.mark.parametrize(
    ("delay", "expected"),
    [(0.25, (1, 1, 0.666667, 0.333333, 0)), (0.5, (1, 1, 1, 0.5, 0)), (0.75, (1, 1, 1, 1, 0))],
)
def test_delayed_linear(delay: float, expected: Sequence[float]) -> None:
    assert at_progress(DelayedLinear(delay=delay), 0, 0.25, 0.5, 0.75, 1) == pytest.approx(expected, abs=1e-6)


def test_one_cycle() -> None:
    assert at_progress(OneCycle(), 0, 0.25, 0.5, 0.75, 1) == pytest.approx([0.1, 0.55, 1, 0.55, 0.1])
    momentum = OneCycle().momentum_schedule()
    assert momentum is not None
    assert at_progress(momentum, 0, 0.25, 0.5, 0.75, 1) == pytest.approx([0.95, 0.9, 0.85, 0.9, 0.95])
    assert OneCycle(momentum=None).momentum_schedule() is None


def test_points_are_met_exactly() -> None:
    table = [math.sin(i) ** 2 for i in range(50)]
    assert values(Points(table, 49), 50) == table
    assert Points((0.0, 1.0), 4)(1) == 0.25
    assert values(Points([0.3], 4), 6) == [0.3] * 6


@pytest.mark.parametrize(
    ("profile", "at", "expected"),
    [
        (Sampled(Rex(), (0.5, 0.75)), (0, 0.49, 0.5, 0.74, 0.75, 1), (1, 1, 0.666667, 0.666667, 0.4, 0.4)),
        (Sampled(Linear(), (0.5, 0.75)), (0, 0.49, 0.5, 0.74, 0.75, 1), (1, 1, 0.5, 0.5, 0.25, 0.25)),
        (Sampled(Rex(), 0.1), (0, 0.05, 0.1, 0.55, 0.95), (1, 1, 0.947368, 0.666667, 0.181818)),
    ],
    ids=kind,
)
def test_sampled(profile: Schedule, at: Sequence[float], expected: Sequence[float]) -> None:
    assert at_progress(profile, *at) == pytest.approx(expected, abs=1e-6)


@given(st.integers(1, 60), st.integers(1, 200))
def test_a_sample_point_is_read_at_its_own_step(parts: int, steps_per_part: int) -> None:
    """However the fraction is rounded, the k-th of n parts begins at step k T / n."""
    total = parts * steps_per_part
    sampled = Sampled(Linear(total), rate=1 / parts)
    for part in range(parts):
        first = part * steps_per_part
        assert [sampled(first), sampled(first + steps_per_part - 1)] == pytest.approx([1 - first / total] * 2)


@pytest.mark.parametrize("percent", range(1, 100))
def test_a_sample_point_in_percent_is_a_step(percent: int) -> None:
    """0.07 * 100 is a little more than 7."""
    for rate in (percent / 100, (percent / 100,)):
        sampled = Sampled(Linear(100), rate)
        assert [sampled(percent - 1), sampled(percent)] == pytest.approx([1, 1 - percent / 100])


def test_sampled_every_so_many_steps() -> None:
    assert values(Sampled(Linear(10), rate=4), 10) == pytest.approx([1, 1, 1, 1, 0.6, 0.6, 0.6, 0.6, 0.2, 0.2])
    assert values(Sampled(Rex(10)), 12) == pytest.approx(values(Rex(10), 12))


CLR_STEPS = (0, 1000, 2000, 3000, 4000, 5000, 6000, 8000, 10000)


@pytest.mark.parametrize(
    ("mode", "gamma", "expected"),
    [
        ("triangular", 1.0, (0.001, 0.0035, 0.006, 0.0035, 0.001, 0.0035, 0.006, 0.001, 0.006)),
        ("triangular2", 1.0, (0.001, 0.0035, 0.006, 0.0035, 0.001, 0.00225, 0.0035, 0.001, 0.00225)),
        (
            "exp_range",
            0.99994,
            (0.001, 0.00335441, 0.00543459, 0.00308816, 0.001, 0.00285203, 0.00448834, 0.001, 0.00374401),
        ),
    ],
)
def test_cyclic(mode: Any, gamma: float, expected: Sequence[float]) -> None:
    cyclic = Scaled(Cyclic(mode=mode, gamma=gamma), 0.006)
    assert [cyclic(step) for step in CLR_STEPS] == pytest.approx(expected, abs=1e-8)


def test_warm_restarts() -> None:
    sgdr = Scaled(WarmRestarts(period=10, mult=2), 0.05)
    expected = (0.05, 0.025, 0.00122359, 0.05, 0.025, 0.00030779, 0.05, 0.025, 0.00007707, 0.05)
    assert [sgdr(t) for t in (0, 5, 9, 10, 20, 29, 30, 50, 69, 70)] == pytest.approx(expected, abs=1e-8)
    assert values(WarmRestarts(period=3), 9) == pytest.approx([1, 0.75, 0.25] * 3)


def test_ramps_of_a_range_test() -> None:
    linear, exponential = Points((1e-3, 1), 4), Scaled(Exponential(100, gamma=math.log(1e8)), 1e-8)
    assert values(linear, 5) == pytest.approx([0.001, 0.25075, 0.5005, 0.75025, 1])
    assert [exponential(t) for t in (0, 25, 50, 75, 100)] == pytest.approx([1e-8, 1e-6, 1e-4, 1e-2, 1])


def test_warmup() -> None:
    linear_lr = Scaled(Warmup(Constant(), 5, start=1 / 3), 0.005)
    assert values(linear_lr, 8) == pytest.approx(
        [0.0016667, 0.0023333, 0.003, 0.0036667, 0.0043333] + [0.005] * 3, abs=1e-7
    )
    inside, outside = Warmup(Cosine(100), 20), Warmup(Cosine(100), 20, in_budget=False)
    assert (inside.length, outside.length) == (100, 120)
    assert [inside(t) for t in (0, 10, 20, 60, 100)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert [outside(t) for t in (0, 10, 20, 70, 120)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert values(Warmup(Cosine(100), 0.2), 100) == values(inside, 100)
    assert values(Warmup(Rex(10), 0), 12) == values(Rex(10), 12)
    assert Warmup(OneCycle(10), 5)(4) == pytest.approx(0.8 * OneCycle(10)(0))  # it climbs to where the cycle begins


def test_warmup_stable_decay() -> None:
    wsd = WarmupStableDecay(100, num_warmup_steps=0.1, num_decay_steps=20, start=0.5)
    assert [wsd(t) for t in (0, 5, 10, 50, 80, 90, 100, 101)] == pytest.approx([0.5, 0.75, 1, 1, 1, 0.5, 0, 0])
    short = WarmupStableDecay(6, num_warmup_steps=4, num_decay_steps=4)
    assert values(short, 7) == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.5, 0])


# -- the same as torch's own classes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (Cosine(20, end=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20, eta_min=0.1)),
        (Polynomial(20, power=1.5), lambda o: lr_scheduler.PolynomialLR(o, total_iters=20, power=1.5)),
        (Step(20), lambda o: lr_scheduler.MultiStepLR(o, milestones=[10, 15])),
        (Exponential(20), lambda o: lr_scheduler.ExponentialLR(o, gamma=math.exp(-3 / 20))),
        (Warmup(Constant(), 5, start=1 / 3), lr_scheduler.LinearLR),
        (WarmRestarts(4, mult=2), lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4, T_mult=2)),
        (Cyclic(step_size=5), lambda o: lr_scheduler.CyclicLR(o, 1 / 6, 1.0, step_size_up=5)),
        (
            Cyclic(step_size=5, mode="triangular2"),
            lambda o: lr_scheduler.CyclicLR(o, 1 / 6, 1.0, step_size_up=5, mode="triangular2"),
        ),
        (
            Cyclic(step_size=5, mode="exp_range", gamma=0.97),
            lambda o: lr_scheduler.CyclicLR(o, 1 / 6, 1.0, step_size_up=5, mode="exp_range", gamma=0.97),
        ),
    ],
    ids=kind,
)
def test_agrees_with_torch(schedule: Schedule, make: Callable[[torch.optim.Optimizer], Any]) -> None:
    theirs = follow(make(sgd()), 20)  # CosineAnnealingLR rises again after T_max, ours does not
    ours = follow(to_lr_scheduler(schedule, sgd()), 20)
    assert [lr for (lr,) in ours] == pytest.approx([lr for (lr,) in theirs], abs=1e-12)


def test_one_cycle_agrees_with_torch() -> None:
    """With two linear phases and no annihilation; torch reaches the end at step T - 1, we at step T."""

    def theirs(key: str) -> list[float]:
        # Torch's first phase ends at pct_start * total_steps - 1: that is step 10.
        options: Any = {"pct_start": 11 / 21, "anneal_strategy": "linear", "div_factor": 10, "final_div_factor": 1}
        scheduler = lr_scheduler.OneCycleLR(sgd(), max_lr=1.0, total_steps=21, **options)
        return [value for (value,) in follow(scheduler, 20, key)]

    cycle = OneCycle(20)
    momentum = cycle.momentum_schedule()
    assert momentum is not None
    assert values(cycle, 20) == pytest.approx(theirs("lr"))
    assert values(momentum, 20) == pytest.approx(theirs("momentum"))


@pytest.mark.parametrize(("mode", "gamma"), [("triangular", 1.0), ("triangular2", 1.0), ("exp_range", 0.97)])
def test_cyclic_momentum_agrees_with_torch(mode: Any, gamma: float) -> None:
    scheduler = lr_scheduler.CyclicLR(sgd(), 0.1, 1.0, step_size_up=4, mode=mode, gamma=gamma)
    momentum = Cyclic(step_size=4, mode=mode, gamma=gamma, momentum=(0.8, 0.9)).momentum_schedule()
    assert momentum is not None
    assert values(momentum, 30) == pytest.approx([m for (m,) in follow(scheduler, 30, "momentum")])


# -- what holds for every schedule -------------------------------------------------------------------------------------


def test_every_public_schedule_is_in_the_zoo() -> None:
    public = {getattr(schedules, name) for name in schedules.__all__}
    kinds = {cls for cls in public if isinstance(cls, type) and issubclass(cls, Schedule)}
    assert kinds - {type(s) for s in ZOO} == {schedules.Schedule, schedules.Profile}


@every
def test_values_are_finite_and_not_negative(schedule: Schedule) -> None:
    for step in (*range(100), 10**9, 0.5, 12.25):
        assert math.isfinite(schedule(step))
        assert schedule(step) >= 0.0


@every
def test_past_the_end_it_stays_at_the_end(schedule: Schedule) -> None:
    if schedule.length is not None:
        end = schedule(schedule.length)
        assert [schedule(schedule.length + more) for more in (1, 10, 10**6)] == [end] * 3


@every
def test_is_a_value(schedule: Schedule) -> None:
    schedule(3)  # what a call caches must not show
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert hash(copy) == hash(schedule)
    assert values(copy, 30) == values(schedule, 30)
    assert eval(repr(schedule), vars(schedules)) == schedule
    assert [other for other in ZOO if other == schedule] == [schedule]
    with pytest.raises(AttributeError):
        schedule.anything = 1  # type: ignore[attr-defined]


@every
def test_survives_json_to_the_bit(schedule: Schedule) -> None:
    copy = from_plain(json.loads(json.dumps(to_plain(schedule))), (Segment,))
    assert copy == schedule
    assert values(copy, 30) == values(schedule, 30)


@every
def test_survives_a_recorded_request(schedule: Schedule) -> None:
    request = Train(lr=0.1, num_steps=20, shape=schedule)
    assert decode(json.loads(json.dumps(to_plain(request)))) == request


@every
def test_scaling_and_sampling_leave_the_rest_alone(schedule: Schedule) -> None:
    assert values(Scaled(schedule, 3.0), 30) == [3.0 * value for value in values(schedule, 30)]
    # Joined at step 0 or alone, and sampled at every step, a schedule is itself.
    assert values(Joined((schedule,), ()), 30) == values(schedule, 30)
    assert values(Joined((schedule, schedule), (0,)), 30) == values(schedule, 30)
    assert values(Sampled(schedule), 30) == values(schedule, 30)
    for wrapped in (Scaled(schedule, 3.0), Joined((schedule,), ()), Sampled(schedule), Warmup(schedule, 2)):
        assert wrapped.absolute == schedule.absolute
        assert wrapped.length == schedule.length


@every
def test_composes_with_a_warmup(schedule: Schedule) -> None:
    for in_budget in (True, False):
        warm = Warmup(schedule, 4, start=0.25, in_budget=in_budget)
        assert warm(4) == pytest.approx(schedule(0))
        assert warm(2) == pytest.approx(schedule(0) * 0.625)


@every
def test_stretched_again_is_itself(schedule: Schedule) -> None:
    if schedule.length is not None:
        assert values(schedule.stretched(schedule.length), 40) == values(schedule, 40)


@pytest.mark.parametrize("schedule", OPEN, ids=kind)
class TestOpen:
    """Schedules with a number of steps still to be filled in."""

    def test_refuses_to_be_called(self, schedule: Schedule) -> None:
        assert not schedule.is_resolved
        assert schedule.length is None
        with pytest.raises(ValueError, match=r"Expected a known number of steps.*stretched"):
            schedule(0)

    @pytest.mark.parametrize("num_steps", [40, 1, 0, 10_000])
    def test_is_filled_in(self, schedule: Schedule, num_steps: int) -> None:
        full = schedule.stretched(num_steps)
        assert full.is_resolved
        assert full.length in (num_steps, None) or num_steps < 10  # a warm-up of 5 steps is longer than a run of 1
        assert all(math.isfinite(full(step)) for step in (0, 1, num_steps // 2, num_steps, num_steps + 1))

    def test_is_a_value(self, schedule: Schedule) -> None:
        assert pickle.loads(pickle.dumps(schedule)) == schedule
        assert eval(repr(schedule), vars(schedules)) == schedule
        assert from_plain(json.loads(json.dumps(to_plain(schedule)))) == schedule


@pytest.mark.parametrize("schedule", FRACTIONS, ids=kind)
def test_equal_progress_means_equal_value(schedule: Schedule) -> None:
    short, long = schedule.stretched(220), schedule.stretched(22_000)
    assert [short(t) for t in range(220)] == pytest.approx([long(100 * t) for t in range(220)])


def test_stretching_keeps_steps_and_lets_fractions_follow() -> None:
    assert Warmup(Cosine(), 50).stretched(1000) == Warmup(Cosine(950), 50, in_budget=False)
    assert Warmup(Cosine(), 0.1).stretched(1000) == Warmup(Cosine(900), 100, in_budget=False)
    assert Warmup(Cosine(), 0.25, in_budget=False).stretched(1000) == Warmup(Cosine(800), 200, in_budget=False)
    joined = Joined((Linear(), Linear(30), Cosine(70)), (0.1, 0.5)).stretched(200)
    assert joined == Joined((Linear(20), Linear(30), Cosine(100)), (20, 100))
    assert Scaled(Rex(), 0.5).stretched(10) == Scaled(Rex(10), 0.5)
    assert Sampled(Rex(), 0.5).stretched(10) == Sampled(Rex(10), 0.5)
    assert Sampled(Constant(), (0.5, 7)).stretched(10) == Sampled(Constant(), (5, 7))
    assert Cyclic(step_size=0.25).stretched(10_000) == Cyclic(step_size=2500)
    assert Cyclic(step_size=7).stretched(100) == Cyclic(step_size=7)


def test_shifted() -> None:
    shifted = Shifted(Cosine(20), by=5)
    assert shifted.length == 15
    assert values(shifted, 20) == values(Cosine(20), 25)[5:]
    assert shifted.stretched(30) == Shifted(Cosine(40), by=10)
    assert Shifted(Cosine(), by=5).stretched(15) == shifted
    momentum = Shifted(OneCycle(20), by=5).momentum_schedule()
    assert momentum is not None
    assert momentum(5) == pytest.approx(0.85)


def test_fractions_of_a_known_budget_need_no_stretching() -> None:
    assert Warmup(Cosine(100), 0.1).is_resolved
    assert Sampled(Cosine(100), 0.1).is_resolved


def test_no_steps_is_the_start_value() -> None:
    assert values(Rex(0), 3) == [1.0] * 3
    assert values(Cosine(0), 3) == [1.0] * 3
    assert values(WarmupStableDecay(0), 3) == [1.0] * 3


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.data())
def test_joined_is_continuous_where_ends_meet(corners: list[float], data: st.DataObject) -> None:
    lengths = [data.draw(st.integers(1, 50)) for _ in corners[1:]]
    pieces = [Points((a, b), n) for a, b, n in zip(corners, corners[1:], lengths, strict=False)]
    boundaries = [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]
    joined = Joined(tuple(pieces), tuple(boundaries))
    assert joined.length == sum(lengths)
    for boundary, corner in zip(boundaries, corners[1:-1], strict=True):
        assert joined(boundary - 1e-9) == pytest.approx(corner, abs=1e-7)
        assert joined(boundary) == corner


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0, 1))
def test_warmup_is_continuous(warmup: int, rest: int, start: float) -> None:
    schedule = Warmup(Rex(rest), warmup, start=start, in_budget=False)
    assert schedule(warmup - 1e-9) == pytest.approx(schedule(warmup), abs=1e-6)


@given(st.floats(0, 0.999), st.floats(0, 1), st.integers(1, 1000), st.data())
def test_rex_family_falls_from_one_and_is_above_linear(d: float, end: float, n: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, n - 1))
    rex, linear = Rex(n, d=d, end=end), Linear(n, end=end)
    assert rex(0) == 1.0
    assert rex(step) >= rex(step + 1)
    assert rex(step) >= linear(step) - 1e-12


# -- momentum ----------------------------------------------------------------------------------------------------------


def test_momentum_goes_through_compositions() -> None:
    def momentum(schedule: Schedule) -> Schedule:
        found = schedule.momentum_schedule()
        assert found is not None
        return found

    cycle = OneCycle(10)
    assert momentum(Scaled(cycle, 2.0)) == momentum(cycle)
    warm = momentum(Warmup(cycle, 4, in_budget=False))
    assert [warm(t) for t in (0, 3, 4, 9, 14)] == pytest.approx([0.95, 0.95, 0.95, 0.85, 0.95])
    # A piece without momentum keeps what it finds; one before the first cycle takes the value that comes.
    joined = momentum(Joined((Constant(), OneCycle(10, momentum=(0.8, 0.9)), Linear(5)), (5, 10)))
    assert [joined(t) for t in (0, 4, 5, 9, 10, 14)] == pytest.approx([0.9, 0.9, 0.9, 0.82, 0.8, 0.8])
    sampled = momentum(Sampled(cycle, rate=5))
    assert [sampled(t) for t in (0, 4, 5, 9)] == pytest.approx([0.95, 0.95, 0.85, 0.85])
    partly = momentum(Sampled(Joined((cycle, Linear(10)), (10,)), rate=0.25))
    assert [partly(t) for t in (0, 4, 5, 9, 10, 19)] == pytest.approx([0.95, 0.95, 0.85, 0.85, 0.95, 0.95])
    table = momentum(Tabulated((Segment(2, 0.1), Segment(3, 0.1, momentum=Constant(0.7)))))
    assert values(table, 6) == [0.7] * 6
    wsd = momentum(WarmupStableDecay(20, num_warmup_steps=5, num_decay_steps=10, decay=OneCycle()))
    assert [wsd(t) for t in (0, 9, 10, 15, 20)] == pytest.approx([0.95, 0.95, 0.95, 0.85, 0.95])
    assert WarmupStableDecay(20).momentum_schedule() is None
    assert all(s.momentum_schedule() is None for s in (Rex(5), Warmup(Rex(5), 2), Joined((Rex(5),), ()), TABLE))
    with pytest.raises(ValueError, match="known number"):
        Joined((OneCycle(), Linear()), (0.9,)).momentum_schedule()


# -- tables ------------------------------------------------------------------------------------------------------------


def test_table_is_lr_times_shape_to_the_bit() -> None:
    step = 0
    for segment in TABLE.segments:
        for i in range(segment.num_steps):
            assert TABLE(step) == segment.lr * segment.shape(i)
            step += 1
    assert TABLE.length == step == 12


def test_table_survives_a_file_to_the_bit(tmp_path: Path) -> None:
    table = Tabulated(tuple(Segment(1, math.exp(-i) / 3, Rex(7, d=1 / (i + 2))) for i in range(50)))
    path = tmp_path / "deep" / "schedule.json"
    table.to_file(path)
    table.to_file(path)  # a second write replaces the first
    again = Tabulated.from_file(path)
    assert again == table
    assert values(again, 60) == values(table, 60)
    assert [file.name for file in path.parent.iterdir()] == ["schedule.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1, 2]",
        '{"type": "Rex", "num_steps": 10}',
        '{"type": "Tabulated"}',
        '{"type": "Tabulated", "segments": [{"type": "Segment", "num_steps": 1, "lr": 0.1, "color": 3}]}',
        '{"type": "Unknown"}',
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"Expected a schedule written by Tabulated\.to_file"):
        Tabulated.from_file(path)


def test_undone_segments_count_their_steps() -> None:
    assert TABLE(3) == 0.3
    assert TABLE.kept().length == 8
    assert TABLE.kept()(3) == TABLE(7)
    assert all(segment.back_to is None for segment in TABLE.kept().segments)


def test_numbers_of_numpy_become_plain() -> None:
    table = Tabulated((Segment(np.int64(2), np.float64(0.1), Constant(np.float32(0.5))),))  # type: ignore[arg-type]
    plain = to_plain(table)["segments"][0]
    assert [type(plain["num_steps"]), type(plain["lr"]), type(plain["shape"]["value"])] == [int, float, float]
    assert from_plain(plain, (Segment,)) == table.segments[0]


def test_open_shapes_span_their_segment() -> None:
    assert Segment(8, 0.1, Linear()) == Segment(8, 0.1, Linear(8))


def test_stretched_table_keeps_its_proportions() -> None:
    twice = TABLE.stretched(24)
    assert [s.num_steps for s in twice.segments] == [6, 8, 10]
    assert [twice(2 * t) for t in range(12)] == pytest.approx(values(TABLE, 12))
    assert TABLE.stretched(12) is TABLE
    assert TABLE.stretched(1).length == 1


def test_empty_segments_are_passed_over() -> None:
    table = Tabulated((Segment(2, 0.1), Segment(0, 9.0), Segment(2, 0.2)))
    assert values(table, 5) == [0.1, 0.1, 0.2, 0.2, 0.2]


def test_a_table_without_empty_segments_goes_back_to_the_same_states() -> None:
    """Segments 1 and 3 are empty: what went back to 1 stays where it is, and 5 goes back to before 2."""
    parts = [(2, None), (0, None), (3, 1), (0, 2), (4, None), (1, 3)]
    table = Tabulated(tuple(Segment(n, 0.1, back_to=back_to) for n, back_to in parts))
    found = table.without_empty()
    assert [(s.num_steps, s.back_to) for s in found.segments] == [(2, None), (3, None), (4, 1), (1, 1)]
    assert TABLE.without_empty() == TABLE


def test_a_table_stretched_to_a_shorter_run_ends_where_it_did() -> None:
    """The last segment of one step gets none: the table goes on past its end as before."""
    table = Tabulated((Segment(99, 0.1), Segment(1, 0.2, Linear(2), momentum=Linear(1))))
    short = table.stretched(10)
    assert [s.num_steps for s in short.segments] == [10, 0]
    assert short(10) == table(100) == 0.1
    assert short.without_empty() == short


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-1.0), "finite value"),
        (lambda: Constant(math.nan), "finite value"),
        (lambda: Linear(-1), "num_steps to be an integer >= 0"),
        (lambda: Linear(10.5), "num_steps to be an integer"),
        (lambda: Cosine(10, end=1.5), r"end in \[0, 1\]"),
        (lambda: Exponential(10, gamma=math.inf), "finite gamma"),
        (lambda: Polynomial(10, power=-1), "power"),
        (lambda: Rex(10, d=1.0), "0 <= d < 1"),
        (lambda: DelayedLinear(10, delay=1.0), "0 <= delay < 1"),
        (lambda: Step(10, at=(0.75, 0.5)), "rising"),
        (lambda: Step(10, at=(0.5, 60)), r"at entry in \[0, 1\]"),
        (lambda: Points(()), "at least one value"),
        (lambda: Points((1.0, -0.1)), "values entry"),
        (lambda: OneCycle(10, momentum=(0.95, 0.85)), "0 <= low <= high < 1"),
        (lambda: Cyclic(step_size=0), "step_size > 0"),
        (lambda: Cyclic(mode="square"), "triangular2"),
        (lambda: Cyclic(gamma=1.1), "0 < gamma <= 1"),
        (lambda: WarmRestarts(0), "period > 0"),
        (lambda: WarmRestarts(10, mult=0), "mult >= 1"),
        (lambda: WarmRestarts(10, mult=1.5), "integer mult"),
        (lambda: Warmup(Linear(10), -1), "num_warmup_steps to be an integer"),
        (lambda: Warmup(Linear(10), 1.5), r"integer \(steps\) or a float in \[0, 1\]"),
        (lambda: Joined((Linear(10), Linear(10)), ()), "one boundary less"),
        (lambda: Joined((), ()), "one boundary less"),
        (lambda: Joined((Linear(1), Linear(1), Linear(1)), (20, 10)), "rising"),
        (lambda: Joined((TABLE, Linear(10)), (5,)), "only factors or only learning rates"),
        (lambda: Scaled(Linear(10), -1.0), "factor"),
        (lambda: Shifted(Linear(10), -1), "by to be an integer >= 0"),
        (lambda: Sampled(Linear(10), 0), "rate > 0"),
        (lambda: Sampled(Linear(10), (0.5, 1.5)), "rate entry"),
        (lambda: Segment(-1, 0.1), "num_steps"),
        (lambda: Segment(1, math.inf), "lr"),
        (lambda: Segment(1, 0.1, TABLE), "shape of factors"),
        (lambda: Tabulated(()), "at least one segment"),
        (lambda: Tabulated((Segment(1, 0.1, back_to=0),)), "back to an earlier"),
    ],
)
def test_mistakes_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected.*{message}"):
        make()


# -- YAML --------------------------------------------------------------------------------------------------------------


def from_yaml(config: object) -> Schedule:
    """Load by class path, and once more from what the parser prints."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=Schedule)
    parsed = parser.parse_string(yaml.safe_dump({"schedule": config}))
    first, second = (
        jsonargparse_instantiate(parser, parsed),
        jsonargparse_instantiate(parser, parser.parse_string(parser.dump(parsed))),
    )
    assert first == second
    assert isinstance(first, Schedule)
    return first


def jsonargparse_instantiate(parser: jsonargparse.ArgumentParser, config: jsonargparse.Namespace) -> Any:
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in 4.49
    return instantiate(config).schedule


def as_config(value: Any) -> Any:
    """The YAML a user would write for a schedule, with every option spelled out."""
    if isinstance(value, dict) and "type" in value:
        options = {name: as_config(v) for name, v in value.items() if name != "type"}
        kind = value["type"]
        return (
            options if kind == "Segment" else {"class_path": f"lightning_autolr.schedules.{kind}", "init_args": options}
        )
    return [as_config(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("schedule", ZOO + OPEN, ids=kind)
def test_loads_from_yaml(schedule: Schedule) -> None:
    assert from_yaml(as_config(to_plain(schedule))) == schedule


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        ("Cosine", Cosine()),
        ({"class_path": "Rex", "init_args": {"d": 0.9}}, Rex(d=0.9)),
        ({"class_path": "Warmup", "init_args": {"schedule": "Cosine", "num_warmup_steps": 0.1}}, Warmup(Cosine(), 0.1)),
        ({"class_path": "Warmup", "init_args": {"schedule": "Cosine", "num_warmup_steps": 100}}, Warmup(Cosine(), 100)),
        (
            {
                "class_path": "Joined",
                "init_args": {"schedules": ["Linear", {"class_path": "Rex"}], "boundaries": [0.25]},
            },
            Joined((Linear(), Rex()), (0.25,)),
        ),
        ({"class_path": "WarmupStableDecay", "init_args": {"decay": "Cosine"}}, WarmupStableDecay(decay=Cosine())),
        (
            {"class_path": "Tabulated", "init_args": {"segments": [{"num_steps": 8, "lr": 0.1, "shape": "Linear"}]}},
            Tabulated((Segment(8, 0.1, Linear(8)),)),
        ),
    ],
)
def test_short_yaml(config: object, schedule: Schedule) -> None:
    assert from_yaml(config) == schedule


def test_table_from_a_file_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    TABLE.to_file(path)
    class_path = "lightning_autolr.schedules.Tabulated.from_file"
    assert from_yaml({"class_path": class_path, "init_args": {"path": str(path)}}) == TABLE
    stretched = from_yaml({"class_path": class_path, "init_args": {"path": str(path), "num_steps": 40}})
    assert stretched == TABLE.kept().stretched(40)
    with pytest.raises(ValueError, match="Expected num_steps to be an integer >= 1"):
        Tabulated.from_file(path, num_steps=2.5)


# -- torch schedulers --------------------------------------------------------------------------------------------------


@every
def test_torch_scheduler_keeps_group_ratios(schedule: Schedule) -> None:
    if isinstance(schedule, Tabulated):
        schedule = schedule.kept()
    scheduler = to_lr_scheduler(schedule, sgd(group(0.2), group(2.0)))
    peak = 1.0 if schedule.absolute else 2.0
    for step, (small, large) in enumerate(follow(scheduler, 25)):
        assert large == peak * schedule(step)
        assert small == pytest.approx(large / 10)


def test_torch_scheduler_fills_a_tensor_in_place() -> None:
    lr = torch.tensor(0.5)
    scheduler = to_lr_scheduler(Linear(4), torch.optim.Adam([group(lr)]))
    follow(scheduler, 2)
    assert scheduler.optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25


@every
def test_torch_scheduler_resumes(schedule: Schedule) -> None:
    if isinstance(schedule, Tabulated):
        schedule = schedule.kept()
    whole = follow(to_lr_scheduler(schedule, sgd(group(0.2), group(2.0))), 24)

    first = to_lr_scheduler(schedule, sgd(group(0.2), group(2.0)))
    begun = follow(first, 9)
    saved = io.BytesIO()
    torch.save({"scheduler": first.state_dict(), "optimizer": first.optimizer.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)

    # The saved schedule goes on, whichever the new process was given; and that one is not touched.
    other = Rex(1000)
    second = to_lr_scheduler(other, sgd(group(0.3), group(0.4)))
    second.optimizer.load_state_dict(state["optimizer"])
    second.load_state_dict(state["scheduler"])
    assert begun + follow(second, 15) == whole
    assert other == Rex(1000)


def test_torch_scheduler_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="known number of steps"):
        to_lr_scheduler(Cosine(), sgd())
    with pytest.raises(ValueError, match=r"undone.*kept"):
        to_lr_scheduler(TABLE, sgd())
    with pytest.raises(ValueError, match="without undone segments"):
        to_lr_scheduler(Scaled(TABLE, 1.0), sgd())
    with pytest.raises(ValueError, match="learning rate > 0"):
        to_lr_scheduler(TABLE.kept(), sgd(group(0.0)))


def test_import_is_light() -> None:
    code = "import sys, lightning_autolr.schedules; print(sorted({'torch', 'lightning', 'scipy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
