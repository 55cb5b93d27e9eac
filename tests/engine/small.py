"""A tiny fit for tests that need a Trainer but no particular module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_autolr.core.requests import Probe, ProbeResult, Requests, Run, Train
from lightning_autolr.search.base import AbstractSearch
from tests.engine.subjects import NoisyData


class Tiny(LightningModule):
    """One linear layer under batch norm."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.layer = nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self.layer(self.norm(batch[0])), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


@dataclass(frozen=True)
class Stages(AbstractSearch):
    """Stages of a few steps; before each, one probe per learning rate, and the best one is trained with."""

    lrs: tuple[float, ...] = (0.1, 0.01)
    num_stages: int = 2
    probe_steps: int = 2
    num_steps: int = 3
    evaluate: str = "validation"

    def requests(self, run: Run) -> Requests:
        for stage in range(self.num_stages):
            answers: dict[float, ProbeResult] = {}
            for lr in self.lrs:
                answers[lr] = yield Probe(lr, self.probe_steps, draw=stage, evaluate=self.evaluate, stage=stage)
            yield Train(min(answers, key=lambda lr: answers[lr].loss), self.num_steps, stage=stage)


def loader(size: int = 24, shuffle: bool = True) -> DataLoader:
    return DataLoader(NoisyData(size, jitter=False), batch_size=6, shuffle=shuffle)


def fit_tiny(
    folder: Path, callbacks: Sequence[Callback], module: LightningModule | None = None, train: Any = None,
    val: Any = None, **options: Any,
) -> tuple[Trainer, Any]:  # fmt: skip
    """Six steps, quiet and on the CPU, unless told otherwise."""
    seed_everything(1, verbose=False)
    defaults = {"max_steps": 6, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings = {**defaults, "enable_progress_bar": False, "enable_model_summary": False, **options}
    trainer = Trainer(callbacks=list(callbacks), default_root_dir=folder, **settings)
    module = Tiny() if module is None else module
    trainer.fit(module, loader() if train is None else train, loader(12, False) if val is None else val or None)
    return trainer, module
