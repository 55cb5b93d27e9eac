"""What every callback promises, in one table: a new callback is one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_autolr
from lightning_autolr import SearchCallback
from lightning_autolr.schedules import Cosine, OneCycle, Rex, Segment, Tabulated
from lightning_autolr.search.ratchet import Ratchet


@dataclass(frozen=True)
class Row:
    """How to make the callback in Python, and what to write in YAML."""

    make: Callable[[], Callback]
    name: str
    arguments: dict[str, Any]


def row(name: str, **arguments: Any) -> Row:
    return Row(lambda: getattr(lightning_autolr, name)(**arguments), name, arguments)


CASES = {
    "autolrs": row("AutoLRSCallback", tau=20, num_candidates=3, min_lr=1e-3, max_lr=0.3),
    "autolrs, bounds unknown": row("AutoLRSCallback"),
    "autolrs, validation": row("AutoLRSCallback", objective="validation", num_candidates=3),
    "autolrs, training losses": row("AutoLRSCallback", objective="train", num_candidates=3),
    "autolrs, holdout": row("AutoLRSCallback", objective="holdout", num_candidates=3),
    "autolrs, published": row(
        "AutoLRSCallback",
        tau=10,
        num_candidates=3,
        probe_fraction=0.3,
        min_lr=1e-3,
        max_lr=0.3,
        method="published",
        kappa=2.0,
    ),
    "autolrs after autowu": row("AutoLRSCallback", warmup="autowu", min_lr=1e-3, num_candidates=3),
    "autowu": row("AutoWUCallback", min_lr=1e-3, test_every=4),
    "autolrs, as the authors' code": row(
        "AutoLRSCallback",
        tau=10,
        num_candidates=3,
        probe_fraction=0.5,
        min_lr=1e-3,
        max_lr=0.3,
        method="published",
        objective="auto",
        estimator="reference",
        warmup_steps=5,
    ),
    "beam": row("BeamSearchCallback", beam_size=2, factors=[2.0, 1.0, 0.5], interval=8),
    "factors": row("FactorSearchCallback", every=8),
    "gradient norms": row("GradNormCallback"),
    "range test": row("RangeTestCallback", num_steps=20, repeats=1),
    "refined": row("RefinedScheduleCallback", every=0.2),
    "rex": Row(
        lambda: lightning_autolr.ScheduleCallback(Rex(), 0.1), "ScheduleCallback", {"schedule": "Rex", "peak_lr": 0.1}
    ),
    "rex, with a ratchet": Row(
        lambda: lightning_autolr.ScheduleCallback(Rex(), 1.0, ratchet=True),
        "ScheduleCallback",
        {"schedule": "Rex", "peak_lr": 1.0, "ratchet": True},
    ),
    "beam, with a ratchet": row("BeamSearchCallback", interval=8, ratchet=True),
    "factors, with a ratchet": row("FactorSearchCallback", every=8, ratchet=True, evaluate_on="validation"),
    "refined, with a ratchet": Row(
        lambda: lightning_autolr.RefinedScheduleCallback(every=0.2, ratchet=Ratchet(patience=2)),
        "RefinedScheduleCallback",
        {"every": 0.2, "ratchet": {"patience": 2}},
    ),
    "one cycle": Row(
        lambda: lightning_autolr.ScheduleCallback(OneCycle()), "ScheduleCallback", {"schedule": "OneCycle"}
    ),
    "found": Row(
        lambda: lightning_autolr.ScheduleCallback(
            Tabulated((Segment(10, 0.1), Segment(10, 0.2, undone=True), Segment(100, 0.1, Cosine(), back_to=1)))
        ),
        "ScheduleCallback",
        {
            "schedule": {
                "class_path": "lightning_autolr.schedules.Tabulated",
                "init_args": {"segments": [{"num_steps": 10, "lr": 0.1}, {"num_steps": 100, "lr": 0.05}]},
            }
        },
    ),
}


class Tiny(LightningModule):
    """A linear classifier with a normalisation and two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.norm(batch[0])).float(), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(
            [{"params": self.norm.parameters(), "lr": 0.01}, {"params": self.head.parameters()}], 0.1, 0.9
        )


class Ordered:
    """A loader that can be put back to where it was: batches in a fixed order, epoch after epoch."""

    def __init__(self, data: TensorDataset) -> None:
        self.loader, self.position = DataLoader(data, batch_size=8), 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        for i, batch in enumerate(self.loader):
            if i >= self.position:
                self.position = i + 1
                yield batch
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 3
    return TensorDataset(torch.randn(96, 6, generator=generator) + 2 * nn.functional.one_hot(y, 6), y)


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 60,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "callbacks": list(callbacks),
            **settings,
        }
    )


