"""Learning rates: written in place, in the configured ratios, at every step; and together with the module's schedulers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, LearningRateMonitor
from torch import nn

from lightning_autolr.callbacks.schedule import ScheduleCallback
from lightning_autolr.engine.lr import LearningRate
from lightning_autolr.schedules import Constant, Linear
from tests.engine.small import Stages, Tiny, fit_tiny
from tests.engine.subjects import Search


def _weights(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


def test_ratios_are_those_of_the_configuration() -> None:
    one, two, three = _weights(3)
    optimizers = [torch.optim.SGD([{"params": [one], "lr": 0.4}, {"params": [two], "lr": 0.1}], lr=1.0)]
    optimizers.append(torch.optim.SGD([three], lr=0.2))
    lr = LearningRate(optimizers)
    lr.set(0.8)
    assert lr.reference == 0.4
    assert [[g["lr"] for g in o.param_groups] for o in optimizers] == [[0.8, 0.2], [0.4]]
    lr.close()


def test_tensors_are_filled_in_place() -> None:
    tensor = torch.tensor(0.1)
    optimizer = torch.optim.AdamW(_weights(1), lr=tensor)
    lr = LearningRate([optimizer])
    held = optimizer.param_groups[0]["lr"]
    lr.set(0.3)
    assert optimizer.param_groups[0]["lr"] is held
    assert held == torch.tensor(0.3)
    lr.close()


def test_what_is_written_in_between_is_not_trained_with() -> None:
    weight = _weights(1)
    optimizer = torch.optim.SGD(weight, lr=0.1)
    lr = LearningRate([optimizer])
    lr.set(0.5)
    optimizer.param_groups[0]["lr"] = 77.0
    weight[0].grad = torch.ones(2)
    optimizer.step()
    assert weight[0].tolist() == [0.5, 0.5]
    lr.close()
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert weight[0].tolist() == [0.25, 0.25]


@pytest.mark.parametrize(("kind", "key"), [(torch.optim.SGD, "momentum"), (torch.optim.AdamW, "betas")])
def test_momentum_is_the_first_beta_of_the_adam_family(kind: Any, key: str) -> None:
    optimizer = kind(_weights(1), lr=0.1)
    before = optimizer.param_groups[0][key]
    lr = LearningRate([optimizer])
    lr.set(0.1, momentum=0.7)
    assert optimizer.param_groups[0][key] == (0.7 if key == "momentum" else (0.7, before[1]))
    lr.close()


def test_all_learning_rates_zero() -> None:
    with pytest.raises(ValueError, match="Expected at least one parameter group with a learning rate > 0, got"):
        LearningRate([torch.optim.SGD(_weights(1), lr=0.0)])


@pytest.mark.parametrize("scheduler", ["step", "exponential", "lambda", "cosine"])
def test_multiply_is_the_schedule_times_the_scheduler(scheduler: str) -> None:
    """Chainable and closed-form schedulers find their own values, whatever is written for the steps in between."""

    def make(optimizer: Any) -> Any:
        return {
            "step": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
            "exponential": lambda: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t)),
            "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        }[scheduler]()

    alone = torch.optim.SGD(_weights(1), lr=0.1)
    followed = make(alone)
    optimizer = torch.optim.SGD(_weights(1), lr=0.1)
    own = make(optimizer)
    lr = LearningRate([optimizer], multiply=True)
    lr.start_segment()
    trained_with: list[float] = []
    expected = []

    def closure() -> float:
        lr.hide()  # as before the backward that Lightning makes within the step
        trained_with.append(optimizer.param_groups[0]["lr"])
        return 0.0

    for step in range(8):
        lr.set(1 + step)
        lr.show()
        shown = optimizer.param_groups[0]["lr"]
        lr.hide()
        assert optimizer.param_groups[0]["lr"] == alone.param_groups[0]["lr"]
        expected.append((1 + step) * (alone.param_groups[0]["lr"] / 0.1))
        if step != 5:  # a step that a gradient scaler skips
            optimizer.step(closure)
            assert trained_with[-1] == shown
        else:
            trained_with.append(shown)
        alone.step()
        own.step()
        followed.step()
        assert optimizer.param_groups[0]["lr"] == alone.param_groups[0]["lr"]
    assert trained_with == pytest.approx(expected)
    lr.close()


class Scheduled(Tiny):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]


class Rates(Callback):
    """What each real step is trained with: read after the backward, which most steps make by themselves."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen.append([float(g["lr"]) for g in optimizer.param_groups])


def test_scheduler_of_the_module_is_overridden_with_one_warning(tmp_path: Path) -> None:
    rates = Rates()
    with pytest.warns(UserWarning, match="overrides the learning rates of StepLR.") as caught:
        fit_tiny(tmp_path, [ScheduleCallback(Constant(), peak_lr=0.2), rates], Scheduled())
    assert len([w for w in caught if "overrides" in str(w.message)]) == 1
    assert rates.seen == [[0.2]] * 6


def test_scheduler_of_the_module_is_multiplied(tmp_path: Path) -> None:
    rates = Rates()
    fit_tiny(tmp_path, [ScheduleCallback(Constant(), peak_lr=0.2, on_scheduler="multiply"), rates], Scheduled())
    assert rates.seen == [[0.2 * 0.5**step] for step in range(6)]


