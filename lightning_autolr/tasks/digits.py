"""Handwritten digits of 8x8 pixels: the default task, part of scikit-learn, trained in a minute without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_autolr.tasks.data import InMemoryData, Splits, TensorData, permutation

__all__ = ["DigitsData"]

_SIZE = 1797


class DigitsData(InMemoryData):
    """The 1,797 images of :func:`sklearn.datasets.load_digits`, one channel, scaled to mean 0 and deviation 1.

    Args:
        batch_size: see :class:`~lightning_autolr.tasks.data.InMemoryData`.
        eval_batch_size: see there.
        num_val: validation images, >= 1.
        num_test: test images, >= 1; the rest is for training.
        label_noise: share of the *training* labels, in [0, 1], that are replaced by another class, so that a network
            can overfit.
        split_seed: which images go where, and which labels are wrong.
    """

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int = 500,
        num_val: int = 300,
        num_test: int = 400,
        label_noise: float = 0.0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size)
        if num_val < 1 or num_test < 1 or num_val + num_test >= _SIZE:
            raise ValueError(
                f"Expected num_val and num_test >= 1 with a sum below {_SIZE}, got {num_val=} and {num_test=}."
            )
        if not 0 <= label_noise <= 1:
            raise ValueError(f"Expected 0 <= label_noise <= 1, got {label_noise=}.")
        self.num_val = num_val
        self.num_test = num_test
        self.label_noise = label_noise
        self.split_seed = split_seed

    def load(self) -> Splits:
        images, labels = _read()
        val, test, train = torch.split(
            permutation(_SIZE, self.split_seed), [self.num_val, self.num_test, _SIZE - self.num_val - self.num_test]
        )
        noisy = _with_noise(labels[train], self.label_noise, self.split_seed)
        return Splits(
            TensorData(images[train], noisy),
            TensorData(images[val], labels[val]),
            TensorData(images[test], labels[test]),
        )


def _read() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "Expected scikit-learn, which carries the digits, got none: pip install 'lightning-autolr[cli]'."
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return (images - images.mean()) / images.std(), torch.as_tensor(labels, dtype=torch.long)


def _with_noise(labels: Tensor, share: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return labels
