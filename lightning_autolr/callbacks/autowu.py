"""AutoWU: a warm-up that ends by itself, then a decay."""

from __future__ import annotations

from typing import Any, Literal

from lightning_autolr.engine.driver import SearchCallback
from lightning_autolr.schedules import Cosine, Schedule
from lightning_autolr.search.autowu import AutoWU

__all__ = ["AutoWUCallback"]


class AutoWUCallback(SearchCallback):
    """The learning rate grows until the training loss has passed its minimum; from the minimum's rate it decays to zero.

    No probes are made: the run itself is watched. See :class:`~lightning_autolr.search.autowu.AutoWU` for the algorithm
    (Kim et al. 2021, arXiv 2107.05855) and for what differs from its published code.

    Args:
        min_lr: learning rate of the first step.
        max_lr: learning rate at the end of the longest possible warm-up.
        max_warmup_fraction: share of the run that the warm-up may take.
        growth: "exponential" or "linear".
        confidence: probability of a past minimum above which a test votes yes.
        num_tests: votes of each test.
        patience: tests in a row that must say yes.
        test_every: steps between two tests; None is an epoch, or a twentieth of the longest warm-up if that is less, but no
            less than a hundredth of it.
        decay: shape after the warm-up; None is a cosine to zero.
        immediate_cooldown: decay at once, or hold until ``cooldown_fraction`` of the run is left.
        cooldown_fraction: see ``immediate_cooldown``.
        plateau_factor: factor on a held learning rate when the loss does not fall any more; 1 holds it.
        plateau_patience: epochs to wait before that.
        guard: the warm-up ends at once when the smoothed loss is this many times its lowest. None: never, and no state is kept:
            the learning rate goes back at the end of the warm-up, the weights do not.
        compat: the published rules, with their raw units and without the guard.
        objective: "holdout" lets a ratchet without an objective of its own look at training batches held out; with "train" and
            "validation" it looks at the validation batches. No candidates are scored.
        options: see :class:`~lightning_autolr.engine.driver.SearchCallback`.

    Example::

        Trainer(callbacks=[AutoWUCallback(min_lr=1e-5, max_lr=1.0)])
    """

    def __init__(
        self,
        min_lr: float = 1e-5,
        max_lr: float = 1.0,
        max_warmup_fraction: float = 0.5,
        growth: Literal["exponential", "linear"] = "exponential",
        confidence: float = 0.95,
        num_tests: int = 5,
        patience: int = 3,
        test_every: int | None = None,
        decay: Schedule | None = None,
        immediate_cooldown: bool = True,
        cooldown_fraction: float = 0.2,
        plateau_factor: float = 1.0,
        plateau_patience: int = 5,
        guard: float | None = 4.0,
        compat: bool = False,
        objective: Literal["train", "validation", "holdout"] = "train",
        **options: Any,
    ) -> None:
        super().__init__(objective=objective, **options)
        self.search = AutoWU(
            min_lr=min_lr,
            max_lr=max_lr,
            max_warmup_fraction=max_warmup_fraction,
            growth=growth,
            confidence=confidence,
            num_tests=num_tests,
            patience=patience,
            test_every=test_every,
            decay=Cosine() if decay is None else decay,
            immediate_cooldown=immediate_cooldown,
            cooldown_fraction=cooldown_fraction,
            plateau_factor=plateau_factor,
            plateau_patience=plateau_patience,
            guard=guard,
            seed=self.probe_options.seed,
            compat=compat,
        )
