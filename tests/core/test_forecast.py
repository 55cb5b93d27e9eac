"""The two fits of the loss curve: golden values, closed forms, a twin in scipy, and honest uncertainty."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from lightning_autolr.core.forecast import Forecast, forecast

T = np.arange(100.0)


def exponential(a: float, rate: float, c: float, t: Any = T) -> Any:
    return a * np.exp(-rate * t) + c


@pytest.mark.parametrize(
    ("series", "curve", "value"),
    [
        (exponential(2, 0.01, 0.5), (2, -0.01, 0.5), 0.500091),
        (exponential(2, 0.05, 0.5), (2, -0.05, 0.5), 0.5),
        (exponential(1.5, 0.002, 0.8), (1.5, -0.002, 0.8), 1.003003),
        (3 - 0.001 * T, (1.050308, -0.001, 1.9505), 2.336887),
        (3 - 0.01 * T, (10.50308, -0.001, -7.495001), 0.0),
        (1 + 0.01 * T, (-10.50308, -0.001, 11.495001), 7.631133),
        (exponential(-3, 0.03, 5), (-3, -0.03, 5), 5.0),
    ],
)
def test_the_bounded_fit(series: Any, curve: tuple[float, float, float], value: float) -> None:
    """Golden values at horizon 1000; the lines sit on the bound of the rate."""
    found = forecast(series, 1000)
    assert (found.a, found.b, found.c) == pytest.approx(curve, abs=1e-6)
    assert found.value == pytest.approx(value, abs=1e-6)
    assert found.reason == ""


@pytest.mark.parametrize(
    ("series", "curve", "value"),
    [
        (exponential(2, 0.01, 0.5), (2.091663, -0.009040, 0.384356), 0.384604),
        (exponential(2, 0.05, 0.5), (1.153454, -0.027103, 0.399908), 0.399908),
    ],
)
def test_the_reference_fit(series: Any, curve: tuple[float, float, float], value: float) -> None:
    """Golden values of the authors' code (scipy 1.17), whose filter takes good early points for outliers."""
    found = forecast(series, 1000, estimator="reference")
    assert (found.a, found.b, found.c) == pytest.approx(curve, abs=1e-6)
    assert found.value == pytest.approx(value, abs=1e-6)


def test_the_reference_fit_follows_a_line_below_zero() -> None:
    assert forecast(3 - 0.01 * T, 1000, estimator="reference").value == pytest.approx(-7.0, abs=1e-3)


def test_the_reference_fit_survives_a_column_without_rank() -> None:
    assert math.isfinite(forecast(1 + 0.1 * np.exp(0.05 * T), 1000, estimator="reference").value)


def test_the_reference_filter_for_validation_removes_one_point() -> None:
    """On a parabola nothing but the spike is an outlier, so removing one point more or less is all that may differ."""
    parabola = 2 - 0.1 * T[:16] + 0.004 * T[:16] ** 2
    spiked = parabola.copy()
    spiked[3] += 0.5
    clean = forecast(parabola, 160, estimator="reference", single_outlier=True)
    mended = forecast(spiked, 160, estimator="reference", single_outlier=True)
    assert mended.value == pytest.approx(clean.value, rel=1e-3)


