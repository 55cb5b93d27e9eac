"""Validation by hand: the loss of fixed batches, touching neither the Trainer's loops nor its results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torchmetrics import Metric

from lightning_autolr.engine.batches import own_batch
from lightning_autolr.engine.compat import takes_batch_idx
from lightning_autolr.engine.quiet import LogSink
from lightning_autolr.engine.steps import loss_of, returned_loss, to_device, training_step

__all__ = ["evaluate", "evaluate_training_batches", "validating"]


@contextmanager
def validating(trainer: Any) -> Iterator[None]:
    """The Trainer says that it validates, as modules may want to know."""
    stage = trainer.state.stage
    trainer.validating = True
    try:
        yield
    finally:
        trainer.state.stage = stage


@torch.no_grad()
def evaluate(trainer: Any, batches: Sequence[tuple[Any, int, int]], sink: LogSink, monitor: str) -> list[Tensor]:
    """The monitored value of each validation batch.

    It is what ``validation_step`` logs as ``monitor``, else the single number that it returns, else what
    ``on_validation_epoch_end`` logs (one value for all batches). Metrics that accumulate give one value too.

    Raises:
        ValueError: the monitored value is nowhere to be found.
    """
    module, strategy = trainer.lightning_module, trainer.strategy
    if not batches:
        raise ValueError(
            "Expected validation batches, got none: the validation dataloader is empty, or `limit_val_batches` leaves none of "
            "it. Give some, or choose `objective='train'` with `ratchet=False`."
        )
    several = len({number for _, _, number in batches}) > 1
    takes_idx = takes_batch_idx(module.validation_step)
    values: list[Tensor] = []
    accumulated: Metric | None = None
    metrics: list[Metric] = []
    logged: dict[str, Any] = {}
    sink.take()
    if is_overridden("on_validation_model_eval", module):
        module.on_validation_model_eval()
    else:
        module.eval()
    module.on_validation_start()
    module.on_validation_epoch_start()
    for raw, idx, number in batches:
        sink.dataloader_idx = number if several else None
        batch = to_device(trainer, own_batch(raw), number)
        extra = ((idx, number) if several else (idx,)) if takes_idx else ()
        module.on_validation_batch_start(batch, idx, number)
        output = strategy.validation_step(batch, *extra)
        module.on_validation_batch_end(output, batch, idx, number)
        logged = sink.take()
        value = logged.get(monitor)
        metrics += [m for m in logged.values() if isinstance(m, Metric)]
        if isinstance(value, Metric):
            accumulated = value
        elif value is not None:
            values.append(torch.as_tensor(value, dtype=torch.float32, device=strategy.root_device).mean())
        elif monitor not in logged and (number == 0 or f"dataloader_idx_{number}" in monitor):
            loss = returned_loss(output)
            if isinstance(loss, Real) or (isinstance(loss, Tensor) and loss.numel() == 1):  # and not logits, say
                values.append(torch.as_tensor(loss, device=strategy.root_device).float().mean())
    sink.dataloader_idx = None
    module.on_validation_epoch_end()
    logged_at_end = sink.take()
    module.on_validation_end()
    sink.take()
    at_end = logged_at_end.get(monitor, accumulated)
    if at_end is not None:
        value = at_end.compute() if isinstance(at_end, Metric) else at_end
        values = [torch.as_tensor(value, device=strategy.root_device).float().mean()]
    for metric in [*metrics, *(m for m in logged_at_end.values() if isinstance(m, Metric))]:
        metric.reset()  # as the Trainer does at the end of a validation: the next one starts anew
    if not values:
        raise ValueError(
            f"Expected `validation_step` to log {monitor!r} or to return a loss, got neither; the last batch logged "
            f"{sorted(logged)}. Set `monitor=` to one of these (with `mode='max'` where more is better), or choose "
            "`objective='holdout'` or 'train'."
        )
    return values


@torch.no_grad()
def evaluate_training_batches(
    trainer: Any, batches: Sequence[Any], sink: LogSink, training: bool = False
) -> list[Tensor]:
    """The training loss of each batch, without a step; in evaluation mode unless ``training``.

    Raises:
        ValueError: ``training_step`` gave no loss.
    """
    if not training:
        trainer.lightning_module.eval()
    losses = []
    for idx, raw in enumerate(batches):
        output = training_step(trainer, to_device(trainer, raw), idx)
        if (loss := loss_of(output, sink.take())) is None:
            raise ValueError("Expected `training_step` to return a loss or to log one, got neither.")
        losses.append(loss.float().mean())
    return losses
