r"""Has the training loss passed its minimum? A Gaussian process smooths the losses so far, its joint posterior answers.

The test of AutoWU: while the learning rate grows, the losses :math:`y_0, \dots, y_{n-1}` of all steps so far are
regressed on :math:`x_i = i / n \in [0, 1)` by a Gaussian process :math:`f` of fixed lengthscale. The minimum lies in
the past when for some earlier :math:`x` it is nearly sure that :math:`f(x) < f(1)`. At most 100 losses are fitted and
500 conditioned on, so a test costs the same however long the run is.

References: Kim, Kim, Choi, Hwang and Yoon, "Automated Learning Rate Scheduler for Large-batch Training", ICML AutoML
workshop 2021, arXiv 2107.05855, and its published code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr

from lightning_autolr.core.gp import undisturbed

__all__ = [
    "Explanation",
    "Hyperparameters",
    "PastMinimum",
    "Regression",
    "explain",
    "past_minimum_probability",
    "posterior",
]

Array = NDArray[np.float64]

_LENGTHSCALE = 0.2  # of the unit interval that the whole trajectory is squeezed into; never trained
_NUM_FITTED = 100
_NUM_CONDITIONED = 500
_GRID = np.linspace(0, 1, 500)
_FLOOR = 1e-4  # variance added to every difference, in squared units of the regression


@dataclass(frozen=True)
class Hyperparameters:
    """What is trained, in units of the regression: the constant mean, the variance of the process, that of the noise.

    The defaults are where the published code starts.
    """

    mean: float = 0.0
    scale: float = 0.6931471805599453
    noise: float = 1e-3

    def __post_init__(self) -> None:
        if not (self.scale > 0 and self.noise > 0):
            raise ValueError(f"Expected scale > 0 and noise > 0, got scale={self.scale!r} and noise={self.noise!r}.")


@dataclass(frozen=True, eq=False)
class Regression:
    """The answer of one test.

    Args:
        grid: positions in the trajectory, from 0, the first step, to 1, now, ``(500,)``.
        mean: noise-free posterior mean, in the unit of the losses, mean over the draws, ``(500,)``.
        std: its standard deviation, likewise, ``(500,)``.
        probabilities: probability of a past minimum, one per draw, ``(num_tests,)``.
        argmins: position of the lowest mean, one per draw, ``(num_tests,)``.
        past: the verdict: in more than half of the draws the probability is above the confidence asked for.
        hyperparameters: as trained; their unit is the standard deviation of the losses (``compat``: the losses' own).
    """

    grid: Array
    mean: Array
    std: Array
    probabilities: Array
    argmins: Array
    past: bool
    hyperparameters: Hyperparameters


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a figure of a warm-up shows; ``k`` tests.

    Args:
        grid: where the last test's posterior stands, in steps, ``(500,)``.
        mean: its mean, ``(500,)``.
        std: its standard deviation, ``(500,)``.
        tested: the number of losses that each test saw, ``(k,)``.
        probability: of a past minimum, median over the draws of each test, ``(k,)``.
        argmin: step of the estimated minimum, mean over the draws of the last test.
    """

    grid: Array
    mean: Array
    std: Array
    tested: NDArray[np.int64]
    probability: Array
    argmin: float


def past_minimum_probability(mean: Array, covariance: Array, floor: float = _FLOOR) -> float:
    r"""Probability that the last entry of a normal vector is above an earlier one, for the earlier one most below it.

    .. math:: \max_{i < k} P(f_i < f_k)
              = \max_{i < k} \Phi\left(-\frac{\mu_i - \mu_k}{\sqrt{C_{ii} + C_{kk} - 2 C_{ik} + \text{floor}}}\right)

    Args:
        mean: ``(k,)``, k >= 2; the last entry is now.
        covariance: ``(k, k)``.
        floor: added to the variance of each difference, > 0.

    >>> round(past_minimum_probability(np.array([1, 0.5, 0.8]), 0.01 * np.eye(3)), 6)
    0.982829

    References: ``past_minimum_prob`` in the published code.
    """
    if mean.ndim != 1 or len(mean) < 2 or covariance.shape != (len(mean), len(mean)) or not floor > 0:
        raise ValueError(
            f"Expected shapes (k,) and (k, k) with k >= 2, and floor > 0, got {mean.shape}, {covariance.shape} and "
            f"{floor=}."
        )
    variance = np.diagonal(covariance) + covariance[-1, -1] - 2 * covariance[:, -1]
    # rounding leaves differences between neighbours a little below zero
    z = (mean[-1] - mean) / np.sqrt(np.maximum(variance, 0) + floor)
    return float(ndtr(z[:-1].max()))


def posterior(
    x: Array, y: Array, grid: Array, hyperparameters: Hyperparameters = Hyperparameters()
) -> tuple[Array, Array]:
    """Noise-free posterior of the smoother with given hyper-parameters.

    Args:
        x: positions in [0, 1], ``(n,)``.
        y: losses, ``(n,)``.
        grid: where to predict, ``(k,)``.
        hyperparameters: mean, variance and noise, in units of ``y``.

    Returns:
        Mean ``(k,)`` and covariance ``(k, k)``.
    """
    with _gpytorch():
        model = _smoother()
        _initialize(model, hyperparameters)
        return _predict(model, x, y, grid)


class PastMinimum:
    """The test. Call it with the losses so far, again and again; it remembers the hyper-parameters in between.

    A call trains mean, variance and noise on at most 100 losses, starting from those of the last call. Then
    ``num_tests`` times: condition on at most 500 losses drawn anew, take the joint posterior at 500 positions, vote. It
    is deterministic: each call has its own generator, seeded by ``seed`` and the number of the call.

    Differs from the published code, unless ``compat``:

    - Losses are standardised, and those above the upper outer fence (third quartile + 3 interquartile ranges) moved
      down to it: the floor and the first noise are absolute numbers there, so a loss of order 1e-3 never passes the
      test, and one exploded loss flattens all others.
    - Hyper-parameters are trained to convergence by L-BFGS, and start no lower than a variance of 0.1 and a noise of
      0.01: 100 steps of Adam multiply the noise by at most e, and take noise for structure until they arrive; and a
      variance that went to zero on the plateau before the loss falls has no gradient to come back with.
    - A draw leaves out a fifth of the losses at least: else all draws of fewer than 500 are the same, and so their
      votes.

    Args:
        confidence: probability above which a draw votes for a past minimum, in (0, 1).
        num_tests: draws, >= 1.
        seed: of the draws, >= 0.
        compat: the published arithmetic.
    """

    def __init__(self, confidence: float = 0.95, num_tests: int = 5, seed: int = 0, compat: bool = False) -> None:
        if not 0 < confidence < 1 or num_tests < 1 or seed < 0:
            raise ValueError(
                f"Expected 0 < confidence < 1, num_tests >= 1 and seed >= 0, got {confidence=}, {num_tests=} and "
                f"{seed=}."
            )
        self.confidence, self.num_tests, self.seed, self.compat = confidence, num_tests, seed, compat
        self._model: Any = None
        self._adam: torch.optim.Adam | None = None
        self._num_calls = 0

    def __call__(self, losses: Sequence[float] | Array) -> Regression:
        """Test the trajectory so far. Losses that are not finite are left out; the others keep their places.

        Raises:
            ValueError: fewer than two finite losses.
            RuntimeError: a covariance that is not positive definite, whatever jitter is added.
        """
        raw = np.asarray(losses, dtype=np.float64)
        finite = np.flatnonzero(np.isfinite(raw))
        if len(finite) < 2:
            raise ValueError(f"Expected at least 2 finite losses, got {len(finite)} out of {len(raw)}.")
        x, y, center, unit = finite / len(raw), raw[finite], 0.0, 1.0
        if not self.compat:
            y = _fenced(y)
            center, unit = float(y.mean()), float(y.std()) or 1.0
            y = (y - center) / unit
        generator = torch.Generator(device="cpu").manual_seed(self.seed * 1_000_003 + self._num_calls)
        self._num_calls += 1

        def draw(size: int) -> tuple[Array, Array]:
            chosen = np.sort(torch.randperm(len(y), generator=generator, device="cpu").numpy()[:size])
            return x[chosen], y[chosen]

        size = _NUM_CONDITIONED if self.compat else min(_NUM_CONDITIONED, max(2, len(y) * 4 // 5))
        with _gpytorch():
            self._fit(*draw(_NUM_FITTED), mean=float(y.mean()))
            draws = [_predict(self._model, *draw(size), _GRID) for _ in range(self.num_tests)]
        probabilities = np.array([past_minimum_probability(*prediction) for prediction in draws])
        variances = [np.maximum(np.diagonal(covariance), 0) for _, covariance in draws]
        return Regression(
            grid=_GRID,
            mean=center + unit * np.mean([mean for mean, _ in draws], axis=0),
            std=unit * np.sqrt(np.mean(variances, axis=0)),
            probabilities=probabilities,
            argmins=np.array([_GRID[mean.argmin()] for mean, _ in draws]),
            past=bool(2 * np.count_nonzero(probabilities > self.confidence) > self.num_tests),
            hyperparameters=_hyperparameters(self._model),
        )

    def _fit(self, x: Array, y: Array, mean: float) -> None:
        """Maximise the exact marginal likelihood, the mean starting anew."""
        from botorch.optim.fit import fit_gpytorch_mll_scipy
        from gpytorch.mlls import ExactMarginalLogLikelihood

        if self._model is None:
            self._model = _smoother()
        model = self._model
        last = _hyperparameters(model)
        if self.compat:
            _initialize(model, Hyperparameters(mean, last.scale, last.noise))
        else:
            _initialize(model, Hyperparameters(mean, max(last.scale, 0.1), max(last.noise, 0.01)))
        _condition(model, x, y)
        model.train()
        likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
        if not self.compat:
            fit_gpytorch_mll_scipy(likelihood, options={"maxiter": 50, "ftol": 1e-6})
            return
        if self._adam is None:
            self._adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(100):
            self._adam.zero_grad()
            (-likelihood(model(*model.train_inputs), model.train_targets)).backward()
            self._adam.step()


def explain(losses: Sequence[float], tested: Sequence[int], test: PastMinimum | None = None) -> Explanation:
    """Repeat the tests of a recorded warm-up, for a figure.

    Args:
        losses: training loss of each step of the warm-up.
        tested: number of losses that each test saw, rising, at least one.
        test: a new test with the options of the run; None has the default ones.

    Raises:
        ValueError: tests that are not among the losses.

    >>> x = np.arange(100) / 100
    >>> found = explain(list((x - 0.6) ** 2), tested=[50, 80, 100])
    >>> (found.probability > 0.95).tolist(), round(found.argmin)
    ([False, True, True], 60)
    """
    if not tested or max(tested) > len(losses):
        raise ValueError(f"Expected tests of 1 to {len(losses)} losses, got {tested=}.")
    test = test or PastMinimum()
    regressions = [test(losses[:count]) for count in tested]
    last = regressions[-1]
    return Explanation(
        grid=last.grid * tested[-1],
        mean=last.mean,
        std=last.std,
        tested=np.asarray(tested),
        probability=np.array([np.median(regression.probabilities) for regression in regressions]),
        argmin=float(last.argmins.mean() * tested[-1]),
    )


def _fenced(y: Array) -> Array:
    low, high = np.quantile(y, (0.25, 0.75))
    return np.minimum(y, high + 3 * (high - low)) if high > low else y


@contextmanager
def _gpytorch() -> Iterator[None]:
    """See :func:`~lightning_autolr.core.gp.undisturbed`.

    The diagonal of a matrix that is not positive definite gets jitter, tenfold at each try up to 1e-4.

    Raises:
        RuntimeError: a matrix that is not positive definite even so.
    """
    with undisturbed() as stack:
        from linear_operator import settings
        from linear_operator.utils.errors import NotPSDError

        stack.enter_context(settings.cholesky_jitter(double_value=1e-8))
        stack.enter_context(settings.cholesky_max_tries(5))
        try:
            yield
        except NotPSDError as error:
            raise RuntimeError(
                "Expected the covariance of the losses to be positive definite, got one that is not, even with 1e-4 added "
                "to its diagonal. Losses of extreme size do that with compat=True; compat=False standardises them."
            ) from error


def _smoother() -> Any:
    """Constant mean, scaled RBF kernel of fixed lengthscale, Gaussian noise; double precision; no data yet."""
    from botorch.models import SingleTaskGP
    from gpytorch.kernels import RBFKernel, ScaleKernel
    from gpytorch.likelihoods import GaussianLikelihood
    from gpytorch.means import ConstantMean

    nothing = torch.zeros(1, 1, dtype=torch.float64)
    kernel = ScaleKernel(RBFKernel())
    model = SingleTaskGP(
        nothing,
        nothing,
        likelihood=GaussianLikelihood(),
        covar_module=kernel,
        mean_module=ConstantMean(),
        outcome_transform=None,
    )
    kernel.base_kernel.lengthscale = _LENGTHSCALE
    kernel.base_kernel.raw_lengthscale.requires_grad_(False)
    return model


def _initialize(model: Any, hyperparameters: Hyperparameters) -> None:
    model.mean_module.constant = hyperparameters.mean
    model.covar_module.outputscale = hyperparameters.scale
    model.likelihood.noise = hyperparameters.noise


def _hyperparameters(model: Any) -> Hyperparameters:
    return Hyperparameters(
        mean=model.mean_module.constant.item(),
        scale=model.covar_module.outputscale.item(),
        noise=model.likelihood.noise.item(),
    )


def _condition(model: Any, x: Array, y: Array) -> None:
    model.set_train_data(torch.from_numpy(x)[:, None], torch.from_numpy(y), strict=False)


def _predict(model: Any, x: Array, y: Array, grid: Array) -> tuple[Array, Array]:
    _condition(model, x, y)
    model.eval()
    with torch.no_grad():
        distribution = model(torch.from_numpy(grid)[:, None])
        return distribution.mean.numpy(), distribution.covariance_matrix.numpy()
