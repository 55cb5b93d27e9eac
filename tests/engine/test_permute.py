"""Weights in another order: learnt things are gone, and come back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lightning_autolr.core.requests import Probe, ProbeResult, Requests, Run, Train
from lightning_autolr.engine.permute import permute_weights
from lightning_autolr.search.base import AbstractSearch
from tests.engine.small import Tiny, fit_tiny
from tests.engine.subjects import Search


def test_weights_are_permuted_along_their_axes_and_vectors_stay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    net[2].requires_grad_(False)
    before = [p.clone() for p in net.parameters()]
    permute_weights(net.parameters(), seed=0)
    weight, bias, *frozen = net.parameters()
    assert not torch.equal(weight, before[0])
    assert torch.equal(weight.flatten().sort().values, before[0].flatten().sort().values)
    rows, others = (w.detach().flatten(1).sum(1).sort().values for w in (weight, before[0]))
    assert torch.allclose(rows, others)  # rows stay together
    assert all(torch.equal(a, b) for a, b in zip([bias, *frozen], before[1:], strict=True))


def test_the_same_seed_is_the_same_order() -> None:
    a, b = torch.randn(6, 7, requires_grad=True), torch.zeros(6, 7, requires_grad=True)
    b.data.copy_(a.data)
    permute_weights([a], seed=1)
    permute_weights([b], seed=1)
    assert torch.equal(a, b)


@dataclass(frozen=True)
class Asks(AbstractSearch):
    asks: bool = True

    def requests(self, run: Run) -> Requests:
        yield Train(0.05, 60)
        if self.asks:
            for permuted in (False, True, False):
                yield Probe(0.05, 1, evaluate="none", permuted=permuted)
        yield Train(0.05, None)


def test_what_was_learnt_is_gone_and_comes_back(tmp_path: Path) -> None:
    weights, searches = [], []
    for asks in (True, False):
        torch.manual_seed(0)
        module, search = Tiny(), Search(Asks(asks))
        fit_tiny(tmp_path, [search], module, max_steps=70)
        weights.append([p.detach().clone() for p in module.parameters()])
        searches.append(search)
    as_it_is, permuted, again = (e.answer.losses[0] for e in searches[0].trace if isinstance(e.answer, ProbeResult))
    assert as_it_is == again
    assert permuted > as_it_is + 0.1
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