@pytest.mark.parametrize("estimator", ["bounded", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_forecasts_infinity(estimator: Any, bad: float) -> None:
    found = forecast([1.0, bad, 1.0, 1.0, 1.0], 10, estimator=estimator)
    assert (found.value, found.reason) == (math.inf, "a loss is not finite")


@pytest.mark.parametrize("estimator", ["bounded", "reference"])
def test_a_constant_series_forecasts_itself(estimator: Any) -> None:
    assert forecast([1.0] * 100, 1000, estimator=estimator) == Forecast(1.0, 1.0, 0.0, reason="the loss is constant")


@pytest.mark.parametrize("losses", [[2.0], [2.0, 1.5], [2.0, 1.5, 1.2]])
def test_too_few_losses_forecast_the_last_one(losses: list[float]) -> None:
    found = forecast(losses, 100)
    assert (found.value, found.stderr, found.a) == (losses[-1], math.inf, None)


def test_a_jump_is_not_extrapolated() -> None:
    jump = np.concatenate([[1.0, 30.0], exponential(29, 0.1, 1.0)])
    assert forecast(jump, 1000).value == pytest.approx(np.mean(jump[-10:]))
    assert forecast(jump, 1000, jump_factor=None).a is not None


def test_the_floor() -> None:
    falling = 3 - 0.01 * T
    assert forecast(falling, 1000, floor=0.5).value == 0.5
    assert forecast(falling - 10, 1000).value < -10, "losses below zero have no floor unless one is given"


def test_the_twin_in_scipy() -> None:
    """With noise, the fit is the bounded least-squares solution that scipy's own routine finds."""
    for seed in range(20):
        generator = np.random.default_rng(seed)
        truth = (2.0, generator.uniform(0.01, 0.05), 0.5)
        series = exponential(*truth) + 0.05 * generator.standard_normal(100)
        (a, rate, c), _ = curve_fit(lambda t, a, r, c: exponential(a, r, c, t), T, series, p0=truth)
        found = forecast(series, 1000)
        assert (found.a, found.b, found.c) == pytest.approx((a, -rate, c), rel=1e-4)


Cases = list[tuple[float, Any, Forecast]]


@pytest.fixture(scope="module")
def cases() -> Cases:
    """True end, series, forecast: mostly decays, slow to fast, in noise from 0.3 % to 30 % of the amplitude."""
    cases = []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        rate, noise = np.exp(generator.uniform(np.log([5e-4, 0.003]), np.log([0.1, 0.3])))
        a, c = generator.choice([1, 1, 1, -0.5]), generator.uniform(0.5, 2)
        series = exponential(a, rate, c) + noise * generator.standard_normal(100)
        cases.append((float(exponential(a, rate, c, 1000)), series, forecast(series, 1000)))
    return cases


def test_the_error_is_about_what_was_announced(cases: Cases) -> None:
    errors = np.array([found.value - truth for truth, _, found in cases if not found.reason])
    announced = np.array([found.stderr for _, _, found in cases if not found.reason])
    assert 0.8 < np.mean(np.abs(errors) < 2 * announced) <= 1
    assert np.corrcoef(np.abs(errors), announced)[0, 1] > 0.3


def test_a_fit_that_says_nothing_is_not_believed(cases: Cases) -> None:
    doubted = [(truth, series, found) for truth, series, found in cases if found.reason]
    assert len(doubted) > 20
    for _, series, found in doubted:
        assert found.value == found.tail == pytest.approx(np.mean(series[-10:]))
    wildest = max(abs(found.value - truth) for truth, _, found in cases)
    unguarded = max(abs(forecast(series, 1000, estimator="reference").value - truth) for truth, series, _ in cases)
    assert wildest < 3 < unguarded


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.01, 100), shift=st.floats(-10, 10), seed=st.integers(0, 1000))
def test_units_do_not_matter(scale: float, shift: float, seed: int) -> None:
    series = exponential(2, 0.02, 0.5) + 0.05 * np.random.default_rng(seed).standard_normal(100)
    here = forecast(series, 1000, floor=-math.inf, jump_factor=None)
    there = forecast(scale * series + shift, 1000, floor=-math.inf, jump_factor=None)
    assert there.value == pytest.approx(scale * here.value + shift, rel=1e-5, abs=1e-5 * scale)
    assert there.stderr == pytest.approx(scale * here.stderr, rel=1e-3)


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        ([], {}, "at least one loss"),
        ([1.0], {"horizon": 0}, "horizon > 0"),
        ([1.0], {"horizon": math.inf}, "horizon > 0"),
        ([1.0], {"estimator": "magic"}, "'bounded' or 'reference'"),
    ],
)
def test_bad_input(losses: list[float], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forecast(losses, **{"horizon": 10, **options})
