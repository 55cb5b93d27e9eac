"""The Gaussian process over learning rates: golden values, BoTorch as twin, and no trace left."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lightning_autolr.core import surrogate
from lightning_autolr.core.surrogate import FitError, Observation, posterior, suggest

BOUNDS = (1e-3, 1e-1)


Fix = Callable[..., None]


@pytest.fixture
def fix(monkeypatch: pytest.MonkeyPatch) -> Fix:
    """Call it to have these hyper-parameters instead of fitted ones: amplitude 1, the length in u, the noise."""

    def fix(length: float = 0.3, noise: float = 1e-4) -> None:
        def set_them(model: Any) -> None:
            model.covar_module.outputscale = 1.0
            model.covar_module.base_kernel.lengthscale = length
            if model.likelihood.noise.numel() == 1:  # else the observations brought their own
                model.likelihood.noise = noise

        monkeypatch.setattr(surrogate, "_fit", set_them)

    return fix


def lr(u: float) -> float:
    return math.exp(math.log(BOUNDS[0]) + u * math.log(BOUNDS[1] / BOUNDS[0]))


def unit(lr: float) -> float:
    return math.log(lr / BOUNDS[0]) / math.log(BOUNDS[1] / BOUNDS[0])


def observed(points: dict[float, float], **fields: Any) -> list[Observation]:
    return [Observation(lr(u), score, **fields) for u, score in points.items()]


THREE = observed({0.0: 2.0, 0.5: 1.0, 1.0: 1.5})


@pytest.mark.parametrize(("u", "expected"), [(0.25, 0.003162278), (0.5, 0.01), (0.75, 0.03162278), (0.9, 0.063095734)])
def test_the_grid_is_logarithmic(u: float, expected: float, fix: Fix) -> None:
    """The middle of the only gap is suggested: golden values of the logarithmic map."""
    fix(length=0.05, noise=1e-6)
    tried = observed({g: g for g in np.linspace(0, 1, 41) if abs(g - u) > 0.03})
    assert suggest(tried, BOUNDS, kappa=1e6).lr == pytest.approx(expected, rel=1e-6)


def test_the_kernel_is_matern_five_halves(fix: Fix) -> None:
    """Golden values at distances in units of the length: far from all else, one point's mean falls like the kernel."""
    length = 0.05
    distances = [0, 0.1, 0.25, 0.5, 1, 2]
    tried = observed({0.0: 1.0, 1.0: -1.0})  # already standardised
    fix(length=length, noise=1e-6)
    found = posterior(tried, BOUNDS, [lr(length * d) for d in distances])
    assert found.mean == pytest.approx([1, 0.991759, 0.950960, 0.828649, 0.523994, 0.138660], abs=3e-6)


def test_the_posterior_with_given_hyperparameters(fix: Fix) -> None:
    us = [0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0]
    fix()
    found = posterior(THREE, BOUNDS, [lr(u) for u in us])
    assert found.mean == pytest.approx([1.860940, 1.491570, 1.127232, 1.000068, 1.018767, 1.207002, 1.499986], abs=1e-6)
    assert found.std == pytest.approx([0.151572, 0.245339, 0.149558, 0.004082, 0.149558, 0.245339, 0.004082], abs=1e-6)


@pytest.mark.parametrize(
    ("kappa", "u"),
    [(0, 0.53), (0.5, 0.59), (1, 0.63), (1.96, 0.67), (3, 0.70), (10, 0.735), (1e3, 0.75), (1e6, 0.75)],
)
def test_the_lower_confidence_bound(kappa: float, u: float, fix: Fix) -> None:
    fix()
    assert unit(suggest(THREE, BOUNDS, kappa=kappa).lr) == pytest.approx(u, abs=0.0051)


def test_the_expected_improvement(fix: Fix) -> None:
    """Golden values for an incumbent whose score is as good as known."""
    fix()
    found = suggest(THREE, BOUNDS, incumbent=lr(0.5))
    assert unit(found.lr) == pytest.approx(0.62, abs=0.0051)
    assert found.expected_improvement == pytest.approx(0.0521, abs=2e-4)


def test_a_huge_kappa_fills_the_space(fix: Fix) -> None:
    fix()
    tried = observed({0.3: 1.0})
    while len(tried) < 10:
        tried.append(Observation(suggest(tried, BOUNDS, kappa=1e6).lr, 0.0))
    expected = [0.3, 1.0, 0.0, 0.66, 0.48, 0.84, 0.14, 0.75, 0.39, 0.93]
    assert [unit(o.lr) for o in tried] == pytest.approx(expected, abs=0.0101)


