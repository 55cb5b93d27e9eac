"""What a callback is before a fit and after it, however that ended."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

from lightning_autolr import AutoLRSCallback, GradNormCallback, RangeTestCallback
from tests.engine.small import Stages, Tiny, fit_tiny, loader
from tests.engine.subjects import Search


def test_empty_before_a_fit() -> None:
    callback = AutoLRSCallback()
    assert (callback.trace, callback.schedule) == ([], ())
    assert callback.summary["schedule_steps"] == callback.summary["probe_steps"] == 0


@pytest.mark.filterwarnings("ignore:.*`max_steps=0` reached")
def test_empty_after_a_fit_without_steps(tmp_path: Path) -> None:
    search = Search(Stages())
    fit_tiny(tmp_path, [search], max_steps=0)
    assert (search.trace, search.schedule, search.summary["learning_rates"]) == ([], (), [])


def test_can_be_copied_and_pickled_and_lets_go(tmp_path: Path) -> None:
    callbacks: list[Any] = [AutoLRSCallback(figures=False), GradNormCallback()]
    trainer, module = fit_tiny(tmp_path, callbacks, max_steps=40)
    alive = weakref.ref(trainer), weakref.ref(module), weakref.ref(trainer.optimizers[0])
    del trainer, module
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    callback = callbacks[0]
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert (twin.trace, twin.schedule, twin.summary) == (callback.trace, callback.schedule, callback.summary)
        assert twin.state_dict().keys() == callback.state_dict().keys() > {"trace", "random_states"}
    pickle.dumps(callbacks[1])


class Stop(Callback):
    """Ends the run by an error in the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise ValueError("user")


def crash(folder: Path, module: Tiny, callback: Callback, *others: Callback) -> None:
    with pytest.raises(ValueError, match="user"):
        fit_tiny(folder, [callback, Stop(25), *others], module, max_steps=60, enable_checkpointing=True)


def test_an_exception_frees_what_teardown_would(tmp_path: Path) -> None:
    callback, module = AutoLRSCallback(figures=False), Tiny()
    crash(tmp_path, module, callback)
    assert all(not o._optimizer_step_pre_hooks for o in module.trainer.optimizers)  # type: ignore[union-attr]
    trainer = weakref.ref(module.trainer)
    state = callback.state_dict()
    assert state["active"]["steps_done"] + sum(s["num_steps"] for s in state["segments"]) == 25
    assert state["kept"]
    del module
    gc.collect()
    assert trainer() is None
    pickle.dumps(callback)
    trainer_again, _ = fit_tiny(tmp_path, [callback], max_steps=30)
    assert trainer_again.global_step == callback.summary["schedule_steps"] + callback.summary["undone_steps"] == 30


@pytest.mark.filterwarnings("ignore:.*was called without a model|.*there is no last checkpoint available:UserWarning")
def test_checkpoints_after_an_exception_have_the_state(tmp_path: Path) -> None:
    callback, module = AutoLRSCallback(figures=False), Tiny()
    crash(tmp_path, module, callback, OnExceptionCheckpoint(tmp_path, filename="crash"))
    module.trainer.save_checkpoint(tmp_path / "later.ckpt")
    states = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["callbacks"] for name in ("crash", "later")]
    keys = [state["AutoLRSCallback"].keys() for state in states]
    assert keys[0] == keys[1] > {"trace", "kept"}


@pytest.mark.parametrize("kind", [partial(Search, Stages()), GradNormCallback, RangeTestCallback])
def test_a_fit_after_a_test_of_a_checkpoint_begins_anew(kind: Any, tmp_path: Path) -> None:
    """Lightning loads the states of callbacks for `validate` and `test`, too."""
    callback = kind()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4)
    trainer, module = fit_tiny(tmp_path, [callback, saver], enable_checkpointing=True)
    before = copy.deepcopy(callback.state_dict())
    trainer.validate(module, loader(12, False), ckpt_path=str(tmp_path / "step=4.ckpt"), verbose=False)
    fit_tiny(tmp_path, [callback], train=loader(30))
    after = callback.state_dict()
    for name in ("trace", "segments", "norms", "suggestions"):
        assert len(before.get(name, ())) == len(after.get(name, ()))
    for name in ("trace", "norms", "suggestions"):
        assert name not in before or before[name][0] != after[name][0]  # found on other batches
