"""Negative controls: with one piece of the fork left out, the comparison of search and replay must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torchmetrics import Metric

from lightning_autolr.callbacks.schedule import ScheduleCallback
from lightning_autolr.engine import batches, quiet, randomness, state
from lightning_autolr.schedules import Tabulated
from tests.engine.subjects import Meter, Options, Scripted, Search, differences, fit

Patch = pytest.MonkeyPatch


def _without_rng(patch: Patch) -> None:
    patch.setattr(randomness.RandomState, "restore", lambda self: None)


def _without_roots(kind: type) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        make = state.Fork.__init__

        def init(self: state.Fork, roots: Iterable[object], store: Any) -> None:
            make(self, [root for root in roots if not isinstance(root, kind)], store)

        patch.setattr(state.Fork, "__init__", init)

    return apply


def _not_visiting(skip: Callable[[Any], bool]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        visit = state._Walk.visit
        patch.setattr(state._Walk, "visit", lambda self, obj: None if skip(obj) else visit(self, obj))

    return apply


def _left_alone(*names: str) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        patch.setattr(state, "_LEFT_ALONE", state._LEFT_ALONE | set(names))

    return apply


def _persistent_buffers_only(patch: Patch) -> None:
    visit = state._Walk._visit_dict

    def visit_dict(self: Any, obj: dict[Any, Any], left_alone: frozenset[str] = frozenset()) -> None:
        names = {"running"} if isinstance(obj, dict) and "running" in obj else set()
        visit(self, obj, left_alone | names)

    patch.setattr(state._Walk, "_visit_dict", visit_dict)


def _without_log_capture(patch: Patch) -> None:
    keep = quiet.LogSink.__call__

    def log(self: Any, *args: Any, **kwargs: Any) -> None:
        keep(self, *args, **kwargs)
        quiet._ORIGINAL["log"](self.module, *args, **kwargs)

    patch.setattr(quiet.LogSink, "__call__", log)

    @contextmanager
    def heard(trainer: Any, module: nn.Module, heard_by: Any) -> Any:
        with original(trainer, module, heard_by) as (sink, signals):
            sink.module = module
            yield sink, signals

    original = quiet.quiet
    patch.setattr("lightning_autolr.engine.probe.quiet", heard)


def _without_callbacks_swap(patch: Patch) -> None:
    @contextmanager
    def heard(trainer: Any, module: nn.Module, heard_by: Any) -> Any:
        with original(trainer, module, [c for c in trainer.callbacks if type(c).__name__ == "Spy"]) as yielded:
            yield yielded

    original = quiet.quiet
    patch.setattr("lightning_autolr.engine.probe.quiet", heard)


def _without_loader_clone(patch: Patch) -> None:
    patch.setattr(batches, "private_loader", lambda loader, seed, draw, skip, copies: loader)
    patch.setattr(batches, "generators_of", lambda roots: [])  # else its own generator is put back


def _without_own_generators(patch: Patch) -> None:
    _not_visiting(lambda obj: isinstance(obj, torch.Generator))(patch)
    patch.setattr("lightning_autolr.engine.probe.generators_of", lambda roots: [])


_SCALED = Options(
    "adamw", precision_plugin=lambda: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=3))
)
CONTROLS: dict[str, tuple[Options, Callable[[Patch], None]]] = {
    "random numbers": (Options(), _without_rng),
    "optimizer state": (Options(), _without_roots(torch.optim.Optimizer)),
    "scaler": (_SCALED, _without_roots(torch.amp.GradScaler)),
    "module attributes": (Options(), _left_alone("count", "history", "notes")),
    "objects of the user's classes": (Options(), _not_visiting(lambda obj: isinstance(obj, Meter))),
    "module's own generator": (Options(), _without_own_generators),
    "metric states": (Options(), _not_visiting(lambda obj: isinstance(obj, Metric))),
    "non-persistent buffers": (Options(), _persistent_buffers_only),
    "log capture": (Options(), _without_log_capture),
    "callbacks swap": (Options(), _without_callbacks_swap),
    "loader clone": (Options(loader={"generator": True}), _without_loader_clone),
    "persistent workers' clone": (
        Options(loader={"num_workers": 1, "persistent_workers": True, "shuffle": False}),
        _without_loader_clone,
    ),
    "scheduler state, manual": (
        Options(manual=True, scheduler="step"),
        _without_roots(torch.optim.lr_scheduler.LRScheduler),
    ),
    "train and eval flags": (Options(), _left_alone("training")),
    "parameters": (Options(), _not_visiting(lambda obj: isinstance(obj, nn.Parameter))),
}


@pytest.mark.filterwarnings("ignore:.* overrides the learning rates of:UserWarning")
@pytest.mark.filterwarnings("ignore:.* undoes a stage in which:UserWarning")
@pytest.mark.filterwarnings("ignore:.* a training loss was not finite:UserWarning")
@pytest.mark.parametrize("name", CONTROLS)
def test_comparison_notices_what_is_left_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, leave_out = CONTROLS[name]
    search = Search(Scripted(num_stages=2), **options.search)
    with monkeypatch.context() as patch:
        leave_out(patch)
        searched = fit(options, search, tmp_path / "search")
    replay = ScheduleCallback(
        Tabulated.from_file(tmp_path / "search" / "autolr" / "schedule.json"),
        on_scheduler=options.search.get("on_scheduler", "override"),
    )
    assert differences(searched, fit(options, replay, tmp_path / "replay")) != []
