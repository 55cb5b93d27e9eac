"""Batches for private steps: from clones of the user's loaders, so that the real stream is not consumed.

A *draw* is a sequence of batches that depends on nothing but the seed and the draw's number (and, of a stream or a loader of
the user's own, on where it stands). All probes of one draw get the same batches in the same order. Copies of them are kept in
memory, since a loader may fill the same tensors anew for each; at most ``cache_bytes``, and the rest is loaded anew for each
probe.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_autolr.engine import compat
from lightning_autolr.engine.files import same_bits
from lightning_autolr.engine.loaders import CANNOT_COPY, SHARED, parts_of, parts_of_loader, private_loader
from lightning_autolr.engine.randomness import RandomState, generators_of

_MIN_EVALUATIONS = 8

__all__ = ["Draws", "in_parts", "mix", "own_batch", "unchanged", "validation_batches"]


def mix(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def own_batch(batch: Any) -> Any:
    """A copy that a training step may write into without changing what the next candidate sees."""
    memo: dict[int, Any] = {}
    tensors: list[Tensor] = []
    for part in parts_of(batch):
        if isinstance(part, Tensor):  # a deep copy would be of all the memory that a view is a part of
            memo[id(part)] = _own_tensor(part)
            tensors.append(part)
        elif isinstance(part, SHARED):
            memo[id(part)] = part
    try:
        for tensor in tensors:
            held = vars(memo[id(tensor)])
            held.update({k: copy.deepcopy(v, memo) for k, v in vars(tensor).items() if k not in held})
        return copy.deepcopy(batch, memo)
    except CANNOT_COPY:
        return apply_to_collection(batch, Tensor, _own_tensor)


def _own_tensor(tensor: Tensor) -> Tensor:
    """A copy that can be differentiated by as the tensor can, cut off from what that was computed from.

    The graph behind it is gone after the first step's backward. What is in it was no leaf, and may be written into.
    """
    copied = tensor.detach().clone()
    if tensor.requires_grad:
        copied.requires_grad_()
    return copied if tensor.is_leaf else copied.clone()


@contextmanager
def unchanged(batch: Any) -> Iterator[None]:
    """Put the contents of a batch back that change in the block.

    A loader that fills the same tensors anew for each batch overwrites the one of the real step when private steps read it.
    """
    tensors = [t for t in parts_of(batch) if isinstance(t, Tensor) and _is_plain(t)]
    before = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, content in zip(tensors, before, strict=True):
                if not same_bits(tensor, content):  # memory may be read-only: written only where need be
                    tensor.copy_(content)


class Draws:
    """The draws of one run.

    Args:
        trainer: the Trainer, inside ``fit``.
        seed: the search's seed.
        num_reserved: batches at the start of each draw that are held out from training.
        loader: an own loader for probes; None is a clone of the training loader.
        cache_bytes: how much of a draw may be kept in memory.
    """

    def __init__(
        self, trainer: Any, seed: int, num_reserved: int = 0, loader: Any = None, cache_bytes: int = 2 << 30
    ) -> None:
        self._trainer, self._seed, self._loader, self._cache_bytes = trainer, seed, loader, cache_bytes
        self.num_reserved = num_reserved
        self._used: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        self._current: tuple[int, _Batches] | None = None
        self._copies: dict[int, Any] = {}

    def note(self, draw: int, num_batches: int) -> None:
        """Remember how far a draw may be read, so that later draws of an ordered stream begin after it.

        What counts is what was asked for: a candidate that diverged early, or whose answer was known from a killed run,
        must not change what later draws see.
        """
        self._start(draw)
        self._used[draw] = max(self._used.get(draw, 0), self.num_reserved + num_batches)

    def training(self, draw: int, first: int, count: int) -> list[Any]:
        """Batches ``first ... first + count - 1`` of those that may be trained on."""
        return self._read(draw, self.num_reserved + first, count)

    def held_out(self, draw: int) -> list[Any]:
        """The batches of a draw that are never trained on in it (until its loader has run through)."""
        return self._read(draw, 0, self.num_reserved)

    def close(self) -> None:
        """Forget the present draw's batches, and end the workers that load them."""
        if self._current is not None:
            self._current[1].close()
        self._current = None
        self._copies.clear()

    def _read(self, draw: int, first: int, count: int) -> list[Any]:
        if self._current is None or self._current[0] != draw:
            self.close()  # free the old draw's batches first
            skip = self._start(draw)
            one_pass = partial(self._one_pass, draw, skip)
            batches = _Batches(one_pass, self._cache_bytes, self._rng(draw))
            self._current = (draw, batches)
        return [own_batch(self._current[1][i]) for i in range(first, first + count)]

    def _start(self, draw: int) -> int:
        """Where a draw begins in an ordered stream; fixed when it is first mentioned."""
        return self._starts.setdefault(draw, sum(n for d, n in self._used.items() if d < draw))

    def _rng(self, draw: int) -> _OwnRandomness:
        loaders = [self._loader] if self._loader is not None else compat.combined_loader(self._trainer).flattened
        return _OwnRandomness(mix(self._seed, draw), self._trainer.strategy.root_device, loaders)

    def _one_pass(self, draw: int, skip: int, number: int, anew: bool) -> Iterator[Any]:
        """One run through the cloned loader; streams go on where the last one ended, unless ``anew``."""
        seed = mix(self._seed, draw, number)
        if anew:
            self._copies.clear()
        clone = partial(private_loader, seed=seed, draw=draw, skip=0 if number else skip, copies=self._copies)
        if self._loader is not None:
            return iter(clone(self._loader))
        combined = compat.combined_loader(self._trainer)
        clones = [clone(leaf) for leaf in combined.flattened]
        batches = (batch for batch, _, _ in iter(compat.clone_combined(combined, clones)))
        return _first(batches, self._trainer.num_training_batches)


