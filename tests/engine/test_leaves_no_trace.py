"""The promise: a run with search and a search-free replay of the schedule it found are the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_autolr.callbacks.schedule import ScheduleCallback
from lightning_autolr.schedules import Tabulated
from tests.engine.subjects import Options, Scripted, Search, differences, fit

pytestmark = [
    # advice that Lightning gives to users of these features
    pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning"),
    # our own, asserted in test_lr.py and test_resume.py
    pytest.mark.filterwarnings("ignore:.* overrides the learning rates of:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* undoes a stage in which:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* a training loss was not finite:UserWarning"),  # of a probe at a wild rate
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument:UserWarning"),
]


def _fp16() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


_ACCUMULATE: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 4}

TABLE = {
    "sgd": Options(),
    "adamw": Options("adamw"),
    "amsgrad": Options("amsgrad"),
    "fused adamw": Options("fused"),
    "tensor lr": Options("adamw", tensor_lr=True),
    "lbfgs": Options("lbfgs"),
    "accumulate and clip": Options(trainer=_ACCUMULATE),
    "accumulate 3 of 10": Options(trainer={"accumulate_grad_batches": 3, "max_epochs": 5}),
    "scheduler": Options(scheduler="step"),
    "onecycle": Options("adamw", scheduler="onecycle"),
    "multiply": Options(scheduler="step", search={"on_scheduler": "multiply"}),
    "multiply, lambda": Options(scheduler="lambda", search={"on_scheduler": "multiply"}),
    "manual": Options(manual=True),
    "manual, 2 optimizers": Options(manual=True, optimizers=2),
    "manual, scheduler": Options(manual=True, scheduler="lambda"),
    "manual, multiply": Options(manual=True, optimizers=2, scheduler="step", search={"on_scheduler": "multiply"}),
    "manual, multiply, alternate": Options(
        manual=True, optimizers=2, alternate=True, scheduler="step", search={"on_scheduler": "multiply"}
    ),
    "bf16": Options("adamw", trainer={"precision": "bf16-mixed"}),
    "fp16": Options(precision_plugin=_fp16),
    "fp16, accumulate and clip": Options(precision_plugin=_fp16, trainer=_ACCUMULATE),
    "64-true": Options(trainer={"precision": "64-true"}),
    "generator": Options(loader={"generator": True}),
    "ordered": Options(loader={"shuffle": False}),
    "limited": Options(trainer={"limit_train_batches": 7, "max_epochs": 3}),
    "overfit": Options(trainer={"overfit_batches": 4, "max_epochs": 5, "val_check_interval": 1.0}),
    "late validation": Options(trainer={"check_val_every_n_epoch": 2, "val_check_interval": 1.0}),
    "stream": Options(stream=True),
    "combined": Options(combined=True),
    "own loader": Options(own_loader=True),
    "dataloader_iter": Options(dataloader_iter=True),
    "compiled": Options(compiled=True),
    "compiled step": Options("adamw", manual=True, compiled_step=True, tensor_lr=True),
    "fork on the CPU": Options("adamw", search={"fork": "cpu"}),
    "fork on disk": Options("adamw", search={"fork": "disk"}),
    "fork on disk, manual, 2 optimizers": Options(manual=True, optimizers=2, search={"fork": "disk"}),
    "holdout": Options(search={"objective": "holdout"}),
    "holdout, accumulate": Options(trainer=_ACCUMULATE, search={"objective": "holdout", "fork": "cpu"}),
    "few batches": Options(search={"eval_batches": 1, "mode": "max", "monitor": "val_acc"}),
    "workers": Options(loader={"num_workers": 2}, trainer={"max_epochs": 2}),
    "persistent workers": Options(loader={"num_workers": 1, "persistent_workers": True}),
}
SLOW = {"workers", "compiled step"}


@pytest.mark.parametrize(
    "options", [pytest.param(o, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, o in TABLE.items()]
)
def test_search_equals_replay(options: Options, tmp_path: Path) -> None:
    held_out = options.search.get("objective") == "holdout"
    search = Search(Scripted(evaluate="holdout" if held_out else "validation"), **options.search)
    searched = fit(options, search, tmp_path / "search")
    assert len([e for e in search.trace if hasattr(e.answer, "evaluations")]) >= 15
    assert search.summary["undone_steps"] == 5
    replay = ScheduleCallback(
        Tabulated.from_file(tmp_path / "search" / "autolr" / "schedule.json"),
        on_scheduler=options.search.get("on_scheduler", "override"),
    )
    replayed = fit(options, replay, tmp_path / "replay")
    assert differences(searched, replayed) == []
