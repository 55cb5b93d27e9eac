"""What a module counts of an epoch is of that epoch, also where the run goes back to earlier weights."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

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


class Renewing(Tiny):
    """Makes its meters and metrics anew at each epoch's start, counts in dicts, and sums losses as tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[list[float]] = []

    def on_train_epoch_start(self) -> None:
        self.meter, self.mean = Meter(), MeanMetric()
        self.total, self.count = torch.zeros(()), np.int64(0)
        self.outputs: dict[str, Any] = {"seen": [], "count": 0, "meters": {"own": Meter()}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.meter.count += 1
        self.mean.update(1.0)
        self.total, self.count = self.total + 1.0, self.count + 1
        self.outputs["seen"].append(loss.detach()[None])
        self.outputs["count"] += 1
        self.outputs["meters"]["own"].count += 1
        return loss

    def on_train_epoch_end(self) -> None:
        held = [len(self.outputs["seen"]), self.outputs["count"], self.outputs["meters"]["own"].count]
        self.epochs.append([self.meter.count, float(self.mean.weight), float(self.total), int(self.count), *held])


def test_what_is_made_anew_each_epoch_counts_right_too(tmp_path: Path) -> None:
    _, module = fit_tiny(tmp_path, [Search(GoesBack())], Renewing(), max_steps=16)
    assert module.epochs == [[4] * 7] * 4


class Growing(nn.Module):
    """A table that grows, and its length; a mean that is set up by the first batch, and whether it was."""

    def __init__(self) -> None:
        super().__init__()
        self.length, self.count = 0, 0
        self.register_buffer("table", torch.zeros(0))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.length += 1
        self.table = torch.ones(self.length)
        if self.count == 0:
            self.mean = x.detach().mean() + 1.0
        self.count += 1
        return x


class Encoded(Metric):
    """A metric that looks through a part of the network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        self.total += self.net(x).detach().mean()

    def compute(self) -> Tensor:
        return self.total


class Averaged:
    """A moving average of the weights, in a list that is made anew at each step, or in a dict."""

    def __init__(self) -> None:
        self.shadow: list[Tensor] = []
        self.named: dict[str, Tensor] = {}
        self.steps = 0

    def update(self, module: nn.Module) -> None:
        self.shadow = [p.detach().clone() for p in module.parameters()]
        self.named = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.steps += 1


class Described(Tiny):
    """What describes the weights, and goes back with them."""

    def __init__(self) -> None:
        super().__init__()
        self.growing, self.average = Growing(), Averaged()
        self.encoded = Encoded(self.layer)
        self.seen: list[tuple[Any, ...]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.average.update(self.layer)
        growing, weight = self.growing, self.layer.weight.detach().clone()
        agrees = torch.equal(self.average.shadow[0], weight) and torch.equal(self.average.named["weight"], weight)
        self.seen.append((growing.length, len(growing.table), growing.count, self.average.steps, agrees, weight))
        growing(batch[0])
        return super().training_step(batch, batch_idx)


def test_what_describes_weights_goes_back_with_them(tmp_path: Path) -> None:
    """A step sees what the same step saw before the undo: one number of it alone would be about other tensors."""
    _, module = fit_tiny(tmp_path, [Search(GoesBack())], Described(), max_steps=16)
    assert torch.equal(module.seen[7][-1], module.seen[2][-1])  # the run did go back
    assert module.seen[7][:5] == module.seen[2][:5] == (2, 2, 2, 3, True)
    assert module.growing.count == 16 - 5
