"""How many steps a search believes the run to have, and what is said when that cannot be kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch.utils.data import DataLoader, IterableDataset

from lightning_autolr import AutoLRSCallback, ScheduleCallback
from lightning_autolr.core.requests import Run
from lightning_autolr.schedules import Linear
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.fixed import Fixed
from tests.engine.small import Tiny, fit_tiny, loader
from tests.engine.test_unknown_end import Lrs


class Told(ScheduleCallback):
    """A linear schedule, and what the search was told of the run."""

    def __init__(self, **options: Any) -> None:
        super().__init__(Linear(), **options)
        self.runs: list[Run] = []

    def make_search(self, run: Run) -> AbstractSearch:
        self.runs.append(run)
        return Fixed(Linear().stretched(run.total_steps or 10))


class Stream(IterableDataset):
    """Batches without a length."""

    def __iter__(self) -> Iterator[Any]:
        yield from loader()


def total(folder: Path, *callbacks: Callback, train: Any = None, **options: Any) -> int | None:
    told = Told()
    fit_tiny(folder, [told, *callbacks], train=train, **{"max_steps": -1, **options})
    return told.runs[-1].total_steps


def test_epochs_of_unknown_length_have_no_known_end(tmp_path: Path) -> None:
    stream = DataLoader(Stream(), batch_size=None)
    assert total(tmp_path, train=stream, max_epochs=2) is None
    assert total(tmp_path, train=stream, max_epochs=2, max_steps=7) == 7
    callback, seen = AutoLRSCallback(figures=False), Lrs()
    fit_tiny(tmp_path, [callback, seen], train=stream, max_steps=-1, max_epochs=2)
    assert len(set(seen.lrs)) == 1  # held
    assert seen.lrs[0] > 1e-4


def test_an_accumulation_that_changes(tmp_path: Path) -> None:
    # four batches an epoch
    assert total(tmp_path, GradientAccumulationScheduler({0: 1, 1: 2, 3: 3}), max_epochs=4) == 4 + 2 + 2 + 2
    assert total(tmp_path, GradientAccumulationScheduler({0: 1, 1: 2}), max_epochs=4, max_steps=5) == 5
    seen = Lrs()
    fit_tiny(tmp_path, [Told(), GradientAccumulationScheduler({1: 4}), seen], max_steps=-1, max_epochs=4)
    # 4 steps in the first epoch, one in each other; the last step's learning rate is the last of 7
    assert seen.lrs[-1] == pytest.approx(0.05 / 7)


def test_steps_made_before_a_plain_checkpoint_are_gone(tmp_path: Path) -> None:
    trainer, _ = fit_tiny(tmp_path, [], enable_checkpointing=True, max_steps=4)
    path = tmp_path / "plain.ckpt"
    trainer.save_checkpoint(path)
    told, seen = Told(), Lrs()
    fit_tiny(tmp_path, [told, seen], max_steps=4)
    assert told.runs[-1].total_steps == 4
    told, seen = Told(), Lrs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _fit_from(tmp_path, path, [told, seen], max_steps=10)
    assert told.runs[-1].total_steps == 6
    assert len(seen.lrs) == 6
    assert seen.lrs[-1] == pytest.approx(0.05 / 6)


def test_a_second_fit_has_its_own_steps(tmp_path: Path) -> None:
    told, seen = Told(), Lrs()
    trainer, module = fit_tiny(tmp_path, [told, seen], max_steps=4)
    trainer.fit_loop.epoch_loop.max_steps = 10
    trainer.fit(module, loader(), loader(12, False))
    assert [run.total_steps for run in told.runs] == [4, 6]
    assert seen.lrs[-1] == pytest.approx(seen.lrs[4] / 6)


def test_a_resumed_run_is_as_long_as_it_was(tmp_path: Path) -> None:
    trainer, _ = fit_tiny(tmp_path, [], enable_checkpointing=True, max_steps=4)
    plain = tmp_path / "plain.ckpt"
    trainer.save_checkpoint(plain)
    saver = ModelCheckpoint(tmp_path / "saved", filename="at-{step}", every_n_train_steps=4, save_top_k=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, module = _fit_from(tmp_path, plain, [Told(), saver], max_steps=12, enable_checkpointing=True)
        told = Told()
        _, resumed = _fit_from(tmp_path, tmp_path / "saved" / "at-step=8.ckpt", [told], max_steps=12)
    assert told.runs[-1].total_steps == 8  # 4 steps were made before the callback came
    for a, b in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_says_that_time_may_end_a_planned_run(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"plans for 6 steps. Should `max_time`"):
        fit_tiny(tmp_path, [AutoLRSCallback(figures=False)], max_time=timedelta(hours=1))


def test_says_that_an_earlier_end_is_not_annealed(tmp_path: Path) -> None:
    callback = AutoLRSCallback(figures=False)
    with pytest.warns(UserWarning, match="planned for 40 steps and does not anneal anew"):
        fit_tiny(tmp_path, [callback, Lrs(20, lambda: callback.finish_in(5))], max_steps=40)
    assert sum(s.num_steps for s in callback.schedule) == 25


class Manual(Tiny):
    """Steps in every n-th batch, its second optimizer (if it has two) in every m-th."""

    def __init__(self, *every: int) -> None:
        super().__init__()
        self.every = every
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.count = getattr(self, "count", 0) + 1
        optimizers = self.optimizers() if len(self.every) > 1 else [self.optimizers()]
        for every, optimizer in zip(self.every, optimizers, strict=True):
            if self.count % every == 0:
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.layer, self.norm)][: len(self.every)]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Manual(4),
            r"plans for 10 batches, .* 20 steps in the first 20 batches, got 5. The run will end after about 40",
        ),
        (Manual(1, 5), "40 steps in the first 20 batches, got 24"),
        (Manual(50), "got 0. The run will end later"),
    ],
)
def test_says_that_optimizers_step_otherwise_than_planned(module: Manual, message: str, tmp_path: Path) -> None:
    limit = {1: 10, 2: 60}[len(module.every)]
    with pytest.warns(UserWarning, match=message):
        fit_tiny(tmp_path, [Told(), StopAt(30)], module, max_steps=limit, max_epochs=-1)


@pytest.mark.parametrize(
    ("every", "told", "options"),
    [
        ((1,), {}, {"max_steps": 25, "max_epochs": -1}),
        ((1, 1), {}, {"max_steps": 51, "max_epochs": -1}),
        ((4,), {"total_steps": 24}, {"max_steps": 6, "max_epochs": -1}),
        ((4,), {}, {"max_steps": -1, "max_epochs": 6}),
        ((4,), {}, {"max_steps": 100, "max_epochs": 6}),
    ],
)
def test_says_nothing_where_the_plan_is_right(
    every: tuple[int, ...], told: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    seen = Lrs()
    fit_tiny(tmp_path, [Told(**told), seen], Manual(*every), **options)  # a warning would be an error
    assert len(seen.lrs) >= 24


class StopAt(Callback):
    """Ends the run after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.left -= 1
        trainer.should_stop = trainer.should_stop or self.left <= 0


