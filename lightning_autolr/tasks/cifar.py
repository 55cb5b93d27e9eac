"""CIFAR-10: 60,000 colour photographs of 32x32 pixels, ten classes (Krizhevsky, 2009)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import CIFAR10

from lightning_autolr.tasks.data import Batch, InMemoryData, Splits, TensorData, hold_out

__all__ = ["CIFAR10Data"]

_NUM_TRAIN = 50_000
_MEAN = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
_STD = torch.tensor([0.2470, 0.2435, 0.2616])[:, None, None]


class CIFAR10Data(InMemoryData):
    """Validation images are taken from the official training set; the official test set is the test set.

    Args:
        batch_size: see :class:`~lightning_autolr.tasks.data.InMemoryData`.
        eval_batch_size: see there.
        root: folder of torchvision's copy.
        download: fetch it with torchvision when it is not there.
        fake_data: noise of the right shapes in place of the data, to try a configuration without a download.
        augment: shift training images by up to 4 pixels and mirror half of them.
        num_train: training images, or None for all that are left by ``num_val``.
        num_val: validation images, 1 ... 49,999.
        split_seed: which images are for validation, and which for training when ``num_train`` is given.
    """

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        root: str = "data",
        download: bool = False,
        fake_data: bool = False,
        augment: bool = True,
        num_train: int | None = None,
        num_val: int = 5_000,
        split_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size)
        self.root = root
        self.download = download
        self.fake_data = fake_data
        self.augment = augment
        self._train, self._val = hold_out(_NUM_TRAIN, num_train, num_val, split_seed)

    def prepare_data(self) -> None:
        if self.download and not self.fake_data:
            CIFAR10(self.root, download=True)

    def load(self) -> Splits:
        transform = partial(_prepare, augment=self.augment)
        if self.fake_data:
            return Splits(
                TensorData(*_noise(512, seed=0), transform=transform),
                TensorData(*_noise(256, seed=1), transform=_prepare),
                TensorData(*_noise(256, seed=2), transform=_prepare),
            )
        images, labels = _read(self.root, train=True)
        return Splits(
            TensorData(images[self._train], labels[self._train], transform=transform),
            TensorData(images[self._val], labels[self._val], transform=_prepare),
            TensorData(*_read(self.root, train=False), transform=_prepare),
        )


def _read(root: str, train: bool) -> tuple[Tensor, Tensor]:
    try:
        data = CIFAR10(root, train=train)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"Expected CIFAR-10 in {root!r}, got none: set `download: true`, or `root` to torchvision's copy of it, "
            "or `fake_data: true` to try the configuration on noise."
        ) from error
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


def _noise(num: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 10, (num,), generator=generator)


def _prepare(images: Tensor, labels: Tensor, augment: bool = False) -> Batch:
    """Bytes to floats with mean 0 and deviation 1, shifted and mirrored where asked for."""
    values = (images / 255 - _MEAN) / _STD
    return (_mirror(_shift(values, 4)) if augment else values), labels


def _shift(images: Tensor, reach: int) -> Tensor:
    """Move each image by its own -reach ... reach pixels in both directions, with zeros (the mean) behind it."""
    num, _, height, width = images.shape
    rows = torch.randint(2 * reach + 1, (num, 1)) + torch.arange(height)
    columns = torch.randint(2 * reach + 1, (num, 1)) + torch.arange(width)
    padded = F.pad(images, (reach,) * 4).permute(0, 2, 3, 1)
    return padded[torch.arange(num)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _mirror(images: Tensor) -> Tensor:
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
