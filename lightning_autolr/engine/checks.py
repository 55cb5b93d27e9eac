"""What can be wrong with a Trainer or an option, said before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_autolr.core.record import set_aside
from lightning_autolr.engine import compat

__all__ = [
    "TESTED_STRATEGIES",
    "callbacks_among",
    "check_choice",
    "check_trainer",
    "keep_earlier",
    "record_folder",
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
            "`ratchet=Ratchet(objective='holdout')`."
        )
    if "holdout" in evaluates and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "Expected automatic optimization for `objective='holdout'` or a ratchet that looks at it, got a manual one, whose "
            "`training_step` cannot be evaluated without a step. Use `objective='validation'`."
        )


def callbacks_among(callbacks: Sequence[Callback], named: Sequence[Callback]) -> tuple[Callback, ...]:
    """Those of a Trainer's ``callbacks`` that are ``named``: each itself, or the one of its class.

    YAML makes a second instance of a callback that stands in two places, and that one the Trainer never sets up.
    """
    found = []
    for callback in named:
        same = [c for c in callbacks if c is callback] or [c for c in callbacks if type(c) is type(callback)]
        if len(same) != 1:
            name = type(callback).__name__
            raise MisconfigurationException(
                f"Expected each of `search_callbacks` among the Trainer's callbacks, got {name}, of which it has {len(same)}. "
                f"Give it one {name}, in `Trainer(callbacks=...)` or `trainer.callbacks`, or pass the very instance meant."
            )
        found += same
    return tuple(found)


def record_folder(trainer: Any) -> str | None:
    """Where to write the trace and all else about a search, ``<log_dir>/autolr``; None where nothing is to be written.

    Collective: to be asked for on every rank.
    """
    log_dir = trainer.log_dir
    return None if trainer.fast_dev_run or log_dir is None else os.path.join(log_dir, "autolr")


def keep_earlier(trainer: Any, folder: str | None, name: str) -> None:
    """Move a file of an earlier fit out of the way; ``folder`` is the :func:`record_folder`."""
    if trainer.is_global_zero and folder is not None and (other := set_aside(folder, name)) is not None:
        rank_zero_info(f"The {name} of an earlier fit is now in {other}.")
