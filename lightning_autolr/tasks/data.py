"""Data that fits in memory, one indexing operation per batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["Batch", "InMemoryData", "Splits", "TensorData", "hold_out", "permutation"]

Batch = tuple[Tensor, ...]


class TensorData(Dataset[Batch]):
    """Tensors with one first axis, `(n, ...)`, of which a whole batch is taken by one indexing operation.

    A :class:`~torch.utils.data.TensorDataset` takes samples one by one and stacks them, which costs more than a
    training step of a small network. Samplers are the ordinary ones, so that Lightning can put distributed ones there.

    Args:
        tensors: at least one; the first axes have equal lengths.
        transform: from a batch as stored to a batch as trained on, such as integers to normalised floats.

    >>> data = TensorData(torch.arange(5), torch.arange(5) * 10)
    >>> data[3]
    (tensor(3), tensor(30))
    >>> data.__getitems__([0, 4])
    (tensor([0, 4]), tensor([ 0, 40]))
    """

    def __init__(self, *tensors: Tensor, transform: Callable[..., Batch] | None = None) -> None:
        if not tensors or len({len(t) for t in tensors}) != 1:
            raise ValueError(
                f"Expected at least one tensor, all of one length, got {[tuple(t.shape) for t in tensors]}."
            )
        self.tensors = tensors
        self.transform = transform

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Batch:
        return tuple(t[0] for t in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The whole batch; what :class:`~torch.utils.data.DataLoader` calls when a data set has it."""
        rows = torch.as_tensor(indices)
        batch = tuple(t[rows] for t in self.tensors)
        return batch if self.transform is None else self.transform(*batch)


@dataclass(frozen=True)
class Splits:
    """What is trained on, what decisions are made on, and what results are reported on."""

    train: TensorData
    val: TensorData
    test: TensorData


class InMemoryData(LightningDataModule, ABC):
    """A LightningDataModule whose :meth:`load` says all.

    Training batches are shuffled and have equal sizes (a smaller last one is left out); evaluation is in order. Memory
    is pinned when the Trainer runs on CUDA. No worker processes: fetching is cheaper than handing over.

    Args:
        batch_size: samples in a training batch, >= 1.
        eval_batch_size: samples in a batch of validation, test and prediction, >= 1.
    """

    def __init__(self, batch_size: int = 64, eval_batch_size: int = 500) -> None:
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1:
            raise ValueError(f"Expected batch_size and eval_batch_size >= 1, got {batch_size=} and {eval_batch_size=}.")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.splits: Splits | None = None

    @abstractmethod
    def load(self) -> Splits:
        """Read the data. Called once in each process, equal in all."""

    def setup(self, stage: str | None = None) -> None:
        if self.splits is not None:
            return
        self.splits = self.load()
        if len(self.splits.train) < self.batch_size:
            raise ValueError(
                f"Expected batch_size <= {len(self.splits.train)} training samples, got batch_size={self.batch_size!r}."
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self._loaded.train, self.batch_size, train=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self._loaded.val, self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self._loaded.test, self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.test_dataloader()

    @property
    def _loaded(self) -> Splits:
        if self.splits is None:
            raise RuntimeError("Expected the data to be loaded, got none: call setup() first.")
        return self.splits

    def _loader(self, data: TensorData, batch_size: int, train: bool = False) -> DataLoader[Batch]:
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            data,
            batch_size=batch_size,  # by name, or Lightning cannot rebuild the loader
            shuffle=train,
            drop_last=train,
            pin_memory=on_cuda,
            collate_fn=_as_is,
        )


def permutation(num: int, seed: int) -> Tensor:
    """The order in which samples are dealt out to the splits: a fixed one for each seed, whatever else is random."""
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed))


def hold_out(num: int, num_train: int | None, num_val: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which of ``num`` samples are for training, and which for validation; None takes all that the other leaves.

    >>> [len(rows) for rows in hold_out(10, None, 3, seed=0)]
    [7, 3]
    """
    size = num - num_val if num_train is None else num_train
    if num_val < 1 or not 1 <= size <= num - num_val:
        raise ValueError(
            f"Expected num_train and num_val >= 1 with a sum of at most {num}, got {num_train=}, {num_val=}."
        )
    order = permutation(num, seed)
    return order[num_val : num_val + size], order[:num_val]


def _as_is(batch: Any) -> Any:
    return batch
