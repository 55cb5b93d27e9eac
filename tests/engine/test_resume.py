"""A run that is killed at any moment and resumed goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_autolr.callbacks.autolrs import AutoLRSCallback
from lightning_autolr.callbacks.schedule import ScheduleCallback
from lightning_autolr.core.record import read_trace
from lightning_autolr.core.requests import LineProbe, Probe, ProbeResult, Requests, Run, Train
from lightning_autolr.schedules import Cosine, Linear, Tabulated
from lightning_autolr.search.base import AbstractSearch, ReplayError
from tests.engine.stateful import StatefulLoader
from tests.engine.subjects import NoisyData, Search, differences

pytestmark = pytest.mark.filterwarnings("ignore:.* undoes a stage in which:UserWarning")

NUM_STEPS = 18


class Killed(Exception):
    """The power cut."""


class Net(LightningModule):
    """Dropout (random numbers), batch norm (buffers), momentum (optimizer state); counts the steps it is made to do."""

    def __init__(self, kill_at: int | None = None, scheduler: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.kill_at = kill_at
        self.scheduler = scheduler

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        COUNTER.steps += 1
        if COUNTER.steps == self.kill_at:
            raise Killed
        return cross_entropy(self.body(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.body(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return ([optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]) if self.scheduler else optimizer


class Counter:
    """Steps of all kinds since the last reset; outside of the module, where no fork puts it back."""

    steps = 0


COUNTER = Counter()


class KillAt(Callback):
    """Kills the run after so many real steps."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


@dataclass(frozen=True)
class Plan(AbstractSearch):
    """Three stages: two probes each, without kept ends; the second stage is undone."""

    lrs: tuple[float, ...] = (0.2, 0.05)
    undo: bool = True
    evaluate: str = "validation"

    def requests(self, run: Run) -> Requests:
        start = None
        for stage in range(3):
            scores = {}
            for lr in self.lrs:
                answer = yield Probe(lr, 3, draw=stage, stage=stage, evaluate=self.evaluate)
                scores[lr] = answer.loss
            best = min(scores, key=scores.__getitem__)
            trained = yield Train(best, 5, Linear(num_steps=9), keep_start=self.undo and stage == 1, stage=stage)
            start = trained.start
            if start is not None:
                yield Train(best / 3, 3, start=start, release=(start,), stage=stage)


