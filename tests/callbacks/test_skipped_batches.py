"""`training_step` may return None: the Trainer counts a step, and nothing is learnt."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from lightning_autolr import (
    AutoWUCallback,
    BeamSearchCallback,
    FactorSearchCallback,
    GradNormCallback,
    RefinedScheduleCallback,
    SearchCallback,
)
from lightning_autolr.core.refine import refine_schedule
from lightning_autolr.core.requests import Probe, Requests, Run, Train
from lightning_autolr.search.base import AbstractSearch
from tests.engine.small import Tiny, fit_tiny, loader

pytestmark = pytest.mark.filterwarnings("ignore:.training_step. returned .None.")


class Skips(Tiny):
    """Leaves out every fifth batch of an epoch of ten."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 5 == 4 else super().training_step(batch, batch_idx)


class Accumulates(Tiny):
    """Steps by hand, once in five batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, optimizer = self.loss(batch), self.optimizers()
        self.manual_backward(loss)
        if batch_idx % 5 == 4:
            optimizer.step()
            optimizer.zero_grad()
        return loss


class Rates(Callback):
    """The learning rate of each batch."""

    def __init__(self) -> None:
        self.lrs: list[float] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.lrs.append(float(trainer.optimizers[0].param_groups[0]["lr"]))


def fit(folder: Path, module: Tiny, callback: Callback, **options: int) -> list[float]:
    rates = Rates()
    fit_tiny(folder, [callback, rates], module, loader(60), **{"max_steps": 100, **options})
    return rates.lrs


@dataclass(frozen=True)
class OneProbe(AbstractSearch):
    def requests(self, run: Run) -> Requests:
        yield Probe(0.1, 12, evaluate="none")


def test_a_probe_says_which_steps_gave_no_loss(tmp_path: Path) -> None:
    callback = SearchCallback(figures=False)
    callback.search = OneProbe()
    fit(tmp_path, Skips(), callback, max_steps=1)
    answer = callback.trace[0].answer
    assert answer.skipped == (4, 9)
    assert answer.loss_steps == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11]
    assert answer.num_steps == 12


@pytest.mark.parametrize("ratchet", [False, True])
def test_autowu_counts_the_steps_and_decays_to_the_end(ratchet: bool, tmp_path: Path) -> None:
    """At 100 steps a piece of the climb is one or two of them, some of which give no loss at all."""
    callback = AutoWUCallback(figures=False, guard=None, test_every=1, ratchet=ratchet)
    lrs = fit(tmp_path, Skips(), callback)
    climb = [e for e in callback.trace if isinstance(e.request, Train) and e.request.kind == "climb"]
    steps = sum(e.answer.num_steps for e in climb)
    assert steps > sum(len(e.answer.losses) for e in climb)
    assert len(lrs) == 100
    assert all(a < b for a, b in itertools.pairwise(lrs[:steps]))
    assert lrs[-1] < 0.01 * max(lrs)


def test_a_refined_schedule_ends_at_zero(tmp_path: Path) -> None:
    for module in (Skips(), Accumulates()):
        lrs = fit(tmp_path, module, RefinedScheduleCallback(peak_lr=0.1), max_steps=-1, max_epochs=12)
        assert len(lrs) == 120
        assert lrs[-1] == 0


def test_there_is_a_norm_for_each_step(tmp_path: Path) -> None:
    callback = GradNormCallback()
    fit(tmp_path, Skips(), callback)
    assert [i for i, norm in enumerate(callback.norms) if math.isnan(norm)] == list(range(4, 100, 5))
    assert refine_schedule(callback.norms).length == 100


class SkipsByData(Tiny):
    """Leaves out a sixth of the batches, wherever they come."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if float(batch[0][0, 0]) > 1.0 else super().training_step(batch, batch_idx)


class SkipsAll(Tiny):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None


@pytest.mark.parametrize(
    "make",
    [
        partial(BeamSearchCallback, interval=10, objective="holdout", eval_batches=4),
        partial(FactorSearchCallback, every=10),
        partial(FactorSearchCallback, every=10, evaluate_on="same"),
    ],
)
def test_they_are_left_out_of_scores(make: Any, tmp_path: Path) -> None:
    assert len(fit(tmp_path, SkipsByData(), make(figures=False), max_steps=50)) == 50
    with pytest.raises(ValueError, match=r"a loss .*got n"):
        fit(tmp_path, SkipsAll(), make(figures=False), max_steps=50)