def test_the_twin_in_botorch() -> None:
    """Log expected improvement, far into the tail where the improvement itself underflows."""
    suggest(THREE, BOUNDS)  # has BoTorch imported without its warnings
    from botorch.acquisition.analytic import LogExpectedImprovement
    from botorch.utils.testing import MockModel, MockPosterior

    gain = np.array([2.0, 1.0, 0.1, 0.0, -0.1, -0.9, -1.1, -5.0, -30.0, -300.0])
    for std in (1.0, 0.3, 2.0):
        values = surrogate._log_expected_improvement(gain, np.full(len(gain), std))
        for g, value in zip(gain, values, strict=True):
            mean, variance = torch.tensor([[[-g]]]).double(), torch.tensor([[[std**2]]]).double()
            model = MockModel(MockPosterior(mean=mean, variance=variance))
            twin = LogExpectedImprovement(model, best_f=0.0, maximize=False)
            assert value == pytest.approx(twin(torch.zeros(1, 1, 1).double()).item(), rel=1e-6)


def bowl(us: Sequence[float], optimum: float, noise: float = 0.0, **fields: Any) -> list[Observation]:
    generator = np.random.default_rng(0)
    points = {u: (u - optimum) ** 2 + noise * generator.standard_normal() for u in us}
    return observed(points, **fields)


@pytest.mark.parametrize("over_the_best", [False, True])
@pytest.mark.parametrize("optimum", [0.37, 1.0])
def test_ten_suggestions_find_the_optimum(over_the_best: bool, optimum: float) -> None:
    tried: list[Observation] = []
    for _ in range(10):
        incumbent = min(tried, key=lambda o: o.score).lr if over_the_best and tried else None
        found = suggest(tried, BOUNDS, incumbent=incumbent, seed=1)
        tried.append(Observation(found.lr, (unit(found.lr) - optimum) ** 2))
    assert found.reason == ""
    assert unit(min(tried, key=lambda o: o.score).lr) == pytest.approx(optimum, abs=0.03)


def test_known_noise_is_used(fix: Fix) -> None:
    """Wiggles known to be noise are smoothed away, and wiggles known to be exact are followed."""
    us = np.linspace(0, 1, 9)
    wiggle = {u: (u - 0.5) ** 2 + 0.1 * (-1) ** i for i, u in enumerate(us)}
    at = [lr(u) for u in us]
    clean = np.array([(u - 0.5) ** 2 for u in us])

    fix(length=0.4)

    def error(variance: float) -> float:
        found = posterior(observed(wiggle, variance=variance), BOUNDS, at)
        return float(np.max(np.abs(np.array(found.mean) - clean)))

    assert error(1e-8) == pytest.approx(0.1, rel=0.01)
    assert error(0.01) < 0.06


def test_the_incumbent_is_compared_under_the_joint_distribution(fix: Fix) -> None:
    """A lucky score is no reason to stop looking: the incumbent's mean counts, not its score."""
    fix()
    lucky = [*bowl([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], 0.5, variance=0.02), Observation(lr(0.3), -0.5, variance=0.02)]
    found = suggest(lucky, BOUNDS, incumbent=lr(0.3))
    there = posterior(lucky, BOUNDS, [lr(0.3), found.lr])
    assert there.mean[0] > -0.3
    (_, gain), (own, std) = there.gain(over=0)
    assert own == 0
    c = there.covariance
    assert gain == there.mean[0] - there.mean[1]
    assert std == pytest.approx(math.sqrt(c[0, 0] + c[1, 1] - 2 * c[0, 1]))
    z = gain / std
    expected = gain * norm.cdf(z) + std * norm.pdf(z)
    assert found.expected_improvement == pytest.approx(expected, rel=1e-6)


def test_a_failed_candidate_is_bad_but_not_blinding(fix: Fix) -> None:
    """The failure counts as the worst score plus the spread: 1 + 1."""
    fix()
    tried = observed({0.0: 1.0, 0.4: 0.0, 1.0: math.inf})
    found = posterior(tried, BOUNDS, [o.lr for o in tried])
    assert found.mean == pytest.approx([1.0, 0.0, 2.0], abs=1e-3)
    assert unit(suggest(tried, BOUNDS, kappa=1.0).lr) < 0.6


def test_without_observations_the_point_is_random_and_says_so() -> None:
    suggestions = [suggest([], BOUNDS, seed=seed) for seed in range(200)]
    assert all("nothing was tried" in s.reason for s in suggestions)
    assert np.mean([unit(s.lr) for s in suggestions]) == pytest.approx(0.5, abs=0.06), "uniform in the logarithm"
    assert suggest([], BOUNDS, seed=7) == suggestions[7]


