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
from lightning_autolr.engine.compat import num_val_loaders, takes_batch_idx
from lightning_autolr.engine.quiet import LogSink
from lightning_autolr.engine.steps import loss_of, returned_loss, to_device, training_step

__all__ = ["evaluate", "evaluate_first", "evaluate_training_batches", "validating"]

_FAILURES = (ArithmeticError, AssertionError, IndexError, RuntimeError, ValueError)  # of code that meets an odd batch


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
    module = trainer.lightning_module
    if not batches:
        raise ValueError(
            "Expected validation batches, got none: the validation dataloader is empty, or `limit_val_batches` leaves none of "
            "it. Give some, or choose `objective='train'` with `ratchet=False`."
        )
    several = num_val_loaders(trainer) > 1
    takes_idx = takes_batch_idx(module.validation_step)
    found = _Monitored(monitor, trainer.strategy.root_device)
    sink.take()
    (module.on_validation_model_eval if is_overridden("on_validation_model_eval", module) else module.eval)()
    module.on_validation_start()
    module.on_validation_epoch_start()
    for raw, idx, number in batches:
        sink.dataloader_idx = number if several else None
        batch = to_device(trainer, own_batch(raw), number)
        extra = ((idx, number) if several else (idx,)) if takes_idx else ()
        module.on_validation_batch_start(batch, idx, number)
        output = trainer.strategy.validation_step(batch, *extra)
        module.on_validation_batch_end(output, batch, idx, number)
        found.add(sink.take(), output, number)
    sink.dataloader_idx = None
    with _shown(trainer, found.means()):
        module.on_validation_epoch_end()
        logged_at_end = sink.take()
        trainer.callback_metrics.update(_numbers(logged_at_end, trainer.strategy.root_device))
        module.on_validation_end()
        sink.take()
    return found.values(logged_at_end)


@contextmanager
def _shown(trainer: Any, logged: dict[str, Tensor]) -> Iterator[None]:
    """In this block ``trainer.callback_metrics`` has what a validation logged."""
    metrics = trainer.callback_metrics
    before = dict(metrics)
    metrics.update(logged)
    try:
        yield
    finally:
        metrics.clear()
        metrics.update(before)


def _numbers(logged: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Single numbers; not metric objects, which may be slow to compute."""
    values = {name: value for name, value in logged.items() if isinstance(value, (Real, Tensor))}
    as_tensors = {name: torch.as_tensor(v, dtype=torch.float32, device=device) for name, v in values.items()}
    return {name: tensor.squeeze() for name, tensor in as_tensors.items() if tensor.numel() == 1}


def evaluate_first(
    trainer: Any, choices: list[list[tuple[Any, int, int]]], sink: LogSink, monitor: str
) -> list[Tensor]:
    """``evaluate`` on the first choice of batches, or on the second if the module fails on the first, which is then taken off.

    Parts of batches are no batches to a module that knows how large these are.
    """
    try:
        return evaluate(trainer, choices[0], sink, monitor)
    except _FAILURES as error:
        if len(choices) == 1:
            raise
        try:
            values = evaluate(trainer, choices[1], sink, monitor)
        except _FAILURES:  # not for the parts' sake
            raise error from None
    del choices[0]
    return values


class _Monitored:
    """Looks for the monitored value in what a validation logs and returns."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._name, self._device = name, device
        self._values: list[Tensor] = []
        self._accumulated: Metric | None = None
        self._metrics: list[Metric] = []
        self._logged: dict[str, Any] = {}  # by the last batch
        self._numbers: dict[str, list[Tensor]] = {}  # by each batch

    def add(self, logged: dict[str, Any], output: Any, number: int) -> None:
        """What a batch of loader ``number`` logged, and what ``validation_step`` returned."""
        self._logged = logged
        for name, figure in _numbers(logged, self._device).items():
            self._numbers.setdefault(name, []).append(figure)
        self._metrics += [value for value in logged.values() if isinstance(value, Metric)]
        value = logged.get(self._name)
        if isinstance(value, Metric):
            self._accumulated = value
        elif value is not None:
            self._values.append(self._scalar(value))
        elif self._takes_returned(number) and self._name not in logged:
            loss = returned_loss(output)
            if isinstance(loss, Real) or (isinstance(loss, Tensor) and loss.numel() == 1):  # and not logits, say
                self._values.append(self._scalar(loss))

    def _takes_returned(self, number: int) -> bool:
        """Whether the loss that is returned for this loader may stand for a value that is not logged: not one that was asked
        for by a name of its own, which may be misspelt."""
        name, _, suffix = self._name.partition("/")
        return name == "val_loss" and suffix in ("", f"dataloader_idx_{number}") and (number == 0 or suffix != "")

    def means(self) -> dict[str, Tensor]:
        """What was logged, over all batches."""
        return {name: torch.stack(values).mean() for name, values in self._numbers.items()}

    def values(self, logged_at_end: dict[str, Any]) -> list[Tensor]:
        """One for each batch; or the one that was logged or accumulated for all of them."""
        at_end = logged_at_end.get(self._name, self._accumulated)
        found = self._values
        if at_end is not None:
            found = [self._scalar(at_end.compute() if isinstance(at_end, Metric) else at_end)]
        for metric in [*self._metrics, *(m for m in logged_at_end.values() if isinstance(m, Metric))]:
            metric.reset()  # as the Trainer does at the end of a validation: the next one starts anew
        if not found:
            raise ValueError(
                f"Expected `validation_step` to log {self._name!r} or, for 'val_loss', to return a loss, got neither; the last "
                f"batch logged {sorted(self._logged)}. Set `monitor=` to one of these (with `mode='max'` where more is "
                "better), or choose `objective='holdout'`, or 'train' with `ratchet=False`."
            )
        return found

    def _scalar(self, value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32, device=self._device).mean()


@torch.no_grad()
def evaluate_training_batches(
    trainer: Any, batches: Sequence[Any], sink: LogSink, training: bool = False
) -> list[Tensor]:
    """The training loss of each batch, without a step; in evaluation mode unless ``training``.

    A batch that ``training_step`` skips has none and is left out.
    """
    if not training:
        trainer.lightning_module.eval()
    losses = []
    for idx, raw in enumerate(batches):
        output = training_step(trainer, to_device(trainer, raw), idx)
        if (loss := loss_of(output, sink.take())) is not None:
            losses.append(loss.float().mean())
    return losses
