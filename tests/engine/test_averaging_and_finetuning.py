"""Callbacks that add to the optimizer while training, under a ratchet that goes back to before that."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader

from lightning_autolr import ScheduleCallback
from lightning_autolr.schedules import Constant
from tests.engine.small import Tiny
from tests.engine.stateful import StatefulLoader
from tests.engine.subjects import NoisyData, differences

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


def fit(folder: Path, callbacks: list[Callback], module: Any, ckpt_path: Any = None, **options: Any) -> Any:
    seed_everything(1, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=callbacks, default_root_dir=folder, max_epochs=10, **quiet, **options)
    train = StatefulLoader(NoisyData(24, jitter=False), 6)
    trainer.fit(module, train, wrong_labels(), ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.filterwarnings("ignore:.* took back")
def test_an_undo_to_before_a_weight_averaging_began(tmp_path: Path) -> None:
    callback = guarded()
    trainer, _ = fit(tmp_path, [callback, averaging()], Plain(), enable_checkpointing=False)
    assert trainer.global_step == 40
    assert callback.summary["undone_steps"] > 20
    assert trainer.optimizers[0].param_groups[0]["swa_lr"] == 1e-2


class Unfreeze(BaseFinetuning):
    """Trains the norm from the third epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.norm, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.norm, optimizer, train_bn=True)


class Finetuned(Tiny):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def often(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="at-{step}", every_n_train_steps=1, save_top_k=-1)


def outcome(trainer: Any, module: Any) -> dict[str, Any]:
    optimizer = trainer.optimizers[0].state_dict()
    trained = {name: weight.requires_grad for name, weight in module.named_parameters()}
    return {"weights": module.state_dict(), "optimizer": optimizer, "trained": trained}


@pytest.mark.filterwarnings("ignore:.* took back")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")
@pytest.mark.parametrize("make", [lambda: (Finetuned(), Unfreeze()), lambda: (Plain(), averaging())])
def test_resumes_where_a_kept_state_is_from_before(tmp_path: Path, make: Any) -> None:
    """A group of the optimizer, or a scheduler, came between the kept state and the checkpoint."""
    module, other = make()
    whole = outcome(*fit(tmp_path, [guarded(), other, often(tmp_path / "all")], module))
    for step in (4, 12, 26, 34):  # at the end of an epoch a weight averaging does not resume alike by itself
        path = tmp_path / "all" / f"at-step={step}.ckpt"
        (saved,) = torch.load(path, weights_only=False)["callbacks"]["ScheduleCallback"]["kept"].values()
        assert len(saved["optimizers"][0]["param_groups"]) == 1
        module, other = make()
        resumed = outcome(*fit(tmp_path, [guarded(), other], module, path, enable_checkpointing=False))
        assert differences(whole, resumed) == [], step


class Exploding(Plain):
    """Its weights are broken from some step on."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step == 18:
            for parameter in self.parameters():
                parameter.grad.fill_(math.inf)  # type: ignore[union-attr]


@pytest.mark.filterwarnings(
    "ignore:.* a training loss was not finite", "ignore:.* took back", "ignore:.* undoes a stage", "ignore:Be aware"
)
@pytest.mark.parametrize("resumes", [False, True])
def test_an_undo_takes_the_average_back_too(tmp_path: Path, resumes: bool) -> None:
    """Otherwise one divergence would break it for good, and the run ends on the average."""
    ema, module = EMAWeightAveraging(decay=0.5), Exploding()
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=15, filename="{step}")
    trainer, module = fit(tmp_path, [guarded(), ema, checkpoint], module)
    if resumes:
        ema = EMAWeightAveraging(decay=0.5)
        trainer, module = fit(tmp_path, [guarded(), ema], Exploding(), ckpt_path=tmp_path / "step=15.ckpt")
    assert trainer.callbacks[0].summary["undone_steps"] > 0
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