class _OwnRandomness:
    """Loading has random numbers of its own: a batch is the same whether it is loaded before, between or after steps."""

    def __init__(self, seed: int, device: torch.device, loaders: Iterable[Any]) -> None:
        self._device = device
        self._held = generators_of(part for loader in loaders for part in parts_of_loader(loader))
        outside = self._present()
        RandomState.seed(seed, device, self._held)
        self._state = self._present()
        outside.restore()

    def run(self, load: Callable[[], Any]) -> Any:
        outside = self._present()
        self._state.restore()
        try:
            return load()
        finally:
            self._state = self._present()
            outside.restore()

    def _present(self) -> RandomState:
        return RandomState(self._device, self._held)


class _Batches:
    """Random access to an endless sequence of passes; the beginning is kept, the rest is loaded again when asked for."""

    def __init__(
        self, one_pass: Callable[[int, bool], Iterator[Any]], cache_bytes: int, randomness: _OwnRandomness
    ) -> None:
        self._one_pass, self._budget, self._randomness = one_pass, cache_bytes, randomness
        self._at_start = copy.copy(randomness)
        self._kept: list[Any] = []
        self._stream = self._passes()
        self._position = 0

    def __getitem__(self, index: int) -> Any:
        if index < len(self._kept):
            return self._kept[index]
        if index < self._position:
            self._stream, self._position, self._randomness = self._passes(), 0, copy.copy(self._at_start)
        while True:
            batch = self._randomness.run(lambda: next(self._stream))
            self._position += 1
            if self._position == len(self._kept) + 1 and (size := _num_bytes(batch)) <= self._budget:
                batch = own_batch(batch)
                self._kept.append(batch)
                self._budget -= size
            if self._position == index + 1:
                return batch

    def close(self) -> None:
        self._stream.close()

    def _passes(self) -> Generator[Any, None, None]:
        """A pass may be over before it begins, when it is entered at its end: some streams then begin again, some never do."""
        empty = 0  # passes in a row
        for number in itertools.count():
            empty += 1
            for batch in self._one_pass(number, number == 0 or empty == 3):
                empty = 0
                if batch is not None:
                    yield batch
            if empty == 3:
                raise ValueError("Expected the training loader to yield batches for probes, got none.")


