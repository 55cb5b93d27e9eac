"""Callbacks that add to the optimizer while training, under a ratchet that goes back to before that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from lightning_autolr import ScheduleCallback
from lightning_autolr.schedules import Constant
from tests.engine.small import Tiny, fit_tiny, loader
from tests.engine.subjects import NoisyData

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


class Plain(Tiny):
    """Without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()


def wrong_labels() -> DataLoader:
    """Validation that training makes worse: the run ends on the weights that it began with."""
    data = NoisyData(24, jitter=False)
    data.y = (data.y + 1) % 3
    return DataLoader(data, 6)


def averaging() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=0.5, annealing_epochs=2)


def guarded() -> ScheduleCallback:
    return ScheduleCallback(Constant(), ratchet=True, figures=False)


def fit(folder: Path, callbacks: list[Callback], module: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {"max_steps": -1, "max_epochs": 10} | options
    return fit_tiny(folder, callbacks, module, loader(shuffle=False), wrong_labels(), **settings)


def test_an_undo_to_before_a_weight_averaging_began(tmp_path: Path) -> None:
    callback = guarded()
    trainer, _ = fit(tmp_path, [callback, averaging()], Plain())
    assert trainer.global_step == 40
    assert callback.summary["undone_steps"] > 20
    assert trainer.optimizers[0].param_groups[0]["swa_lr"] == 1e-2
