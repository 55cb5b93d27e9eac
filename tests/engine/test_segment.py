"""The piece of real training that is going on."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_autolr.core.requests import Status, Train, TrainResult
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


def test_steps_without_a_loss_are_told() -> None:
    """And the missing gradients before the first norm; a saved piece of training knows them."""
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    active = ActiveSegment(Train(0.1, 5, grad_norm="l2"))
    for loss in (None, torch.tensor(2.0), None):
        if loss is not None:
            active.add_loss(loss)
        active.end_step()
    active.read(strategy)
    active = ActiveSegment.from_state_dict(active.state_dict())
    answer = TrainResult(tuple(active.losses), skipped=tuple(active.skipped))
    assert (answer.losses, answer.skipped, answer.num_steps) == ((2.0,), (0, 2), 3)
    assert len(active.grad_norms) == 3
