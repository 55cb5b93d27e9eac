"""Whatever happens inside a probe: the state is put back, and what should reach the user does."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_autolr.core.requests import ProbeResult, Status
from lightning_autolr.engine.quiet import SavedInSearchError
from tests.engine.small import Stages, Tiny, fit_tiny
from tests.engine.subjects import Search, differences


class Fragile(Tiny):
    """Raises in the n-th training step (private ones included) or validation step."""

    def __init__(self, error: BaseException, step: int | None = None, val_step: int | None = None) -> None:
        super().__init__()
        self.error, self.counts = error, _Counts()
        self.bad_step, self.bad_val_step = step, val_step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.counts.train += 1
        if self.counts.train == self.bad_step:
            raise self.error
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.counts.val += not self.trainer.sanity_checking
        if self.counts.val == self.bad_val_step:
            raise self.error
        super().validation_step(batch, batch_idx)


class _Counts(Callback):
    """Made on a class of a library, so that no fork puts it back."""

    train = 0
    val = 0


class Before(Callback):
    """Remembers the state right before the search of the given step, which is made when the next batch begins."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.state: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == self.step and not self.state:
            self.state = _state(trainer, module)


def _state(trainer: Any, module: Any) -> dict[str, Any]:
    return {
        "module": {k: v.clone() for k, v in module.state_dict().items()},
        "momentum": [s["momentum_buffer"].clone() for s in trainer.optimizers[0].state.values()],
        "rng": torch.get_rng_state(),
        "flags": [m.training for m in module.modules()],
        "callbacks": [type(c).__name__ for c in trainer.callbacks],
        "log": "log" in vars(module),
        "grads": [p.grad is None for p in module.parameters()],
    }


class After(Callback):
    """Remembers the state that callbacks see when the exception has reached the Trainer."""

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.exception = exception
        self.state = _state(trainer, module)
        self.state["save"] = "save_checkpoint" in vars(trainer)


# Two candidates of two steps, three real steps, and the same again: the second search makes the steps 8 to 11. A candidate
# is evaluated in six parts, so that its parts are 13 to 24.
@pytest.mark.parametrize(
    "error", [KeyError("user"), RuntimeError("user"), KeyboardInterrupt(), ZeroDivisionError("user")]
)
@pytest.mark.parametrize("at", ["step", "val_step"])
@pytest.mark.filterwarnings("ignore:.*was called without a model|.*there is no last checkpoint available:UserWarning")
def test_everything_is_put_back(error: BaseException, at: str, tmp_path: Path) -> None:
    module = Fragile(error, **{at: 9 if at == "step" else 15})
    before, after = Before(3), After()
    # Errors of arithmetic are tried once more with the real weights, where they occur again.
    module.counts = _Persistent() if isinstance(error, (RuntimeError, ArithmeticError)) else module.counts
    saver = OnExceptionCheckpoint(tmp_path, filename="crash")
    expected = SystemExit if isinstance(error, KeyboardInterrupt) else type(error)
    with pytest.raises(expected):
        fit_tiny(
            tmp_path,
            [before, Search(Stages()), after, saver],
            module,
            num_sanity_val_steps=0,
            enable_checkpointing=True,
        )
    assert after.exception is error
    assert after.state.pop("save") is False
    before.state["grads"] = after.state["grads"]
    assert differences(before.state, after.state) == []
    saved = torch.load(tmp_path / "crash.ckpt", weights_only=True)
    assert differences(saved["state_dict"], before.state["module"]) == []
    assert saved["callbacks"]["Search"]["trace"]


class _Persistent(_Counts):
    """Once the number is reached it stays: the error occurs again and again."""

    def __setattr__(self, name: str, value: int) -> None:
        limit = {"train": 9, "val": 15}[name]
        object.__setattr__(self, name, min(value, limit))


class RefusesNaN(Tiny):
    """Checks its loss, as careful users do."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        if not torch.isfinite(loss) and self.where == ("training" if self.training else "validation"):
            raise ValueError("The loss is not finite.")
        return loss


@pytest.mark.parametrize("where", ["training", "validation"])
def test_refused_nan_is_an_answer(where: str, tmp_path: Path) -> None:
    search = Search(Stages(lrs=(1e38, 0.1), probe_steps=3 if where == "training" else 1))
    trainer, module = fit_tiny(tmp_path, [search], RefusesNaN(where))
    answers = [e.answer for e in search.trace if isinstance(e.answer, ProbeResult)]
    assert [a.status for a in answers] == [Status.DIVERGED, Status.OK] * 2
    assert trainer.global_step == 6
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_detected_anomaly_is_an_answer(tmp_path: Path) -> None:
    search = Search(Stages(lrs=(1e38, 0.1), probe_steps=4))
    fit_tiny(tmp_path, [search], detect_anomaly=True)
    answers = [e.answer for e in search.trace if isinstance(e.answer, ProbeResult)]
    assert [a.status for a in answers] == [Status.DIVERGED, Status.OK] * 2


class Signalled(Tiny):
    """Is sent a signal in a private step."""

    def __init__(self, number: int, at: int) -> None:
        super().__init__()
        self.number, self.at, self.counts = number, at, _Counts()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.counts.train += 1
        if self.counts.train == self.at:
            os.kill(os.getpid(), self.number)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_wait_for_the_end_of_the_probe(number: int, tmp_path: Path) -> None:
    """A handler that saves at once writes real weights; no answer is lost, and a resumed run asks for what is missing."""
    torch.manual_seed(3)
    module, search, before = Signalled(number, at=8), Search(Stages()), Before(3)
    seen: list[dict[str, Any]] = []

    def handler(received: int, frame: Any) -> None:
        seen.append(_state(module.trainer, module))
        module.trainer.save_checkpoint(tmp_path / "signal.ckpt")

    old = signal.signal(number, handler)
    try:
        # Lightning ends the training after a SIGTERM by itself.
        with pytest.raises(SIGTERMException) if number == signal.SIGTERM else nullcontext():
            fit_tiny(tmp_path, [before, search], module)
    finally:
        signal.signal(number, old)
    before.state["grads"] = seen[0]["grads"]
    assert differences([before.state], seen) == []
    saved = torch.load(tmp_path / "signal.ckpt", weights_only=True)
    assert differences(saved["state_dict"], before.state["module"]) == []
    # The first search and stage, and the one probe of the second search that had been made by then.
    assert len(saved["callbacks"]["Search"]["trace"]) == 4
    if number == signal.SIGUSR1:
        torch.manual_seed(3)
        undisturbed, other = Search(Stages()), Signalled(number, at=0)
        fit_tiny(tmp_path, [undisturbed], other)
        assert differences(module.state_dict(), other.state_dict()) == []
        assert [e.answer for e in search.trace] == [e.answer for e in undisturbed.trace]


class Saves(Tiny):
    """Saves a checkpoint of its own in the midst of a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trainer.save_checkpoint("anywhere.ckpt", weights_only=True)
        return super().training_step(batch, batch_idx)


def test_no_candidate_gets_into_a_file(tmp_path: Path) -> None:
    with pytest.raises(SavedInSearchError, match="Expected no checkpoint to be saved while learning rates are tried"):
        fit_tiny(tmp_path, [Search(Stages())], Saves())
