"""The trained weights in another order: what a network is worth that has learnt nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_autolr.engine.compat import local_tensor

__all__ = ["permute_weights"]


@torch.no_grad()
def permute_weights(parameters: Iterable[Tensor], seed: int) -> None:
    """Permute each trained weight of two axes or more along each of them, in place; the same way for a seed on every rank.

    What a fresh network was drawn from does not change by this, its loss hardly either; what a network has learnt is gone.
    Vectors stay: a bias that begins at the classes' frequencies is none of what training found.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in (local_tensor(p) for p in parameters if p.requires_grad and p.ndim > 1):
        permuted = weight
        for axis, size in enumerate(weight.shape):
            order = torch.randperm(size, generator=generator)
            permuted = permuted.index_select(axis, order.to(weight.device))
        weight.copy_(permuted)
