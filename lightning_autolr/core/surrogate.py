r"""Which learning rate to try next: a Gaussian process over what the tried ones scored.

The input is :math:`u = (\ln\eta - \ln\eta_{min}) / (\ln\eta_{max} - \ln\eta_{min}) \in [0, 1]`, the scores (lower is
better) are standardised, the kernel is Matérn-5/2, as in AutoLRS (Jin et al., ICLR 2021, arXiv 2105.10762). A search
that goes on over several stages has the stage as a second input: what was good a stage ago is probably still good, but
all losses have moved. So each stage has a level of its own, about which nothing is assumed, and only differences within
a stage speak.

One input means that acquisition functions need no optimiser: they are evaluated on a grid, all of it.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import erfcx, ndtr

__all__ = ["FitError", "Hyperparameters", "Observation", "Posterior", "Suggestion", "fit", "posterior", "suggest"]

Acquisition = Literal["lcb", "ei"]
Array = NDArray[np.float64]

_LEVEL = 100.0  # prior variance of a stage's level, in units of the standardised scores': large, to assume nothing


@dataclass(frozen=True)
class Observation:
    """A learning rate that was tried.

    Args:
        lr: learning rate, > 0.
        score: lower is better; not finite when the candidate failed.
        variance: variance of the score's error, >= 0; None when unknown, then one noise is fitted for all.
        stage: number of the stage it was tried in.
    """

    lr: float
    score: float
    variance: float | None = None
    stage: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"Expected a finite learning rate > 0, got {self.lr=}.")
        if self.variance is not None and not 0 <= self.variance < math.inf:
            raise ValueError(f"Expected a finite variance >= 0 or None, got {self.variance=}.")


@dataclass(frozen=True)
class Hyperparameters:
    """What shapes the Gaussian process, in units of the standardised scores.

    Args:
        amplitude: prior variance of the function, > 0.
        length: length scale in u, where 1 is the whole range of learning rates, > 0.
        noise: variance of the scores' errors, >= 0; not used when the observations bring their own.
        stage_length: length scale in stages, > 0; not used within one stage.
    """

    amplitude: float = 1.0
    length: float = 0.3
    noise: float = 1e-4
    stage_length: float = 3.0

    def __post_init__(self) -> None:
        if not (min(self.amplitude, self.length, self.stage_length) > 0 and self.noise >= 0):
            raise ValueError(f"Expected scales > 0 and noise >= 0, got {self}.")


_PRIOR = Hyperparameters(amplitude=1.0, length=0.4, noise=math.exp(-4), stage_length=3.0)  # medians of the priors


@dataclass(frozen=True)
class Posterior:
    """The scores to expect at some learning rates, without their noise and in their units.

    Args:
        mean: one value per learning rate.
        covariance: one row per learning rate. With several stages it contains what is not known of the stage's level,
            which moves all learning rates alike: only variances of differences mean something then.
    """

    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each score."""
        return tuple(math.sqrt(max(row[i], 0.0)) for i, row in enumerate(self.covariance))

    def gain(self, index: int, over: int) -> tuple[float, float]:
        """By how much score ``index`` is lower than score ``over``: mean and standard deviation."""
        c = self.covariance
        variance = c[index][index] + c[over][over] - 2 * c[index][over]
        return self.mean[over] - self.mean[index], math.sqrt(max(variance, 0.0))


@dataclass(frozen=True)
class Suggestion:
    """The learning rate to try next.

    Args:
        lr: within the bounds, and not tried in this stage before.
        value: its acquisition value in the scores' units: the confidence bound, or the expected improvement.
        hyperparameters: of the Gaussian process that suggested it; None when none did.
        reason: why no Gaussian process suggested it, for the user to see; empty when one did.
    """

    lr: float
    value: float | None = None
    hyperparameters: Hyperparameters | None = None
    reason: str = ""


class FitError(RuntimeError):
    """The hyper-parameters of the Gaussian process could not be fitted."""


