from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_autolr.core import minimum
from lightning_autolr.core.minimum import (
    Hyperparameters,
    PastMinimum,
    explain,
    past_minimum_probability,
    posterior,
)

with minimum._gpytorch():  # its import warns
    from linear_operator.utils.cholesky import psd_safe_cholesky
    from linear_operator.utils.errors import NotPSDError

GRID = np.linspace(0, 1, 500)


def curve(kind: str, num_steps: int, noise: float = 0.0, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    x = np.arange(num_steps) / num_steps
    y = {"bowl": 1 + 4 * (x - 0.6) ** 2, "falling": 3 - 2 * x, "flat": 1 + 0 * x}[kind]
    return y + noise * np.random.default_rng(seed).normal(size=num_steps)


# Golden values: the formula, evaluated with the published code's constants (floor 1e-4).
@pytest.mark.parametrize(
    ("mean", "covariance", "expected"),
    [
        ((1, 0.5, 0.8), 0.01 * np.eye(3), 0.982829),
        ((1, 0.5, 0.8), 0.01 * np.array([[1, 0.5, 0.2], [0.5, 1, 0.6], [0.2, 0.6, 1]]), 0.999571),
        ((1, 0.8, 0.6), 0.01 * np.eye(3), 0.079168),
        ((1, 0.5, 0.505), np.zeros((3, 3)), 0.691462),
        ((1, 0.5, 0.52), np.zeros((3, 3)), 0.977250),
    ],
)
def test_the_probability_of_a_past_minimum(mean: Any, covariance: Any, expected: float) -> None:
    assert past_minimum_probability(np.array(mean), covariance) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(
    ("noise", "loss", "argmin", "now", "lowest", "probability"),
    [
        (1e-3, lambda x: 4 * (x - 0.6) ** 2 + 1, 0.5972, 1.60237, 1.00145, 1.000000),
        (1e-3, lambda x: 3 - 2 * x, 1.0000, 1.04532, 1.04532, 0.441582),
        (1e-3, lambda x: 1 + np.exp(-6 * x), 0.9339, 1.00758, 1.00358, 0.525997),
        (1e-2, lambda x: 4 * (x - 0.6) ** 2 + 1, 0.6012, 1.57110, 1.00026, 0.999320),
        (1e-2, lambda x: 3 - 2 * x, 1.0000, 1.09653, 1.09653, 0.499266),
        (1e-2, lambda x: 1 + np.exp(-6 * x), 0.8878, 1.01627, 1.00305, 0.535101),
    ],
)
def test_the_posterior_with_given_hyperparameters(
    noise: float, loss: Callable[[Any], Any], argmin: float, now: float, lowest: float, probability: float
) -> None:
    x = np.arange(20) / 20
    y = loss(x)
    mean, covariance = posterior(x, y, GRID, Hyperparameters(mean=y.mean(), scale=1.0, noise=noise))
    assert GRID[mean.argmin()] == pytest.approx(argmin, abs=5e-5)
    assert mean[-1] == pytest.approx(now, abs=6e-6)
    assert mean.min() == pytest.approx(lowest, abs=6e-6)
    assert past_minimum_probability(mean, covariance) == pytest.approx(probability, abs=1e-6)


def test_the_posterior_is_the_textbook_s() -> None:
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.random(12)), rng.normal(size=12)
    given = Hyperparameters(mean=0.3, scale=1.7, noise=0.05)

    def kernel(a: Any, b: Any) -> Any:
        return given.scale * np.exp(-0.5 * ((a[:, None] - b) / 0.2) ** 2)

    grid = np.linspace(0, 1, 7)
    weights = np.linalg.solve(kernel(x, x) + given.noise * np.eye(12), kernel(x, grid))
    mean, covariance = posterior(x, y, grid, given)
    np.testing.assert_allclose(mean, given.mean + weights.T @ (y - given.mean), atol=1e-9)
    np.testing.assert_allclose(covariance, kernel(grid, grid) - kernel(grid, x) @ weights, atol=1e-9)


@pytest.mark.parametrize("compat", [False, True])
def test_a_minimum_is_found_when_it_is_past_and_not_before(compat: bool) -> None:
    test, losses = PastMinimum(compat=compat), curve("bowl", 100, noise=0.05)
    before, after = test(losses[:50]), test(losses)
    assert not before.past
    assert after.past
    assert abs(after.argmins.mean() - 0.6) < 0.05
    assert not PastMinimum(compat=compat)(curve("falling", 100, noise=0.05)).past


def test_hyperparameters_are_fitted() -> None:
    """Samples of a process with known variance and noise, of 100 points, give the noise back."""
    x = np.arange(100) / 100
    k = np.exp(-0.5 * ((x[:, None] - x) / 0.2) ** 2) + 1e-9 * np.eye(100)
    rng = np.random.default_rng(0)
    y = np.linalg.cholesky(k) @ rng.normal(size=100) + 0.3 * rng.normal(size=100)
    found = PastMinimum()(y).hyperparameters
    assert math.sqrt(found.noise) * y.std() == pytest.approx(0.3, rel=0.25)  # its standard error is 7 %


