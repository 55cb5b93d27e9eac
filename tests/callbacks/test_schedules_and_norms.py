"""What is written into the optimizer, what is measured at it, and what a range test leaves behind."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint
from torch.optim import lr_scheduler as sched
from torch.utils.data import DataLoader

from lightning_autolr import GradNormCallback, RangeTestCallback, RefinedScheduleCallback, ScheduleCallback
from lightning_autolr.core.range_rules import RangeSuggestion
from lightning_autolr.core.refine import refine_schedule
from lightning_autolr.schedules import (
    Cosine,
    Exponential,
    Joined,
    Linear,
    OneCycle,
    Rex,
    Scaled,
    Schedule,
    Segment,
    Shifted,
    Tabulated,
    to_plain,
)
from tests.callbacks.test_contract import Ordered, Tiny, data, trainer
from tests.test_schedules import ZOO


class Scheduled(Tiny):
    """With one of torch's schedulers."""

    def __init__(
        self, make: Callable[[Any], Any] | None = None, lr: float = 0.1, optimizer: Any = torch.optim.SGD
    ) -> None:
        super().__init__()
        self.make, self.lr, self.kind = make, lr, optimizer

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.norm.parameters(), "lr": 0.1 * self.lr}, {"params": self.head.parameters()}]
        optimizer = self.kind(groups, lr=self.lr)
        if self.make is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make(optimizer), "interval": "step"}]


class Seen(Callback):
    """The learning rates, momenta and gradient norms of each step."""

    def __init__(self) -> None:
        self.lrs: list[list[float]] = []
        self.momenta: list[float] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        self.norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads)))
        self.lrs.append([float(g["lr"]) for g in optimizer.param_groups])
        group = optimizer.param_groups[0]
        self.momenta.append(group["betas"][0] if "betas" in group else group["momentum"])


def run(module: Tiny, folder: Path, *callbacks: Callback, **settings: Any) -> Seen:
    seed_everything(0, verbose=False)
    seen = Seen()
    fit = trainer(folder, *callbacks, seen, enable_checkpointing=False, **{"max_steps": 24, **settings}).fit
    fit(module, DataLoader(data(), batch_size=8, shuffle=True), DataLoader(data(), batch_size=24))
    return seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_schedule_is_written_at_each_optimizer_step_in_the_groups_ratio(accumulate: int, tmp_path: Path) -> None:
    seen = run(Scheduled(), tmp_path, ScheduleCallback(Rex(), peak_lr=0.5), accumulate_grad_batches=accumulate)
    expected = [0.5 * Rex(num_steps=24)(t) for t in range(24)]
    assert [lr for _, lr in seen.lrs] == expected
    assert [lr for lr, _ in seen.lrs] == pytest.approx([0.1 * lr for lr in expected])


def test_past_its_end_a_schedule_stays(tmp_path: Path) -> None:
    seen = run(Scheduled(), tmp_path, ScheduleCallback(Cosine(num_steps=10, end=0.2), peak_lr=0.5))
    assert [lr for _, lr in seen.lrs[10:]] == pytest.approx([0.1] * 14)


@pytest.mark.parametrize(
    "table",
    [
        Tabulated((Segment(10, 0.1, Linear(10)),)),  # past its end
        Tabulated((Segment(4, 0.1, Exponential(10)),)),  # and past the end of its shape, which has one of its own
        Tabulated((Segment(4, 0.1), Segment(0, 0.4), Segment(20, 0.2))),
        Tabulated((Segment(4, 0.1), Segment(5, 0.0), Segment(15, 0.2))),
        Tabulated((Segment(99, 0.1), Segment(1, 0.2, Linear(2)))).stretched(20),
    ],
)
@pytest.mark.filterwarnings("ignore:ScheduleCallback repeats:UserWarning")
def test_a_table_is_trained_as_it_says(table: Tabulated, tmp_path: Path) -> None:
    seen = run(Scheduled(), tmp_path, ScheduleCallback(table))
    assert [lr for _, lr in seen.lrs] == [table(step) for step in range(24)]


