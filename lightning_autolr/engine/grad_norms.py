"""The gradient norm of each step: one fused norm on the device, read in blocks."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_autolr.engine.compat import float_of_sums, foreach_norm, local_tensor

__all__ = ["GradNorms", "Norm"]

Norm = Literal["l1", "l2"]


class GradNorms:
    """Measures gradients right before the optimizer step: unscaled, after all-reduce, accumulated.

    Under manual optimization with several optimizers a step's norm is that of all their gradients together.

    Args:
        trainer: the Trainer.
        norm: "l2" (SGD) or "l1" (Adam family).
        clipped: measure what is left after the Trainer's gradient clipping.
    """

    def __init__(self, trainer: Any, norm: Norm, clipped: bool = False) -> None:
        self._trainer, self._order, self._clipped = trainer, 1 if norm == "l1" else 2, clipped
        self._unread: list[Tensor | None] = []  # None for a step without gradients
        self._open: list[Tensor] = []
        self._sharded = False

    @torch.no_grad()
    def measure(self, optimizer: Optimizer) -> None:
        """Called from ``on_before_optimizer_step``."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return
        self._sharded = self._sharded or hasattr(grads[0], "to_local")
        grads = [local_tensor(g) for g in grads]
        clip, value = self._trainer.gradient_clip_val or 0.0, self._trainer.gradient_clip_algorithm == "value"
        if self._clipped and clip and value:
            grads = [g.clamp(-clip, clip) for g in grads]
        powered = self._powered(grads, self._order)
        if self._clipped and clip and not value:
            size = powered.sqrt() if self._order == 2 else self._powered(grads, 2).sqrt()
            powered = powered * (clip / (size + 1e-6)).clamp(max=1.0) ** self._order
        self._open.append(powered)

    def end_step(self) -> None:
        """The step is over; what was measured since the last call belongs together."""
        self._unread.append(torch.stack(self._open).sum() if self._open else None)
        self._open = []

    def read(self) -> list[float]:
        """The norms since the last call, one per step: NaN where the batch was skipped, which leaves no gradients.

        Collective when parameters are sharded over ranks.
        """
        unread, self._unread = self._unread, []
        measured = [x for x in unread if x is not None]
        if not measured:
            return [math.nan] * len(unread)
        powered = torch.stack(measured)
        if self._sharded:
            powered = self._trainer.strategy.reduce(powered, reduce_op="sum")
        norms = iter(powered.pow(1 / self._order).cpu())
        return [math.nan if x is None else float(next(norms)) for x in unread]

    @staticmethod
    def _powered(grads: list[Tensor], order: int) -> Tensor:
        norms = [n.to(float_of_sums(n.device)) for n in foreach_norm(grads, order)]
        return torch.stack([n.to(norms[0].device) for n in norms]).pow(order).sum()
