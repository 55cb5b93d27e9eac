"""Fashion-MNIST: 70,000 pictures of clothes, 28x28 pixels, ten classes (Xiao, Rasul and Vollgraf, 2017)."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import FashionMNIST

from lightning_autolr.tasks.data import Batch, InMemoryData, Splits, TensorData, hold_out

__all__ = ["FashionMNISTData"]

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # the package dataset-fashion-mnist
_NUM_TRAIN = 60_000


class FashionMNISTData(InMemoryData):
    """Validation images are taken from the official training set; the official test set is the test set.

    The four ``.gz`` files are looked for in ``root``, below it where torchvision puts them, and where Debian's package
    ``dataset-fashion-mnist`` has them.

    Args:
        batch_size: see :class:`~lightning_autolr.tasks.data.InMemoryData`.
        eval_batch_size: see there.
        root: folder to look in first, and to download to.
        download: fetch the files with torchvision when they are nowhere.
        num_train: training images, or None for all that are left by ``num_val``.
        num_val: validation images, 1 ... 59,999.
        split_seed: which images are for validation, and which for training when ``num_train`` is given.
    """

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        root: str = "data",
        download: bool = False,
        num_train: int | None = None,
        num_val: int = 5_000,
        split_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size)
        self.root = root
        self.download = download
        self._train, self._val = hold_out(_NUM_TRAIN, num_train, num_val, split_seed)

    def prepare_data(self) -> None:
        if self.download and self._folder() is None:
            FashionMNIST(self.root, download=True)

    def load(self) -> Splits:
        folder = self._folder()
        if folder is None:
            raise FileNotFoundError(
                f"Expected Fashion-MNIST's .gz files in one of {[str(f) for f in self._candidates()]}, got none: "
                "install Debian's dataset-fashion-mnist, or set `download: true`, or `root` to the folder with them."
            )
        images, labels = _read(folder, "train")
        return Splits(
            TensorData(images[self._train], labels[self._train], transform=_normalise),
            TensorData(images[self._val], labels[self._val], transform=_normalise),
            TensorData(*_read(folder, "t10k"), transform=_normalise),
        )

    def _candidates(self) -> tuple[Path, ...]:
        return Path(self.root), Path(self.root, "FashionMNIST", "raw"), _DEBIAN

    def _folder(self) -> Path | None:
        return next((f for f in self._candidates() if (f / "train-images-idx3-ubyte.gz").is_file()), None)


def _read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = _read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    return images[:, None], labels.long()


def _read_idx(path: Path) -> Tensor:
    """Read an IDX file of bytes: two zeros, the type (8), the number of axes, their lengths then the values."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"Expected {path} to begin with 00 00 08 (an IDX file of bytes), got {raw[:3].hex(' ')}.")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    return torch.from_numpy(values.reshape(shape).copy())


def _normalise(images: Tensor, labels: Tensor) -> Batch:
    """Bytes to floats with the training set's mean 0 and deviation 1."""
    return (images / 255 - 0.2860) / 0.3530, labels