def suggest(
    observations: Sequence[Observation],
    bounds: tuple[float, float],
    *,
    acquisition: Acquisition = "lcb",
    kappa: float = 1.96,
    incumbent: float | None = None,
    stage: int = 0,
    seed: int = 0,
    hyperparameters: Hyperparameters | None = None,
    num_points: int = 201,
) -> Suggestion:
    r"""Suggest the next learning rate of a stage.

    - ``"lcb"`` minimises the lower confidence bound :math:`\mu(u) - \kappa\,\sigma(u)`;
    - ``"ei"`` maximises the expected improvement :math:`E\max(f^* - f(u), 0)`.

    Without ``incumbent``, :math:`f^*` is the best score of the stage. With it, :math:`f^*` is the unknown :math:`f` at
    that learning rate, under the joint distribution, so that luck in the incumbent's score is not taken for quality.
    With several stages both are about :math:`f(u) - f^*`, :math:`f^*` at the best tried point, as levels are unknown.

    A score that is not finite counts as the worst finite one of its stage plus their spread: bad enough to stay away
    from, not so bad that all others look equal. The very first point is drawn log-uniformly. If the stage has no finite
    score yet, or the fit fails, the point is the one farthest from those tried, below all that failed; see ``reason``.

    Deterministic given its arguments; torch's random state, default dtype, threads and grad mode are left alone.

    Args:
        observations: what was tried, in this stage and before. Either all finite scores have a variance, or none has.
        bounds: smallest and largest learning rate.
        acquisition: ``"lcb"`` or ``"ei"``.
        kappa: weight of the standard deviation, >= 0. From about 10 on ``"lcb"`` only fills the space.
        incumbent: learning rate to improve on, within the bounds.
        stage: the stage to suggest for.
        seed: of the random first point.
        hyperparameters: given ones instead of fitted ones.
        num_points: size of the grid on u, bounds included, >= 2.

    Raises:
        ValueError: bad arguments, or every point of the grid was tried.

    >>> tried = [Observation(1e-3, 2.0), Observation(1e-2, 1.0), Observation(1e-1, 1.5)]
    >>> round(suggest(tried, (1e-3, 1e-1), hyperparameters=Hyperparameters()).lr, 4)
    0.0224
    """
    if acquisition not in ("lcb", "ei") or not kappa >= 0 or num_points < 2:
        raise ValueError(
            f"Expected acquisition 'lcb' or 'ei', kappa >= 0 and num_points >= 2, got {acquisition=}, {kappa=} and "
            f"{num_points=}."
        )
    _check_bounds(bounds)
    if not observations:
        lr = _lr(random.Random(seed).random(), bounds)
        return Suggestion(lr=lr, reason="nothing was tried yet: a point at random")
    here = [o for o in observations if o.stage == stage]
    tried = np.array([_unit(o.lr, bounds) for o in here])
    failed = [u for u, o in zip(tried, here, strict=True) if not math.isfinite(o.score)]
    grid = np.linspace(0, 1, num_points)
    distance = np.min(np.abs(grid[:, None] - tried), axis=1, initial=math.inf)
    free = grid[distance > 0.5 / (num_points - 1)]
    if len(free) == 0:
        raise ValueError(f"Expected a point of the grid that was not tried yet, got {num_points=}: use a finer grid.")

    def far(reason: str) -> Suggestion:
        safe = free[free < min(failed, default=math.inf)]
        candidates = safe if len(safe) else free
        distances = np.min(np.abs(candidates[:, None] - tried), axis=1, initial=1.0)
        lr = _lr(float(candidates[np.argmax(distances)]), bounds)
        return Suggestion(lr=lr, reason=f"{reason}: the point farthest from those tried")

    if len(here) == len(failed) > 0 or not any(math.isfinite(o.score) for o in observations):
        return far("no score is finite yet")
    data = _standardise(observations, bounds)
    if hyperparameters is None:
        try:
            hyperparameters = _fit(data)
        except FitError as error:
            return far(str(error))

    # What to compare with: the incumbent, or the best tried point, or with no point in this stage the best of all.
    reference = tried if len(data.centres) > 1 or stage not in data.centres else tried[:0]
    if incumbent is not None:
        reference = np.array([_unit(incumbent, bounds)])
    elif stage not in data.centres:
        reference = free
    mean, covariance = _posterior(data, hyperparameters, np.concatenate([free, reference]), stage)
    n = len(free)
    gain, variance = -mean[:n], np.diag(covariance)[:n]
    if len(reference):
        best = n + int(np.argmin(mean[n:]))
        gain = mean[best] + gain
        variance = variance + covariance[best, best] - 2 * covariance[:n, best]
    elif acquisition == "ei":
        gain = min(o.score for o in here if math.isfinite(o.score)) + gain
    std = np.sqrt(np.maximum(variance, 0))
    merit = gain + kappa * std if acquisition == "lcb" else _log_expected_improvement(gain, std)
    i = int(np.argmax(merit))
    value = -merit[i] if acquisition == "lcb" else np.exp(merit[i])
    return Suggestion(lr=_lr(float(free[i]), bounds), value=float(value), hyperparameters=hyperparameters)