class Caching(Net):
    """Makes buffers when it needs them: one at its first batch, one that grows with the third."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(8), persistent=False)
        size = 2 if self.trainer.global_step < 3 else 6
        if not hasattr(self, "cache") or len(self.cache) < size:
            self.register_buffer("cache", torch.full((size, 8), 0.5), persistent=False)
        return super().training_step((batch[0] * self.mask + self.cache[:1], batch[1]), batch_idx)


def run(
    folder: Path, callback: Callback, kill_at: int | None = None, kill_step: int | None = None, ckpt: str | None = None,
    max_steps: int = NUM_STEPS, every: int = 1, scheduler: bool = False, kind: type[Net] = Net,
) -> tuple[Trainer, Net]:  # fmt: skip
    """Train until the end or the kill."""
    seed_everything(0, verbose=False)
    COUNTER.steps = 0
    module = kind(kill_at, scheduler)
    saver = ModelCheckpoint(folder / "ckpt", "{step}", save_top_k=-1, every_n_train_steps=every, save_last=True)
    trainer = Trainer(
        max_steps=max_steps, accelerator="cpu", callbacks=[callback, KillAt(kill_step), saver], log_every_n_steps=1,
        logger=CSVLogger(folder, name="", version=""), enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    train = StatefulLoader(NoisyData(36, jitter=False), 6)
    val = DataLoader(NoisyData(12, jitter=False), 6)
    with contextlib.suppress(Killed):
        trainer.fit(module, train, val, ckpt_path=ckpt)
    return trainer, module


def result(trainer: Trainer, module: Net) -> dict[str, Any]:
    return {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "step": trainer.global_step,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Search, int]:
    """The uninterrupted run."""
    callback = Search(Plan())
    outcome = result(*run(tmp_path_factory.mktemp("whole"), callback))
    return outcome, callback, COUNTER.steps


def resume(folder: Path, callback: Callback, **options: Any) -> tuple[Trainer, Net]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists.*|Experiment logs directory .* exists")
        return run(folder, callback, ckpt=str(folder / "ckpt" / "last.ckpt"), **options)


@pytest.mark.parametrize("step", [1, 4, 5, 6, 9, 10, 12, 13, 17])
def test_killed_in_a_stage(whole: tuple[dict[str, Any], Search, int], step: int, tmp_path: Path) -> None:
    """Steps 5, 10, 13 end stages; those after 5 lie in the stage that will be undone: its start is in the checkpoint."""
    outcome, callback, _ = whole
    killed = Search(Plan())
    run(tmp_path, killed, kill_step=step + 1)
    resumed = Search(Plan())
    assert differences(outcome, result(*resume(tmp_path, resumed))) == []
    assert resumed.schedule == callback.schedule
    assert [(e.request, e.answer) for e in resumed.trace] == [(e.request, e.answer) for e in callback.trace]
    one, other = resumed.summary, callback.summary
    assert all(one[key] == other[key] for key in ("schedule_steps", "search_steps", "probe_steps", "eval_batches"))


# The steps of the second search are numbers 12 to 17: six of the first search, five real ones, then two probes of three.
@pytest.mark.parametrize(("made", "finished"), [(12, 0), (13, 0), (15, 1), (17, 1), (18, 2)])
def test_killed_in_a_search(
    whole: tuple[dict[str, Any], Search, int], made: int, finished: int, tmp_path: Path
) -> None:
    outcome, callback, total = whole
    run(tmp_path, Search(Plan()), kill_at=made)
    assert len(read_trace(str(tmp_path / "autolr" / "trace.jsonl"))) == 3 + finished
    resumed = Search(Plan())
    again = resume(tmp_path, resumed)
    assert differences(outcome, result(*again)) == []
    assert COUNTER.steps == total - 11 - 3 * finished  # no finished probe is made again
    assert [(e.request, e.answer) for e in resumed.trace] == [(e.request, e.answer) for e in callback.trace]
    assert all(resumed.summary[key] == callback.summary[key] for key in ("search_steps", "eval_batches"))


def test_own_training_losses_cost_nothing_when_found_again(tmp_path: Path) -> None:
    run(tmp_path, Search(Plan(evaluate="train")), kill_at=17)
    resumed = Search(Plan(evaluate="train"))
    resume(tmp_path, resumed)
    assert any(entry.answer.evaluations for entry in resumed.trace if isinstance(entry.answer, ProbeResult))
    assert resumed.summary["eval_batches"] == 0


@dataclass(frozen=True)
class Lines(AbstractSearch):
    """A line probe before each stage."""

    def requests(self, run: Run) -> Requests:
        for stage in range(3):
            for lr in (0.1, 0.05):
                yield LineProbe(lr, (0.5, 1.0), draw=stage, evaluate_on="validation")
            yield Train(0.05, 6, stage=stage)


def test_evaluations_of_line_probes_are_counted_when_found_again(tmp_path: Path) -> None:
    whole, resumed = Search(Lines()), Search(Lines())
    run(tmp_path / "whole", whole)
    run(tmp_path / "killed", Search(Lines()), kill_at=12)
    left = read_trace(str(tmp_path / "killed" / "autolr" / "trace.jsonl"))
    assert [type(entry.request) for entry in left[3:]] == [LineProbe]  # the first of the second search
    resume(tmp_path / "killed", resumed)
    assert resumed.summary["eval_batches"] == whole.summary["eval_batches"] > 0


def test_killed_twice_in_one_search(whole: tuple[dict[str, Any], Search, int], tmp_path: Path) -> None:
    """What the first of two kills left over is not lost by the second one."""
    outcome, _, total = whole
    run(tmp_path, Search(Plan()), kill_at=15)
    resume(tmp_path, Search(Plan()), kill_at=1)
    assert differences(outcome, result(*resume(tmp_path, Search(Plan())))) == []
    assert COUNTER.steps == total - 11 - 3
    assert not (tmp_path / "autolr" / "leftover.jsonl").exists()


def test_killed_and_replayed(tmp_path: Path) -> None:
    """A replay of a schedule with an undone stage, killed in that stage, ends like the search."""
    search = Search(Plan())
    outcome = result(*run(tmp_path / "search", search))
    table = Tabulated.from_file(tmp_path / "search" / "autolr" / "schedule.json")
    run(tmp_path / "replay", ScheduleCallback(table), kill_step=8)
    assert differences(outcome, result(*resume(tmp_path / "replay", ScheduleCallback(table)))) == []


def test_multiplied_schedulers_go_on(tmp_path: Path) -> None:
    """The module's scheduler counts from the beginning of the segment, also when that lies before the kill."""
    options: dict[str, Any] = {"on_scheduler": "multiply"}
    outcome = result(*run(tmp_path / "whole", Search(Plan(), **options), scheduler=True))
    run(tmp_path / "killed", Search(Plan(), **options), kill_step=9, scheduler=True)
    resumed = resume(tmp_path / "killed", Search(Plan(), **options), scheduler=True)
    assert differences(outcome, result(*resumed)) == []


