"""Loaders on the user's data that are read by private steps, and leave the user's own where they are."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from lightning_autolr.engine import compat

__all__ = ["parts_of_loader", "private_loader"]


def private_loader(loader: Any, seed: int, draw: int, skip: int, copies: dict[int, Any]) -> Iterable[Any]:
    """A loader on the same data with its own iterator, samplers and generators.

    Where a stream or a loader of the user's own stands may be an attribute of it, so it is copied.

    Args:
        loader: a DataLoader, or anything that can be iterated twice.
        seed: of its random numbers.
        draw: number of the draw, which a distributed sampler shuffles by.
        skip: batches to leave out at the start of an ordered pass.
        copies: the copies made so far, by the ids of what was copied; a new one is added.
    """
    if not isinstance(loader, DataLoader):
        again: Iterable[Any] = _copied(loader, copies)
        if iter(again) is again:
            raise ValueError(
                f"Expected a loader that can be iterated twice, got {type(loader).__name__}, which is its own iterator. "
                "Pass `probe_dataloader=` with batches for the probes."
            )
        return again
    clone = compat.clone_loader(loader)
    if isinstance(loader.dataset, IterableDataset):
        compat.set_in_loader(clone, dataset=_copied(loader.dataset, copies), generator=_generator(seed))
        return itertools.islice(clone, skip, None) if skip else clone
    # Sampler chains are copied whole, less the data that they point to.
    batch_sampler: Any
    memo: dict[int, Any] = {id(loader.dataset): loader.dataset}
    for held in (loader.sampler, loader.batch_sampler):
        for name in ("data_source", "dataset"):
            data = getattr(held, name, None)
            if data is not None and compat.wrapped_sampler(data) is None:
                memo[id(data)] = data
    if loader.generator is not None:
        memo[id(loader.generator)] = _generator(seed)
    batch_sampler, sampler = copy.deepcopy((loader.batch_sampler, loader.sampler), memo)
    for copied in _chain(batch_sampler if batch_sampler is not None else sampler):
        for value in vars(copied).values():
            if isinstance(value, torch.Generator):
                value.manual_seed(seed)
        if hasattr(copied, "set_epoch"):
            copied.set_epoch(10**6 + draw)  # no epoch of the run
    if batch_sampler is not None and isinstance(loader.sampler, SequentialSampler) and len(batch_sampler) > 0:
        batch_sampler = _Rotated(batch_sampler, skip % len(batch_sampler))
    compat.set_in_loader(clone, batch_sampler=batch_sampler, sampler=sampler, generator=_generator(seed))
    return clone


def parts_of_loader(loader: Any) -> tuple[Any, ...]:
    """What a loader was made of."""
    if isinstance(loader, DataLoader):
        return compat.parts_of_loader(loader)
    return (loader,)


def _copied(stream: Any, copies: dict[int, Any]) -> Any:
    """Its copy; the stream itself if it cannot be copied."""
    if id(stream) not in copies:
        try:
            copies[id(stream)] = copy.copy(stream)
        except (TypeError, RecursionError):  # as of generators, and of wrappers that ask another object for everything
            return stream
    return copies[id(stream)]


class _Rotated:
    """The batches of an ordered sampler, beginning later: another draw should not see the same first batches again."""

    def __init__(self, batch_sampler: Any, skip: int) -> None:
        self._batch_sampler, self._skip = batch_sampler, skip

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._batch_sampler), self._skip, None)

    def __len__(self) -> int:
        return len(self._batch_sampler) - self._skip


def _chain(sampler: Any) -> Iterator[Any]:
    """A sampler and the samplers inside it."""
    seen: set[int] = set()
    while sampler is not None and id(sampler) not in seen and hasattr(sampler, "__dict__"):
        seen.add(id(sampler))
        yield sampler
        inner = getattr(sampler, "sampler", None) or compat.wrapped_sampler(sampler)
        sampler = inner if inner is not None else compat.wrapped_sampler(getattr(sampler, "dataset", None))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
