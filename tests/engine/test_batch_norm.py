"""Evaluating with running statistics that are taken anew."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_autolr.core.requests import Probe, ProbeResult, Requests, Run, Train
from lightning_autolr.engine import batch_norm
from lightning_autolr.search.base import AbstractSearch
from tests.engine.small import Tiny, fit_tiny, loader
from tests.engine.subjects import Search

LR = 2.0  # high: the running means lag behind


@dataclass(frozen=True)
class Looks(AbstractSearch):
    """After some training, the same weights are evaluated with and without new statistics."""

    train_steps: int = 3
    anew: tuple[bool, ...] = (False, True, False)

    def requests(self, run: Run) -> Requests:
        yield Train(LR, self.train_steps)
        for anew in self.anew:
            yield Probe(LR, 0, update_bn=anew)
        yield Train(LR, None)


class Remember(Callback):
    """The module after three steps."""

    module: Any = None

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == 3:
            self.module = copy.deepcopy(module.net if hasattr(module, "net") else module)


class Norms(Tiny):
    """Two layers of it, one behind the other."""

    def __init__(self) -> None:
        super().__init__(lr=LR)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self.net(batch[0])[:, :3], batch[1])


def looks(folder: Path, module: Any, *callbacks: Callback, train: Any = None) -> tuple[list[float], Search]:
    callback = Search(Looks())
    fit_tiny(folder, [callback, *callbacks], module, train)
    return [e.answer.loss for e in callback.trace if isinstance(e.answer, ProbeResult)], callback


def test_statistics_are_those_of_all_evaluation_batches(tmp_path: Path) -> None:
    (before, updated, after), callback = looks(tmp_path, Norms(), remember := Remember())
    assert before == after
    net, batches = remember.module, list(loader(12, False))

    @torch.no_grad()
    def loss() -> float:
        return float(sum(cross_entropy(net.eval()(x)[:, :3], y) for x, y in batches) / 2)

    assert loss() == pytest.approx(before, rel=1e-5)
    by_hand(net, [part for x, _ in batches for part in x.split(2)])  # what an evaluation of two batches is split into
    assert loss() == pytest.approx(updated, rel=1e-4)
    assert abs(updated - before) > 0.05
    assert callback.summary["eval_batches"] == 4 * 6


@torch.no_grad()
def by_hand(net: Any, parts: list[Tensor]) -> None:
    """Each layer's inputs, normalised part by part before it, have these means and variances."""
    net.train()
    for layer in (net[1], net[4]):
        seen = torch.cat([net[: 1 if layer is net[1] else 4](part) for part in parts])
        layer.mean, layer.var = seen.mean(0), seen.var(0, correction=0)
    for layer in (net[1], net[4]):
        layer.running_mean.copy_(layer.mean)
        layer.running_var.copy_(layer.var)


def test_frozen_layers_stay_as_they_are(tmp_path: Path) -> None:
    class Frozen(Norms):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net[1].eval()
            self.net[4].eval()
            return super().training_step(batch, batch_idx)

    class Tenth(Norms):
        def __init__(self) -> None:
            super().__init__()
            self.net[1].momentum = self.net[4].momentum = 0.0

    for number, module in enumerate((Frozen(), Tenth())):
        found, _ = looks(tmp_path / str(number), module)
        assert len(set(found)) == 1


def test_without_batch_norm_there_is_one_pass(tmp_path: Path) -> None:
    class Plain(Tiny):
        def loss(self, batch: Any) -> Tensor:
            return cross_entropy(self.layer(batch[0]), batch[1])

        def __init__(self) -> None:
            super().__init__(lr=LR)
            self.norm = nn.LayerNorm(8)  # type: ignore[assignment]

    found, callback = looks(tmp_path, Plain())
    assert len(set(found)) == 1
    assert callback.summary["eval_batches"] == 3 * 6


@pytest.mark.parametrize(
    "batches", [[(7, 3)], [(7, 3), (2, 3)], [(4, 3, 5), (1, 3, 1), (0, 3, 5)], [(2, 3, 4, 4), (5, 3, 2, 2)]]
)
def test_statistics_are_those_of_all_values(batches: list[tuple[int, ...]]) -> None:
    layer: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(batches[0])](3)
    inputs = [5 + 2 * torch.randn(size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(batches)]
    by_channel = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], 1)

    def evaluate() -> None:
        layer.eval()
        for x in inputs:
            if x.numel():
                own = layer(x).transpose(0, 1).flatten(1)  # normalised by the batch's own statistics
                assert torch.allclose(own.mean(1), torch.zeros(3), atol=1e-4)
            else:
                layer(input=x)

    with batch_norm.updated_statistics([layer], evaluate):
        assert torch.allclose(layer.running_mean, by_channel.mean(1), atol=1e-5)
        assert torch.allclose(layer.running_var, by_channel.var(1, correction=0), rtol=1e-4)
    assert layer.running_mean.tolist() == [0, 0, 0]
    assert layer.running_var.tolist() == [1, 1, 1]
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("anew", [(True, False), (False, True)])
def test_a_compiled_module_is_not_compiled_for_its_statistics(anew: tuple[bool, bool], tmp_path: Path) -> None:
    """A hook with numbers of its own would be compiled anew for each batch, or not be seen by what is compiled already."""
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    class Compiled(Tiny):
        def __init__(self, compiled: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.raw = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
            vars(self)["net"] = torch.compile(self.raw, fullgraph=True, backend=keep) if compiled else self.raw

        def loss(self, batch: Any) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

    torch.compiler.reset()
    losses = []
    for compiled in (True, False):
        search = Search(Looks(anew=anew))
        val = loader(72, False)  # more batches than graphs are allowed
        fit_tiny(tmp_path, [search], Compiled(compiled), val=val, num_sanity_val_steps=0)
        losses.append([entry.answer.loss for entry in search.trace[1:3]])
    assert len(graphs) == 2  # in training and in evaluation
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0][0] != losses[0][1]
