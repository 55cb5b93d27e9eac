"""What a ratchet took back is taken back by a replay of the schedule, too: the same states, at the same moments."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable
from csv import DictReader
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset

from lightning_autolr import (
    AutoLRSCallback,
    AutoWUCallback,
    BeamSearchCallback,
    FactorSearchCallback,
    ScheduleCallback,
)
from lightning_autolr.core.record import account_of
from lightning_autolr.core.requests import Probe, Requests, Run, Status, Train, TrainResult
from lightning_autolr.engine.driver import SearchCallback
from lightning_autolr.schedules import Tabulated
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.ratchet import Ratchet
from tests.engine.stateful import StatefulLoader
from tests.engine.subjects import Search, differences
from tests.engine.test_resume import KillAt, Killed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* undoes a stage in which:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* took back .* steps:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*a training loss was not finite:UserWarning"),
]


class Moco(LightningModule):
    """A network and a slow copy of it, which a hook moves after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.slow = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Seen(Callback):
    """What other callbacks meet when a batch has ended."""

    def __init__(self) -> None:
        self.lrs = list[float]()
        self.weights = list[Tensor]()

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.weights.append(next(module.net.parameters()).detach().clone())


def points(size: int, seed: int = 1, noise: float = 0.0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(size) % 3
    x = torch.randn(size, 8, generator=generator) + one_hot(y, 8)
    wrong = torch.rand(size, generator=generator) < noise
    return TensorDataset(x, torch.where(wrong, torch.randint(0, 3, (size,), generator=generator), y))


def noisy_labels() -> Any:
    """24 points, half of their labels made up: soon learnt by heart."""
    return StatefulLoader(points(24, noise=0.5), 6)


def one_broken_record(at: int, value: float) -> Callable[[], Any]:
    def make() -> Any:
        data = points(1200)
        data.tensors[0][at] = value
        return DataLoader(data, 6)

    return make


def go(
    folder: Path, callback: SearchCallback, train: Callable[[], Any], kill_step: int | None = None,
    ckpt_path: Path | None = None, noise: float = 0.0, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Everything that a replay has to end with, and all that others saw on the way."""
    seed_everything(0, verbose=False)
    module, seen, ema = Moco(), Seen(), EMAWeightAveraging(decay=0.9)
    saver = ModelCheckpoint(folder / "ckpt", "{step}", save_top_k=-1, every_n_train_steps=5)
    settings = {
        "max_steps": 200,
        "max_epochs": -1,
        "val_check_interval": 25,
        "check_val_every_n_epoch": None,
        **options,
    }
    trainer = Trainer(
        callbacks=[callback, seen, ema, saver, KillAt(kill_step)], logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip
    with contextlib.suppress(Killed):
        trainer.fit(module, train(), DataLoader(points(60, 51 if noise else 2, noise), 20), ckpt_path=ckpt_path)
    with open(folder / "metrics.csv") as file:
        rows = [
            {k: v for k, v in r.items() if not k.startswith("autolr/") or k == "autolr/lr"} for r in DictReader(file)
        ]
    return {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "ema": ema.state_dict(),
        "seen": [seen.lrs, seen.weights],
        "metrics": [row for row in rows if any(v for k, v in row.items() if k not in ("step", "epoch"))],
        "checkpoints": {
            path.name: torch.load(path, weights_only=True)["state_dict"] for path in (folder / "ckpt").iterdir()
        },
    }


def replay_of(folder: Path) -> ScheduleCallback:
    return ScheduleCallback(Tabulated.from_file(folder / "autolr" / "schedule.json"), figures=False)


WITH_STATES: dict[str, Callable[[], SearchCallback]] = {
    "autowu before autolrs": lambda: AutoLRSCallback(warmup="autowu", figures=False),
    "autowu": lambda: AutoWUCallback(ratchet=True, figures=False),
    "factors": lambda: FactorSearchCallback(every=25, ratchet=True, figures=False),
    "beam of one": lambda: BeamSearchCallback(beam_size=1, interval=25, ratchet=True, figures=False),
    "published": lambda: AutoLRSCallback(
        method="published", tau=25, num_candidates=3, min_lr=1e-3, max_lr=0.3, ratchet=True, figures=False
    ),
}


@pytest.mark.parametrize("make", WITH_STATES.values(), ids=WITH_STATES)
def test_around_a_search_with_states_of_its_own(tmp_path: Path, make: Callable[[], SearchCallback]) -> None:
    """Its undos are in the record, in the account, and in the replay."""
    search = make()
    found = go(tmp_path / "search", search, noisy_labels, noise=0.5)
    assert_undone(search)
    assert differences(found, go(tmp_path / "replay", replay_of(tmp_path / "search"), noisy_labels, noise=0.5)) == []


def assert_undone(search: SearchCallback) -> None:
    undos = [e.request for e in search.trace if isinstance(e.request, Train) and e.request.start is not None]
    assert any("back to the lowest" in undo.reason for undo in undos)
    assert len([s for s in search.schedule if s.back_to is not None]) == len(undos)
    assert not any(s.leaps for s in search.schedule)
    assert search.summary["undone_steps"] == sum(s.num_steps for s in search.schedule if s.undone) > 0


@pytest.mark.parametrize("name", ["autowu", "factors", "published"])
def test_goes_back_after_a_resume_as_well(tmp_path: Path, name: str) -> None:
    whole = WITH_STATES[name]()
    found = go(tmp_path / "whole", whole, noisy_labels, noise=0.5)
    reasons = [e.request.reason for e in whole.trace if isinstance(e.request, Train)]
    undo = next(i for i, reason in enumerate(reasons) if "back to the lowest" in reason)
    begun = sum(s.num_steps for s in whole.schedule[:undo])
    go(tmp_path / "cut", WITH_STATES[name](), noisy_labels, noise=0.5, kill_step=begun - 1)
    resumed = WITH_STATES[name]()
    last = tmp_path / "cut" / "ckpt" / f"step={(begun - 2) // 5 * 5}.ckpt"
    again = go(tmp_path / "resumed", resumed, noisy_labels, noise=0.5, ckpt_path=last)
    differ = differences(found["weights"], again["weights"])
    assert all(".slow." in name for name in differ)  # the checkpoint was saved before the module's hook moved it
    assert resumed.schedule == whole.schedule
    assert resumed.summary["undone_steps"] == whole.summary["undone_steps"]


@dataclass(frozen=True)
class StartsAgain(AbstractSearch):
    """Goes back twice to where it began, and gets nowhere from there."""

    lr: float

    def requests(self, run: Run) -> Requests:
        first = yield Train(self.lr, 30, keep_start=True)
        yield Train(1e-5, 30, start=first.start)
        yield Train(1e-5, None, start=first.start, release=(first.start,))


@pytest.mark.parametrize(("lr", "lowest"), [(0.02, 20), (0.01, 30)])
def test_back_to_a_way_that_the_search_itself_took_back(tmp_path: Path, lr: float, lowest: int) -> None:
    """The lowest weights lie on it, in its midst or where the search left: those steps lead to the end after all."""

    def train() -> Any:
        return StatefulLoader(points(60), 6)

    search = Search(StartsAgain(lr), ratchet=Ratchet(), figures=False)
    found = go(tmp_path / "search", search, train, max_steps=100)
    assert_undone(search)
    *before, last = search.schedule
    assert last.back_to == lowest // 10
    assert last.as_left == (lowest == 30)
    assert [s.undone for s in before] == [i >= last.back_to for i in range(len(before))]
    assert account_of(search.summary)[0] == f"100 steps trained, {99 - lowest} of them undone"
    assert differences(found, go(tmp_path / "replay", replay_of(tmp_path / "search"), train, max_steps=100)) == []


def test_back_at_once_to_what_a_probe_has_kept(tmp_path: Path) -> None:
    """Nothing was trained since: there is nothing to undo, and no leap."""

    class Keeps(AbstractSearch):
        def requests(self, run: Run) -> Requests:
            yield Train(0.05, 5)
            kept = yield Probe(1.0, 0, evaluate="none", keep_end=True)
            yield Probe(0.1, 3, evaluate="none")
            yield Train(0.05, 5, start=kept.end, release=(kept.end,))

    search = Search(Keeps(), figures=False)
    found = go(tmp_path / "search", search, noisy_labels, max_steps=10)
    assert [(s.back_to, s.leaps, s.undone) for s in search.schedule] == [(None, False, False)] * 2
    assert differences(found, go(tmp_path / "replay", replay_of(tmp_path / "search"), noisy_labels, max_steps=10)) == []


@pytest.mark.parametrize(
    ("at", "value", "num_steps"), [(306, 1e4, 200), (500, 1e4, 200), (500, math.nan, 200), (500, math.nan, 90)]
)
def test_a_diverged_stage_is_taken_back_at_once(tmp_path: Path, at: int, value: float, num_steps: int) -> None:
    """In the replay as in the search: hooks, averages, validations and checkpoints of that batch meet the same weights."""
    search = AutoLRSCallback(figures=False, probe_dataloader=DataLoader(points(60), 6))
    train = one_broken_record(at, value)
    found = go(tmp_path / "search", search, train, max_steps=num_steps)
    cut = [s.diverged for s in search.schedule]
    assert cut == [e.answer.status is Status.DIVERGED for e in search.trace if isinstance(e.answer, TrainResult)]
    assert any(cut)
    replay = replay_of(tmp_path / "search")
    assert differences(found, go(tmp_path / "replay", replay, train, max_steps=num_steps)) == []
    assert replay.schedule == search.schedule


def test_a_replay_cuts_where_the_record_says_and_nowhere_else(tmp_path: Path) -> None:
    """A loss that is not finite did not end an unguarded segment: it does not end it in the replay, which keeps its start."""

    class Unguarded(AbstractSearch):
        def requests(self, run: Run) -> Requests:
            kept = yield Probe(1.0, 0, evaluate="none", keep_end=True)
            yield Train(0.05, 95)
            yield Train(0.05, None, start=kept.end)

    search, train = Search(Unguarded(), figures=False), one_broken_record(500, math.inf)
    found = go(tmp_path / "search", search, train, max_steps=120)
    replay = replay_of(tmp_path / "search")
    assert differences(found, go(tmp_path / "replay", replay, train, max_steps=120)) == []
    assert [s.num_steps for s in replay.schedule] == [95, 25]


def test_a_schedule_of_an_older_version_is_read_and_replayed(tmp_path: Path) -> None:
    search = AutoLRSCallback(figures=False, probe_dataloader=DataLoader(points(60), 6))
    train = one_broken_record(500, 1e4)
    found = go(tmp_path / "search", search, train, max_steps=200)
    path = tmp_path / "search" / "autolr" / "schedule.json"
    plain = json.loads(path.read_text())
    for segment in plain["segments"]:
        del segment["diverged"], segment["as_left"]
    path.write_text(json.dumps(plain))
    again = go(tmp_path / "replay", replay_of(tmp_path / "search"), train, max_steps=200)
    assert differences(found["seen"], again["seen"]) != []  # one batch late
    assert differences(found["optimizer"], again["optimizer"]) == []
