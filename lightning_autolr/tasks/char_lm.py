"""Language modelling on the bytes of one text."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_autolr.tasks.data import Batch, InMemoryData, Splits, TensorData

__all__ = ["CharLMData"]


class CharLMData(InMemoryData):
    """A text cut into pieces of ``context`` bytes; the target of each byte is the one after it.

    Splits are by position: the beginning is for training, what follows for validation, the end for the test. The text
    is the file at ``path``, or else what Debian's ``bible`` prints (packages ``bible-kjv`` and ``bible-kjv-text``: 4 MB
    of English).

    Args:
        batch_size: pieces in a training batch, see :class:`~lightning_autolr.tasks.data.InMemoryData`.
        eval_batch_size: see there.
        path: a text file, or None.
        context: bytes in a piece, >= 1.
        num_bytes: use so many bytes of the text, or None for all of it.
        val_fraction: share of the text for validation, in (0, 1).
        test_fraction: share of the text for the test, in (0, 1).
    """

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        path: str | None = None,
        context: int = 128,
        num_bytes: int | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
    ) -> None:
        super().__init__(batch_size, eval_batch_size)
        if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                f"Expected val_fraction and test_fraction > 0 of sum < 1, got {val_fraction=}, {test_fraction=}."
            )
        if context < 1 or (num_bytes is not None and num_bytes < 1):
            raise ValueError(f"Expected context and num_bytes >= 1, got {context=} and {num_bytes=}.")
        self.path = path
        self.context = context
        self.num_bytes = num_bytes
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def load(self) -> Splits:
        text = (_bible() if self.path is None else Path(self.path).read_bytes())[: self.num_bytes]
        num_val, num_test = round(self.val_fraction * len(text)), round(self.test_fraction * len(text))
        num_train = len(text) - num_val - num_test
        if min(num_train, num_val, num_test) <= self.context:
            raise ValueError(
                f"Expected every split to be longer than context={self.context!r}, got {num_train}, {num_val} and {num_test} "
                "bytes: use a longer text or a shorter context."
            )
        data = torch.from_numpy(np.frombuffer(text, np.uint8).copy())
        # Each piece overlaps the next one by one byte, which is a target in the one and an input in the other.
        pieces = (
            part.unfold(0, self.context + 1, self.context) for part in torch.split(data, [num_train, num_val, num_test])
        )
        return Splits(*(TensorData(p, transform=_next_byte) for p in pieces))


def _next_byte(pieces: Tensor) -> Batch:
    pieces = pieces.long()
    return pieces[:, :-1], pieces[:, 1:]


def _bible() -> bytes:
    program = shutil.which("bible")
    if program is None:
        raise FileNotFoundError(
            "Expected a text, got none: set `path` to a text file, or install Debian's bible-kjv and bible-kjv-text."
        )
    text = subprocess.run([program, "-l100000", "gen1:1-rev22:21"], check=True, capture_output=True, text=True).stdout
    return re.sub(r"^ +\d+ ", "", text, flags=re.MULTILINE).encode()  # without the numbers of the verses
