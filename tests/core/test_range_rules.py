from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lightning_autolr.core.range_rules import (
    RULES,
    RangeCurve,
    RangeSuggestion,
    Rule,
    divergence,
    ladder,
    smooth,
    suggest,
)

Array = NDArray[np.float64]
LRS = ladder(1e-7, 10, 100)
RATIO = LRS[1] / LRS[0]


def climb(lrs: Array = LRS, centre: float = 1e-3, noise: float = 0.0, seed: int = 0) -> list[float]:
    """Losses before each step: from 2 to 1 around ``centre``, within about a decade; off to the sky beyond 100 x that."""
    x = np.log10(lrs / centre)
    after = 1.5 - 0.5 * np.tanh(2 * x) + np.exp(np.minimum(4 * (x - 2), 50))
    clean = np.concatenate([[2.0], after[:-1]])
    return (clean + noise * np.random.default_rng(seed).standard_normal(len(clean))).tolist()


def curve(losses: list[float], lrs: Array = LRS, width: float = 0.4) -> RangeCurve:
    return RangeCurve.measured(lrs.tolist(), losses, width)


def test_ladders() -> None:
    assert ladder(1e-3, 1, 5, "linear") == pytest.approx([0.001, 0.25075, 0.5005, 0.75025, 1])
    exponential = ladder(1e-8, 1, 101)
    assert exponential[[0, 25, 50, 75, 100]] == pytest.approx([1e-8, 1e-6, 1e-4, 1e-2, 1])


def test_smoothing_keeps_lines_where_a_running_mean_lags() -> None:
    losses = [4.0, 3.0, 2.0, 1.0]
    mean, lagging = 0.0, []
    for i, loss in enumerate(losses):  # Lightning 2.6's finder
        mean = 0.98 * mean + 0.02 * loss
        lagging.append(mean / (1 - 0.98 ** (i + 1)))
    assert lagging == pytest.approx([4, 3.494949, 2.986532, 2.474750], abs=1e-6)
    assert smooth([1, 10, 100, 1000], losses).values == pytest.approx(losses)


@given(
    gaps=st.lists(st.floats(0.01, 2), min_size=3, max_size=30),
    slope=st.floats(-5, 5),
    width=st.floats(0.05, 2),
)
@settings(max_examples=50)
def test_lines_over_uneven_ladders_are_exact(gaps: list[float], slope: float, width: float) -> None:
    x = np.cumsum(gaps)
    fit = smooth(10**x, 7 + slope * x, width)
    assert fit.values == pytest.approx(7 + slope * x, abs=1e-6)
    assert fit.slopes == pytest.approx(np.full(len(x), slope), abs=1e-6)
    assert (fit.errors <= 1 + 1e-9).all()


def test_the_standard_errors_are_those_of_the_noise() -> None:
    generator = np.random.default_rng(0)
    fits = np.array([smooth(LRS, generator.standard_normal(100)).values for _ in range(2000)])
    assert fits.std(axis=0) == pytest.approx(smooth(LRS, np.zeros(100)).errors, rel=0.1)


@pytest.mark.parametrize("level", [-100.0, -1.5, 0.0, 1e4])
def test_divergence_does_not_depend_on_the_sign_of_the_loss(level: float) -> None:
    losses = np.array(climb())
    index, limit = divergence((losses + level).tolist())
    assert index == divergence(losses.tolist())[0]
    # from 2 down to 1 (nearly, the running median sees it): twice as far up again
    assert limit - level == pytest.approx(3, abs=0.1)
    assert index == int(np.argmax(losses > limit - level))


def test_one_outlier_is_no_divergence() -> None:
    losses = climb(noise=0.05)[:60]
    for position in (0, 5, 58, 59):
        spoiled = list(losses)
        spoiled[position] = 1e6
        assert divergence(spoiled)[0] is None


def test_a_loss_that_is_not_finite_is_divergence_at_once() -> None:
    losses = climb()[:60]
    assert divergence([*losses, math.nan, 1.0])[0] == 60
    assert divergence([math.inf])[0] == 0
    assert curve([*losses, math.nan]).edge == pytest.approx(LRS[58])


def test_a_flat_loss_goes_nowhere() -> None:
    for level in (0.0, 1.0, -3.0):
        flat = [level] * 100
        flat[50] += 1e-9
        assert divergence(flat)[0] is None
        assert not curve(flat).fell
        assert curve(flat).edge is None


def test_a_loss_belongs_to_the_step_before_it() -> None:
    # only the step at rung 50 does anything
    losses = [2.0] * 51 + [1.0] * 49
    assert curve(losses, width=0.01).smoothed[49:51] == pytest.approx([2.0, 1.0], abs=0.4)
    assert curve(losses).losses[50] == 1.0
    assert len(curve(losses).lrs) == 99