def test_while_all_fail_the_next_point_is_far_and_below() -> None:
    found = suggest(observed({0.5: math.nan, 0.9: math.inf}), BOUNDS)
    assert unit(found.lr) == 0.0
    assert "no score is finite" in found.reason
    at_the_bottom = suggest(observed({0.0: math.nan}), BOUNDS)
    assert unit(at_the_bottom.lr) == pytest.approx(1.0), "nowhere below is left"


def test_a_failed_fit_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    suggest(THREE, BOUNDS)
    import botorch.fit

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(botorch.fit, "fit_gpytorch_mll", fail)
    tried = observed({0.0: 1.0, 0.3: 2.0, 1.0: 1.5})
    found = suggest(tried, BOUNDS)
    assert unit(found.lr) == pytest.approx(0.65)
    assert "no such luck" in found.reason
    assert found.expected_improvement is None
    with pytest.raises(FitError, match="no such luck"):
        posterior(tried, BOUNDS, [1e-2])


def test_equal_scores_give_a_suggestion() -> None:
    found = suggest(observed({0.0: 1.0, 1.0: 1.0}), BOUNDS)
    assert unit(found.lr) == pytest.approx(0.5)
    assert found.reason == ""


def test_nothing_is_suggested_twice() -> None:
    """Not in the hundred suggestions that a caller may ask for, wherever the points off the grid are."""
    tried = observed({(i + 0.5) / 200: 1.0 for i in range(0, 150, 2)})  # each takes two points of the grid
    while len(tried) <= 100:
        tried.append(Observation(suggest(tried, BOUNDS, kappa=0).lr, 1.0))
    assert np.diff(sorted(unit(o.lr) for o in tried)).min() > 0.0025 - 1e-9


def test_the_same_arguments_give_the_same_suggestion() -> None:
    tried = bowl(np.linspace(0, 1, 7).tolist(), 0.4, noise=0.1)
    assert suggest(tried, BOUNDS) == suggest(tried, BOUNDS)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_global_state_is_left_alone(mode: Any) -> None:
    before = (torch.random.get_rng_state().clone(), torch.get_default_dtype(), torch.get_num_threads())
    states = random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    with mode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inside = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = suggest(bowl([0.0, 0.2, 0.5, 1.0], 0.4, noise=0.1), BOUNDS, seed=3)
        assert inside == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert found.reason == ""
    assert caught == []
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (torch.get_default_dtype(), torch.get_num_threads()) == before[1:]
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]


def test_the_default_dtype_does_not_matter() -> None:
    tried = bowl([0.0, 0.2, 0.5, 1.0], 0.4, noise=0.1)
    expected = suggest(tried, BOUNDS)
    for dtype in (torch.float64, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            found = suggest(tried, BOUNDS)
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.lr == expected.lr


def test_botorch_is_imported_only_for_a_fit_and_then_without_a_trace() -> None:
    script = """
import sys, torch
from lightning_autolr.core.surrogate import Observation, suggest
assert "botorch" not in sys.modules and "gpytorch" not in sys.modules
before = torch.random.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
suggest([Observation(1e-3, 2.0), Observation(1e-2, 1.0)], (1e-3, 1e-1))
assert "botorch" in sys.modules
after = torch.random.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: suggest([], (1e-1, 1e-3)), "min_lr < max_lr"),
        (lambda: suggest([], (0.0, 1.0)), "0 < min_lr"),
        (lambda: suggest([], (math.nan, 1.0)), "0 < min_lr"),
        (lambda: suggest([], BOUNDS, kappa=-1), "kappa >= 0"),
        (lambda: suggest([], BOUNDS, kappa=math.nan), "kappa >= 0"),
        (lambda: suggest(THREE * 34, BOUNDS), "at most 100 observations, got .* 102"),
        (lambda: posterior([], BOUNDS, [1e-2]), "at least one finite score"),
        (lambda: posterior(observed({0.5: math.nan}), BOUNDS, [1e-2]), "at least one finite score"),
        (lambda: Observation(0.0, 1.0), "learning rate > 0"),
        (lambda: Observation(0.1, 1.0, variance=-1.0), "variance >= 0"),
        (lambda: Observation(0.1, 1.0, variance=math.nan), "variance >= 0"),
        (
            lambda: suggest(observed({0.1: 1.0}) + observed({0.2: 1.0}, variance=1.0), BOUNDS),
            "variance for every finite score or for none",
        ),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
