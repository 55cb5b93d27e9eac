"""Random number generators of the user's own stand after a search where they stood before it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from lightning_autolr.core.requests import Probe, Requests, Run, Train
from lightning_autolr.engine import batches
from lightning_autolr.engine.randomness import RandomState, generators_of
from lightning_autolr.search.base import AbstractSearch
from tests.engine.small import Stages, Tiny, fit_tiny
from tests.engine.subjects import NoisyData, Search

RNG = np.random.default_rng(0)

MAKES: dict[str, Callable[[], Any]] = {
    "numpy": lambda: np.random.default_rng(0),
    "numpy, philox": lambda: np.random.Generator(np.random.Philox(0)),
    "numpy, legacy": lambda: np.random.RandomState(0),
    "python": lambda: random.Random(0),
    "torch": lambda: torch.Generator().manual_seed(0),
}


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand(1, generator=generator))
    if isinstance(generator, np.random.RandomState):
        return float(generator.rand())
    return float(generator.random())


class Jitter:
    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __call__(self, x: Tensor) -> Tensor:
        return x + draw(self.generator)


class GlobalJitter:
    def __call__(self, x: Tensor) -> Tensor:
        return x + float(RNG.random())


class Transformed(Dataset):
    def __init__(self, *transforms: Any) -> None:
        self.data, self.transforms = NoisyData(24, jitter=False), list(transforms)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[i]
        for transform in self.transforms:
            x = transform(x)
        return x, y


class Streamed(IterableDataset):
    def __init__(self, generator: Any) -> None:
        self.data = Transformed(Jitter(generator))

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(24))


def jittered(generator: Any, rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return x + draw(generator), y


def closure(generator: Any) -> Callable[[list[Any]], Any]:
    return lambda rows: jittered(generator, rows)


class JitteringLoader(DataLoader):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.jitter = Jitter(random.Random(0))

    def __iter__(self) -> Any:
        return ((self.jitter(x), y) for x, y in super().__iter__())


class InDataModule(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def train_dataloader(self) -> Any:
        return DataLoader(NoisyData(24, jitter=False), batch_size=6)

    def val_dataloader(self) -> Any:
        return DataLoader(NoisyData(12, jitter=False), batch_size=6)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + draw(self.generator), batch[1]


class Global(Tiny):
    """Its steps draw from a global of this file."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch[0] + float(RNG.random()), batch[1]))


LOADERS: dict[str, Callable[[], Any]] = {
    **{name: lambda make=make: DataLoader(Transformed(Jitter(make())), batch_size=6) for name, make in MAKES.items()},
    "global": lambda: DataLoader(Transformed(GlobalJitter()), batch_size=6),
    "stream": lambda: DataLoader(Streamed(np.random.default_rng(0)), batch_size=6),
    "partial": lambda: DataLoader(Transformed(), batch_size=6, collate_fn=partial(jittered, random.Random(0))),
    "closure": lambda: DataLoader(Transformed(), batch_size=6, collate_fn=closure(random.Random(0))),
    "method": lambda: DataLoader(Transformed(Jitter(random.Random(0)).__call__), batch_size=6),
    "loader": lambda: JitteringLoader(Transformed(), batch_size=6),
    "data module": InDataModule,
}


class Seen(Callback):
    """The training batches of the real steps, as the steps get them."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0].flatten().tolist())


def seen(tmp_path: Path, loader: Any, callbacks: list[Callback], module: Tiny | None = None) -> list[list[float]]:
    global RNG
    RNG = np.random.default_rng(0)
    watch = Seen()
    val: Any = () if isinstance(loader, LightningDataModule) else None
    fit_tiny(tmp_path, [*callbacks, watch], module, loader, val)
    return watch.batches


@pytest.mark.parametrize("name", LOADERS)
def test_real_batches_are_those_of_a_run_without_a_search(name: str, tmp_path: Path) -> None:
    search = Search(Stages(lrs=(0.1, 0.1, 0.01), probe_steps=3))
    searched = seen(tmp_path, LOADERS[name](), [search])
    alone = seen(tmp_path, LOADERS[name](), [])
    assert searched == alone[: len(searched)]
    assert len(searched) == 6
    answers = [e.answer for e in search.trace if isinstance(e.request, Probe) and e.request.stage == 0]
    assert answers[0].losses == answers[1].losses  # the same batches, jitter included


def test_comparison_notices_generators_that_are_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "generators_of", lambda roots: [])
    searched = seen(tmp_path, LOADERS["numpy"](), [Search(Stages())])
    assert searched != seen(tmp_path, LOADERS["numpy"](), [])[: len(searched)]


def test_steps_that_draw_from_a_global(tmp_path: Path) -> None:
    """Where it stands after all, and what candidates draw from it."""
    search = Search(Stages(lrs=(0.1, 0.1)))
    seen(tmp_path, None, [search], Global())
    after = RNG.random()
    seen(tmp_path, None, [], Global())
    assert after == RNG.random()
    answers = [e.answer for e in search.trace if isinstance(e.request, Probe) and e.request.stage == 0]
    assert answers[0].losses == answers[1].losses


def test_generators_are_looked_for_where_data_are_not() -> None:
    few, many = [random.Random(i) for i in range(100)], [random.Random(i) for i in range(101)]
    assert set(map(id, generators_of([few]))) == set(map(id, few))
    assert generators_of([many]) == []
    assert generators_of([None, torch.ones(3), "text", np.ones(3), {"a": [1, (2.0, {3})]}]) == []
    ring: dict[str, Any] = {"generator": few[0]}
    ring["self"] = ring
    assert generators_of([ring]) == [few[0]]


class Draws(Tiny):
    """Draws once for each batch."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.generator = generator

    def on_train_batch_start(self, *args: Any) -> None:
        DRAWN.append(draw(self.generator))


DRAWN: list[float] = []  # not in the module, where an undo could put it back


@dataclass(frozen=True)
class GoesBack(AbstractSearch):
    """Trains, and again from where it began."""

    def requests(self, run: Run) -> Requests:
        first = yield Train(0.1, 4, keep_start=True)
        yield Train(0.01, None, start=first.start, release=(first.start,))


@pytest.mark.parametrize("name", MAKES)
def test_an_undo_does_not_turn_the_generator_of_a_module_back(name: str, tmp_path: Path) -> None:
    DRAWN.clear()
    fit_tiny(tmp_path, [Search(GoesBack())], Draws(MAKES[name]()), max_steps=10)
    other = MAKES[name]()
    assert [draw(other) for _ in range(10)] == DRAWN


@pytest.mark.parametrize("name", MAKES)
def test_seeding_a_held_generator(name: str) -> None:
    generator, device = MAKES[name](), torch.device("cpu")
    first = RandomState(device, [generator])
    drawn = [draw(generator) for _ in range(3)]
    first.restore()
    assert [draw(generator) for _ in range(3)] == drawn
    RandomState.seed(7, device, [generator])
    seeded = [draw(generator) for _ in range(3)]
    assert seeded != drawn
    RandomState.seed(7, device, [generator])
    assert [draw(generator) for _ in range(3)] == seeded
