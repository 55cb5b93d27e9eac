"""Batch normalisation's running statistics, taken anew for an evaluation.

At a high learning rate the weights move faster than the running means follow, and an evaluation measures the lag: losses jump
by half when nothing is wrong with the weights. A plain mean over a few batches has no lag. It is what
:func:`torch.optim.swa_utils.update_bn` computes for averaged weights, and "precise batch normalisation" in Wu and Johnson
(2021, arXiv 2105.07576, section 3); there for a model that is called with a batch, here for a module's ``training_step``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_autolr.engine.quiet import LogSink
from lightning_autolr.engine.steps import to_device, training_step

__all__ = ["NUM_BATCHES", "updated_statistics"]

NUM_BATCHES = 10  # as far as the running means of the default momentum look back


@contextlib.contextmanager
def updated_statistics(trainer: Any, batches: Callable[[], Sequence[Any]], sink: LogSink) -> Iterator[int]:
    """In this block, running statistics are plain means over ``batches``; afterwards they are what they were.

    Layers that training does not update (in evaluation mode, or without running statistics) stay as they are. So do all of
    them under manual optimization, whose training step would move the weights.

    Yields:
        How many batches that took; ``batches`` is called only if it takes any.
    """
    module = trainer.lightning_module
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
    if not layers or not module.automatic_optimization:
        yield 0
        return
    before = [(layer, layer.momentum, [b.clone() for b in layer.buffers()]) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean
        used = batches()
        # With gradients, as training has them: user code may ask for some. Parallel strategies must not wait for a backward.
        block = getattr(trainer.strategy, "block_backward_sync", contextlib.nullcontext)
        with torch.enable_grad(), block():
            for idx, batch in enumerate(used):
                training_step(trainer, to_device(trainer, batch), idx)
                sink.take()
        yield len(used)
    finally:
        with torch.no_grad():
            for layer, momentum, buffers in before:
                layer.momentum = momentum
                for buffer, value in zip(layer.buffers(), buffers, strict=True):
                    buffer.copy_(value)
