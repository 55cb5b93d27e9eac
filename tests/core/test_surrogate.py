"""The Gaussian process over learning rates: golden values, BoTorch as twin, several stages, and no trace left."""

from __future__ import annotations

import dataclasses
import math
import random
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lightning_autolr.core import surrogate
from lightning_autolr.core.surrogate import FitError, Hyperparameters, Observation, fit, posterior, suggest

BOUNDS = (1e-3, 1e-1)
FIXED = Hyperparameters(amplitude=1.0, length=0.3, noise=1e-4)


def lr(u: float) -> float:
    return math.exp(math.log(BOUNDS[0]) + u * math.log(BOUNDS[1] / BOUNDS[0]))


def unit(lr: float) -> float:
    return math.log(lr / BOUNDS[0]) / math.log(BOUNDS[1] / BOUNDS[0])


def observed(points: dict[float, float], **fields: Any) -> list[Observation]:
    return [Observation(lr(u), score, **fields) for u, score in points.items()]


THREE = observed({0.0: 2.0, 0.5: 1.0, 1.0: 1.5})


@pytest.mark.parametrize(("u", "expected"), [(0.25, 0.003162278), (0.5, 0.01), (0.75, 0.03162278), (0.9, 0.063095734)])
def test_the_grid_is_logarithmic(u: float, expected: float) -> None:
    """With everything but one point tried, that point is suggested: golden values of the logarithmic map."""
    grid = np.linspace(0, 1, 21)
    tried = [Observation(lr(g), 1.0) for g in grid if abs(g - u) > 0.01]
    assert suggest(tried, BOUNDS, hyperparameters=FIXED, num_points=21).lr == pytest.approx(expected, rel=1e-6)


def test_the_kernel_is_matern_five_halves() -> None:
    """Golden values at distances in units of the length: far from all else, one point's mean falls like the kernel."""
    length = 0.04
    distances = [0, 0.1, 0.25, 0.5, 1, 2]
    tried = observed({0.0: 1.0, 1.0: -1.0})  # already standardised
    hyper = Hyperparameters(amplitude=1.0, length=length, noise=1e-6)
    found = posterior(tried, BOUNDS, [lr(length * d) for d in distances], hyperparameters=hyper)
    assert found.mean == pytest.approx([1, 0.991759, 0.950960, 0.828649, 0.523994, 0.138660], abs=3e-6)


def test_the_posterior_with_given_hyperparameters() -> None:
    us = [0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0]
    found = posterior(THREE, BOUNDS, [lr(u) for u in us], hyperparameters=FIXED)
    assert found.mean == pytest.approx([1.860940, 1.491570, 1.127232, 1.000068, 1.018767, 1.207002, 1.499986], abs=1e-6)
    assert found.std == pytest.approx([0.151572, 0.245339, 0.149558, 0.004082, 0.149558, 0.245339, 0.004082], abs=1e-6)


@pytest.mark.parametrize(
    ("kappa", "u"),
    [(0, 0.53), (0.5, 0.59), (1, 0.63), (1.96, 0.67), (3, 0.70), (10, 0.73), (1e3, 0.75), (1e6, 0.75)],
)
def test_the_lower_confidence_bound(kappa: float, u: float) -> None:
    found = suggest(THREE, BOUNDS, kappa=kappa, hyperparameters=FIXED, num_points=101)
    assert unit(found.lr) == pytest.approx(u)
    there = posterior(THREE, BOUNDS, [found.lr], hyperparameters=FIXED)
    assert found.value == pytest.approx(there.mean[0] - kappa * there.std[0])


def test_the_expected_improvement() -> None:
    found = suggest(THREE, BOUNDS, acquisition="ei", hyperparameters=FIXED, num_points=101)
    assert unit(found.lr) == pytest.approx(0.62)
    assert found.value == pytest.approx(0.052129, abs=1e-6)


def test_a_huge_kappa_fills_the_space() -> None:
    tried = observed({0.3: 0.0})
    while len(tried) < 10:
        tried.append(Observation(suggest(tried, BOUNDS, kappa=1e6, hyperparameters=FIXED, num_points=101).lr, 0.0))
    assert [unit(o.lr) for o in tried] == pytest.approx([0.3, 1.0, 0.0, 0.66, 0.48, 0.84, 0.14, 0.75, 0.39, 0.93])


