"""What a module counts of an epoch is of that epoch, also where the run goes back to earlier weights."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_autolr.core.requests import Requests, Run, Train
from lightning_autolr.search.base import AbstractSearch
from tests.engine.small import Tiny, fit_tiny
from tests.engine.subjects import Meter, Search


@dataclass(frozen=True)
class GoesBack(AbstractSearch):
    """In the middle of the second epoch of four steps, to a state from the middle of the first one."""

    def requests(self, run: Run) -> Requests:
        yield Train(0.05, 2)
        trained = yield Train(0.05, 5, keep_start=True)
        yield Train(0.02, None, start=trained.start, release=(trained.start,))


class Counting(Tiny):
    """Counts the batches of an epoch in all the ways of users."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.last = deque[int](maxlen=8)
        self.seen = set[int]()
        self.count, self.total = 0, 0.0
        self.meter, self.mean = Meter(), MeanMetric()
        self.epochs: list[list[int]] = []
        self.means: list[tuple[float, float]] = []
        self.weights: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.weights.append(self.layer.weight.detach().clone())
        self.outputs.append(loss.detach())
        self.last.append(batch_idx)
        self.seen.add(batch_idx)
        self.count, self.total = self.count + 1, self.total + float(loss.detach())
        self.meter.count += 1
        self.mean.update(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        counts = [len(self.outputs), len(self.last), len(self.seen), self.count, self.meter.count]
        self.epochs.append(counts)
        self.means.append((self.total / self.count, float(self.mean.compute())))
        for tally in (self.outputs, self.last, self.seen):
            tally.clear()
        self.count, self.total, self.meter.count = 0, 0.0, 0
        self.mean.reset()


def test_an_epoch_counts_its_own_batches(tmp_path: Path) -> None:
    _, module = fit_tiny(tmp_path, [Search(GoesBack())], Counting(), max_steps=16)
    assert module.epochs == [[4] * 5] * 4
    assert all(abs(own - metric) < 1e-5 for own, metric in module.means)
    assert torch.equal(module.weights[7], module.weights[2])  # the run did go back
