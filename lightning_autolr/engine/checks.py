"""What can be wrong with a Trainer or an option, said before anything is trained."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_autolr.core.requests import Run
from lightning_autolr.engine import compat
from lightning_autolr.engine.steps import steps_per_batch

__all__ = ["TESTED_STRATEGIES", "check_choice", "check_trainer", "facts_of"]

TESTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"Expected {name} to be one of {choices}, got {value!r}.")


def check_trainer(trainer: Any, pl_module: Any, objective: str, allow_untested: bool) -> None:
    """Raise a MisconfigurationException if a search cannot run here."""
    kind = type(trainer.strategy)
    if not allow_untested and not any(c.__name__ in TESTED_STRATEGIES for c in kind.__mro__):
        raise MisconfigurationException(
            f"Expected a strategy out of {TESTED_STRATEGIES}, got {kind.__name__}, whose training state lies where we "
            "cannot copy it faithfully. Choose one of these, or pass `allow_untested=True` and compare with a run "
            "without search."
        )
    if compat.has_comm_hook(trainer.strategy):
        raise MisconfigurationException(
            "Expected DistributedDataParallel without a communication hook, got one: its state cannot be put back."
        )
    if objective == "validation" and not trainer.enable_validation:
        raise MisconfigurationException(
            "Expected a `validation_step`, a validation dataloader and `limit_val_batches > 0` for "
            "`objective='validation'`, got none. Add them, or pass `objective='holdout'` (training batches held out from "
            "the probes) or 'train'."
        )
    if objective == "holdout" and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "Expected automatic optimization for `objective='holdout'`, got a manual one, whose `training_step` cannot be "
            "evaluated without a step. Use `objective='validation'`."
        )


def _known_total(trainer: Any, total_steps: int | Literal["auto"]) -> int | None:
    """The steps of the run as we count them; None when nobody knows."""
    if total_steps != "auto":
        return int(total_steps)
    try:
        total = trainer.estimated_stepping_batches
    except MisconfigurationException:  # an accumulation that changes during the run
        return None
    if not trainer.lightning_module.automatic_optimization and trainer.max_steps != -1:
        # Lightning counts the steps of each optimizer; we count batches
        total = min(total, math.ceil(trainer.max_steps / len(trainer.optimizers)))
    return None if total == math.inf else int(total)


def facts_of(trainer: Any, lr: float, total_steps: int | Literal["auto"], count_search: bool) -> Run:
    """What a search may know of the run."""
    batches = trainer.num_training_batches
    return Run(
        total_steps=_known_total(trainer, total_steps),
        lr=lr,
        has_validation=bool(trainer.enable_validation),
        steps_per_epoch=None if batches == math.inf else math.ceil(batches / steps_per_batch(trainer)),
        count_search=count_search,
    )