def fit(case: Row, folder: Path, *more: Callback, ckpt_path: str | None = None, **settings: Any) -> tuple[Any, Tiny]:
    seed_everything(0, verbose=False)
    callback, module = case.make(), Tiny()
    checkpoint = ModelCheckpoint(folder / "ckpt", save_last=True, every_n_train_steps=7, save_top_k=-1)
    trainer(folder, callback, *more, checkpoint, **settings).fit(
        module, DataLoader(data(), batch_size=8, shuffle=True), DataLoader(data(), batch_size=24), ckpt_path=ckpt_path
    )
    return callback, module


@pytest.fixture(params=[pytest.param(case, id=name) for name, case in CASES.items()])
def case(request: pytest.FixtureRequest) -> Row:
    return request.param


@pytest.mark.filterwarnings("ignore:ScheduleCallback repeats:UserWarning")
def test_fits(case: Row, tmp_path: Path) -> None:
    callback, module = fit(case, tmp_path)
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    if isinstance(callback, SearchCallback):
        assert sum(s.num_steps for s in callback.schedule) == 60
        assert (tmp_path / "autolr" / "schedule.json").exists()


@pytest.mark.filterwarnings("ignore:ScheduleCallback repeats:UserWarning")
@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2, "max_steps": 30}, {"precision": "bf16-mixed"}])
def test_accumulates_and_runs_in_bf16(case: Row, settings: dict[str, Any], tmp_path: Path) -> None:
    _, module = fit(case, tmp_path, **settings)
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


class Crash(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


@pytest.mark.filterwarnings("ignore:.*changed from:UserWarning")
@pytest.mark.filterwarnings("ignore:.*undoes a stage:UserWarning")
@pytest.mark.filterwarnings("ignore:ScheduleCallback repeats:UserWarning")
def test_resumes_after_a_crash(case: Row, tmp_path: Path) -> None:
    def go(folder: Path, *more: Callback, ckpt_path: str | None = None) -> tuple[Any, Tiny]:
        seed_everything(0, verbose=False)
        callback, module = case.make(), Tiny()
        checkpoint = ModelCheckpoint(folder / "ckpt", every_n_train_steps=7, save_top_k=-1, filename="{step}")
        trainer(folder, callback, checkpoint, *more).fit(
            module, Ordered(data()), DataLoader(data(), batch_size=24), ckpt_path=ckpt_path
        )
        return callback, module

    whole, expected = go(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        go(tmp_path / "cut", Crash(38))
    resumed, module = go(tmp_path / "resumed", ckpt_path=str(tmp_path / "cut" / "ckpt" / "step=35.ckpt"))
    for a, b in zip(expected.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)
    if isinstance(whole, SearchCallback):
        assert resumed.schedule == whole.schedule
        assert resumed.summary["search_steps"] == whole.summary["search_steps"]


# A gloo process is now and then aborted at its exit on a busy machine, after the training is over.
@pytest.mark.flaky(reruns=2, only_rerun="ProcessExitedException")
@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.filterwarnings("ignore")
def test_two_processes(name: str, tmp_path: Path) -> None:
    fit(CASES[name], tmp_path, strategy="ddp_spawn", devices=2, max_steps=24)
    if CASES[name].name.endswith(("SearchCallback", "LRSCallback")):
        assert (tmp_path / "autolr" / "trace.jsonl").exists()


def test_loads_from_yaml(case: Row, tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Callback, "callback")
    text = yaml.safe_dump({"callback": {"class_path": f"lightning_autolr.{case.name}", "init_args": case.arguments}})
    config = parser.parse_string(text)
    callback = parser.instantiate(config).callback
    assert type(callback) is getattr(lightning_autolr, case.name)
    made = case.make()
    if isinstance(made, SearchCallback):  # a default of its own holds in YAML too
        assert callback.objective == made.objective
    parser.dump(config)


OPTIONS = {
    "monitor": "val_acc",
    "mode": "max",
    "fork": "disk",
    "on_scheduler": "multiply",
    "total_steps": 50,
    "seed": 3,
}


def test_options_of_all_searches_load_from_yaml(case: Row) -> None:
    if not issubclass(getattr(lightning_autolr, case.name), SearchCallback):
        return
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    written = {"class_path": f"lightning_autolr.{case.name}", "init_args": {**case.arguments, **OPTIONS}}
    callback = parser.instantiate(parser.parse_object({"callback": written})).callback
    found = {**vars(callback), **vars(callback.probe_options)}
    assert {name: found[name] for name in OPTIONS} == OPTIONS
    for name, wrong in {"fork": "nowhere", "on_scheduler": "ignore", "total_steps": "some", "seed": "x"}.items():
        written["init_args"] = {**case.arguments, name: wrong}
        with pytest.raises(ArgumentError):
            parser.parse_object({"callback": written})


def test_the_table_has_every_callback() -> None:
    assert {c.name for c in CASES.values()} == set(lightning_autolr.__all__) - {"Ratchet", "SearchCallback"}