def test_the_twin_in_botorch() -> None:
    """Log expected improvement, far into the tail where the improvement itself underflows."""
    fit(THREE, BOUNDS)  # has BoTorch imported without its warnings
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


def bowl(
    us: Sequence[float], optimum: float, noise: float = 0.0, level: float = 0.0, **fields: Any
) -> list[Observation]:
    generator = np.random.default_rng(0)
    points = {u: level + (u - optimum) ** 2 + noise * generator.standard_normal() for u in us}
    return observed(points, **fields)


@pytest.mark.parametrize("acquisition", ["lcb", "ei"])
@pytest.mark.parametrize("optimum", [0.37, 1.0])
def test_ten_suggestions_find_the_optimum(acquisition: Any, optimum: float) -> None:
    tried: list[Observation] = []
    for _ in range(10):
        found = suggest(tried, BOUNDS, acquisition=acquisition, seed=1)
        tried.append(Observation(found.lr, (unit(found.lr) - optimum) ** 2))
    assert found.reason == ""
    assert unit(min(tried, key=lambda o: o.score).lr) == pytest.approx(optimum, abs=0.03)


def test_known_noise_is_used() -> None:
    """Wiggles known to be noise are smoothed away, and wiggles known to be exact are followed."""
    us = np.linspace(0, 1, 9)
    wiggle = {u: (u - 0.5) ** 2 + 0.1 * (-1) ** i for i, u in enumerate(us)}
    at = [lr(u) for u in us]
    clean = np.array([(u - 0.5) ** 2 for u in us])

    def error(variance: float) -> float:
        hyper = Hyperparameters(amplitude=1.0, length=0.4)
        found = posterior(observed(wiggle, variance=variance), BOUNDS, at, hyperparameters=hyper)
        return float(np.max(np.abs(np.array(found.mean) - clean)))

    assert error(1e-8) == pytest.approx(0.1, rel=0.01)
    assert error(0.01) < 0.06


def test_each_stage_has_a_level_of_its_own() -> None:
    """The same bowl, lifted by 100 and sampled elsewhere, changes no suggestion and no difference between means."""
    hyper = dataclasses.replace(FIXED, stage_length=1e6)
    first, second = bowl([0.0, 0.3, 0.6, 1.0], 0.4, stage=0), bowl([0.35, 0.5], 0.4, stage=1)
    lifted = [dataclasses.replace(o, score=o.score + 100) for o in second]
    for acquisition in ("lcb", "ei"):
        options: Any = {"acquisition": acquisition, "stage": 1, "hyperparameters": hyper}
        assert suggest(first + second, BOUNDS, **options).lr == suggest(first + lifted, BOUNDS, **options).lr

    together = [dataclasses.replace(o, stage=0) for o in first + second]
    at = [lr(u) for u in (0.1, 0.4, 0.8)]
    one, two = (
        posterior(o, BOUNDS, at, stage=s, hyperparameters=dataclasses.replace(hyper, noise=1e-6))
        for o, s in ((together, 0), (first + lifted, 1))
    )
    for i in (0, 2):
        assert two.gain(i, over=1)[0] == pytest.approx(one.gain(i, over=1)[0], abs=0.01)


def test_a_narrow_later_stage_does_not_undo_what_the_first_one_found() -> None:
    """Three good candidates are average among themselves, but not compared with what was tried a stage ago."""
    tried = bowl([0.0, 0.25, 0.5, 0.75, 1.0], 0.5, stage=0) + bowl([0.45, 0.5, 0.55], 0.5, level=-1, stage=1)
    found = posterior(tried, BOUNDS, [lr(0.5), lr(0.1), lr(0.9)], stage=1)
    for far in (1, 2):
        gain, std = found.gain(0, over=far)
        assert gain == pytest.approx(0.16, abs=0.05)
        assert gain > 2 * std


def test_an_old_stage_counts_for_less() -> None:
    tried = bowl([0.0, 0.25, 0.5, 0.75, 1.0], 0.5, stage=0)
    spreads = [posterior(tried, BOUNDS, [lr(0.5), lr(0.1)], stage=s).gain(0, over=1)[1] for s in (0, 1, 3, 30)]
    assert spreads == sorted(spreads)
    assert spreads[0] < 0.5 * spreads[-1]


