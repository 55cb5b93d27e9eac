"""A small data loader that goes on in mid-epoch, as torchdata's does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader


class StatefulLoader(DataLoader):
    """Shuffles by a generator of its own for each epoch; its state is the epoch and the batches given out in it."""

    def __init__(self, dataset: Any, batch_size: int) -> None:
        super().__init__(dataset, batch_size=batch_size, shuffle=True, generator=torch.Generator())
        self.epoch = 0
        self.given = 0

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.__dict__.get("skip", 0), 0
        self.given = skip
        self.generator.manual_seed(100 + self.epoch)
        for number, batch in enumerate(super().__iter__()):
            if number < skip:
                continue
            self.given += 1
            if self.given == len(self):
                self.epoch, self.given = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.skip = state["epoch"], state["given"]