def _fit_from(folder: Path, path: Path, callbacks: list[Callback], **options: Any) -> tuple[Any, Any]:
    seed_everything(1, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "enable_checkpointing": False, **quiet, **options}
    trainer, module = Trainer(callbacks=callbacks, default_root_dir=folder, **settings), Tiny()
    trainer.fit(module, loader(shuffle=False), loader(12, False), ckpt_path=path)
    return trainer, module


class Averages(Callback):
    """The weights when the epoch begins that a weight averaging adds: the averaged ones."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 10:
            self.weights = [w.detach().clone() for w in module.parameters()]


def test_the_epoch_that_a_weight_averaging_adds_is_not_planned_for(tmp_path: Path) -> None:
    """Its one step has no backward, and no ratchet takes the averaged weights back."""
    for options in ({"max_epochs": 10}, {"max_epochs": 10, "max_steps": 30}):
        length = total(tmp_path, StochasticWeightAveraging(1e-2), **options)
        assert length == options.get("max_steps", 40)
    averages, callback = Averages(), ScheduleCallback(Linear(), ratchet=True, figures=False)
    averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=0.5)
    trainer, module = fit_tiny(tmp_path, [callback, averaging, averages], max_steps=-1, max_epochs=10)
    assert trainer.global_step == 41
    for averaged, weight in zip(averages.weights, module.parameters(), strict=True):
        assert torch.allclose(averaged, weight, atol=1e-2)
