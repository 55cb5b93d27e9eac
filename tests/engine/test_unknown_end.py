"""Runs whose length nobody knows beforehand: held, then annealed once the end is known."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Timer

from lightning_autolr import AutoLRSCallback
from lightning_autolr.core.requests import Train
from tests.engine.small import fit_tiny

OPTIONS: dict[str, Any] = {"num_candidates": 2, "search_budget": 0.1, "ratchet": False}
NO_END: dict[str, Any] = {"max_steps": -1, "max_epochs": -1}


class Lrs(Callback):
    """The learning rate of every step, and what to do at one of them."""

    def __init__(self, at: int = -1, then: Any = None) -> None:
        self.at, self.then, self.lrs = at, then, list[float]()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])
        if trainer.global_step == self.at:
            self.then()


class StepClock(Timer):
    """Time that is counted in steps: one second each."""

    def __init__(self, steps: int) -> None:
        super().__init__(timedelta(seconds=steps))
        self.steps, self.trainer = steps, None

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        self.trainer = trainer

    def time_remaining(self, stage: Any = None) -> float:
        return self.steps - self.trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def test_the_end_on_request(tmp_path: Path) -> None:
    callback = AutoLRSCallback(tau=50, **OPTIONS)
    seen = Lrs(20, lambda: callback.finish_in(30))
    fit_tiny(tmp_path, [callback, seen], **NO_END)
    assert len(seen.lrs) == 50
    assert len(set(seen.lrs[:20])) == 1
    assert seen.lrs[25:] == sorted(seen.lrs[25:], reverse=True)
    assert seen.lrs[-1] < 0.15 * seen.lrs[0]
    assert callback.schedule[-1].shape(10) < 1


def test_the_end_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: float(callback._live.trainer.global_step if callback._live else 0))
    callback, clock, seen = AutoLRSCallback(tau=50, **OPTIONS), StepClock(60), Lrs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_tiny(tmp_path, [callback, clock, seen], **NO_END)
    assert len(seen.lrs) == 60
    left = [e.answer.steps_left for e in callback.trace if isinstance(e.request, Train)]
    assert left[0] == 55
    assert left[-1] == 0
    assert seen.lrs[5:] == sorted(seen.lrs[5:], reverse=True)
    assert seen.lrs[-1] < 0.15 * seen.lrs[0]


def test_a_known_length_is_not_asked_for(tmp_path: Path) -> None:
    callback = AutoLRSCallback(tau=50, **OPTIONS)
    fit_tiny(tmp_path, [callback], max_steps=12)
    assert all(e.answer.steps_left is None for e in callback.trace if isinstance(e.request, Train))


def test_finish_in_says_no(tmp_path: Path) -> None:
    callback = AutoLRSCallback()
    with pytest.raises(RuntimeError, match="under way"):
        callback.finish_in(3)
    with pytest.raises(ValueError, match="num_steps >= 1"):
        callback.finish_in(0)
