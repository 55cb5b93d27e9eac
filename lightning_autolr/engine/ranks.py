"""Ranks act together: losses are reduced before anyone looks at them, rank 0 decides, everybody is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_autolr.engine.compat import float_of_sums

__all__ = ["decide", "gather", "mean_over_ranks"]

T = TypeVar("T")


def mean_over_ranks(strategy: Any, losses: Sequence[Tensor]) -> list[float]:
    """Means of 0-dim tensors over ranks, as floats: one collective and one transfer. NaN on one rank is NaN on all."""
    if not losses:
        return []
    device = strategy.root_device
    stacked = torch.stack([loss.detach().to(device, float_of_sums(device)) for loss in losses])
    return [float(x) for x in strategy.reduce(stacked, reduce_op="mean").cpu()]


def gather(value: T) -> list[T]:
    """The value of every rank, in order of rank, on every rank."""
    if not strategy_is_distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def decide(strategy: Any, value: T) -> T:
    """Rank 0's value, on every rank."""
    decided: T = strategy.broadcast(value)
    return decided


def strategy_is_distributed() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )
