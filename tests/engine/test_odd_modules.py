"""Modules and optimizers of kinds that are seldom seen: a search leaves no trace in them either."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_autolr.callbacks.schedule import ScheduleCallback
from lightning_autolr.schedules import Tabulated
from tests.engine import helper
from tests.engine.small import Stages, Tiny, fit_tiny
from tests.engine.subjects import Search, differences


class HandAccumulated(Tiny):
    """Steps with every third batch, without Lightning knowing."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure) if batch_idx % 3 == 2 else optimizer_closure()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 3 == 0:
            optimizer.zero_grad()


class ZeroedGradients(Tiny):
    """A part of it has a gradient of zeros, and so is decayed, from its first batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(8, 3)
        self.batches = 0

    def loss(self, batch: Any) -> Tensor:
        extra = self.extra(batch[0]).square().mean() if self.training and self.trainer.global_step == 1 else 0.0
        return super().loss(batch) + extra

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=0.1)


class GradientOfNoParameter(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones((), requires_grad=True)

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * self.scale


class Scripted(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.jit.script(nn.Sequential(nn.BatchNorm1d(8), nn.ReLU()))


class Ring(list):
    def __init__(self) -> None:
        super().__init__()
        self.position = 0

    def push(self, value: float) -> None:
        self.append(value) if len(self) < 3 else self.__setitem__(self.position % 3, value)
        self.position += 1


class Counting(dict):
    reads = 0

    def __getitem__(self, key: str) -> Any:
        self.reads += 1
        return super().__getitem__(key)


class Attributes(Tiny):
    """State in subclasses of containers, on parameters, and in the order of a set."""

    def __init__(self) -> None:
        super().__init__()
        self.ring, self.counting, self.recent = Ring(), Counting(a=1), deque[float](maxlen=2)
        self.pool = set(range(1000))
        for i in set(range(1000)) - {5, 900, 130, 77, 640}:
            self.pool.discard(i)
        self.orders: list[list[int]] = []
        for parameter in self.parameters():
            parameter.slow = parameter.detach().clone()  # type: ignore[attr-defined]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.orders.append(list(self.pool))

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        if self.training:
            self.ring.push(loss.item())
            self.recent.append(loss.item() * self.counting["a"])
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        for parameter in self.parameters():
            parameter.slow.lerp_(parameter.detach(), 0.1)  # type: ignore[attr-defined]
            parameter.steps = getattr(parameter, "steps", 0) + 1  # type: ignore[attr-defined]


def jittered(generator: np.random.Generator, x: Tensor) -> Tensor:
    return x + float(generator.normal())


class Jitter:
    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator

    def __call__(self, x: Tensor) -> Tensor:
        return jittered(self.generator, x)


def enclosed(generator: np.random.Generator) -> Callable[[Tensor], Tensor]:
    return lambda x: jittered(generator, x)


class Augmented(Tiny):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = [change]

    def loss(self, batch: Any) -> Tensor:
        return super().loss((self.change[0](batch[0]), batch[1]))


def of_a_helper() -> Callable[[Tensor], Tensor]:
    helper.RNG = rng()
    return lambda x: helper.jittered(x)


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


MODULES: dict[str, Callable[[], Tiny]] = {
    "accumulates by hand": HandAccumulated,
    "gradients that are zeroed": ZeroedGradients,
    "gradient of no parameter": GradientOfNoParameter,
    "scripted": Scripted,
    "attributes": Attributes,
    "generator in an object": lambda: Augmented(Jitter(rng())),
    "generator in a partial": lambda: Augmented(partial(jittered, rng())),
    "generator in a closure": lambda: Augmented(enclosed(rng())),
    "generator in a method": lambda: Augmented(Jitter(rng()).__call__),
    "generator in a helper's file": lambda: Augmented(of_a_helper()),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", MODULES)
def test_search_and_replay_are_the_same(name: str, tmp_path: Path) -> None:
    def state(module: Any) -> dict[str, Any]:
        parameters = list(module.parameters())
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (list, dict, set, deque, int))}
        containers = {key: [list(value), vars(value)] for key, value in plain.items() if hasattr(value, "__dict__")}
        attached = [dict(vars(parameter)) for parameter in parameters]
        orders = getattr(module, "orders", [])
        grad = getattr(getattr(module, "scale", None), "grad", None)
        return {"weights": module.state_dict(), "c": containers, "on": attached, "orders": orders, "grad": [grad]}

    torch.manual_seed(0)
    search = Search(Stages(lrs=(0.1, 0.01, 0.3), num_stages=4, num_steps=2))
    _, searched = fit_tiny(tmp_path / "search", [search], MODULES[name](), max_steps=-1, max_epochs=3)
    torch.manual_seed(0)
    schedule = Tabulated.from_file(tmp_path / "search/autolr/schedule.json")
    _, replayed = fit_tiny(
        tmp_path / "replay", [ScheduleCallback(schedule)], MODULES[name](), max_steps=-1, max_epochs=3
    )
    assert search.summary["probe_steps"] > 0
    assert differences(state(searched), state(replayed)) == []


class Seen(Callback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class WrappedLog(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.log = partial(self.log, on_epoch=True)  # type: ignore[method-assign]


class Prefixed(Tiny):
    """Its own ``log`` changes the names; what a helper logs goes past it."""

    def log(self, name: str, value: Any, **options: Any) -> None:  # type: ignore[override]
        super().log(f"my/{name}", value, **options)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        LightningModule.log(self, "spread", self.loss(batch).detach() ** 2)


class Clipping(Callback):
    """Changes gradients, and logs by the method that Lightning gave it."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        norm = nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        self.log("norm", norm, on_epoch=True, on_step=False, reduce_fx="max")


def logged(folder: Path, kind: type[Tiny], callbacks: list[Callback]) -> tuple[list[dict[str, float]], Tiny]:
    torch.manual_seed(0)
    seen, module = Seen(), kind()
    fit_tiny(folder, [*callbacks, seen], module, max_steps=-1, max_epochs=2)
    return seen.metrics, module


@pytest.mark.parametrize(("kind", "monitor"), [(WrappedLog, "val_loss"), (Prefixed, "my/val_loss"), (Tiny, "val_loss")])
def test_only_real_steps_are_logged(kind: Any, monitor: str, tmp_path: Path) -> None:
    clip = Clipping()
    search = Search(Stages(num_stages=4, num_steps=2), monitor=monitor, search_callbacks=[clip])
    searched, module = logged(tmp_path / "search", kind, [search, clip])
    assert ("log" in vars(module)) == (kind is WrappedLog)
    assert LightningModule.log.__module__.startswith("lightning.")
    schedule = Tabulated.from_file(tmp_path / "search/autolr/schedule.json")
    replayed, _ = logged(tmp_path / "replay", kind, [ScheduleCallback(schedule), Clipping()])
    assert searched == replayed
    assert {"my/norm" if kind is Prefixed else "norm", monitor} <= searched[0].keys()


class AdaptiveClipping(Callback):
    """Clips to a moving average of the norms, which is a state of its own."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.calls = 0

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        self.mean = norm if self.mean is None else 0.9 * self.mean + 0.1 * norm
        self.calls += 1
        for grad in grads:
            grad.mul_(self.mean / norm)


def test_the_state_of_callbacks_that_take_part_is_put_back(tmp_path: Path) -> None:
    clips = AdaptiveClipping(), AdaptiveClipping()
    search = Search(Stages(num_steps=2), search_callbacks=[clips[0]])
    _, searched = fit_tiny(tmp_path, [search, clips[0]])
    schedule = Tabulated.from_file(tmp_path / "autolr/schedule.json")
    _, replayed = fit_tiny(tmp_path / "replay", [ScheduleCallback(schedule), clips[1]])
    assert [clip.calls for clip in clips] == [6, 6]
    assert torch.equal(searched.layer.weight, replayed.layer.weight)


def test_a_callback_of_the_same_class_takes_part_in_place_of_one_that_the_trainer_has_not(tmp_path: Path) -> None:
    weights = []
    for itself in (True, False):  # YAML makes a second instance
        clip = AdaptiveClipping()
        other = clip if itself else AdaptiveClipping()
        _, module = fit_tiny(tmp_path / str(itself), [Search(Stages(), search_callbacks=[other]), clip])
        assert (clip.calls, other.calls) == (6, 6 if itself else 0)
        weights.append(module.layer.weight)
    assert torch.equal(*weights)
    for callbacks in ([], [AdaptiveClipping(), AdaptiveClipping()]):
        search = Search(Stages(), search_callbacks=[AdaptiveClipping()])
        with pytest.raises(
            MisconfigurationException, match=rf"got AdaptiveClipping, of which it has {len(callbacks)}\."
        ):
            fit_tiny(tmp_path, [search, *callbacks])


def test_somebody_elses_log_in_place_of_lightnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    before = LightningModule.log

    def patched(self: LightningModule, name: str, value: Any, **options: Any) -> None:
        heard.append(name)
        before(self, name, value, **options)

    monkeypatch.setattr(LightningModule, "log", patched)
    fit_tiny(tmp_path, [search := Search(Stages())], num_sanity_val_steps=0, val_check_interval=2)
    assert LightningModule.log is patched
    assert search.summary["eval_batches"] > 0
    assert heard == ["val_loss"] * 6  # three real validations of two batches


def test_a_patched_save_checkpoint_is_put_back(tmp_path: Path) -> None:
    saved: list[Any] = []

    class Patched(Tiny):
        def on_fit_start(self) -> None:
            save = self.trainer.save_checkpoint
            self.trainer.save_checkpoint = lambda *a, **k: (saved.append(a), save(*a, **k))  # type: ignore[method-assign]

    class Saving(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "now.ckpt")

    fit_tiny(tmp_path, [Search(Stages()), Saving()], Patched())
    assert len(saved) == 6