@pytest.mark.parametrize("lrs", [LRS, ladder(1e-7, 10, 400), ladder(1e-6, 1, 60), ladder(1e-4, 0.2, 300, "linear")])
def test_the_rules_on_a_curve_with_known_answers(lrs: Array) -> None:
    got = curve(climb(lrs), lrs)
    fine = np.geomspace(1e-6, 0.2, 4000)
    x = np.log10(fine / 1e-3)
    lowest = fine[np.argmin(1.5 - 0.5 * np.tanh(2 * x) + np.exp(4 * (x - 2)))]
    assert got.fell
    # the smoothing pulls in the rise, which is steeper than the fall
    within = {"minimum": (lowest / 10, 0.4), "edge": (lowest / 4, 0.1), "steepest": (1e-3, 0.15), "valley": (1e-3, 0.2)}
    for name, (answer, decades) in within.items():
        lr = RULES[name](got)  # type: ignore[index]
        assert lr is not None
        assert abs(math.log10(lr / answer)) < decades, name
    assert got.onset is not None
    assert 1e-4 / 2 < got.onset < 1e-3 / 2


def test_the_rise_after_the_fall_does_not_matter_to_the_valley() -> None:
    # a second, deeper-looking fall from a spike beyond the minimum
    losses = climb()
    spike = [*losses[:80], *np.linspace(2.4, 1.2, 20)]
    assert curve(spike).descent == curve(losses[:80]).descent


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize(("scale", "shift", "factor"), [(1e-3, 0.0, 1.0), (50.0, -1e3, 1.0), (1.0, -4.0, 0.01)])
def test_units_of_loss_and_rate_do_not_matter(rule: Rule, scale: float, shift: float, factor: float) -> None:
    losses = climb(noise=0.03)
    moved = [scale * loss + shift for loss in losses]
    a, b = suggest([curve(losses)], rule), suggest([curve(moved, LRS * factor)], rule)
    assert a.lr is not None
    assert b.lr == pytest.approx(a.lr * factor)
    assert b.bounds == pytest.approx([bound * factor for bound in a.bounds])


def test_repeats_give_an_interval() -> None:
    curves = [curve(climb(centre=centre)) for centre in (1e-3, 2e-3, 8e-3)]
    got = suggest(curves, "steepest")
    assert (got.lower, got.upper) == (RULES["steepest"](curves[0]), RULES["steepest"](curves[2]))
    assert got.lr == RULES["steepest"](curves[1])
    assert "3 of 3 repeats" in got.reason
    one = suggest(curves[:1], "steepest")
    assert one.lower == one.lr == one.upper


@pytest.mark.parametrize("rule", ["minimum", "valley", "steepest"])
def test_noise_is_no_suggestion(rule: Rule) -> None:
    pure = [curve(np.random.default_rng(seed).standard_normal(100).tolist()) for seed in range(200)]
    assert sum(c.fell for c in pure) <= 2
    got = suggest([c for c in pure if not c.fell][:3], rule)
    assert (got.lr, got.lower, got.upper) == (None, None, None)
    assert "never fell" in got.reason


def test_the_majority_decides() -> None:
    good, bad = curve(climb()), curve([1.0] * 100)
    assert suggest([good, good, bad]).lr is not None
    assert suggest([good, bad]).lr is None
    assert suggest([good, bad, bad]).lr is None


def test_reasons_say_what_to_change() -> None:
    assert "raise max_lr" in suggest([curve(climb()[:70])], "edge").reason
    assert "lower min_lr" in suggest([curve([1.0, 5.0, math.inf])]).reason
    assert "never rises up to" in suggest([curve(climb()[:70])]).reason


def test_bounds_hold_the_fall_and_the_edge() -> None:
    got = suggest([curve(climb(noise=0.02, seed=seed)) for seed in range(3)])
    lower, upper = got.bounds
    edges = [c.edge for c in got.curves]
    assert upper == pytest.approx(3 * sorted(e for e in edges if e is not None)[1])
    assert lower <= 1e-3 / 4
    assert lower <= upper / 1000
    # never rose: the top of the ladder
    still = suggest([curve(climb()[:70])])
    assert still.bounds[1] == pytest.approx(LRS[68])


def test_bounds_exist_without_a_suggestion() -> None:
    flat = suggest([curve([1.0] * 100)])
    assert flat.lr is None
    assert flat.bounds == pytest.approx((LRS[98] / 1000, LRS[98]))
    gone = RangeSuggestion(None, None, None, "", (curve([1.0, math.inf]),))
    assert gone.bounds[1] == pytest.approx(LRS[0])


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_noise_moves_the_suggestions_little(noise: float) -> None:
    for rule, decades in {"minimum": 0.2, "edge": 0.4, "valley": 0.2}.items():
        clean = suggest([curve(climb())], rule).lr  # type: ignore[arg-type]
        assert clean is not None
        found = [suggest([curve(climb(noise=noise, seed=seed))], rule).lr for seed in range(20)]  # type: ignore[arg-type]
        lrs = [lr for lr in found if lr is not None]
        assert len(lrs) == 20
        assert np.abs(np.log10(lrs) - math.log10(clean)).mean() < decades


def test_errors() -> None:
    with pytest.raises(ValueError, match="at least one curve"):
        suggest([])
    with pytest.raises(ValueError, match="rule out of"):
        suggest([curve(climb())], "best")  # type: ignore[arg-type]


def test_bounds_without_any_finite_loss() -> None:
    found = suggest([RangeCurve.measured([1e-3], [math.inf])])
    with pytest.raises(ValueError, match="Expected finite training losses at the bottom of the ladder, got none"):
        _ = found.bounds
