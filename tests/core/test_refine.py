"""Refinement: the closed form, the cleaning and smoothing before it, and the one-run variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_autolr.core.refine import refine_online, refine_schedule, refined_values, smoothed_norms
from lightning_autolr.schedules import Tabulated

NORMS = arrays(np.float64, st.integers(2, 60), elements=st.floats(1e-3, 1e3))


def factors(schedule: Tabulated) -> list[float]:
    return [schedule(step) for step in range(schedule.length)]


def spiky_norms() -> np.ndarray:
    t = np.arange(30)
    norms = np.round(1 + 3 * np.exp(-t / 4) + 0.2 * np.maximum(t - 25, 0), 4)
    norms[10] = 9.0
    return norms


@pytest.mark.parametrize(
    ("norms", "power", "raw"),
    [
        ((1, 1, 1, 1, 1), 1, (0.8, 0.6, 0.4, 0.2, 0)),
        ((1, 1, 1, 1, 1), 2, (0.8, 0.6, 0.4, 0.2, 0)),
        ((4, 2, 1, 1, 1, 2), 2, (0.061404, 0.228070, 0.631579, 0.350877, 0.070175, 0)),
        ((4, 2, 1, 1, 1, 2), 1, (0.235294, 0.411765, 0.588235, 0.352941, 0.117647, 0)),
        ((1, 2, 4, 8), 2, (0.247059, 0.014706, 0.000735, 0)),
        ((1, 2, 4, 8), 1, (0.466667, 0.1, 0.016667, 0)),
        ((8, 4, 2, 1), 2, (0.015441, 0.058824, 0.188235, 0)),
        ((8, 4, 2, 1), 1, (0.116667, 0.2, 0.266667, 0)),
    ],
)
def test_closed_form(norms: tuple[float, ...], power: float, raw: tuple[float, ...]) -> None:
    assert refined_values(norms, power) == pytest.approx(raw, abs=1e-6)


@pytest.mark.parametrize(
    ("norms", "norm", "normalised"),
    [
        ((1, 1, 1, 1, 1), "l2", (1, 0.75, 0.5, 0.25, 0)),
        ((4, 2, 1, 1, 1, 2), "l2", (0.097222, 0.361111, 1, 0.555556, 0.111111, 0)),
        ((4, 2, 1, 1, 1, 2), "l1", (0.4, 0.7, 1, 0.6, 0.2, 0)),
        ((1, 2, 4, 8), "l2", (1, 0.059524, 0.002976, 0)),
        ((1, 2, 4, 8), "l1", (1, 0.214286, 0.035714, 0)),
        ((8, 4, 2, 1), "l2", (0.082031, 0.3125, 1, 0)),
        ((8, 4, 2, 1), "l1", (0.4375, 0.75, 1, 0)),
    ],
)
def test_normalised_factors(norms: tuple[float, ...], norm: Any, normalised: tuple[float, ...]) -> None:
    assert factors(refine_schedule(norms, norm=norm, smoothing=0)) == pytest.approx(normalised, abs=1e-6)


def test_closed_form_is_the_sum_over_the_steps_behind() -> None:
    norms = np.linspace(1, 3, 17)
    weights = norms**-2.0
    expected = [weights[t] * sum(weights[t + 1 :]) / sum(weights) for t in range(17)]
    assert refined_values(norms, 2) == pytest.approx(expected)


@pytest.mark.parametrize(("length", "width"), [(20, 3), (50, 5), (100, 11), (1000, 101), (10_000, 1001)])
def test_width_of_the_filter(length: int, width: int) -> None:
    """A block of ones survives a median filter once it fills more than half of the window, and not before."""
    half = width // 2
    for ones, survives in ((half, False), (half + 1, True)):
        norms = np.full(length, 2.0)
        middle = length // 2 - half // 2
        norms[middle : middle + ones] = 1.0
        assert (smoothed_norms(norms).min() == 1.0) == survives


def test_ten_steps_are_not_smoothed() -> None:
    norms = [1.0, 9.0] * 5
    assert smoothed_norms(norms).tolist() == norms
    with pytest.warns(UserWarning, match="too few"):
        refine_schedule(norms)


def test_the_whole_way_on_a_spiky_sequence() -> None:
    smoothed = smoothed_norms(spiky_norms())
    assert [smoothed[9], smoothed[10], smoothed[29]] == pytest.approx([1.4060, 1.3162, 1.6027])
    values = factors(refine_schedule(spiky_norms()))
    assert np.argmax(values) == 12
    expected = [0.110435, 0.486494, 0.841879, 0.946302, 0.620727, 0.182990, 0.014247, 0]
    assert [values[t] for t in (0, 5, 10, 15, 20, 25, 28, 29)] == pytest.approx(expected, abs=1e-6)


def test_right_end_is_reflected_and_left_end_held() -> None:
    smoothed = smoothed_norms(np.arange(1.0, 51.0))  # width 5
    assert smoothed[-1] == 49.0  # median of 48, 49, 50 and the reflected 49, 48; held, it would be 50
    assert smoothed[0] == 1.0  # median of 1, 1, 1, 2, 3; reflected, it would be 2


def test_bad_values_are_interpolated_and_the_length_kept() -> None:
    norms = [np.inf, 2.0, np.nan, 4.0, -1.0, 2.0, np.nan]
    assert smoothed_norms(norms, smoothing=0).tolist() == [2.0, 2.0, 3.0, 4.0, 3.0, 2.0, 2.0]


@pytest.mark.parametrize("zero", [0.0, 5e-324])
def test_norms_next_to_zero_are_raised(zero: float) -> None:
    assert smoothed_norms([2.0, zero, 2.0], smoothing=0)[1] == 2e-12
    assert np.isfinite(factors(refine_schedule([2.0, zero, 2.0, 2.0], smoothing=0))).all()


@pytest.mark.parametrize("norms", [[], [0.0, 0.0], [np.nan, -1.0]])
def test_nothing_to_refine_from(norms: list[float]) -> None:
    with pytest.raises(ValueError, match="finite and > 0"):
        refine_schedule(norms)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="shape"):
        refine_schedule(np.ones((3, 2)))
    with pytest.raises(ValueError, match="smoothing"):
        refine_schedule([1.0, 1.0], smoothing=1.0)
    with pytest.raises(ValueError, match="norm 'l1' or 'l2'"):
        refine_schedule([1.0, 1.0], norm=cast(Any, "l3"), smoothing=0)
    with pytest.raises(ValueError, match="at most num_steps"):
        refine_online([1.0, 1.0], 1)
    with pytest.raises(ValueError, match="max_growth"):
        refine_online([1.0, 1.0], 5, max_growth=0.9)


def test_one_step_is_trained() -> None:
    schedule = refine_schedule([3.0], smoothing=0)
    assert [schedule(0), schedule(1)] == [1.0, 1.0]


def test_a_refined_schedule_holds_factors_and_survives_a_file(tmp_path: Path) -> None:
    schedule = refine_schedule(spiky_norms(), norm="l1")
    assert not schedule.absolute
    schedule.to_file(tmp_path / "schedule.json")
    assert Tabulated.from_file(tmp_path / "schedule.json") == schedule


def test_another_length_reads_by_relative_progress() -> None:
    schedule = refine_schedule(spiky_norms())
    twice = schedule.stretched(60)
    assert [twice(2 * t) for t in range(30)] == pytest.approx(factors(schedule))
    assert twice(21) == pytest.approx((schedule(10) + schedule(11)) / 2)


@given(NORMS, st.floats(1e-6, 1e6), st.sampled_from(["l1", "l2"]))
def test_scale_of_the_norms_does_not_matter(norms: np.ndarray, scale: float, norm: Any) -> None:
    first = refine_schedule(norms, norm=norm, smoothing=0)
    second = refine_schedule(norms * scale, norm=norm, smoothing=0)
    assert factors(second) == pytest.approx(factors(first), rel=1e-6, abs=1e-12)


@given(NORMS)
def test_factors_are_in_range_and_end_at_zero(norms: np.ndarray) -> None:
    values = np.array(factors(refine_schedule(norms, smoothing=0)))
    assert np.isfinite(values).all()
    assert values.min() == 0.0
    assert values.max() == 1.0
    assert values[-1] == 0.0


@given(st.integers(2, 200), st.floats(1e-3, 1e3), st.sampled_from([1.0, 2.0]))
def test_equal_norms_give_linear_decay(length: int, level: float, power: float) -> None:
    raw = refined_values(np.full(length, level), power) * level**power
    assert raw.sum() == pytest.approx((length - 1) / 2)
    linear = [1 - t / (length - 1) for t in range(length)]
    assert factors(refine_schedule(np.full(length, level), smoothing=0)) == pytest.approx(linear, abs=1e-9)


class TestOnline:
    """The rule of one run: the last smoothed norm is assumed for the rest."""

    def test_nothing_known_is_linear_decay(self) -> None:
        rest = refine_online([], 11)
        assert [rest(step) for step in range(11)] == pytest.approx([1 - step / 10 for step in range(11)])

    @pytest.mark.parametrize("norm", ["l1", "l2"])
    @pytest.mark.parametrize("done", [1, 7, 20, 29])
    def test_is_the_offline_schedule_of_the_assumed_norms(self, done: int, norm: Any) -> None:
        known = spiky_norms()[:done]
        rest = refine_online(known, 30, norm=norm, smoothing=0)
        assumed = np.append(known, np.full(30 - done, known[-1]))
        offline = refine_schedule(assumed, norm=norm, smoothing=0)
        assert rest.num_steps == 30 - done
        assert [rest(step) for step in range(30 - done)] == pytest.approx([offline(t) for t in range(done, 30)])

    def test_smoothing_is_a_share_of_the_whole_run(self) -> None:
        """Three steps are few in a window of 11, a tenth of 100, and many in one of 3, a tenth of the known 20."""
        calm, spike = [1.0] * 20, [1.0] * 17 + [9.0] * 3
        assert refine_online(spike, 100) == refine_online(calm, 100)
        assert refine_online(spike, 100, smoothing=0)(0) < refine_online(calm, 100, smoothing=0)(0) / 10

    def test_growth_is_limited_and_a_fall_is_not(self) -> None:
        shrinking = [100.0] * 5 + [1.0] * 5
        assert refine_online(shrinking, 20, smoothing=0)(0) == pytest.approx(9 / 14)  # the maximum is at step 5
        assert refine_online(shrinking, 20, smoothing=0, previous=0.2)(0) == pytest.approx(0.22)
        assert refine_online(shrinking, 20, smoothing=0, previous=0.2, max_growth=2)(0) == pytest.approx(0.4)
        growing = [1.0] * 5 + [100.0] * 5
        assert refine_online(growing, 20, smoothing=0, previous=0.7)(0) < 0.01

    def test_the_last_step_and_the_end(self) -> None:
        assert refine_online([1.0] * 9, 10)(0) == 0.0
        assert refine_online([1.0] * 10, 10).num_steps == 0

    @given(NORMS, st.floats(0, 1), st.floats(0, 1))
    def test_every_update_of_a_run_is_in_range(self, norms: np.ndarray, smoothing: float, start: float) -> None:
        factor = start
        for done in range(len(norms)):
            rest = refine_online(norms[:done], len(norms), previous=factor, smoothing=smoothing * 0.9)
            assert 0.0 <= rest(0) <= min(1.0, 1.1 * factor)
            factor = rest(0)
