"""A loss that is not finite, and what the user is told of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lightning_autolr import AutoLRSCallback
from tests.engine.small import Stages, Tiny, fit_tiny
from tests.engine.subjects import Search


class Survives(Tiny):
    """A loss is NaN now and then, and the gradients are cleaned."""

    def __init__(self, at: int, every: int) -> None:
        super().__init__()
        self.at, self.every, self.count = at, every, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count += 1
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.count % self.every == self.at else loss

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0)


@pytest.mark.filterwarnings("ignore:.* took back")
@pytest.mark.parametrize(
    ("at", "every", "message"),
    [(3, 7, "not finite, in step 3 of a candidate at learning rate"), (30, 100, "not finite, in step 30. ")],
)
def test_is_said_once(at: int, every: int, message: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=message) as said:
        fit_tiny(tmp_path, [AutoLRSCallback(figures=False)], Survives(at, every), max_steps=60)
    assert sum("was not finite" in str(w.message) for w in said) == 1


def test_a_candidate_that_blows_up_is_nothing_to_warn_of(tmp_path: Path) -> None:
    search = Search(Stages(lrs=(1e38, 0.1), probe_steps=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit_tiny(tmp_path, [search])
    assert search.trace[0].answer.status == "diverged"  # type: ignore[union-attr]
