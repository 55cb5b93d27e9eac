"""What can be wrong with a Trainer or an option, said before anything is trained."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging

from lightning_autolr.core.requests import Run
from lightning_autolr.engine import compat
from lightning_autolr.engine.steps import steps_per_batch

__all__ = [
    "TESTED_STRATEGIES",
    "check_choice",
    "check_trainer",
    "facts_of",
    "other_count",
    "record_folder",
    "steps_made",
]

TESTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"Expected {name} to be one of {choices}, got {value!r}.")


def check_trainer(trainer: Any, pl_module: Any, evaluates: Collection[str | None], allow_untested: bool) -> None:
    """Raise a MisconfigurationException if a search that ``evaluates`` this cannot run here."""
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
    if "validation" in evaluates and not trainer.enable_validation:
        raise MisconfigurationException(
            "Expected a `validation_step`, a validation dataloader and `limit_val_batches > 0` for "
            "`objective='validation'` or a ratchet that looks at it, got none. Add them, or pass `objective='holdout'` "
            "(training batches held out from the probes), or `objective='train'` without a ratchet or with "
            "`ratchet=Ratchet(evaluate='holdout')`."
        )
    if "holdout" in evaluates and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "Expected automatic optimization for `objective='holdout'` or a ratchet that looks at it, got a manual one, whose "
            "`training_step` cannot be evaluated without a step. Use `objective='validation'`."
        )


def _counts_per_step(trainer: Any) -> int:
    """Under manual optimization Lightning counts the steps of each optimizer, where we count batches."""
    return 1 if trainer.lightning_module.automatic_optimization else max(1, len(trainer.optimizers))


def steps_made(trainer: Any) -> int:
    """The steps of the run until now as we count them, also those before a plain checkpoint."""
    return int(trainer.global_step) // _counts_per_step(trainer)


def _known_total(trainer: Any) -> float:
    """The steps of the run as we count them; infinite when nobody knows."""
    total = _steps_of_epochs(trainer)
    if trainer.max_steps != -1:
        total = min(total, math.ceil(trainer.max_steps / _counts_per_step(trainer)))
    return total


def _steps_of_epochs(trainer: Any) -> float:
    # Not the Trainer's estimate: that takes the accumulation of the moment, and the added epoch, for those of all epochs.
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if batches == math.inf or epochs in (None, -1):
        return math.inf
    scheduler = next((c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)), None)
    fixed = trainer.accumulate_grad_batches
    counts = (
        fixed if scheduler is None else scheduler.get_accumulate_grad_batches(epoch)
        for epoch in range(epochs - _adds_epoch(trainer))
    )
    return float(sum(math.ceil(batches / count) for count in counts))


def _adds_epoch(trainer: Any) -> bool:
    """Whether there is an epoch more, without a backward, in which averaged weights get their batch statistics."""
    averaging = [c for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging)]
    return any(c.pl_module_contains_batch_norm(trainer.lightning_module) for c in averaging)


def other_count(trainer: Any, batches: int, steps: int) -> str:
    """What to say when ``max_steps`` will not end a manually optimized run where it was planned to end; empty if it will.

    What an optimizer does in a batch is known to the module only: it may accumulate, or train one optimizer more often.

    Args:
        trainer: the Trainer.
        batches: the batches of this fit until now.
        steps: by how much ``trainer.global_step`` grew in them.
    """
    per_batch = _counts_per_step(trainer)
    if steps == batches * per_batch:
        return ""
    endless = trainer.max_epochs in (None, -1)
    epochs = math.inf if endless else float(trainer.num_training_batches * trainer.max_epochs)
    max_steps = trainer.max_steps
    planned = min(epochs, math.ceil(max_steps / per_batch))
    found = min(epochs, math.ceil(max_steps * batches / steps) if steps else math.inf)
    if found == planned:
        return ""
    known = "later" if found == math.inf else f"after about {found:,.0f}"
    return (
        f"plans for {planned:,.0f} batches, out of {max_steps=} under manual optimization: expected each optimizer to step "
        f"once per batch, {batches * per_batch} steps in the first {batches} batches, got {steps}. The run will end {known}, "
        "and its learning rate was not planned for that. Pass `total_steps=`, the batches from the start to the end of the "
        "run, or end it by `max_epochs` alone."
    )


def facts_of(trainer: Any, lr: float, total_steps: int | Literal["auto"], count_search: bool, first_step: int) -> Run:
    """What a search may know of the run, which began after ``first_step`` steps of the Trainer."""
    batches = trainer.num_training_batches
    total = _known_total(trainer) - first_step if total_steps == "auto" else total_steps
    return Run(
        total_steps=None if total == math.inf else max(1, int(total)),
        lr=lr,
        has_validation=bool(trainer.enable_validation),
        steps_per_epoch=None if batches == math.inf else math.ceil(batches / steps_per_batch(trainer)),
        count_search=count_search,
    )


def record_folder(trainer: Any) -> str | None:
    """Where to write the trace and all else about a search, ``<log_dir>/autolr``; None where nothing is to be written.

    Collective: to be asked for on every rank.
    """
    log_dir = trainer.log_dir
    return None if trainer.fast_dev_run or log_dir is None else os.path.join(log_dir, "autolr")
