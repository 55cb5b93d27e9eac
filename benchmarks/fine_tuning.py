"""Does it train better what is trained already? The table of ``quality.py`` for fine-tuning, with the same options.

    python benchmarks/fine_tuning.py --tuned        # goes on where it stopped
    python benchmarks/fine_tuning.py --table        # only the table of what was run

Networks are trained once (the weights stay in ``runs/pretrained``), and fine-tuned on

- "text": the New Testament, by a Transformer that has read the Old one;
- "little text": 50 kB of it;
- "rotated": clothes turned by 30 degrees, by a ConvNet that knows them upright;
- "other classes": five classes of clothes, by a ConvNet that knows the other five and has a fresh last layer;
- "digits": handwritten digits, by an MLP-Mixer that knows clothes and has a fresh last layer;
- "rotated, mixer": the turned clothes, by that MLP-Mixer, which is worse than chance on them at first;
- "text, low rank" and "rotated, low rank": the weights stay, and corrections of rank 4 to them are trained (LoRA, Hu et al.
  2022, arXiv 2106.09685), of the Transformer and the MLP-Mixer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import quality
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from quality import SGD, AdamW, Task
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.parametrize import register_parametrization
from torchvision.transforms.functional import rotate

from lightning_autolr import ScheduleCallback
from lightning_autolr.schedules import Cosine, Warmup
from lightning_autolr.tasks import (
    ByteTransformer,
    CharLMData,
    ClassificationTask,
    ConvNet,
    DigitsData,
    FashionMNISTData,
    MLPMixer,
)
from lightning_autolr.tasks.data import InMemoryData, Splits, TensorData

ADAM_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
HIGH_GRID = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)  # for AdamW, too
SGD_GRID = (1e-3, 1e-2, 3e-2, 0.1, 0.3)


Change = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # from the tensors of a split to those of the new one


class Part(InMemoryData):
    """Some of the samples of other data, changed."""

    def __init__(self, data: InMemoryData, change: Change) -> None:
        super().__init__(data.batch_size, data.eval_batch_size)
        self.data, self.change = data, change

    def load(self) -> Splits:
        splits = self.data.load()
        parts = (splits.train, splits.val, splits.test)
        return Splits(*(TensorData(*self.change(*p.tensors), transform=p.transform) for p in parts))


def turned(images: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
    return rotate(images, 30), classes


def only(wanted: range) -> Change:
    def change(images: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        kept = (classes >= wanted.start) & (classes < wanted.stop)
        return images[kept], classes[kept] - wanted.start

    return change


def enlarged(images: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
    return interpolate(images, size=28, mode="bilinear"), classes


class Testament(CharLMData):
    """The Old or the New Testament; the end of each is for validation and test."""

    def __init__(self, is_new: bool, num_train: int | None = None) -> None:
        super().__init__(batch_size=16, context=32)
        self.is_new, self.num_train = is_new, num_train

    def load(self) -> Splits:
        whole = super().load()
        inputs = torch.cat([part.tensors[0] for part in (whole.train, whole.val, whole.test)])
        old, num_val, num_test = int(0.7706 * len(inputs)), 600, 2400  # where Matthew begins
        pieces = inputs[old:] if self.is_new else inputs[:old]
        num_train = len(pieces) - num_val - num_test
        train, val, test = torch.split(pieces, [num_train, num_val, num_test])
        parts = (train[: self.num_train], val, test)
        return Splits(*(TensorData(p, transform=whole.train.transform) for p in parts))


def clothes(num_train: int) -> FashionMNISTData:
    return FashionMNISTData(num_train=num_train, num_val=1000)


def transformer() -> nn.Module:
    return ByteTransformer(width=48, context=32, depth=2)


def conv_net() -> nn.Module:
    return ConvNet(widths=(8, 16), batch_norm=True)


def mixer() -> nn.Module:
    return MLPMixer(28, width=24, depth=2)


# What is trained beforehand: the network, on what, with which optimizer, peak learning rate and steps.
BEFORE: dict[str, tuple[Callable[[], nn.Module], Callable[[], LightningDataModule], Any, float, int]] = {
    "transformer": (transformer, lambda: Testament(is_new=False), AdamW, 1e-2, 5000),
    "conv-net": (conv_net, lambda: clothes(10_000), SGD, 0.3, 3000),
    "conv-net-of-five": (conv_net, lambda: Part(clothes(10_000), only(range(5))), SGD, 0.3, 3000),
    "mixer": (mixer, lambda: clothes(10_000), AdamW, 1e-2, 4000),
}


def trained(name: str, fresh_head: bool = False) -> nn.Module:
    """The network ``name`` of ``BEFORE``; trained now if it never was. Random numbers go on as if nothing had happened."""
    make, data, optimizer, lr, steps = BEFORE[name]
    path = Path("runs/pretrained", f"{name}.pt")
    random_state = torch.random.get_rng_state()
    if not path.exists():
        seed_everything(1000, verbose=False)
        module = ClassificationTask(make(), num_classes=256, optimizer=partial(optimizer, lr=lr))
        callbacks: list[Any] = [ScheduleCallback(Warmup(Cosine(), 0.05))]
        quiet_trainer(path.parent / name, steps, callbacks=callbacks).fit(module, data())
        torch.save(module.network.state_dict(), path)
    network = make()
    network.load_state_dict(torch.load(path))
    torch.random.set_rng_state(random_state)
    if fresh_head:
        [m for m in network.modules() if isinstance(m, nn.Linear)][-1].reset_parameters()
    return network


class LowRank(nn.Module):
    """A weight of two axes and the trained correction to it; 0 at first."""

    def __init__(self, weight: Tensor, rank: int = 4) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2 * (self.up @ self.down)


def low_rank(network: nn.Module) -> nn.Module:
    """Nothing of it is trained but corrections to the weights of its linear and attention layers."""
    network.requires_grad_(False)
    for module in list(network.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(module, (nn.Linear, nn.MultiheadAttention)) and weight.ndim == 2:
                register_parametrization(module, name, LowRank(weight))
    return network


TASKS = {
    "text": Task(
        lambda: trained("transformer"), lambda: Testament(is_new=True), AdamW, ADAM_GRID, 1000, num_classes=256
    ),
    "little text": Task(
        lambda: trained("transformer"), lambda: Testament(True, 1600), AdamW, ADAM_GRID, 1000, num_classes=256
    ),
    "rotated": Task(lambda: trained("conv-net"), lambda: Part(clothes(4000), turned), SGD, SGD_GRID, 1000),
    "other classes": Task(
        lambda: trained("conv-net-of-five", fresh_head=True),
        lambda: Part(clothes(2000), only(range(5, 10))),
        SGD,
        SGD_GRID,
        1000,
    ),
    "digits": Task(
        lambda: trained("mixer", fresh_head=True), lambda: Part(DigitsData(), enlarged), AdamW, ADAM_GRID, 1000
    ),
    "rotated, mixer": Task(lambda: trained("mixer"), lambda: Part(clothes(4000), turned), AdamW, HIGH_GRID, 1000),
    "text, low rank": Task(
        lambda: low_rank(trained("transformer")),
        lambda: Testament(is_new=True),
        AdamW,
        HIGH_GRID,
        1000,
        num_classes=256,
    ),
    "rotated, low rank": Task(
        lambda: low_rank(trained("mixer")), lambda: Part(clothes(4000), turned), AdamW, HIGH_GRID, 1000
    ),
}


if __name__ == "__main__":
    quality.main(__doc__ or "", TASKS, Path("benchmarks/results/fine-tuning.jsonl"), Path("runs/fine-tuning"))
