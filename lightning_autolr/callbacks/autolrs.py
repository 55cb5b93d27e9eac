"""AutoLRS: the learning rate is found while training."""

from __future__ import annotations

from inspect import signature
from numbers import Integral
from typing import Any, Literal

from lightning_autolr.engine.driver import SearchCallback
from lightning_autolr.schedules import Rex, Schedule
from lightning_autolr.search.autolrs import AutoLRS
from lightning_autolr.search.autowu import AutoWU
from lightning_autolr.search.published import PublishedAutoLRS
from lightning_autolr.search.ratchet import Ratchet

__all__ = ["AutoLRSCallback"]

_OPTIONS_OF = {  # what one method has and the other has not
    "early": ("search_budget", "warmup_fraction", "caution", "anneal_fraction", "anneal", "warmup"),
    "published": ("tau_max", "probe_fraction", "kappa", "estimator", "warmup_steps", "warmup_lr"),
}


class AutoLRSCallback(SearchCallback):
    """Finds the peak learning rate, anneals it slowly to zero, and takes back what did harm.

    ``method="early"``, the default, is :class:`~lightning_autolr.search.autolrs.AutoLRS`: one search before the first step
    (a twentieth of the training steps, or a hundredth), then a warm-up, a slow anneal, and undo of stages that did harm.
    ``method="published"`` is the paper's, :class:`~lightning_autolr.search.published.PublishedAutoLRS`: a search before every
    stage, at as many steps as are trained.

    Args:
        tau: steps, >= 1. "early": the longest between two looks of the ratchet, so what counts in runs of more than 40 times as
            many; a run of unknown length is searched as one of ten times as many. "published": the first stage.
        tau_max: steps of the longest stage of the published method.
        num_candidates: learning rates tried in a search, at most, beside the short candidates that come before it with "early",
            >= 1; None is 4, and 10 as published.
        probe_fraction: "published": steps of a probe as a share of its stage, in (0, 1).
        min_lr: lower bound of the learning rate, > 0. None: "early" goes as low as it needs, "published" makes a range test
            first.
        max_lr: upper bound; likewise. With "published" a bound that is found is at least a factor of ten from a given one.
        objective: what scores a candidate: "validation", "holdout" (training batches held out from the probes), or "train":
            its own training losses, which with "early" are those of its second half. "published" forecasts them, and has
            "auto", too: training losses until a stage of ``tau_max`` steps was made, validation losses from then on, as the
            authors' code does; without validation batches it keeps to training losses. None is "validation" as published; with
            "early" it is "train" for candidates of ten steps and more, and "validation" for shorter ones, as in runs of less
            than 160 steps.
        kappa: "published": weight of the standard deviation in the lower confidence bound, >= 0; the published value fills the
            space.
        estimator: "published": "bounded" forecasts, or the "reference" ones of the authors' code.
        warmup_steps: "published": steps before the first stage that rise to ``warmup_lr``, not searched.
        warmup_lr: "published": learning rate at their end; None is ``max_lr``.
        method: "early" or "published".
        search_budget: "early": search steps as a share of the run's, at most, in (0, 1); None is 1 % where short candidates
            learn something, a twentieth where they do not, and more in short runs.
        caution: "early": what the best candidate's learning rate is divided by, > 0, since a run is longer than a probe; None
            is 2, more for short candidates, and 1/2 for a network that is trained already, as in fine-tuning.
        warmup_fraction: "early": share of the run that goes linearly up to the peak, in [0, 1).
        anneal_fraction: "early": share of the run at its end that goes to zero, in (0, 1].
        anneal: "early": shape of the anneal; None is REX.
        ratchet: take back training that did harm, see :class:`~lightning_autolr.search.ratchet.Ratchet`; None does so with
            "early" only.
        warmup: "autowu" lets AutoWU find the warm-up first: the learning rate grows until the training loss has passed its
            minimum, and the candidates stay in the range found. None is a warm-up of ``warmup_fraction``.
        options: see :class:`~lightning_autolr.engine.driver.SearchCallback`.

    Raises:
        ValueError: an argument out of its range, or one of the other method.

    Example::

        Trainer(max_steps=10_000, callbacks=[AutoLRSCallback()])
    """

    def __init__(
        self,
        tau: int = 1000,
        *,
        tau_max: int = 8000,
        num_candidates: int | None = None,
        probe_fraction: float = 0.1,
        min_lr: float | None = None,
        max_lr: float | None = None,
        objective: Literal["validation", "holdout", "train", "auto"] | None = None,
        kappa: float = 1e6,
        estimator: Literal["bounded", "reference"] = "bounded",
        warmup_steps: int = 0,
        warmup_lr: float | None = None,
        method: Literal["early", "published"] = "early",
        search_budget: float | None = None,
        warmup_fraction: float = 0.1,
        caution: float | None = None,
        anneal_fraction: float = 0.9,
        anneal: Schedule | None = None,
        ratchet: Ratchet | bool | None = None,
        warmup: Literal["autowu"] | None = None,
        **options: Any,
    ) -> None:
        if not (isinstance(tau, (int, Integral)) and tau >= 1):
            raise ValueError(f"Expected a whole tau >= 1, got {tau=}.")
        tau = int(tau)  # it is written into traces and checkpoints
        if anneal is not None and not isinstance(anneal, Schedule):
            raise TypeError(f"Expected anneal to be a Schedule such as Rex(), or None, got {anneal!r}.")
        if method not in _OPTIONS_OF:
            raise ValueError(f"Expected method to be 'early' or 'published', got {method!r}.")
        (other,) = _OPTIONS_OF.keys() - {method}
        defaults, given = signature(AutoLRSCallback).parameters, locals()
        if foreign := [name for name in _OPTIONS_OF[other] if given[name] != defaults[name].default]:
            raise ValueError(f"Expected {', '.join(foreign)} only with method={other!r}, got {method=}.")
        signal = objective or ("validation" if method == "published" else "train")
        super().__init__(
            objective="train" if signal == "auto" else signal,  # "auto" takes validation losses where there are any
            ratchet=Ratchet(longest_stage=tau) if method == "early" and ratchet in (None, True) else ratchet or False,
            **options,
        )
        if warmup not in (None, "autowu"):
            raise ValueError(f"Expected warmup to be 'autowu' or None, got {warmup!r}.")
        seed = self.probe_options.seed
        if method == "early":
            if objective == "auto":
                raise ValueError(
                    "Expected objective 'train', 'validation' or 'holdout' for method='early', got 'auto'."
                )
            self.search = AutoLRS(
                tau=tau,
                num_candidates=4 if num_candidates is None else num_candidates,
                min_lr=min_lr,
                max_lr=max_lr,
                search_budget=search_budget,
                caution=caution,
                warmup_fraction=warmup_fraction,
                anneal_fraction=anneal_fraction,
                anneal=Rex() if anneal is None else anneal,
                objective=objective,
                warmup=None if warmup is None else AutoWU(min_lr=min_lr or 1e-5, max_lr=max_lr or 1.0, seed=seed),
            )
        else:
            self.search = PublishedAutoLRS(
                min_lr=min_lr,
                max_lr=max_lr,
                tau=tau,
                tau_max=max(tau, tau_max),
                num_candidates=10 if num_candidates is None else num_candidates,
                probe_fraction=probe_fraction,
                kappa=kappa,
                objective=signal,
                estimator=estimator,
                warmup_steps=warmup_steps,
                warmup_lr=warmup_lr,
                seed=seed,
            )
