"""The promise: a run with search and a search-free replay of the schedule it found are the same to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_autolr.callbacks.schedule import ScheduleCallback
from lightning_autolr.schedules import Tabulated
from tests.engine.subjects import Options, Scripted, Search, differences, fit

TABLE = {
    "sgd": Options(),
    "adamw": Options("adamw"),
    "amsgrad": Options("amsgrad"),
    "fused adamw": Options("fused"),
    "tensor lr": Options("adamw", tensor_lr=True),
    "lbfgs": Options("lbfgs"),
    "accumulate and clip": Options(trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 4}),
    "accumulate 3 of 10": Options(trainer={"accumulate_grad_batches": 3, "max_epochs": 5}),
    "scheduler": Options(scheduler="step"),
    "onecycle": Options("adamw", scheduler="onecycle"),
    "manual": Options(manual=True),
    "manual, 2 optimizers": Options(manual=True, optimizers=2),
    "manual, scheduler": Options(manual=True, scheduler="lambda"),
    "bf16": Options("adamw", trainer={"precision": "bf16-mixed"}),
    "fp16": Options(precision_plugin=lambda: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))),
    "fp16, accumulate and clip": Options(
        precision_plugin=lambda: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")),
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 4},
    ),
    "64-true": Options(trainer={"precision": "64-true"}),
    "generator": Options(loader={"generator": True}),
    "ordered": Options(loader={"shuffle": False}),
    "limited": Options(trainer={"limit_train_batches": 7, "max_epochs": 3}),
    "overfit": Options(trainer={"overfit_batches": 4, "max_epochs": 5, "val_check_interval": 1.0}),
    "stream": Options(stream=True),
    "combined": Options(combined=True),
    "dataloader_iter": Options(dataloader_iter=True),
    "compiled": Options(compiled=True),
    "workers": Options(loader={"num_workers": 2}),
    "persistent workers": Options(loader={"num_workers": 1, "persistent_workers": True}),
}


@pytest.mark.parametrize("options", [pytest.param(o, id=name) for name, o in TABLE.items()])
def test_search_equals_replay(options: Options, tmp_path: Path) -> None:
    search = Search()
    searched = fit(options, search, tmp_path / "search")
    assert len([e for e in search.trace if hasattr(e.answer, "evaluations")]) >= 15
    assert search.summary["undone_steps"] == 5
    replay = ScheduleCallback(Tabulated.from_file(tmp_path / "search" / "autolr" / "schedule.json"))
    replayed = fit(options, replay, tmp_path / "replay")
    assert differences(searched, replayed) == []
