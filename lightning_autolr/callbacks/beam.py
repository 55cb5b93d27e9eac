"""Beam search over the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_autolr.engine.driver import SearchCallback
from lightning_autolr.search.beam import BeamSearch

__all__ = ["BeamSearchCallback"]


class BeamSearchCallback(SearchCallback):
    """The adaptive learning-rate tree: several states, several factors each, the best children go on.

    The run's own steps follow the best path. See :class:`~lightning_autolr.search.beam.BeamSearch` for the algorithm, its
    cost and its memory.

    Args:
        beam_size: states that are kept, M >= 1.
        factors: learning-rate factors that each state tries, one of them below 1.
        interval: optimizer steps of a round; None is one epoch, as published.
        objective: "train"ing loss of the round as published, or the loss at its end on the "validation" batches or on
            training batches held out ("holdout").
        start_lrs: learning rates of the first round; None is the optimizer's own.
        min_lr: smallest learning rate.
        max_lr: largest learning rate.
        keep_ends: keep the ends of children instead of training survivors again: faster, more memory.
        options: see :class:`~lightning_autolr.engine.driver.SearchCallback`.

    Example::

        Trainer(callbacks=[BeamSearchCallback(beam_size=2, factors=(2, 1, 0.5), interval=100)])
    """

    def __init__(
        self,
        beam_size: int = 2,
        factors: Sequence[float] = (2.0, 1.0, 0.5),
        interval: int | None = None,
        objective: Literal["train", "validation", "holdout"] = "train",
        start_lrs: Sequence[float] | None = None,
        min_lr: float = 1e-7,
        max_lr: float = 10.0,
        keep_ends: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(objective=objective, **options)
        self.search = BeamSearch(
            beam_size=beam_size,
            factors=tuple(factors),
            interval=interval,
            objective=objective,
            start_lrs=None if start_lrs is None else tuple(start_lrs),
            min_lr=min_lr,
            max_lr=max_lr,
            keep_ends=keep_ends,
            seed=self.probe_options.seed,
        )
