r"""Which learning rate to try next: a Gaussian process over what the tried ones scored.

The input is :math:`u = (\ln\eta - \ln\eta_{min}) / (\ln\eta_{max} - \ln\eta_{min}) \in [0, 1]`, the scores (lower is
better) are standardised, the kernel is Matérn-5/2, as in AutoLRS (Jin et al., ICLR 2021, arXiv 2105.10762). One input
means that acquisition functions need no optimiser: they are evaluated on a grid, all of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import erfcx, ndtr

from lightning_autolr.core.gp import undisturbed
from lightning_autolr.core.losses import paired
from lightning_autolr.core.requests import ProbeResult

__all__ = ["FitError", "Observation", "Posterior", "Suggestion", "observe", "posterior", "suggest"]

Array = NDArray[np.float64]

_GRID = np.linspace(0, 1, 201)  # of u: where a learning rate may be suggested


@dataclass(frozen=True)
class Observation:
    """A learning rate that was tried.

    Args:
        lr: learning rate, > 0.
        score: lower is better; not finite when the candidate failed.
        variance: variance of the score's error, >= 0; None when unknown, then one noise is fitted for all.
    """

    lr: float
    score: float
    variance: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"Expected a finite learning rate > 0, got lr={self.lr!r}.")
        if self.variance is not None and not 0 <= self.variance < math.inf:
            raise ValueError(f"Expected a finite variance >= 0 or None, got variance={self.variance!r}.")


@dataclass(frozen=True, eq=False)
class Posterior:
    """The scores to expect at ``k`` learning rates, without their noise and in their units.

    Args:
        mean: ``(k,)``.
        covariance: ``(k, k)``.
    """

    mean: Array
    covariance: Array

    @property
    def std(self) -> Array:
        """Standard deviation of each score, ``(k,)``."""
        return np.sqrt(np.maximum(np.diag(self.covariance), 0))

    def gain(self, over: int) -> tuple[Array, Array]:
        """By how much each score is lower than score ``over``: mean ``(k,)`` and standard deviation ``(k,)``."""
        c = self.covariance
        variance = np.diag(c) + c[over, over] - 2 * c[:, over]
        return self.mean[over] - self.mean, np.sqrt(np.maximum(variance, 0))

    def expected_improvement(self, over: int) -> Array:
        r""":math:`E\max(f_{over} - f_i, 0)` of each score, ``(k,)``."""
        return np.exp(_log_expected_improvement(*self.gain(over)))


@dataclass(frozen=True)
class Suggestion:
    """The learning rate to try next.

    Args:
        lr: within the bounds, and not tried before.
        expected_improvement: on the incumbent, in the scores' units; None without an incumbent or a Gaussian process.
        reason: why no Gaussian process suggested it, for the user to see; empty when one did.
    """

    lr: float
    expected_improvement: float | None = None
    reason: str = ""


class FitError(RuntimeError):
    """The hyper-parameters of the Gaussian process could not be fitted."""


def observe(results: Mapping[float, ProbeResult]) -> list[Observation]:
    """What probes on the same evaluation batches say of their learning rates.

    The noise of a score is that of its paired difference to the best one, whose own is next to nothing: a tenth of the
    median of the others. One that failed has that median.

    Args:
        results: by learning rate; those that did not fail have an evaluation, and there is at least one of them.

    >>> from lightning_autolr.core.requests import Evaluation
    >>> def result(*losses):
    ...     return ProbeResult(evaluations=(Evaluation(5, losses),))
    >>> for o in observe({0.1: result(2.0, 4.0), 0.2: result(1.0, 2.0)}):
    ...     print(o.lr, o.score, round(o.variance, 4))
    0.1 3.0 0.25
    0.2 1.5 0.0025
    """
    best = min(sorted(results), key=lambda lr: results[lr].loss)
    errors = {lr: paired(results[best], r)[1] for lr, r in results.items() if math.isfinite(r.loss)}
    typical = max(float(np.median([e for lr, e in errors.items() if lr != best] or [0.0])), 1e-9)
    errors[best] = 0.1 * typical
    return [Observation(lr, r.loss, max(errors.get(lr, typical), 1e-9) ** 2) for lr, r in results.items()]


def suggest(
    observations: Sequence[Observation],
    bounds: tuple[float, float],
    *,
    incumbent: float | None = None,
    kappa: float = 1.96,
    seed: int = 0,
) -> Suggestion:
    r"""Suggest the next learning rate.

    - With an incumbent, the one of largest expected improvement :math:`E\max(f^* - f(u), 0)`. :math:`f^*` is the unknown
      :math:`f` at the incumbent, under the joint distribution, so that luck in its score is not taken for quality.
    - Without, the one of lowest confidence bound :math:`\mu(u) - \kappa\,\sigma(u)`.

    A score that is not finite counts as the worst finite one plus their spread: bad enough to stay away from, not so bad
    that all others look equal. The very first point is drawn log-uniformly. While no score is finite, or if the fit
    fails, the point is the one farthest from those tried, below all that failed; see ``reason``.

    Deterministic given its arguments; torch's random state, default dtype, threads and grad mode are left alone.

    Args:
        observations: what was tried, at most 100. Either all finite scores have a variance, or none has.
        bounds: smallest and largest learning rate.
        incumbent: learning rate to improve on, within the bounds.
        kappa: weight of the standard deviation, >= 0. From about 10 on the confidence bound only fills the space.
        seed: of the random first point.

    Raises:
        ValueError: bad arguments.

    >>> tried = [Observation(1e-3, 2.0), Observation(1e-2, 1.0), Observation(1e-1, 1.5)]
    >>> round(suggest(tried, (1e-3, 1e-1), incumbent=1e-2).lr, 4)
    0.0166
    """
    if not kappa >= 0 or len(observations) > 100:  # each takes two points off the grid at most
        raise ValueError(f"Expected kappa >= 0 and at most 100 observations, got {kappa=} and {len(observations)}.")
    _check_bounds(bounds)
    if not observations:
        return Suggestion(_lr(random.Random(seed).random(), bounds), reason="nothing was tried yet: a point at random")
    tried = np.array([_unit(o.lr, bounds) for o in observations])
    distance = np.min(np.abs(_GRID[:, None] - tried), axis=1)
    is_free = distance > 0.5 * _GRID[1]
    free, distance = _GRID[is_free], distance[is_free]

    def farthest(reason: str) -> Suggestion:
        failed = [u for u, o in zip(tried, observations, strict=True) if not math.isfinite(o.score)]
        is_safe = free < min(failed, default=math.inf)
        u = free[np.argmax(np.where(is_safe, distance, 0) if is_safe.any() else distance)]
        return Suggestion(_lr(u, bounds), reason=f"{reason}: the point farthest from those tried")

    if not any(math.isfinite(o.score) for o in observations):
        return farthest("no score is finite yet")
    try:
        found = _posterior(
            observations, bounds, free if incumbent is None else np.append(free, _unit(incumbent, bounds))
        )
    except FitError as error:
        return farthest(str(error))
    if incumbent is None:
        return Suggestion(_lr(free[np.argmax(kappa * found.std - found.mean)], bounds))
    merit = _log_expected_improvement(*found.gain(over=len(free)))[:-1]
    i = np.argmax(merit)
    return Suggestion(_lr(free[i], bounds), float(np.exp(merit[i])))


def posterior(observations: Sequence[Observation], bounds: tuple[float, float], lrs: Sequence[float]) -> Posterior:
    """The scores to expect at ``lrs``.

    The hyper-parameters are fitted: the largest posterior density, by L-BFGS in double precision. Differs from the
    paper's code, which maximises the likelihood alone: weak priors keep three or four points from being read as mere
    noise.

    Raises:
        ValueError: bad arguments, or no finite score.
        FitError: the fit failed.

    >>> tried = [Observation(1e-3, 2.0), Observation(1e-2, 1.0), Observation(1e-1, 1.5)]
    >>> posterior(tried, (1e-3, 1e-1), [1e-2, 3e-2]).mean.round(2).tolist()
    [1.01, 1.27]
    """
    _check_bounds(bounds)
    return _posterior(observations, bounds, np.array([_unit(lr, bounds) for lr in lrs]))


def _posterior(observations: Sequence[Observation], bounds: tuple[float, float], at: Array) -> Posterior:
    finite = [o.score for o in observations if math.isfinite(o.score)]
    known = [o.variance for o in observations if math.isfinite(o.score) and o.variance is not None]
    if not finite:
        raise ValueError(f"Expected at least one finite score, got {observations=}.")
    if 0 < len(known) < len(finite):
        raise ValueError(f"Expected a variance for every finite score or for none, got {len(known)} of {len(finite)}.")
    bad = max(finite) + ((max(finite) - min(finite)) or abs(max(finite)) or 1.0)
    u = np.array([_unit(o.lr, bounds) for o in observations])
    y = np.array([o.score if math.isfinite(o.score) else bad for o in observations])
    center = y.mean()
    y = y - center
    scale = math.sqrt(y @ y / len(y)) or 1.0
    noise = None
    if known:
        noise = np.array([max(known) if o.variance is None else o.variance for o in observations]) / scale**2
    with _botorch():
        model = _model(u, y / scale, noise)
        if y.any():  # without differences there is nothing to learn
            _fit(model)
        with torch.no_grad():
            distribution = model.posterior(torch.from_numpy(at)[:, None]).distribution
            mean, covariance = distribution.mean.numpy(), distribution.covariance_matrix.numpy()
    return Posterior(center + scale * mean, scale**2 * covariance)


def _model(u: Array, y: Array, noise: Array | None) -> Any:
    """The Gaussian process at the medians of its priors; scores of unknown ``noise`` have one to be fitted."""
    from botorch.models import SingleTaskGP
    from gpytorch.constraints import Interval
    from gpytorch.kernels import MaternKernel, ScaleKernel
    from gpytorch.likelihoods import GaussianLikelihood
    from gpytorch.means import ZeroMean
    from gpytorch.priors import LogNormalPrior

    def weakly(name: str, median: float, low: float, high: float, spread: float) -> dict[str, Any]:
        return {
            f"{name}_constraint": Interval(low, high, transform=None, initial_value=median),
            f"{name}_prior": LogNormalPrior(math.log(median), spread),
        }

    likelihood = None
    if noise is None:
        likelihood = GaussianLikelihood(**weakly("noise", math.exp(-4), 1e-6, 1.0, spread=1.0))
    matern = MaternKernel(nu=2.5, **weakly("lengthscale", 0.4, 0.05, 2.0, spread=0.6))
    return SingleTaskGP(
        train_X=torch.from_numpy(u)[:, None],
        train_Y=torch.from_numpy(y)[:, None],
        train_Yvar=None if noise is None else torch.from_numpy(noise)[:, None],
        likelihood=likelihood,
        covar_module=ScaleKernel(matern, **weakly("outputscale", 1.0, 0.01, 100.0, spread=1.0)),
        mean_module=ZeroMean(),
        outcome_transform=None,
    )


def _fit(model: Any) -> None:
    """Move its hyper-parameters to the largest posterior density."""
    from botorch.exceptions.errors import BotorchError, ModelFittingError
    from botorch.fit import fit_gpytorch_mll
    from gpytorch.mlls import ExactMarginalLogLikelihood

    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    try:
        fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"ftol": 1e-6, "maxiter": 50}})
    except (BotorchError, ModelFittingError, RuntimeError, ValueError) as error:
        raise FitError(f"the Gaussian process could not be fitted ({type(error).__name__}: {error})") from error


def _log_expected_improvement(gain: Array, std: Array) -> Array:
    r"""Log of :math:`E\max(N(gain, std^2), 0) = std\,(\varphi(z) + z\,\Phi(z))`, with :math:`z = gain / std`.

    The logarithm still ranks candidates where the improvement itself is zero to rounding (Ament et al., "Unexpected
    Improvements to Expected Improvement for Bayesian Optimization", 2023).
    """
    std = np.maximum(std, 1e-12)
    z = np.maximum(gain / std, -1e6)  # below, 1 + z * Mills' ratio is nothing but rounding
    log_density = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    mills = math.sqrt(math.pi / 2) * erfcx(-np.minimum(z, 0) / math.sqrt(2))
    below = log_density + np.log1p(z * mills)
    above = np.log(np.maximum(np.exp(log_density) + z * ndtr(z), np.finfo(np.float64).tiny))
    return np.asarray(np.log(std) + np.where(z < -1, below, above))


@contextmanager
def _botorch() -> Iterator[None]:
    """See :func:`~lightning_autolr.core.gp.undisturbed`; torch's random state is as before afterwards."""
    with undisturbed() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reach the accelerators' generators too
        from botorch.settings import validate_input_scaling

        stack.enter_context(validate_input_scaling(False))
        yield


def _unit(lr: float, bounds: tuple[float, float]) -> float:
    return math.log(lr / bounds[0]) / math.log(bounds[1] / bounds[0])


def _lr(u: float, bounds: tuple[float, float]) -> float:
    """Inverse of :func:`_unit`; rounding never leaves the bounds."""
    return float(min(max(bounds[0] * (bounds[1] / bounds[0]) ** u, bounds[0]), bounds[1]))


def _check_bounds(bounds: tuple[float, float]) -> None:
    if not 0 < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"Expected 0 < min_lr < max_lr, both finite, got {bounds=}.")