def test_a_long_plateau_does_not_blind_the_test() -> None:
    """Noise alone takes the variance of the process to zero, where its gradient is zero, too."""
    rng = np.random.default_rng(1)
    x = np.arange(200) / 200
    losses = np.where(x < 0.5, 2, np.where(x < 0.75, 2 - 6 * (x - 0.5), 0.5 + 6 * (x - 0.75)))
    losses += 0.1 * rng.normal(size=200)
    test = PastMinimum()
    assert not any(test(losses[:n]).past for n in (40, 60, 80, 100))
    assert test(losses).past


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_unit_of_the_loss_does_not_matter(scale: float) -> None:
    losses = curve("bowl", 60, noise=0.1)
    one, other = PastMinimum()(losses), PastMinimum()(5 + scale * losses)
    np.testing.assert_allclose(other.probabilities, one.probabilities, atol=1e-4)
    np.testing.assert_allclose(other.argmins, one.argmins)
    np.testing.assert_allclose(other.mean, 5 + scale * one.mean, rtol=1e-3)
    np.testing.assert_allclose(other.std, scale * one.std, rtol=1e-2)


def test_the_published_test_does_depend_on_it() -> None:
    losses = 1e-3 * curve("bowl", 60)
    assert not PastMinimum(compat=True)(losses).past
    assert PastMinimum()(losses).past


def test_draws_differ_though_losses_are_few() -> None:
    losses = curve("bowl", 60, noise=0.3)
    assert np.ptp(PastMinimum()(losses).probabilities) > 0
    assert np.ptp(PastMinimum(compat=True)(losses).probabilities) == 0


def test_the_same_calls_get_the_same_answers_and_no_global_state_is_touched() -> None:
    losses = curve("bowl", 150, noise=0.3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]

    def answers(seed: int) -> list[Any]:
        test = PastMinimum(seed=seed)
        return [a for n in (90, 150) for a in (*test(losses[:n]).probabilities, test(losses[:n]).hyperparameters)]

    first = answers(seed=1)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    with torch.no_grad(), torch.inference_mode():  # as inside a validation loop
        assert answers(seed=1) == first
    assert answers(seed=2) != first
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]


def test_the_cost_of_a_test_does_not_grow_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    condition = minimum._condition

    def recorded(model: Any, x: Any, y: Any) -> None:
        sizes.append(len(x))
        condition(model, x, y)

    monkeypatch.setattr(minimum, "_condition", recorded)
    PastMinimum(num_tests=3)(curve("bowl", 20_000, noise=0.1))
    assert sizes == [100, 500, 500, 500]
    sizes.clear()
    PastMinimum(num_tests=3)(curve("bowl", 200, noise=0.1))
    assert sizes == [100, 160, 160, 160]


def test_losses_that_are_not_finite_keep_their_places() -> None:
    losses = curve("bowl", 100)
    losses[70:80] = math.nan
    losses[30] = math.inf
    found = PastMinimum()(losses)
    assert abs(found.argmins.mean() - 0.6) < 0.02
    with pytest.raises(ValueError, match="at least 2 finite losses, got 1 out of 3"):
        PastMinimum()([math.nan, 1.0, math.inf])


def test_an_exploded_loss_does_not_flatten_the_others() -> None:
    losses = curve("bowl", 100)
    losses[-3:] = 1e6, 1e9, 1e30
    assert abs(PastMinimum()(losses).argmins.mean() - 0.6) < 0.05


def test_equal_losses_have_no_minimum() -> None:
    assert not PastMinimum()(curve("flat", 50)).past


def test_a_matrix_that_never_is_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise NotPSDError("not positive definite")

    monkeypatch.setattr(minimum, "_predict", failing)
    with pytest.raises(RuntimeError, match="positive definite, got one that is not"):
        PastMinimum()(curve("bowl", 50))


@pytest.mark.parametrize("negative", [1e-9, 1e-7, 1e-5])
def test_jitter_is_added_to_a_singular_matrix(negative: float) -> None:
    """Two equal points without noise, and rounding: only jitter makes the matrix positive definite, the least that does."""
    singular = torch.tensor([[1.0, 1.0 + negative], [1.0 + negative, 1.0]], dtype=torch.float64)
    with minimum._gpytorch():
        root = psd_safe_cholesky(singular)
    jitter = (root @ root.T - singular).diagonal()
    assert negative < jitter.min() * (1 + 1e-6)
    assert jitter.max() < 11 * negative


def test_a_figure_s_arrays_are_those_of_the_tests_made() -> None:
    losses = curve("bowl", 80, noise=0.1)
    found = explain(losses.tolist(), tested=(30, 60, 80))
    test = PastMinimum()
    last = [test(losses[:n]) for n in (30, 60, 80)][-1]
    np.testing.assert_array_equal(found.mean, last.mean)
    np.testing.assert_array_equal(found.grid, GRID * 80)
    assert found.argmin == pytest.approx(80 * last.argmins.mean())
    assert found.probability[-1] == np.median(last.probabilities)
    assert found.probability.shape == found.tested.shape == (3,)
    with pytest.raises(ValueError, match="tests of 1 to 2 losses"):
        explain([1.0, 2.0], tested=(3,))


@pytest.mark.parametrize(("field", "value"), [("confidence", 1.0), ("num_tests", 0), ("seed", -1)])
def test_bad_options_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}"):
        PastMinimum(**{field: value})  # type: ignore[arg-type]


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(k,\) and \(k, k\)"):
        past_minimum_probability(np.zeros(3), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="noise > 0"):
        Hyperparameters(noise=0.0)