def test_the_incumbent_is_compared_under_the_joint_distribution() -> None:
    """A lucky score is no reason to stop looking: the incumbent's mean counts, not its score."""
    lucky = [*bowl([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], 0.5, variance=0.02), Observation(lr(0.3), -0.5, variance=0.02)]
    options: Any = {"acquisition": "ei", "hyperparameters": FIXED}
    against_score = suggest(lucky, BOUNDS, **options)
    against_function = suggest(lucky, BOUNDS, incumbent=lr(0.3), **options)
    assert against_score.value is not None
    assert against_function.value is not None
    assert against_score.value < against_function.value


def test_a_failed_candidate_is_bad_but_not_blinding() -> None:
    """The failure counts as the worst score plus the spread: 1 + 1."""
    tried = observed({0.0: 1.0, 0.4: 0.0, 1.0: math.inf})
    found = posterior(tried, BOUNDS, [o.lr for o in tried], hyperparameters=FIXED)
    assert found.mean == pytest.approx([1.0, 0.0, 2.0], abs=1e-3)
    assert unit(suggest(tried, BOUNDS, kappa=1.0, hyperparameters=FIXED).lr) < 0.6


def test_without_observations_the_point_is_random_and_says_so() -> None:
    suggestions = [suggest([], BOUNDS, seed=seed) for seed in range(200)]
    assert all("nothing was tried" in s.reason for s in suggestions)
    assert np.mean([unit(s.lr) for s in suggestions]) == pytest.approx(0.5, abs=0.06), "uniform in the logarithm"
    assert suggest([], BOUNDS, seed=7) == suggestions[7]


def test_while_all_fail_the_next_point_is_far_and_below() -> None:
    found = suggest(observed({0.5: math.nan, 0.9: math.inf}), BOUNDS)
    assert unit(found.lr) == 0.0
    assert "no score is finite" in found.reason
    stage = observed({0.5: 1.0}, stage=0) + observed({0.5: math.nan}, stage=1)
    assert "no score is finite" in suggest(stage, BOUNDS, stage=1).reason
    at_the_bottom = suggest(observed({0.0: math.nan}), BOUNDS)
    assert unit(at_the_bottom.lr) == pytest.approx(1.0), "nowhere below is left"


def test_a_failed_fit_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fit(THREE, BOUNDS)
    import botorch.fit

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(botorch.fit, "fit_gpytorch_mll", fail)
    tried = observed({0.0: 1.0, 0.3: 2.0, 1.0: 1.5})
    found = suggest(tried, BOUNDS)
    assert unit(found.lr) == pytest.approx(0.65)
    assert "no such luck" in found.reason
    assert found.hyperparameters is None
    with pytest.raises(FitError, match="no such luck"):
        fit(tried, BOUNDS)


def test_equal_scores_give_a_suggestion() -> None:
    found = suggest(observed({0.0: 1.0, 1.0: 1.0}), BOUNDS)
    assert unit(found.lr) == pytest.approx(0.5)
    assert found.reason == ""


def test_nothing_is_suggested_twice_in_a_stage() -> None:
    tried: list[Observation] = []
    while len(tried) < 11:
        tried.append(Observation(suggest(tried, BOUNDS, kappa=0, num_points=11, hyperparameters=FIXED).lr, 1.0))
        if len(tried) == 11:
            break
    points = sorted(unit(o.lr) for o in tried)
    assert np.diff(points).min() > 0.05 - 1e-9
    with pytest.raises(ValueError, match="use a finer grid"):
        suggest(observed({u: 1.0 for u in np.linspace(0, 1, 11)}), BOUNDS, num_points=11)


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
        (lambda: suggest([], BOUNDS, num_points=1), "num_points >= 2"),
        (lambda: suggest([], BOUNDS, acquisition="magic"), "'lcb' or 'ei'"),  # type: ignore[arg-type]
        (lambda: posterior([], BOUNDS, [1e-2]), "at least one finite score"),
        (lambda: fit(observed({0.5: math.nan}), BOUNDS), "at least one finite score"),
        (lambda: Observation(0.0, 1.0), "learning rate > 0"),
        (lambda: Observation(0.1, 1.0, variance=-1.0), "variance >= 0"),
        (lambda: Observation(0.1, 1.0, variance=math.nan), "variance >= 0"),
        (lambda: Hyperparameters(length=0.0), "scales > 0"),
        (
            lambda: suggest(observed({0.1: 1.0}) + observed({0.2: 1.0}, variance=1.0), BOUNDS),
            "variance for every finite score or for none",
        ),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
