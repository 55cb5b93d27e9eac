from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_autolr.core.scores import (
    Normalization,
    clip_outliers,
    normalize,
    scored_factor,
    weighted_geometric_mean,
)

SLIDES = [4, 2, 1, 0.5, 0.125]  # the list on the paper's slides, with its hidden drift
SEVEN = [8, 4, 2, 1, 0.5, 0.25, 0.125]
FIVE = [4, 2, 1, 0.5, 0.25]
OPTIONS = ["zscore", "zscore_population", "minmax", "softmax", "sum"]


@pytest.mark.parametrize(
    ("factors", "losses", "expected"),
    [
        ([2, 1, 0.5], [1.0, 0.9, 1.2], [1.171630, 1.175151, 1.122929, 1.016125, 1.014687]),
        ([2, 1, 0.5], [0.9, 1.0, 1.1], [1.489895, 1.582266, 1.248466, 1.015485, 1.015520]),
        (FIVE, [2.5, 2.2, 2.0, 2.1, 2.15], [0.753300, 0.749374, 0.841731, 0.976275, 0.990027]),
        (SLIDES, [2.5, 2.2, 2.0, 2.1, 2.15], [0.663239, 0.662846, 0.729773, 0.848709, 0.861445]),
        (SEVEN, [9, 4, 2.4, 2.2, 2.1, 2.15, 2.2], [0.609455, 0.599097, 0.762802, 0.813764, 0.910863]),
    ],
)
def test_factors_of_given_losses(factors: list[float], losses: list[float], expected: list[float]) -> None:
    got = [scored_factor(factors, losses, normalization=how, outlier_clip=None) for how in OPTIONS]  # type: ignore[arg-type]
    assert got == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(
    ("lr", "losses", "zscore", "minmax"),
    [
        (0.01, [0.4802, 0.49005, 0.495013], 1.525585, 1.262119),
        (0.5, [0, 0.125, 0.28125], 1.472531, None),
        (1.0, [0.5, 0, 0.125], 0.830743, None),
        (2.5, [8, 1.125, 0.03125], 0.739569, None),
    ],
)
def test_factors_on_half_w_squared(lr: float, losses: list[float], zscore: float, minmax: float | None) -> None:
    exact = [0.5 * (1 - lr * f) ** 2 for f in (2, 1, 0.5)]
    assert exact == pytest.approx(losses, abs=5e-7)
    assert scored_factor([2, 1, 0.5], exact, outlier_clip=None) == pytest.approx(zscore, abs=5e-7)
    if minmax is not None:
        got = scored_factor([2, 1, 0.5], exact, normalization="minmax", outlier_clip=None)
        assert got == pytest.approx(minmax, abs=5e-7)


def test_intermediate_values() -> None:
    x = normalize([1.0, 0.9, 1.2])
    assert x == pytest.approx([-0.218218, -0.872872, 1.091089], abs=5e-7)
    assert np.exp(-x) == pytest.approx([1.243858, 2.393775, 0.335850], abs=5e-7)


@pytest.mark.parametrize(("factors", "expected"), [([2, 1, 0.5], 1), (FIVE, 1), (SLIDES, 0.870551), (SEVEN, 1)])
def test_equal_scores_give_the_geometric_mean(factors: list[float], expected: float) -> None:
    assert weighted_geometric_mean(factors, np.ones(len(factors))) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("n", [3, 5, 7])
def test_one_clear_winner_bounds_the_step(n: int) -> None:
    # z = -(n - 1) / sqrt(n) for the winner and 1 / sqrt(n) for the others
    factors = np.geomspace(2, 0.5, n)
    lone = np.exp((n - 1) / math.sqrt(n)), np.exp(-1 / math.sqrt(n))
    expected = math.exp((lone[0] - lone[1]) * math.log(2) / (lone[0] + (n - 1) * lone[1]))
    assert scored_factor(list(factors), [0.0] + [1.0] * (n - 1)) == pytest.approx(expected)


def test_ranks_and_improvements() -> None:
    assert normalize([3.0, 1.0, 1.0, 9.0], "rank").tolist() == [2 / 3, 1 / 6, 1 / 6, 1.0]
    assert normalize([0.5, 0.7, 2.0], "improvement", base=0.9) == pytest.approx([0, 0.5, 3.75])
    with pytest.raises(ValueError, match="before the step"):
        normalize([1.0, 2.0], "improvement")


@pytest.mark.parametrize("how", get_args(Normalization))
def test_equal_losses_say_nothing(how: Normalization) -> None:
    assert normalize([0.3] * 3, how, base=1.0).tolist() == [0, 0, 0]
    assert scored_factor(SLIDES, [0.3] * 5, base=1.0, normalization=how) == 1
    assert scored_factor(SLIDES, [0.0] * 5, base=0.0, normalization=how) == 1


