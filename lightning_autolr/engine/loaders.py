"""Loaders on the user's data that are read by private steps, and leave the user's own where they are."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from lightning_autolr.engine import compat
from lightning_autolr.engine.state import slots_of

__all__ = ["CANNOT_COPY", "SHARED", "parts_of", "parts_of_loader", "private_loader"]

# What batches and samplers may know, and is no part of them.
SHARED = (nn.Module, Dataset, LightningDataModule, Trainer)
CANNOT_COPY = (TypeError, ValueError, AttributeError, RuntimeError, copy.Error)  # what `copy.deepcopy` raises


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
    batch_sampler, sampler = _copied_samplers(loader, seed)
    for copied in _chain(batch_sampler if batch_sampler is not None else sampler):
        for value in vars(copied).values():
            if isinstance(value, torch.Generator):
                value.manual_seed(seed)
        if hasattr(copied, "set_epoch"):
            copied.set_epoch(10**6 + draw)  # no epoch of the run
    if batch_sampler is not None and isinstance(loader.sampler, SequentialSampler):
        batch_sampler = _Rotated(batch_sampler, skip)
    compat.set_in_loader(clone, batch_sampler=batch_sampler, sampler=sampler, generator=_generator(seed))
    return clone


def _copied_samplers(loader: DataLoader[Any], seed: int) -> tuple[Any, Any]:
    """A batch sampler and a sampler with all that is in them, less the data, modules and Trainer that they point to."""
    memo: dict[int, Any] = {id(loader.dataset): loader.dataset}
    for held in (*_chain(loader.batch_sampler), *_chain(loader.sampler)):
        data = [getattr(held, name, None) for name in ("data_source", "dataset")]
        known = (part for part in parts_of(list(vars(held).values())) if isinstance(part, SHARED))
        memo.update((id(part), part) for part in (*data, *known) if compat.wrapped_sampler(part) is None)
    if loader.generator is not None:
        memo[id(loader.generator)] = _generator(seed)
    try:
        return copy.deepcopy((loader.batch_sampler, loader.sampler), memo)
    except CANNOT_COPY as error:
        names = " and ".join(
            dict.fromkeys(type(s).__name__ for s in (loader.batch_sampler, loader.sampler) if s is not None)
        )
        raise ValueError(
            f"Expected samplers that can be copied, since private steps must not move those of the run, got {names}: {error}. "
            "Make what cannot be copied in `__iter__`, or pass `probe_dataloader=` with batches for the probes."
        ) from error


def parts_of(whole: Any) -> Iterator[Any]:
    """An object and all that is in it, each once: in collections, and in attributes of tensors and of the user's classes."""
    waiting, seen = [whole], dict[int, Any]()
    while waiting:
        part = waiting.pop()
        if part is None or isinstance(part, (str, bytes, int, float)) or id(part) in seen:
            continue
        seen[id(part)] = part
        yield part
        if isinstance(part, Mapping):
            waiting.extend(part.values())
        elif isinstance(part, (list, tuple, set)):
            waiting.extend(part)
        elif isinstance(part, MethodType):
            waiting.append(part.__self__)
        elif isinstance(part, partial):
            waiting.extend((part.func, *part.args, *part.keywords.values()))
        elif isinstance(part, Tensor):
            waiting.extend(() if part.is_nested else vars(part).values())  # a nested one has its inner workings there
        elif not isinstance(part, (type, *SHARED)) and not compat.is_foreign(type(part).__module__):
            waiting.extend(getattr(part, "__dict__", {}).values())
            waiting.extend(getattr(part, name, None) for name, _ in slots_of(part))


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
        with suppress(TypeError, NotImplementedError):  # it need not know its length: then one pass is over early
            self._skip %= max(1, len(batch_sampler))

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
