"""The ratchet inside a Trainer, where something else of the run has a say: other callbacks, schedulers, no returned loss."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lightning_autolr import AutoLRSCallback, BeamSearchCallback, FactorSearchCallback, ScheduleCallback
from lightning_autolr.core.requests import Probe, Requests, Run, Train
from lightning_autolr.engine.driver import SearchCallback
from lightning_autolr.schedules import Constant, Rex, Tabulated
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.ratchet import Ratchet
from tests.engine.small import Tiny, fit_tiny
from tests.engine.subjects import Search
from tests.engine.test_unknown_end import Lrs


class Spoil(Callback):
    """Multiplies the weights after these steps, once each."""

    def __init__(self, *at: int, factor: float = 1e4) -> None:
        self.at, self.factor = set(at), factor

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step in self.at:
            self.at.remove(trainer.global_step)
            with torch.no_grad():
                for weight in module.parameters():
                    weight.mul_(self.factor)


class Manual(Tiny):
    """Manual optimization; the loss is logged, and returned or not."""

    def __init__(self, returns: bool) -> None:
        super().__init__()
        self.returns, self.automatic_optimization = returns, False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss if self.returns else None


def guarded(**options: Any) -> ScheduleCallback:
    return ScheduleCallback(Constant(), ratchet=True, figures=False, **options)


PUBLISHED: dict[str, Any] = {"method": "published", "tau": 20, "num_candidates": 3, "min_lr": 1e-3, "max_lr": 0.1}


@pytest.mark.parametrize(
    "callback",
    [
        AutoLRSCallback(ratchet=True, figures=False, **PUBLISHED),
        FactorSearchCallback(every=10, ratchet=True, figures=False),
        BeamSearchCallback(interval=10, ratchet=True, figures=False),
    ],
    ids=["published", "factors", "beam"],
)
def test_a_search_that_undoes_for_itself_and_a_ratchet_around_it(tmp_path: Path, callback: SearchCallback) -> None:
    _, module = fit_tiny(tmp_path, [callback, Spoil(33, 57)], max_steps=80)
    assert sum(s.num_steps for s in callback.schedule) == 80
    assert all(bool(w.isfinite().all()) for w in module.parameters())


NO_LOADER = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


@NO_LOADER
@pytest.mark.parametrize("objective", ["validation", "holdout"])
def test_looks_at_batches_that_are_held_out(tmp_path: Path, objective: Any) -> None:
    callback = ScheduleCallback(
        Constant(), objective=objective, ratchet=Ratchet(objective="holdout"), figures=False, eval_batches=1
    )
    fit_tiny(tmp_path, [callback], max_steps=40, val=False if objective == "holdout" else None)
    assert callback.summary["undone_steps"] < 30
    assert callback.summary["eval_batches"] > 0


@NO_LOADER
def test_looks_at_what_the_objective_says(tmp_path: Path) -> None:
    callback = AutoLRSCallback(objective="holdout", ratchet=Ratchet(patience=3), eval_batches=1, figures=False)
    assert callback.ratchet == Ratchet(patience=3, objective="holdout")
    fit_tiny(tmp_path, [callback], max_steps=20, val=False)


def test_tau_is_the_longest_stage() -> None:
    assert (
        AutoLRSCallback(tau=70).ratchet.longest_stage
        == AutoLRSCallback(tau=70, ratchet=True).ratchet.longest_stage
        == 70
    )


def test_reads_a_loss_that_is_only_logged(tmp_path: Path) -> None:
    trains = {}
    for returns in (True, False):
        callback = guarded()
        torch.manual_seed(0)
        fit_tiny(tmp_path, [callback, Spoil(25)], module=Manual(returns), max_steps=80)
        trains[returns] = [(e.request, e.answer) for e in callback.trace if isinstance(e.request, Train)]
    assert trains[False] == trains[True]
    assert len(trains[False][0][1].losses) == 10
    assert any(request.reason.startswith("The loss blew up") for request, _ in trains[False])


@pytest.mark.filterwarnings("ignore:.*a training loss was not finite:UserWarning")
@pytest.mark.parametrize("at", [97, 98, 101])
def test_no_validation_meets_weights_known_to_be_broken(tmp_path: Path, at: int) -> None:
    stopper = EarlyStopping("val_loss", patience=1000)
    callback = guarded()
    trainer, module = fit_tiny(tmp_path, [callback, stopper, Spoil(at, factor=1e30)], max_steps=140)
    assert trainer.global_step == 140
    assert stopper.stopped_epoch == 0
    assert all(bool(w.isfinite().all()) for w in module.parameters())


@pytest.mark.parametrize("filename", ["best", None])
def test_tells_of_a_best_checkpoint_that_was_undone(tmp_path: Path, filename: str | None) -> None:
    saver = ModelCheckpoint(tmp_path, filename=filename, monitor="val_loss", save_top_k=1)
    callback = guarded(peak_lr=1e-3)
    spoil = Spoil(34, factor=1e4)
    with pytest.warns(UserWarning, match="undoes a stage in which a checkpoint was saved as the best one"):
        fit_tiny(tmp_path, [callback, spoil, saver], max_steps=60, enable_checkpointing=True)


def test_tells_of_it_after_a_resume_too(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", filename="best", monitor="val_loss", save_top_k=1)
    often = ModelCheckpoint(tmp_path / "all", filename="at-{step}", every_n_train_steps=4, save_top_k=-1)
    fit_tiny(tmp_path, [guarded(peak_lr=1e-3), best, often], max_steps=40, enable_checkpointing=True)
    state = torch.load(tmp_path / "all" / "at-step=32.ckpt", weights_only=False)
    (saved,) = [s for name, s in state["callbacks"].items() if name.startswith("ScheduleCallback")]
    assert [list(b) for b in saved["best_at"].values()] == [[str(tmp_path / "best" / "best.ckpt")]]


@pytest.mark.parametrize(("lr", "warnings_of_it"), [(0.05, 1), (50.0, 0)])
def test_tells_of_it_where_a_probe_kept_the_state(tmp_path: Path, lr: float, warnings_of_it: int) -> None:
    """And only where the best checkpoint came after it."""

    class Keeps(AbstractSearch):
        def requests(self, run: Run) -> Requests:
            yield Train(0.05, 4)
            kept = yield Probe(1.0, 0, evaluate="none", keep_end=True)
            yield Train(lr, 4)
            yield Train(0.01, 4, start=kept.end, release=(kept.end,))

    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_tiny(tmp_path, [Search(Keeps(), figures=False), saver], max_steps=12, enable_checkpointing=True)
    assert sum("undoes a stage in which a checkpoint" in str(w.message) for w in caught) == warnings_of_it


class PerEpoch(Tiny):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.1)
        return [optimizer], [{"scheduler": scheduler, "interval": "epoch"}]


class Shown(Callback):
    """The learning rates that whoever looks when a batch starts is shown: the module's scheduler has no say yet."""

    def __init__(self) -> None:
        self.lrs = list[float]()

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_module_schedulers_go_on_across_looks(tmp_path: Path) -> None:
    lrs = {}
    for ratchet in (False, True):
        callback = ScheduleCallback(Constant(), ratchet=ratchet, on_scheduler="multiply", figures=False)
        seen = Shown()
        fit_tiny(tmp_path, [callback, seen], module=PerEpoch(lr=1e-3), max_steps=60)
        lrs[ratchet] = seen.lrs
    assert lrs[True] == lrs[False]
    assert lrs[True][0] == pytest.approx(1e-3)
    assert lrs[True][45] == pytest.approx(1e-5)