@pytest.mark.parametrize("how", get_args(Normalization))
def test_losses_that_are_not_finite_score_zero(how: Normalization) -> None:
    bad = [math.nan, math.inf, 1e200]
    expected = scored_factor([1, 0.5], [1.0, 0.8], base=1.1, normalization=how)
    for loss in bad:
        assert scored_factor([2, 1, 0.5], [loss, 1.0, 0.8], base=1.1, normalization=how) == expected
        assert scored_factor([2, 1, 0.5], [loss] * 3, base=1.1, normalization=how) == 0.5
        assert scored_factor([2, 1, 0.5], [1.0, loss, loss], base=loss, normalization="rank") == pytest.approx(2)
    # what is left says nothing but "not the largest one"
    assert scored_factor([2, 1, 0.5], [math.nan, 1.0, 1.0], base=1.0, normalization=how) == pytest.approx(0.5**0.5)


def test_one_factor_is_a_constant_multiplier() -> None:
    assert [scored_factor([0.9], [loss]) for loss in (1.0, 7.0, math.nan)] == [0.9] * 3


def test_an_exploding_candidate_does_not_flatten_the_others() -> None:
    factors, rest = [4, 2, 1, 0.5], [1.0, 0.8, 0.9]
    explodes = [scored_factor(factors, [loss, *rest]) for loss in (2.0, 1e6, 1e30)]
    assert explodes == pytest.approx([explodes[0]] * 3)  # all three are capped at 0.95 + 3 * (0.95 - 0.8)
    assert clip_outliers([1e30, *rest]) == pytest.approx([1.4, *rest])
    flat = scored_factor(factors, [1e30, *rest], outlier_clip=None)
    assert flat == pytest.approx(weighted_geometric_mean(factors, np.exp([-1.5, 0.5, 0.5, 0.5])))


def test_when_every_step_is_worse_than_none_the_rate_falls() -> None:
    # half w squared at lr = 5: 81 / 16 / 2.25 times the loss; a cap below all of them would say "no change"
    losses = [0.5 * (1 - 5 * f) ** 2 for f in (2, 1, 0.5)]
    assert scored_factor([2, 1, 0.5], losses) < 0.75


def test_ties_for_the_lowest_do_not_hide_the_one_that_explodes() -> None:
    assert clip_outliers([1e3, 1.0, 1.0, 1.0, 1.0]).tolist() == [1e3, 1.0, 1.0, 1.0, 1.0]
    assert scored_factor(FIVE, [1e3, 1.0, 1.0, 1.0, 1.0]) < 0.8


def test_gains_against_a_loss_that_is_not_finite_say_nothing() -> None:
    for base in (math.nan, math.inf):
        assert scored_factor(FIVE, [3.0, 2.0, 1.0, 1.5, 2.0], base, normalization="improvement") == pytest.approx(1.0)


def test_temperature() -> None:
    losses = [1.0, 0.9, 1.2]
    assert scored_factor([2, 1, 0.5], losses, temperature=1e-4) == pytest.approx(1)
    assert scored_factor([4, 1, 0.5], losses, temperature=1e6) == pytest.approx(2 ** (1 / 3), rel=1e-5)


finite = st.floats(-100, 100).map(lambda v: round(v, 6))


@given(
    losses=st.lists(finite, min_size=5, max_size=5),
    base=finite,
    scale=st.sampled_from([1e-3, 0.5, 2.0, 1e4]),
    shift=st.sampled_from([-3.0, 0.0, 40.0]),
    how=st.sampled_from(["zscore", "zscore_population", "minmax", "rank", "improvement"]),
)
def test_units_and_level_of_the_loss_do_not_matter(
    losses: list[float], base: float, scale: float, shift: float, how: Any
) -> None:
    if 0 < np.ptp(losses) < 1e-4 or 0 < abs(base - min(losses)) < 1e-4:
        return  # rounding of the shifted losses is what is compared then
    moved = [scale * loss + shift for loss in losses]
    expected = scored_factor(FIVE, losses, base=base, normalization=how)
    got = scored_factor(FIVE, moved, base=scale * base + shift, normalization=how)
    assert got == pytest.approx(expected, rel=1e-5)
    assert 0.25 <= expected <= 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scored_factor([1, 2], [1.0]), "as many losses"),
        (lambda: scored_factor([], []), "as many losses"),
        (lambda: scored_factor([0, 2], [1.0, 1.0]), "factors > 0"),
        (lambda: scored_factor([1, 2], [1.0, 2.0], temperature=0), "temperature > 0"),
        (lambda: normalize([1.0, 2.0], "best"), "Expected one of"),  # type: ignore[arg-type]
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("normalization", ["zscore", "zscore_population", "minmax", "rank", "improvement"])
@pytest.mark.parametrize("unit", [1e-300, 1e-150, 1e99])
def test_losses_of_any_size(normalization: Normalization, unit: float) -> None:
    """What squares of them would underflow to is no matter."""
    losses = np.array([1.0, 0.9, 1.2])
    one, other = (scored_factor([2, 1, 0.5], losses * u, 1.1 * u, normalization=normalization) for u in (1.0, unit))
    assert other == pytest.approx(one, rel=1e-9)
