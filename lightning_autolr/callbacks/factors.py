"""Factor search: the learning rate follows what one update does at several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_autolr.core.scores import Normalization
from lightning_autolr.engine.driver import SearchCallback
from lightning_autolr.search.factors import FactorSearch

__all__ = ["FactorSearchCallback"]


class FactorSearchCallback(SearchCallback):
    """One update direction, forward passes at several multiples of it, and a step of the learning rate towards the best.

    See :class:`~lightning_autolr.search.factors.FactorSearch` for the algorithm and what it does about each limit that its
    authors list.

    Args:
        factors: multiples of the learning rate to try.
        every: optimizer steps between two decisions, or "epoch" as published.
        normalize: how losses become comparable ("improvement" costs one more forward pass).
        temperature: of the exponential score; smaller is nearer to "the lowest loss wins".
        outlier_clip: a loss counts for no more than the median plus this many times what the best is below it, so that one
            exploding candidate does not make the others look equal; None clips nothing, as published.
        evaluate_on: the batch of the update, the next one, or the validation batches.
        horizon: updates that make the direction.
        exact: make the updates anew for each factor, for optimizers that are not linear in their learning rate.
        initial_lr: None is the optimizer's own.
        min_lr: smallest learning rate.
        max_lr: largest learning rate.
        smoothing: of the logarithm of the factor, in [0, 1).
        back_off: decide more rarely as long as the factor is within this of 1; None never does.
        start_rounds: decisions before the first real step, at most.
        guard: undo the steps since the last decision, and make them at a lower learning rate, when a training loss is this many
            times the highest loss that any decision began with; None never does, and keeps no state.
        shuffle_scores: the control arm: same cost, no information.
        objective: "holdout" lets a ratchet without an objective of its own look at training batches held out; with "train" and
            "validation" it looks at the validation batches. What scores the factors is ``evaluate_on``; None is "validation"
            where that is, and else "train", which needs no validation batches.
        options: see :class:`~lightning_autolr.engine.driver.SearchCallback`.

    Example::

        Trainer(callbacks=[FactorSearchCallback(factors=(4, 2, 1, 0.5, 0.25), every=100)])
    """

    def __init__(
        self,
        factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5, 0.25),
        every: int | Literal["epoch"] = "epoch",
        normalize: Normalization = "zscore",
        temperature: float = 1.0,
        outlier_clip: float | None = 3.0,
        evaluate_on: Literal["same", "next", "validation"] = "next",
        horizon: int = 1,
        exact: bool = False,
        initial_lr: float | None = None,
        min_lr: float = 1e-7,
        max_lr: float = 10.0,
        smoothing: float = 0.0,
        back_off: float | None = None,
        start_rounds: int = 1,
        guard: float | None = 4.0,
        shuffle_scores: bool = False,
        objective: Literal["train", "validation", "holdout"] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(objective=objective or ("validation" if evaluate_on == "validation" else "train"), **options)
        self.search = FactorSearch(
            factors=tuple(factors),
            every=every,
            normalize=normalize,
            temperature=temperature,
            outlier_clip=outlier_clip,
            evaluate_on=evaluate_on,
            horizon=horizon,
            exact=exact,
            initial_lr=initial_lr,
            min_lr=min_lr,
            max_lr=max_lr,
            smoothing=smoothing,
            back_off=back_off,
            start_rounds=start_rounds,
            guard=guard,
            shuffle_scores=shuffle_scores,
            seed=self.probe_options.seed,
        )