def _num_bytes(batch: Any) -> int:
    parts = list(parts_of(batch))
    tensors = sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))
    return tensors + sum(part.nbytes for part in parts if isinstance(part, np.ndarray))


def validation_batches(trainer: Any, count: int | None, combined: Any, seed: int) -> list[tuple[Any, int, int]]:
    """The first ``count`` batches of each validation loader, as (batch, index, number of the loader).

    No more of them than the Trainer's own validation uses. Loaders that are combined are one loader.
    """
    if combined is None:
        return []
    limits = trainer.num_val_batches if isinstance(trainer.num_val_batches, list) else [trainer.num_val_batches]
    randomness = _OwnRandomness(mix(seed), trainer.strategy.root_device, combined.flattened)

    def load() -> list[tuple[Any, int, int]]:
        clones = [private_loader(loader, mix(seed), 0, 0, {}) for loader in combined.flattened]
        return [
            (own_batch(batch), i, number)
            for number, (loader, limit) in enumerate(_streams(combined, clones, limits))
            for i, batch in enumerate(_first(loader, min(limit, math.inf if count is None else count)))
        ]

    with torch.no_grad():  # as the Trainer validates
        batches: list[tuple[Any, int, int]] = randomness.run(load)
    return batches


def _streams(combined: Any, loaders: list[Any], limits: list[float]) -> list[tuple[Iterable[Any], float]]:
    """What gives batches, and how many the Trainer takes of them."""
    if compat.is_sequential(combined) or not loaders:
        return list(zip(loaders, limits, strict=True))
    limit = min(limits) if compat.stops_at_shortest(combined) else max(limits)
    return [((batch for batch, _, _ in compat.clone_combined(combined, loaders)), limit)]


def in_parts(batches: list[tuple[Any, int, int]]) -> list[tuple[Any, int, int]]:
    """The batches; where they are fewer than eight, parts of them.

    The difference between two candidates has a standard error only when there are several losses to compare.
    """
    parts = -(-_MIN_EVALUATIONS // max(1, len(batches)))
    return [(part, i, number) for batch, i, number in batches for part in split(batch, parts)]


def split(batch: Any, parts: int) -> list[Any]:
    """The batch in equal parts along its first dimension; whole unless it is made of tensors that agree about it.

    A square matrix is taken for one of pairs, such as the edges of a graph, of which rows alone make no batch. Nor does a slice
    make a part of a tensor that is sparse or nested, or that says something about itself in attributes.
    """
    leaves = list(_leaves(batch))
    if any(isinstance(leaf, Tensor) and (_is_odd(leaf) or _is_square(leaf)) for leaf in leaves):
        return [batch]
    sizes = {leaf.shape[0] if isinstance(leaf, Tensor) and leaf.ndim else 0 for leaf in leaves}
    size = sizes.pop() if len(sizes) == 1 else 0
    parts = min(parts, size // 2)  # two samples at least: user code may squeeze a batch of one
    if parts < 2:
        return [batch]
    parts = next((n for n in range(parts, 2 * parts) if size % n == 0 and size // n > 1), parts)
    edges = [round(i * size / parts) for i in range(parts + 1)]
    return [
        apply_to_collection(batch, Tensor, lambda t, a=a, b=b: _slice(t, a, b)) for a, b in itertools.pairwise(edges)
    ]


def _first(batches: Iterable[Any], count: float) -> Iterator[Any]:
    return itertools.islice(batches, None if count == math.inf else int(count))


def _slice(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor.detach()[start:stop].requires_grad_(tensor.requires_grad)


def _is_odd(tensor: Tensor) -> bool:
    return not _is_plain(tensor) or type(tensor) is not Tensor or bool(vars(tensor))


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is neither sparse nor nested."""
    return tensor.layout is torch.strided and not tensor.is_nested


def _is_square(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]


def _leaves(batch: Any) -> Iterator[Any]:
    if isinstance(batch, (dict, list, tuple)):
        for item in batch.values() if isinstance(batch, dict) else batch:
            yield from _leaves(item)
    else:
        yield batch