def posterior(
    observations: Sequence[Observation],
    bounds: tuple[float, float],
    lrs: Sequence[float],
    *,
    stage: int = 0,
    hyperparameters: Hyperparameters | None = None,
) -> Posterior:
    """The scores to expect at ``lrs`` in ``stage``, with fitted or given hyper-parameters.

    Raises:
        ValueError: bad arguments, or no finite score.
        FitError: the fit failed.

    >>> tried = [Observation(1e-3, 2.0), Observation(1e-2, 1.0), Observation(1e-1, 1.5)]
    >>> [round(m, 2) for m in posterior(tried, (1e-3, 1e-1), [1e-2, 3e-2], hyperparameters=Hyperparameters()).mean]
    [1.0, 1.19]
    """
    data = _standardise(observations, bounds)
    at = np.array([_unit(lr, bounds) for lr in lrs])
    mean, covariance = _posterior(data, hyperparameters or _fit(data), at, stage)
    return Posterior(mean=tuple(mean.tolist()), covariance=tuple(tuple(row) for row in covariance.tolist()))


def fit(observations: Sequence[Observation], bounds: tuple[float, float]) -> Hyperparameters:
    r"""Fit the hyper-parameters with BoTorch: the largest posterior density, by L-BFGS in double precision.

    Differs from the paper's code, which maximises the likelihood alone: weak priors (log-normal; medians: length 0.4 of
    the range, amplitude 1, noise :math:`e^{-4}`, 3 stages) keep three or four points from being read as mere noise.

    Raises:
        ValueError: bad arguments, or no finite score.
        FitError: the optimiser failed.
    """
    return _fit(_standardise(observations, bounds))


@dataclass(frozen=True)
class _Data:
    """Observations in the units of the Gaussian process, those of stages without a finite score left out."""

    x: Array  # (n, 2): u and stage
    y: Array  # (n,): score minus its stage's centre, in units of ``scale``
    noise: Array | None  # (n,): known variances in the same units
    centres: dict[int, float]
    scale: float


def _standardise(observations: Sequence[Observation], bounds: tuple[float, float]) -> _Data:
    _check_bounds(bounds)
    finite = [o for o in observations if math.isfinite(o.score)]
    known = [o.variance for o in finite if o.variance is not None]
    if not finite:
        raise ValueError(f"Expected at least one finite score, got {observations=}.")
    if 0 < len(known) < len(finite):
        raise ValueError(f"Expected a variance for every finite score or for none, got {len(known)} of {len(finite)}.")
    scores: dict[int, list[float]] = {}
    for o in finite:
        scores.setdefault(o.stage, []).append(o.score)
    bad = {
        stage: max(values) + ((max(values) - min(values)) or abs(max(values)) or 1.0)
        for stage, values in scores.items()
    }
    used = [o for o in observations if o.stage in scores]
    y = np.array([o.score if math.isfinite(o.score) else bad[o.stage] for o in used])
    stages = np.array([o.stage for o in used])
    centres = {stage: float(y[stages == stage].mean()) for stage in scores}
    y = y - np.array([centres[stage] for stage in stages])
    # One degree of freedom less per further stage; for a single stage it is the population standard deviation.
    scale = math.sqrt(float(y @ y) / (len(y) - len(centres) + 1)) or 1.0
    noise = None
    if known:
        noise = np.array([max(known) if o.variance is None else o.variance for o in used]) / scale**2
    x = np.column_stack([[_unit(o.lr, bounds) for o in used], stages])
    return _Data(x=x, y=y / scale, noise=noise, centres=centres, scale=scale)


