"""The piece of real training that is going on."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_autolr.core.requests import Status, Train
from lightning_autolr.engine.segment import ActiveSegment


@pytest.mark.parametrize("stop_above", [None, 10.0, math.inf])
@pytest.mark.parametrize(
    ("loss", "status"), [(9.0, Status.OK), (math.inf, Status.DIVERGED), (math.nan, Status.DIVERGED)]
)
def test_a_loss_that_is_not_finite_is_a_divergence(loss: float, status: Status, stop_above: float | None) -> None:
    """Whatever the limit is, and only when somebody asks; it is told once."""
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    active = ActiveSegment(Train(0.1, 5, keep_start=True, stop_above=stop_above))
    active.add_loss(torch.tensor(loss))
    active.end_step()
    assert active.read(strategy) is Status.OK
    assert active.read(strategy, judge=True) is status
    assert active.read(strategy, judge=True) is Status.OK