@pytest.mark.parametrize("kill_step", [2, 7, 9])
def test_buffers_that_come_with_time(kill_step: int, tmp_path: Path) -> None:
    outcome = result(*run(tmp_path / "whole", Search(Plan()), kind=Caching))
    run(tmp_path / "killed", Search(Plan()), kill_step=kill_step, kind=Caching)
    assert differences(outcome, result(*resume(tmp_path / "killed", Search(Plan()), kind=Caching))) == []


def test_weights_that_are_missing_in_a_resumed_run_are_named(tmp_path: Path) -> None:
    class Wider(Net):
        def on_train_start(self) -> None:
            self.late = nn.Linear(2, 2)

    run(tmp_path, Search(Plan()), kill_step=7, kind=Wider)
    saved = torch.load(tmp_path / "ckpt/last.ckpt")
    saved["state_dict"] = {name: value for name, value in saved["state_dict"].items() if "late" not in name}
    torch.save(saved, tmp_path / "ckpt/last.ckpt")
    with pytest.raises(ValueError, match=r"Expected the module to have late\.bias, late\.weight when"):
        resume(tmp_path, Search(Plan()))


def test_checkpoints_hold_real_weights_and_plain_values(tmp_path: Path) -> None:
    """Each checkpoint's weights are those of a search-free replay at the same step, and load with ``weights_only``."""
    run(tmp_path / "search", Search(Plan()))
    table = Tabulated.from_file(tmp_path / "search" / "autolr" / "schedule.json")
    run(tmp_path / "replay", ScheduleCallback(table))
    names = sorted(p.name for p in (tmp_path / "search" / "ckpt").iterdir())
    assert len(names) == NUM_STEPS + 1
    for name in names:
        one, other = (torch.load(tmp_path / kind / "ckpt" / name, weights_only=True) for kind in ("search", "replay"))
        assert differences(one["state_dict"], other["state_dict"]) == []
        assert differences(one["optimizer_states"], other["optimizer_states"]) == []


def test_changed_options_are_refused(tmp_path: Path) -> None:
    run(tmp_path, Search(Plan()), kill_step=7)
    with pytest.raises(ReplayError, match="Expected request 0 of the resumed search to be the recorded one"):
        resume(tmp_path, Search(Plan(lrs=(0.1, 0.05))))
    run(tmp_path / "b", Search(Plan(undo=False)), kill_step=7)
    with pytest.raises(ReplayError, match="Expected the resumed search to go on with"):
        resume(tmp_path / "b", Search(Plan()))


def test_another_length_is_named_and_can_be_gone_on_with(tmp_path: Path) -> None:
    options: dict[str, Any] = {"figures": False, "ratchet": False}
    run(tmp_path, AutoLRSCallback(**options), max_steps=40)
    said = (
        r"planned for 40 steps when it began, and the run is now of 80: .* Expected request \d+ of the resumed search to be "
        r"the recorded one, got .*=\S+ \(recorded: .* without the callback's state"
    )
    with pytest.raises(ReplayError, match=said) as caught:
        resume(tmp_path, AutoLRSCallback(**options), max_steps=80)
    assert len(str(caught.value)) < 1000
    path = tmp_path / "ckpt" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"]["AutoLRSCallback"]
    torch.save(checkpoint, path)
    callback = AutoLRSCallback(**options)
    resume(tmp_path, callback, max_steps=80)
    assert callback.summary["schedule_steps"] == 40


def test_open_schedule_is_stretched_over_a_longer_run(tmp_path: Path) -> None:
    run(tmp_path, ScheduleCallback(Cosine(), peak_lr=0.1), max_steps=6)
    callback = ScheduleCallback(Cosine(), peak_lr=0.1)
    seen: list[float] = []
    resume(tmp_path, _Watched(callback, seen), max_steps=12)
    expected = Cosine(num_steps=12)
    assert seen == [0.1 * expected(step) for step in range(6, 12)]


class _Watched(ScheduleCallback):
    """Remembers the learning rates of real steps."""

    def __init__(self, callback: ScheduleCallback, seen: list[float]) -> None:
        super().__init__(callback.schedule_to_follow, callback.peak_lr)
        self.seen = seen

    @property
    def state_key(self) -> str:
        return "ScheduleCallback"

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, module, *args)
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_state_after_the_end_goes_on_too(tmp_path: Path) -> None:
    """``trainer.save_checkpoint`` after ``fit`` saves what the last checkpoint of the run holds."""
    callback = Search(Plan())
    trainer, _ = run(tmp_path, callback, max_steps=12)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    after = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"]["Search"]
    last = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["callbacks"]["Search"]
    assert after["active"] is not None
    assert differences(after["trace"], last["trace"]) == []
    assert differences(after["active"] | {"begun": 0, "judged": 0}, last["active"] | {"begun": 0, "judged": 0}) == []
