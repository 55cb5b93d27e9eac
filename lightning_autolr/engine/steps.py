"""Private optimizer steps: what the Trainer's loop does for a batch, without the loop.

They are made of strategy and module methods, so that none of the Trainer's counters move: those live in the loop objects.
``trainer.global_step`` as the module sees it therefore stands still during a search.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_autolr.engine.compat import on_before_batch_transfer, takes_batch_idx, takes_dataloader_iter
from lightning_autolr.engine.quiet import LogSink

__all__ = [
    "batches_per_step",
    "index_in_epoch",
    "loss_of",
    "private_step",
    "real_loss",
    "returned_loss",
    "to_device",
    "training_step",
]


def to_device(trainer: Any, batch: Any, dataloader_idx: int = 0) -> Any:
    """Move a batch as the training loop does."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = on_before_batch_transfer(trainer.lightning_module, batch, dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def batches_per_step(trainer: Any) -> int:
    """Batches that one step takes: the accumulation, or an epoch's that has fewer, under automatic optimization; else one."""
    if not trainer.lightning_module.automatic_optimization:
        return 1
    return int(max(1, min(trainer.accumulate_grad_batches, trainer.num_training_batches)))


def index_in_epoch(trainer: Any, step: int) -> int:
    """``batch_idx`` of a private step's first batch: it begins anew where an epoch's would."""
    count, batches = batches_per_step(trainer), trainer.num_training_batches
    per_epoch = max(1, int(batches) // count) if batches != math.inf else step + 1
    return step % per_epoch * count


def private_step(trainer: Any, batches: Sequence[Any], first_idx: int, sink: LogSink) -> Tensor | None:
    """Make one step on ``batches`` (already on the device).

    Returns:
        The mean training loss before the step, 0-dim and detached; None when the module returns none and logs none.
    """
    module = trainer.lightning_module
    if module.automatic_optimization:
        losses = _automatic(trainer, batches, first_idx, sink)
    else:
        module.on_train_batch_start(batches[0], first_idx)
        output = training_step(trainer, batches[0], first_idx)
        losses = [loss_of(output, sink.take())]
        module.on_train_batch_end(_as_outputs(output), batches[0], first_idx)
    found = [loss.detach().float().mean() for loss in losses if loss is not None]
    return torch.stack(found).mean() if found else None


def _automatic(trainer: Any, batches: Sequence[Any], first_idx: int, sink: LogSink) -> list[Tensor | None]:
    strategy, module = trainer.strategy, trainer.lightning_module
    optimizer = module.optimizers()
    raw = trainer.optimizers[0]
    accumulated = trainer.accumulate_grad_batches  # what the loop divides by, also where an epoch has fewer batches
    losses: list[Tensor | None] = []
    outputs: dict[str, Any] = {}

    @torch.enable_grad()  # an optimizer may call its closure under `no_grad`
    def micro_step(offset: int) -> Tensor | None:
        nonlocal outputs
        output = training_step(trainer, batches[offset], first_idx + offset)
        loss = loss_of(output, sink.take())
        losses.append(None if loss is None else loss.detach().clone())
        if offset == 0:
            module.on_before_zero_grad(raw)
            module.optimizer_zero_grad(trainer.current_epoch, first_idx, raw)
        outputs = _as_outputs(output, accumulated)
        if output is None:  # the user's way to skip a batch
            return None
        strategy.backward(returned_loss(output) / accumulated, raw)
        return losses[-1]

    last = len(batches) - 1
    for offset, batch in enumerate(batches):
        module.on_train_batch_start(batch, first_idx + offset)
        if offset < last:
            # only parallel strategies reduce gradients, and only they can hold that back
            with getattr(strategy, "block_backward_sync", contextlib.nullcontext)():
                micro_step(offset)
        else:
            module.optimizer_step(trainer.current_epoch, first_idx + last, optimizer, lambda: micro_step(last))
        module.on_train_batch_end(outputs, batch, first_idx + offset)
    return losses[: len(batches)]  # an optimizer that calls its closure again evaluates other weights


def loss_of(output: Any, logged: dict[str, Any]) -> Tensor | None:
    """The loss a step returned or, if it returned none, logged under a name that says so."""
    loss = returned_loss(output)
    if loss is None:
        loss = next((v for k, v in logged.items() if k in ("loss", "train_loss", "val_loss")), None)
        loss = next((v for k, v in logged.items() if "loss" in k), None) if loss is None else loss
    return torch.as_tensor(loss).detach() if loss is not None and not isinstance(loss, Tensor) else loss


def real_loss(trainer: Any, outputs: Any) -> Tensor | None:
    """The training loss of a real batch, from what ``on_train_batch_end`` is given; see :func:`loss_of`."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if loss is None and not trainer.lightning_module.automatic_optimization:
        logged = trainer.callback_metrics.items()  # also those of the last validation
        loss = loss_of(None, {name: value for name, value in logged if not name.startswith(("val", "test"))})
    return loss


def returned_loss(output: Any) -> Any:
    return output.get("loss") if isinstance(output, Mapping) else output


def _as_outputs(output: Any, accumulated: int = 1) -> dict[str, Any]:
    """What ``on_train_batch_end`` is given: the loop divides the loss by the number of accumulated batches."""
    loss = returned_loss(output)
    outputs = dict(output) if isinstance(output, Mapping) else {}
    return outputs if loss is None else {**outputs, "loss": loss.detach() / accumulated}


def training_step(trainer: Any, batch: Any, batch_idx: int) -> Any:
    """What ``training_step`` gives for a batch; it takes (dataloader_iter,), (batch,) or (batch, batch_idx)."""
    if takes_dataloader_iter(trainer):
        return trainer.strategy.training_step(iter([(batch, batch_idx, 0)]))
    takes_idx = takes_batch_idx(trainer.lightning_module.training_step)
    return trainer.strategy.training_step(batch, *((batch_idx,) if takes_idx else ()))
