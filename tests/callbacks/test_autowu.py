"""AutoWU inside a Trainer: ranks end the warm-up together, and a kill in the midst of it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_autolr import AutoWUCallback
from lightning_autolr.core.requests import Train
from tests.engine.subjects import differences
from tests.engine.test_ddp import Ranked, fit_ranked, on_ranks
from tests.engine.test_resume import resume, run


def autowu() -> AutoWUCallback:
    return AutoWUCallback(min_lr=1e-3, max_lr=100.0, max_warmup_fraction=0.8, test_every=5, patience=2)


def climb(callback: AutoWUCallback) -> list[Train]:
    """The segments of the warm-up that were asked for."""
    requests = [e.request for e in callback.trace if isinstance(e.request, Train)]
    return [r for r in requests if r.label == "warm-up" and r.stage == 0]


class Watched(Ranked):
    """Remembers the loss on this rank and the learning rate of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.local_losses: list[float] = []
        self.lrs: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.local_losses.append(float(outputs["loss"]))
        self.lrs.append(self.trainer.optimizers[0].param_groups[0]["lr"])


def _warm_up(rank: int, folder: Path) -> None:
    torch.manual_seed(11)
    module, callback = Watched(), autowu()
    # a fork puts the module's own lists back, too: what is undone is forgotten by all ranks alike
    fitted = fit_ranked(folder, callback, module, max_steps=75, val_check_interval=7)
    segments = [(s.num_steps, s.lr) for s in callback.schedule]
    torch.save(
        (fitted["weights"], module.lrs, module.local_losses, segments, len(climb(callback))), folder / f"rank-{rank}.pt"
    )


def test_ranks_with_different_losses_switch_at_the_same_step(tmp_path: Path) -> None:
    on_ranks(2, _warm_up, tmp_path)
    one, other = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    weights, lrs, losses, segments, num_climbed = one
    assert not any(a == b for a, b in zip(losses, other[2], strict=True))
    assert 2 <= num_climbed < 12  # of at most 60 steps: it was the losses that ended the warm-up
    assert (lrs, segments, num_climbed) == (other[1], *other[3:])
    trained = {name: tensor for name, tensor in weights.items() if "running" not in name}  # statistics are a rank's own
    assert differences(trained, {name: other[0][name] for name in trained}) == []


@pytest.mark.parametrize("saved", [10, 13])
def test_a_warm_up_that_is_killed_goes_on_bit_for_bit(saved: int, tmp_path: Path) -> None:
    """The last checkpoint was written when a test of the losses was due, or in the midst of a segment."""
    whole, resumed, options = autowu(), autowu(), {"max_steps": 60}
    _, expected = run(tmp_path / "whole", whole, **options)
    run(tmp_path / "killed", autowu(), kill_step=saved + 1, **options)
    _, module = resume(tmp_path / "killed", resumed, **options)
    assert 5 * len(climb(whole)) > saved + 1  # it was in the warm-up
    assert differences(expected.state_dict(), module.state_dict()) == []
    assert resumed.schedule == whole.schedule
    assert [(e.request, e.answer) for e in resumed.trace] == [(e.request, e.answer) for e in whole.trace]