def test_a_replay_has_the_module_schedulers_where_the_run_had_them(tmp_path: Path) -> None:
    class PerStep(Tiny):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def weights(folder: Path, callback: SearchCallback) -> list[torch.Tensor]:
        torch.manual_seed(0)
        return list(fit_tiny(folder, [callback], module=PerStep(), max_steps=60)[1].parameters())

    callback = AutoLRSCallback(on_scheduler="multiply", figures=False)
    found = weights(tmp_path, callback)
    assert sum(s.goes_on for s in callback.schedule) > 2
    schedule = Tabulated.from_file(tmp_path / "autolr/schedule.json")
    replayed = weights(tmp_path / "replay", ScheduleCallback(schedule, on_scheduler="multiply", figures=False))
    assert all(torch.equal(a, b) for a, b in zip(found, replayed, strict=True))


def test_a_run_of_which_nothing_was_kept_is_warned_of(tmp_path: Path) -> None:
    class Worse(Tiny):
        steps = 0

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.steps += 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", float(self.steps))

    with pytest.warns(UserWarning, match="took back 59 of 60 steps: nothing after them was better"):
        fit_tiny(tmp_path, [guarded()], Worse(), max_steps=60)


def test_an_undo_lowers_the_rate_for_good_when_the_end_is_unknown(tmp_path: Path) -> None:
    callback = AutoLRSCallback(tau=50, num_candidates=1, min_lr=0.05, max_lr=0.05, figures=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        end = Lrs(60, lambda: callback.finish_in(1))
        fit_tiny(tmp_path, [callback, Spoil(22), end], max_steps=-1, max_epochs=-1)
    trains = [e.request for e in callback.trace if isinstance(e.request, Train)]
    first = next(i for i, train in enumerate(trains) if train.start is not None)
    assert trains[first].reason.startswith("The loss blew up")
    assert first + 3 < len(trains)
    assert all(t.lr < trains[0].lr for t in trains[first:])


def test_rex_is_cut_into_pieces_that_go_on(tmp_path: Path) -> None:
    callback = ScheduleCallback(Rex(), ratchet=True, figures=False)
    fit_tiny(tmp_path, [callback], max_steps=40)
    trains = [e.request for e in callback.trace if isinstance(e.request, Train)]
    assert [t.goes_on for t in trains] == [False] + [True] * (len(trains) - 1)


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("step", [10, 15, 20, 24, 25])  # some of them end a stage
def test_an_end_that_was_not_planned_is_warned_of(step: int, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"the run was ended after {step} of 40 steps.*keeps its last"):
        fit_tiny(tmp_path, [guarded(), StopAt(step)], max_steps=40)