@pytest.mark.parametrize("length", [20, 30])
def test_a_found_schedule_of_another_length_is_told(length: int, tmp_path: Path) -> None:
    found = Tabulated((Segment(5, 0.1), Segment(5, 0.3, undone=True), Segment(length - 10, 0.2, Linear(), back_to=1)))
    found.to_file(path := tmp_path / "schedule.json")
    with pytest.warns(UserWarning, match=rf"repeats {length} steps in a run of 24: .*num_steps=24"):
        run(Scheduled(), tmp_path, ScheduleCallback(Tabulated.from_file(path)))
    stretched = Tabulated.from_file(path, num_steps=24)
    seen = run(Scheduled(), tmp_path, ScheduleCallback(stretched))  # a warning would be an error here
    assert [lr for _, lr in seen.lrs] == [stretched(step) for step in range(24)]
    assert seen.lrs[-1][1] < 0.03  # it comes to its end


@pytest.mark.parametrize(
    "wrap",
    [
        lambda found: Scaled(found, 1.0),
        lambda found: Joined((found,), ()),
        lambda found: Shifted(found, 0),
        lambda found: Tabulated((Segment(9, 1.0, found),)),
    ],
)
def test_a_found_schedule_within_another_has_no_undone_segments(wrap: Callable[[Schedule], Schedule]) -> None:
    """Nobody would take them back."""
    found = Tabulated((Segment(3, 0.1), Segment(3, 0.2, undone=True), Segment(3, 0.1, back_to=1)))
    with pytest.raises(ValueError, match=r"Put `found.kept\(\)` there"):
        ScheduleCallback(wrap(found))
    ScheduleCallback(wrap(found.kept()))


@pytest.mark.parametrize("kind", [lambda g, lr: torch.optim.SGD(g, lr=lr, momentum=0.9), torch.optim.AdamW])
def test_one_cycle_turns_the_momentum_too(kind: Any, tmp_path: Path) -> None:
    seen = run(Scheduled(optimizer=kind), tmp_path, ScheduleCallback(OneCycle()))
    momentum = OneCycle(num_steps=24).momentum_schedule()
    assert momentum is not None
    assert seen.momenta == pytest.approx([momentum(t) for t in range(24)])


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_gradient_norms(norm: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    callback = GradNormCallback(norm)
    seen = run(Scheduled(), tmp_path, callback, **settings)
    assert len(callback.norms) == 24
    if norm == "l2":  # measured before clipping
        assert callback.norms == pytest.approx(seen.norms, rel=1e-5)
    else:
        assert all(a >= b for a, b in zip(callback.norms, seen.norms, strict=True))
    written = json.loads((tmp_path / "autolr" / "grad_norms.json").read_text())
    assert [float(x) for x in written["norms"]] == callback.norms
    assert refine_schedule(callback.norms, norm=norm).length == 24


def test_norms_after_clipping(tmp_path: Path) -> None:
    callback = GradNormCallback(clipped=True)
    seen = run(Scheduled(), tmp_path, callback, gradient_clip_val=0.2)
    assert callback.norms == pytest.approx([min(x, 0.2) for x in seen.norms], rel=1e-3)
    assert max(seen.norms) > 0.2


def test_norms_under_a_gradient_scaler_are_unscaled(tmp_path: Path) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    plain, scaled = GradNormCallback(), GradNormCallback()
    torch.manual_seed(0)
    first = Scheduled()
    second = copy.deepcopy(first)
    run(first, tmp_path, plain, precision="bf16-mixed")
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    run(second, tmp_path, scaled, plugins=[plugin])
    assert scaled.norms[0] == pytest.approx(plain.norms[0], rel=0.05)


def test_refined_while_training(tmp_path: Path) -> None:
    callback = RefinedScheduleCallback(peak_lr=0.3, every=0.25)
    seen = run(Scheduled(), tmp_path, callback)
    lrs = [lr for _, lr in seen.lrs]
    assert lrs[0] == pytest.approx(0.3)
    assert lrs[-1] == pytest.approx(0.0, abs=1e-9)
    assert all(b <= 1.11 * a for a, b in itertools.pairwise(lrs))
    recorded = [n for entry in callback.trace for n in entry.answer.grad_norms]
    assert recorded == pytest.approx(seen.norms, rel=1e-5)


@pytest.mark.parametrize("num_steps", [1, 5, 20, 101, 301])
def test_refined_to_the_last_step(num_steps: int, tmp_path: Path) -> None:
    """The last plan may be for one step alone, whose factor is 0."""
    callback = RefinedScheduleCallback(peak_lr=0.3)
    seen = run(Scheduled(), tmp_path, callback, max_steps=num_steps)
    assert len(seen.lrs) == num_steps
    assert num_steps == 1 or seen.lrs[-1][1] == pytest.approx(0.0, abs=1e-9)


class TwoOptimizers(Tiny):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizers: Any = self.optimizers()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.norm, self.head)]


