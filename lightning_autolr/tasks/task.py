"""The one LightningModule of all tasks."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from lightning_autolr.tasks.data import Batch

__all__ = ["ClassificationTask"]


class ClassificationTask(LightningModule):
    """A network trained by cross-entropy on (inputs, classes), be it images or the next byte of a text.

    It configures an optimizer and no scheduler: the learning rate is the callbacks' affair. It logs ``train_loss`` at
    steps, and ``val_loss``, ``val_acc``, ``test_loss`` and ``test_acc`` as means over samples.

    Args:
        network: from inputs to logits of shape `(..., num_classes)`.
        num_classes: >= 2.
        optimizer: from parameters to an optimizer. In YAML a ``class_path`` with ``init_args``.

    >>> task = ClassificationTask(nn.Linear(4, 3), num_classes=3)
    >>> task(torch.zeros(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self, network: nn.Module, num_classes: int = 10, optimizer: OptimizerCallable = torch.optim.SGD
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer = optimizer
        self.val_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = _cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate("val", batch, self.val_acc)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate("test", batch, self.test_acc)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Logits of one batch."""
        logits: Tensor = self(batch[0])
        return logits

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())

    def _evaluate(self, split: str, batch: Batch, accuracy: MulticlassAccuracy) -> Tensor:
        inputs, classes = batch
        logits = self(inputs)
        loss = _cross_entropy(logits, classes)
        accuracy.update(logits.flatten(0, -2), classes.flatten())
        self.log(f"{split}_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(inputs))
        self.log(f"{split}_acc", accuracy, prog_bar=True, on_step=False, on_epoch=True)
        return loss


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), classes.flatten())