@pytest.mark.parametrize("scheduler", ["from zero", "from a thousandth", "sequence", "one-cycle", "cyclic"])
def test_a_scheduler_that_starts_low_is_multiplied_relative_to_its_top(scheduler: str) -> None:
    optimizer = torch.optim.SGD(_weights(1), lr=0.05, momentum=0.9)
    schedules = torch.optim.lr_scheduler
    warmup = {"start_factor": 1e-3, "total_iters": 4}
    own: Any = {
        "from zero": lambda: schedules.LambdaLR(optimizer, lambda t: min(1, t / 4)),
        "from a thousandth": lambda: schedules.LinearLR(optimizer, **warmup),
        "sequence": lambda: schedules.SequentialLR(
            optimizer, [schedules.LinearLR(optimizer, **warmup), schedules.CosineAnnealingLR(optimizer, 8)], [4]
        ),
        "one-cycle": lambda: schedules.OneCycleLR(optimizer, 0.05, total_steps=13, pct_start=5 / 13),
        "cyclic": lambda: schedules.CyclicLR(optimizer, 1e-4, 0.05, step_size_up=4),
    }[scheduler]()
    lr = LearningRate([optimizer], multiply=True, schedulers=[own])
    lr.start_segment()
    trained_with = []
    for _ in range(9):
        expected = optimizer.param_groups[0]["lr"] / 0.05
        lr.set(0.2)
        lr.show()
        trained_with.append(optimizer.param_groups[0]["lr"])
        assert trained_with[-1] == pytest.approx(0.2 * expected)
        optimizer.step()
        own.step()
    assert trained_with[0] < 0.01
    assert max(trained_with) == pytest.approx(0.2)
    lr.start_segment()  # the top was reached: relative to what it is now
    lr.set(0.2)
    lr.show()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    lr.is_private = True
    lr.set(0.3)
    lr.show()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)
    lr.close()


def test_scheduler_of_the_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"Expected a module without learning-rate schedulers, got \['StepLR'\]"):
        fit_tiny(tmp_path, [Search(Stages(), on_scheduler="error")], Scheduled())


class Unfreeze(BaseFinetuning):
    """Trains the norm from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.norm, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.norm, optimizer, train_bn=True)


class Finetuned(Tiny):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


def test_added_groups_keep_their_ratio(tmp_path: Path) -> None:
    """Lightning adds them at a tenth of the present learning rate; a tenth they stay."""
    rates = Rates()
    fit_tiny(
        tmp_path, [ScheduleCallback(Linear(), peak_lr=0.2), Unfreeze(), rates], Finetuned(), max_epochs=2, max_steps=8
    )
    assert [len(step) for step in rates.seen] == [1] * 4 + [2] * 4
    assert all(step[1] == pytest.approx(step[0] / 10) for step in rates.seen[4:])
    assert [step[0] for step in rates.seen] == pytest.approx([0.2 * Linear(num_steps=8)(t) for t in range(8)])


def test_added_groups_in_a_search(tmp_path: Path) -> None:
    rates, search = Rates(), Search(Stages(lrs=(0.3, 0.1), num_steps=4))
    fit_tiny(tmp_path, [search, Unfreeze(), rates], Finetuned(), max_epochs=2, max_steps=8)
    assert all(step[1] == pytest.approx(step[0] / 10) for step in rates.seen[4:])


def test_monitor_sees_the_rates_of_the_coming_step(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    monitor = LearningRateMonitor("step")
    fit_tiny(
        tmp_path, [monitor, ScheduleCallback(Linear(), peak_lr=0.2)], logger=CSVLogger(tmp_path), log_every_n_steps=1
    )
    logged = [float(line.split(",")[i]) for line, i in _column(tmp_path, "lr-SGD")]
    assert logged == pytest.approx([0.2 * Linear(num_steps=6)(t) for t in range(6)])


def _column(folder: Path, name: str) -> list[tuple[str, int]]:
    (path,) = folder.rglob("metrics.csv")
    head, *lines = path.read_text().splitlines()
    index = head.split(",").index(name)
    return [(line, index) for line in lines if line.split(",")[index]]


class Wrapping(torch.optim.Optimizer):
    """As Lookahead in many repositories: it leaves out ``super().__init__()``, and with it the step hooks."""

    def __init__(self, inside: torch.optim.Optimizer, param_groups: Any = None) -> None:
        self.inside, self.defaults, self.state = inside, inside.defaults, inside.state
        self.param_groups = inside.param_groups if param_groups is None else param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inside.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inside.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return self.inside.state_dict()


@pytest.mark.parametrize("multiply", [False, True])
def test_optimizer_that_wraps_another(multiply: bool) -> None:
    weight = _weights(1)
    optimizer = Wrapping(torch.optim.SGD(weight, lr=0.1))
    lr = LearningRate([optimizer], multiply)
    lr.set(0.5)
    optimizer.param_groups[0]["lr"] = 0.1 if multiply else 77.0
    weight[0].grad = torch.ones(2)
    optimizer.step()
    assert weight[0].tolist() == [0.5, 0.5]
    assert optimizer.param_groups[0]["lr"] == (0.1 if multiply else 0.5)
    lr.close()


def test_optimizer_without_step_hooks() -> None:
    optimizer = Wrapping(torch.optim.SGD(_weights(1), lr=0.1), [{"params": _weights(1), "lr": 0.1}])
    with pytest.raises(ValueError, match=r"got Wrapping.* Call `super\(\)"):
        LearningRate([optimizer])


def test_fit_with_an_optimizer_that_wraps_another(tmp_path: Path) -> None:
    class Wrapped(Tiny):
        def configure_optimizers(self) -> Any:
            return Wrapping(super().configure_optimizers())

    ends = []
    for kind in (Tiny, Wrapped):
        torch.manual_seed(0)
        _, module = fit_tiny(tmp_path / kind.__name__, [Search(Stages())], kind())
        ends.append(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))
