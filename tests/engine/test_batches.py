"""Batches of private steps are their own: whatever a loader or a step does to them, the next one gets them as they were."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_autolr import RangeTestCallback
from lightning_autolr.core.requests import Probe
from lightning_autolr.engine import batches
from lightning_autolr.engine.batches import own_batch, unchanged
from lightning_autolr.engine.files import MemoryStore
from lightning_autolr.engine.state import Fork
from tests.engine.small import Stages, Tiny, fit_tiny
from tests.engine.subjects import NoisyData, Search


class Reused:
    """A loader that fills the same two tensors anew for each batch."""

    def __init__(self, size: int = 24) -> None:
        self.data = NoisyData(size, jitter=False)
        self.x, self.y = torch.empty(6, 8), torch.empty(6, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.data) // 6

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self.data) - 5, 6):
            self.x.copy_(self.data.x[first : first + 6])
            self.y.copy_(self.data.y[first : first + 6])
            yield self.x, self.y


class Pair:
    """A batch of a user's own class."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, *args: Any, **kwargs: Any) -> Pair:
        self.x, self.y = self.x.to(*args, **kwargs), self.y.to(*args, **kwargs)
        return self


class SlottedPair:
    __slots__ = ("x", "y")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


@dataclass(frozen=True)
class FrozenPair:
    x: Tensor
    y: Tensor


class Halving(Tiny):
    """Its steps write into the batch."""

    def loss(self, batch: Any) -> Tensor:
        batch.x.mul_(0.5)
        return super().loss((batch.x, batch.y))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=6)


class Seen(Callback):
    """The training batches of the real steps, as the steps get them."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0].clone())


def test_loader_that_uses_its_memory_again(tmp_path: Path) -> None:
    """Each batch of a draw is another, and so is the real batch that the Trainer holds meanwhile."""
    trained: list[float] = []
    validated: list[float] = []

    class Watched(Tiny):
        def loss(self, batch: Any) -> Tensor:
            (trained if self.training else validated).append(float(batch[0].sum()))
            return super().loss(batch)

    search, seen = Search(Stages(lrs=(0.1, 0.01, 0.02), probe_steps=4)), Seen()
    fit_tiny(tmp_path, [search, seen], Watched(), Reused(), Reused(12), num_sanity_val_steps=0)
    real = [float(x.sum()) for x, _ in Reused()]
    assert [float(x.sum()) for x in seen.batches] == [*real, *real[:2]]
    assert len(set(trained[:4])) == 4
    assert trained[:4] == trained[4:8] == trained[8:12]
    parts = [float(x.sum()) for batch, _ in Reused(12) for x in batch.split(2)]
    assert validated[: len(parts)] == pytest.approx(parts)


@pytest.mark.parametrize("num_steps", [30, 33])  # after which another batch lies in that memory
def test_a_range_test_leaves_the_real_batch_as_it_is(num_steps: int, tmp_path: Path) -> None:
    seen = Seen()
    fit_tiny(tmp_path, [RangeTestCallback(num_steps=num_steps, repeats=1, figures=False), seen], train=Reused())
    real = [float(x.sum()) for x, _ in Reused()]
    assert [float(x.sum()) for x in seen.batches] == [*real, *real[:2]]


@pytest.mark.parametrize("callback", [Search(Stages()), None])
def test_batches_on_memory_that_cannot_be_written(callback: Any, tmp_path: Path) -> None:
    """A mapped file with NaN for what is missing; writing to it, even the same, would be a segmentation fault."""
    values = NoisyData(24, jitter=False).x.numpy().copy()
    values[0, 3] = np.nan
    np.save(tmp_path / "x.npy", values)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")

    class Missing(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.from_numpy(mapped), persistent=False)
            self.rows = torch.from_numpy(mapped)

        def loss(self, batch: Any) -> Tensor:
            return super().loss((batch[0].nan_to_num(), batch[1])) + 0 * self.rows[1].sum()

    labels = NoisyData(24, jitter=False).y
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        train = [(torch.from_numpy(mapped[i : i + 6]), labels[i : i + 6]) for i in range(0, 24, 6)]
        callbacks = [callback] if callback else []
        _, module = fit_tiny(tmp_path, callbacks, Missing(), DataLoader(train, batch_size=None))
    assert torch.equal(module.table[1], module.rows[1])


@pytest.mark.parametrize("kind", [Pair, SlottedPair])
def test_step_that_writes_into_a_batch_of_the_users_class(kind: Any, tmp_path: Path) -> None:
    def collate(rows: list[Any]) -> Any:
        return kind(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))

    train, val = (DataLoader(NoisyData(n, jitter=False), batch_size=6, collate_fn=collate) for n in (24, 12))
    search = Search(Stages(lrs=(0.1, 0.1, 0.1)))
    fit_tiny(tmp_path, [search], Halving(), train, val, num_sanity_val_steps=0)
    answers = [e.answer for e in search.trace if isinstance(e.request, Probe) and e.request.stage == 0]
    assert len({(a.losses, a.evaluations) for a in answers}) == 1
    assert len(answers) == 3


def test_own_batch_is_a_whole_copy() -> None:
    x, y = torch.arange(4.0), torch.arange(2)
    data, layer = TensorDataset(x), nn.Linear(1, 1)
    batch = {"pairs": [Pair(x, y), SlottedPair(x, y), FrozenPair(x, y)], "array": x.numpy(), "name": "a"}
    batch["pairs"][0].data, batch["pairs"][0].layer = data, layer
    copied = own_batch(batch)
    x.zero_()
    for pair in copied["pairs"]:
        assert pair.x.tolist() == [0, 1, 2, 3]
    assert copied["array"].tolist() == [0, 1, 2, 3]
    assert copied["pairs"][0].data is data
    assert copied["pairs"][0].layer is layer


def test_own_batch_of_a_view_is_no_larger() -> None:
    view = torch.zeros(1000)[:2]
    copied = own_batch(Pair(view, view))
    assert copied.x.untyped_storage().nbytes() == 8
    assert batches._num_bytes(Pair(view, view.clone())) == 16


def test_graphs_of_a_library_are_part_of_a_batch_and_no_state_of_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of PyTorch Geometric, which the tests do without."""
    monkeypatch.setattr(Pair, "__module__", "torch_geometric.data")
    module = nn.Module()
    module.graph = Pair(torch.zeros(100), torch.zeros(100))
    assert batches._num_bytes(module.graph) == 800
    fork = Fork([module], MemoryStore())
    fork.capture()
    assert fork.num_bytes == 0


def test_own_batch_where_something_cannot_be_copied() -> None:
    x = torch.ones(2)
    opened = (i for i in range(3))
    copied = own_batch([x, opened])
    assert copied[0] is not x
    assert copied[1] is opened


def test_unchanged_writes_only_what_changed() -> None:
    x, y = torch.ones(2), torch.ones(2)
    version = y._version
    with unchanged([Pair(x, y), None, "text"]):
        x.zero_()
    assert x.tolist() == [1, 1]
    assert y._version == version


@pytest.mark.parametrize("kind", ["conjugate", "negative", "expanded"])
def test_unchanged_reads_complex_views(kind: str) -> None:
    z = torch.ones(4, 1, dtype=torch.complex128 if kind == "expanded" else torch.complex64).mul_(1 + 2j)
    view = {"conjugate": z.conj(), "negative": z.conj().imag, "expanded": z.expand(-1, 3)}[kind]
    before = view.clone()
    with unchanged(view):
        if kind != "expanded":  # nothing could be written back to what lies in memory once only
            z.zero_()
    assert torch.equal(view, before)