def test_milestones_count_the_steps_of_all_optimizers_as_one(tmp_path: Path) -> None:
    test = RangeTestCallback(milestones=(5,), unit="step", num_steps=20, repeats=1)
    run(TwoOptimizers(), tmp_path, test, max_steps=24)
    assert list(test.suggestions) == [5]


class TwoSteps(TwoOptimizers):
    """Two steps of one optimizer a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        for _ in range(2):
            loss = Tiny.training_step(self, batch, batch_idx)
            optimizer: Any = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        return Tiny.configure_optimizers(self)


def test_a_milestone_within_a_batch_is_tested_at_the_next(tmp_path: Path) -> None:
    path = tmp_path / "at_6.ckpt"

    def save(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            trainer.save_checkpoint(path)

    test = RangeTestCallback(milestones=(1, 5, 7), unit="step", num_steps=20, repeats=1)
    run(TwoSteps(), tmp_path, test, LambdaCallback(on_train_batch_end=save), max_steps=10)
    assert list(test.suggestions) == [1, 5, 7]
    assert torch.load(path)["callbacks"]["RangeTestCallback"]["passed"] == 4  # so a resumed run makes the test of 5


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: sched.StepLR(o, 5, 0.5),
    "MultiStepLR": lambda o: sched.MultiStepLR(o, [4, 9]),
    "ConstantLR": lambda o: sched.ConstantLR(o, 0.5, 6),
    "LinearLR": lambda o: sched.LinearLR(o, 0.5, total_iters=8),
    "ExponentialLR": lambda o: sched.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: sched.PolynomialLR(o, 40),
    "CosineAnnealingLR": lambda o: sched.CosineAnnealingLR(o, 40),
    "CosineAnnealingWarmRestarts": lambda o: sched.CosineAnnealingWarmRestarts(o, 7),
    "LambdaLR": lambda o: sched.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: sched.MultiplicativeLR(o, lambda t: 0.9),
    "OneCycleLR": lambda o: sched.OneCycleLR(o, [g["lr"] for g in o.param_groups], total_steps=40),
    "CyclicLR": lambda o: sched.CyclicLR(
        o, [0.1 * g["lr"] for g in o.param_groups], [g["lr"] for g in o.param_groups], 5
    ),
    "SequentialLR": lambda o: sched.SequentialLR(o, [sched.LinearLR(o, 0.1, total_iters=5), sched.StepLR(o, 4)], [5]),
    "ChainedScheduler": lambda o: sched.ChainedScheduler([sched.LinearLR(o, 0.5, total_iters=5), sched.StepLR(o, 9)]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_every_stock_scheduler_keeps_what_the_range_test_applied(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is suggested is tested elsewhere: here it is what becomes of it.
    found = 0.037
    conclusion = RangeSuggestion(found, found, found, "given")
    monkeypatch.setattr("lightning_autolr.search.range_test.suggest", lambda curves, rule: conclusion)
    make = SCHEDULERS[name]
    sgd: Any = partial(torch.optim.SGD, momentum=0.9)
    callback = RangeTestCallback(apply=True, num_steps=20, repeats=1)
    tested = run(Scheduled(make, optimizer=sgd), tmp_path, callback)
    assert callback.suggestions[0] is conclusion
    configured = run(Scheduled(make, lr=found, optimizer=sgd), tmp_path)
    for a, b in zip(tested.lrs, configured.lrs, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_a_range_test_that_is_not_applied_leaves_no_trace(tmp_path: Path) -> None:
    def weights(*callbacks: Callback) -> list[torch.Tensor]:
        seed_everything(0, verbose=False)
        module = Tiny()
        run(module, tmp_path, *callbacks)
        return list(module.parameters())

    callback = RangeTestCallback(milestones=(0, 1), num_steps=20, repeats=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(callback), strict=True))
    assert sorted(callback.suggestions) == [0, 1]


@pytest.mark.parametrize("on_scheduler", ["multiply", "override"])
@pytest.mark.filterwarnings("ignore:ScheduleCallback overrides")
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_a_range_test_beside_a_callback_that_sets_the_learning_rate(on_scheduler: Any, tmp_path: Path) -> None:
    def weights(*callbacks: Callback) -> list[torch.Tensor]:
        seed_everything(0, verbose=False)
        module = Scheduled(lambda o: sched.ExponentialLR(o, 0.9))
        run(module, tmp_path, *callbacks, ScheduleCallback(Rex(), peak_lr=0.5, on_scheduler=on_scheduler))
        return list(module.parameters())

    test = RangeTestCallback(milestones=(0, 3, 5), unit="step", num_steps=20, repeats=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(test), strict=True))
    assert sorted(test.suggestions) == [0, 3, 5]


@pytest.mark.parametrize(
    "wrong",
    [
        {"milestones": ()},
        {"milestones": (-1,)},
        {"milestones": 0},
        {"milestones": (0.5,)},
        {"num_steps": 20.5},
        {"repeats": 1.5},
        {"unit": "hour"},
        {"min_lr": 1.0, "max_lr": 0.1},
        {"rule": "best"},
    ],
)
def test_a_range_test_says_no(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        RangeTestCallback(**wrong)


def test_a_range_test_of_a_fast_dev_run_is_a_short_one(tmp_path: Path) -> None:
    steps: list[int] = []

    class Counted(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    test = RangeTestCallback()
    run(Counted(), tmp_path, test, fast_dev_run=True)
    assert list(test.suggestions) == [0]
    assert len(steps) == 10 + 1


class Interrupted(Scheduled):
    """Ends in the midst of its second range test."""

    steps_left = 0  # of the class: no private step is taken back in it

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        Interrupted.steps_left -= 1
        if Interrupted.steps_left == 0:
            raise InterruptedError
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("older", [False, True])
def test_an_interrupted_range_test_is_made_again_and_earlier_ones_are_kept(older: bool, tmp_path: Path) -> None:
    def go(kind: type[Scheduled], ckpt_path: str | None = None, *more: Callback) -> RangeTestCallback:
        test = RangeTestCallback(milestones=(0, 6), unit="step", num_steps=20, repeats=2, apply=True)
        seed_everything(0, verbose=False)
        module = kind()
        fit = trainer(tmp_path, test, *more, max_steps=8, enable_checkpointing=False).fit
        fit(module, Ordered(data()), DataLoader(data(), batch_size=24), ckpt_path=ckpt_path)
        return test

    expected = go(Scheduled)
    Interrupted.steps_left = 2 * 20 + 6 + 5
    path = tmp_path / "interrupted.ckpt"
    with pytest.raises(InterruptedError):
        go(Interrupted, None, LambdaCallback(on_exception=lambda trainer, *_: trainer.save_checkpoint(path)))
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["RangeTestCallback"]
    assert state["done"] == [0]
    if older:
        del state["suggestions"]
        torch.save(checkpoint, path)
    resumed = go(Scheduled, str(path))
    assert list(resumed.suggestions) == ([6] if older else [0, 6])
    if not older:
        assert to_plain(resumed.suggestions[0]) == to_plain(expected.suggestions[0])
    written = json.loads((tmp_path / "autolr/range_test.json").read_text())
    assert [found["at"] for found in written] == list(resumed.suggestions)


class Crash(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 13:
            raise InterruptedError


@pytest.mark.parametrize("schedule", ZOO, ids=repr)
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning", "ignore:ScheduleCallback repeats:UserWarning")
def test_every_schedule_is_fitted_and_resumed_after_a_crash(schedule: Schedule, tmp_path: Path) -> None:
    def go(*more: Callback, ckpt_path: str | None = None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = Tiny()
        saver = ModelCheckpoint(tmp_path / str(len(more)), every_n_train_steps=10, save_top_k=-1, filename="{step}")
        fit = trainer(tmp_path, ScheduleCallback(schedule, peak_lr=0.1), saver, *more, max_steps=20).fit
        fit(module, Ordered(data()), DataLoader(data(), batch_size=24), ckpt_path=ckpt_path)
        return list(module.parameters())

    expected = go()
    with pytest.raises(InterruptedError):
        go(Crash())
    resumed = go(Callback(), Callback(), ckpt_path=str(tmp_path / "1" / "step=10.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(expected, resumed, strict=True))


def test_a_second_fit_of_the_same_callbacks_begins_anew(tmp_path: Path) -> None:
    norms, test = GradNormCallback(), RangeTestCallback(num_steps=20, repeats=1)
    run(Scheduled(), tmp_path, norms, test)
    assert len(norms.norms) == 24
    first = test.suggestions.pop(0)
    run(Scheduled(), tmp_path, norms, test, max_steps=10)
    assert len(norms.norms) == 10
    assert test.suggestions[0] is not first


def test_norms_of_an_earlier_fit_are_set_aside(tmp_path: Path) -> None:
    for steps in (4, 6):
        run(Tiny(), tmp_path, GradNormCallback(), max_steps=steps)
    run(Tiny(), tmp_path, GradNormCallback(), ScheduleCallback(Rex()), max_steps=8)
    run(Tiny(), tmp_path, GradNormCallback(), ScheduleCallback(Rex()), max_steps=10)
    files = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/grad_norms.json")}
    lengths = {folder: len(record["norms"]) for folder, record in files.items()}
    assert lengths == {"autolr-1": 4, "autolr-2": 6, "autolr-3": 8, "autolr": 10}


def test_a_range_test_of_an_earlier_fit_is_set_aside(tmp_path: Path) -> None:
    for num_steps in (20, 30):
        run(Tiny(), tmp_path, RangeTestCallback(num_steps=num_steps, repeats=1, figures=False), max_steps=2)
    files = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/range_test.json")}
    lengths = {folder: len(tests[0]["suggestion"]["curves"][0]["lrs"]) for folder, tests in files.items()}
    assert lengths["autolr-1"] < lengths["autolr"]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_norms_go_on_in_a_resumed_fit(tmp_path: Path) -> None:
    run(Tiny(), tmp_path, GradNormCallback(), LambdaCallback(on_train_end=_save), max_steps=4)
    seed_everything(0, verbose=False)
    again = trainer(tmp_path, norms := GradNormCallback(), enable_checkpointing=False, max_steps=6)
    loaders = DataLoader(data(), batch_size=8), DataLoader(data(), batch_size=24)
    again.fit(Tiny(), *loaders, ckpt_path=str(tmp_path / "end.ckpt"))
    assert len(norms.norms) == 6
    assert not list(tmp_path.glob("autolr-*"))


def _save(trainer: Any, module: Any) -> None:
    trainer.save_checkpoint(Path(trainer.default_root_dir, "end.ckpt"))


def test_a_range_test_applies_nothing_beside_a_callback_that_sets_the_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"beside `RangeTestCallback.apply=True.`, got .'ScheduleCallback'"
    ):
        run(Scheduled(), tmp_path, RangeTestCallback(apply=True), ScheduleCallback(Rex()))
    run(Scheduled(), tmp_path, RangeTestCallback(num_steps=20, repeats=1), ScheduleCallback(Rex()))


def test_the_account_tells_the_peaks_of_a_replay(tmp_path: Path) -> None:
    table = Tabulated((Segment(3, 0.0), Segment(3, 0.1)))
    found, shifted = ScheduleCallback(table), ScheduleCallback(Shifted(table, 0))
    for callback in (found, shifted):
        run(Tiny(), tmp_path, callback, max_steps=6)
    assert found.summary["learning_rates"] == [0.0, 0.1]
    assert shifted.summary["learning_rates"] == [0.1]  # one piece, of a shape of learning rates