def _fit(data: _Data) -> Hyperparameters:
    if not data.y.any():
        return _PRIOR  # no differences, nothing to learn
    with _botorch():
        from botorch.exceptions.errors import BotorchError, ModelFittingError
        from botorch.fit import fit_gpytorch_mll
        from gpytorch.mlls import ExactMarginalLogLikelihood

        model, fitted = _model(data, several=len(data.centres) > 1)
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        try:
            fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"ftol": 1e-6, "maxiter": 50}})
        except (BotorchError, ModelFittingError, RuntimeError, ValueError) as error:
            raise FitError(f"the Gaussian process could not be fitted ({type(error).__name__}: {error})") from error
    return replace(_PRIOR, **{name: parameter.item() for name, parameter in fitted.items()})


def _posterior(data: _Data, hyperparameters: Hyperparameters, u: Array, stage: int) -> tuple[Array, Array]:
    """Mean ``(n,)`` and covariance ``(n, n)`` at ``u`` in the scores' units."""
    with _botorch():
        model, _ = _model(data, several=data.centres.keys() != {stage}, given=hyperparameters)
        at = torch.tensor(np.column_stack([u, np.full(len(u), stage)]), dtype=torch.float64)
        with torch.no_grad():
            distribution = model.posterior(at).distribution
            mean, covariance = distribution.mean.numpy(), distribution.covariance_matrix.numpy()
    centre = data.centres.get(stage, data.centres[max(data.centres)])
    return centre + data.scale * mean, data.scale**2 * covariance


def _model(
    data: _Data, several: bool, given: Hyperparameters | None = None
) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """The Gaussian process, given its hyper-parameters or ready to have them fitted, and these parameters by name.

    The covariance is amplitude * Matérn(u); with several stages, amplitude * Matérn(u) * Matérn(stage) + level(stage).
    """
    from botorch.models import SingleTaskGP
    from gpytorch.constraints import Interval, Positive
    from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
    from gpytorch.likelihoods import GaussianLikelihood
    from gpytorch.means import ZeroMean
    from gpytorch.priors import LogNormalPrior

    def hyper(name: str, kind: str, low: float, high: float, spread: float) -> dict[str, Any]:
        median = getattr(_PRIOR, name)
        if given is not None:
            return {f"{kind}_constraint": Positive(transform=None, initial_value=getattr(given, name))}
        return {
            f"{kind}_constraint": Interval(low, high, transform=None, initial_value=median),
            f"{kind}_prior": LogNormalPrior(math.log(median), spread),
        }

    noise = data.noise
    if given is not None and noise is None:
        noise = np.full(len(data.y), given.noise)
    matern = MaternKernel(nu=2.5, active_dims=(0,), **hyper("length", "lengthscale", 0.05, 2.0, 0.6))
    parameters = {"length": matern.raw_lengthscale}
    if several:
        over_stages = MaternKernel(nu=2.5, active_dims=(1,), **hyper("stage_length", "lengthscale", 0.5, 100.0, 0.7))
        parameters["stage_length"] = over_stages.raw_lengthscale
        matern = matern * over_stages
    kernel = ScaleKernel(matern, **hyper("amplitude", "outputscale", 0.01, 100.0, 1.0))
    parameters["amplitude"] = kernel.raw_outputscale
    if several:
        level = ScaleKernel(RBFKernel(active_dims=(1,)))
        level.outputscale, level.base_kernel.lengthscale = _LEVEL, 0.01  # stages are whole numbers: equal or unrelated
        kernel = kernel + level.requires_grad_(False)
    likelihood = None
    if noise is None:
        likelihood = GaussianLikelihood(**hyper("noise", "noise", 1e-6, 1.0, 1.0))
        parameters["noise"] = likelihood.raw_noise
    model = SingleTaskGP(
        train_X=torch.tensor(data.x, dtype=torch.float64),
        train_Y=torch.tensor(data.y[:, None], dtype=torch.float64),
        train_Yvar=None if noise is None else torch.tensor(noise[:, None], dtype=torch.float64),
        likelihood=likelihood,
        covar_module=kernel,
        mean_module=ZeroMean(),
        outcome_transform=None,
    )
    return model, parameters


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
    """Import and run BoTorch without a trace: none of its warnings, and torch's global state as it was.

    The import takes seconds, which searches without a surrogate need not spend, and warns about a use of TorchScript.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reach the accelerators' generators too
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))  # not always: it slows down every call
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
