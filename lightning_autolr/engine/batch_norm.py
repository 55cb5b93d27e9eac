"""Batch normalisation's running statistics, taken anew for an evaluation.

At a high learning rate the weights move faster than the running means follow, and an evaluation measures the lag: losses jump
by half when nothing is wrong with the weights. Statistics of the present weights have no lag: "precise batch normalisation",
Wu and Johnson (2021, arXiv 2105.07576, section 3). They, and :func:`torch.optim.swa_utils.update_bn`, take them from training
batches; here they come from the evaluation's own, which are at hand: a run may have no training batches to spare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_autolr.engine.compat import BatchNorm

__all__ = ["updated_statistics"]


@contextmanager
def updated_statistics(modules: Iterable[nn.Module], evaluate: Callable[[], Any]) -> Iterator[None]:
    """In this block, running statistics are those of the inputs that layers get in ``evaluate()``; then they are put back.

    In ``evaluate()`` each layer normalises by the statistics of its batch, as in training. Layers that training does not
    update (in evaluation mode, without running statistics or with momentum 0) stay as they are; if there are no others,
    ``evaluate`` is not called.
    """
    layers = [m for m in modules if isinstance(m, BatchNorm) and m.training and m.momentum != 0]
    collected = {layer: _Statistics(layer) for layer in layers if layer.running_mean is not None}
    if not collected:
        yield
        return
    with torch.no_grad():
        before = [(buffer, buffer.clone()) for layer in collected for buffer in layer.buffers(recurse=False)]
        try:
            with ExitStack() as hooks:
                for layer, statistics in collected.items():
                    hooks.callback(layer.register_forward_pre_hook(statistics.add).remove)
                with torch.compiler.set_stance(
                    "force_eager"
                ):  # else compiled layers would be compiled anew for the hooks
                    evaluate()
            for statistics in collected.values():
                statistics.set()
            yield
        finally:
            for buffer, value in before:
                buffer.copy_(value)


class _Statistics:
    """Mean and variance, for each channel, of all the inputs of one layer (Chan, Golub and LeVeque, 1979)."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._count = layer, 0
        self._mean, self._var = torch.zeros(()), torch.zeros(())

    def add(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        if not inputs or not inputs[0].numel():  # given by keyword, or nothing
            return
        values = inputs[0].detach().float().transpose(0, 1).flatten(1)  # (channels, all others)
        var, mean = torch.var_mean(values, 1, correction=0)
        share = values.shape[1] / (self._count + values.shape[1])  # of all so far
        self._count += values.shape[1]
        delta = mean - self._mean.to(mean)
        self._var = self._var.to(var) * (1 - share) + var * share + delta.square() * share * (1 - share)
        self._mean = mean - delta * (1 - share)
        self._write(mean, var)

    def set(self) -> None:
        """Those of all inputs; a layer that got none keeps its own."""
        if self._count:
            self._write(self._mean, self._var)

    def _write(self, mean: Tensor, var: Tensor) -> None:
        self._layer.running_mean.copy_(mean)
        self._layer.running_var.copy_(var)
