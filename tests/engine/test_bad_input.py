"""Wrong input is refused early, with what was expected, what came, and what to do."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_autolr.callbacks.autolrs import AutoLRSCallback
from lightning_autolr.callbacks.grad_norm import RefinedScheduleCallback
from lightning_autolr.callbacks.schedule import ScheduleCallback
from lightning_autolr.engine.checks import check_trainer
from lightning_autolr.engine.driver import SearchCallback
from lightning_autolr.schedules import Constant, Cosine, Segment, Tabulated
from lightning_autolr.search.ratchet import Ratchet
from tests.engine.small import Stages, Tiny, fit_tiny, loader
from tests.engine.subjects import NoisyData, Search


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "accuracy"}, r"Expected objective to be one of .*, got 'accuracy'"),
        ({"mode": "lower"}, r"Expected mode to be one of \('min', 'max'\), got 'lower'"),
        ({"fork": "gpu"}, r"Expected fork to be one of \('device', 'cpu', 'disk'\), got 'gpu'"),
        ({"on_scheduler": "ignore"}, r"Expected on_scheduler to be one of .*, got 'ignore'"),
        ({"eval_batches": 0}, r"Expected a whole eval_batches >= 1 or None, got eval_batches=0"),
        ({"eval_batches": 2.5}, r"Expected a whole eval_batches >= 1 or None, got eval_batches=2.5"),
        ({"total_steps": 0}, r"Expected total_steps >= 1 or 'auto', got total_steps=0"),
        ({"total_steps": "all"}, r"Expected total_steps >= 1 or 'auto', got total_steps='all'"),
        ({"total_steps": 2.5}, r"Expected total_steps >= 1 or 'auto', got total_steps=2.5"),
        ({"seed": -1}, r"Expected a whole seed >= 0, got seed=-1"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Search(**options)


def test_schedule_arguments() -> None:
    with pytest.raises(TypeError, match=r"Expected a Schedule, got 'cosine'. For a file pass"):
        ScheduleCallback("cosine")  # type: ignore[arg-type]
    for peak_lr in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="Expected peak_lr > 0 or None"):
            ScheduleCallback(Constant(), peak_lr=peak_lr)


def test_a_score_of_which_less_is_better() -> None:
    with pytest.warns(UserWarning, match="takes less of 'val/acc' for better"):
        Search(Stages(), monitor="val/acc")


def test_a_loss_of_which_more_is_better() -> None:
    with pytest.warns(UserWarning, match="takes more of 'val_loss' for better"):
        Search(Stages(), mode="max")


def test_a_misspelt_monitor_is_told_and_no_loss_taken_for_it(tmp_path: Path) -> None:
    class Returns(Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("val_acc", 1 - self.loss(batch))
            return self.loss(batch)

    with pytest.raises(ValueError, match=r"Expected `validation_step` to log 'val_accuracy'.*\['val_acc'\]"):
        fit_tiny(tmp_path, [Search(Stages(), monitor="val_accuracy", mode="max")], Returns())
    fit_tiny(tmp_path, [Search(Stages())], Returns())  # what is returned stands for "val_loss"


def test_the_base_class_alone_has_no_search(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Expected a callback with a search of its own"):
        fit_tiny(tmp_path, [SearchCallback()])


@pytest.mark.parametrize(
    "options",
    [
        {"anneal": "Rex"},
        {"anneal": Cosine},
        {"tau": 2.5},
        {"ratchet": "yes"},
        {"seed": 1.5},
        {"search_callbacks": Callback()},
        {"monitor": None},
        {"probe_dataloader": {"class_path": "torch.utils.data.DataLoader"}},
    ],
)
def test_values_of_another_kind_are_told_before_anything_is_trained(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^Expected "):
        AutoLRSCallback(**options)


def test_whole_numbers_of_numpy_are_taken() -> None:
    callback = AutoLRSCallback(tau=np.int64(100), total_steps=np.int64(50))
    assert (type(callback.search.tau), type(callback.total_steps)) == (int, int)


class OtherName(torch.optim.Optimizer):
    """Its groups have no "lr"."""

    def step(self, closure: Any = None) -> Any:
        raise AssertionError("no step is made")


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (None, "Expected an optimizer, got none"),
        ("own", "Expected a learning rate in each parameter group, got none in SGD"),
        ("other", "Expected a learning rate in each parameter group, got none in OtherName"),
    ],
)
def test_no_learning_rate(tmp_path: Path, optimizer: str | None, message: str) -> None:
    class Own(Tiny):
        def configure_optimizers(self) -> Any:
            if optimizer is None:
                return None
            if optimizer == "other":
                return OtherName(self.parameters(), {"step_size": 0.1})
            sgd = torch.optim.SGD(self.parameters(), lr=0.1)
            sgd.param_groups[0]["lr"] = None
            return sgd

    with pytest.raises(ValueError, match=message):
        fit_tiny(tmp_path, [Search(Stages())], Own())


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_epochs_of_unlike_numbers_of_batches(tmp_path: Path) -> None:
    class Growing(LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(24 * (1 + self.trainer.current_epoch))

        def val_dataloader(self) -> Any:
            return loader(12, False)

    for epochs, steps in ((2, -1), (-1, 10)):
        options = {"max_epochs": epochs, "max_steps": steps, "reload_dataloaders_every_n_epochs": 1}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit_tiny(tmp_path, [Search(Stages())], train=Growing(), val=False, **options)
        said = [str(w.message) for w in caught if "has planned for 8 steps, epochs of 4 batches" in str(w.message)]
        assert len(said) == (1 if steps == -1 else 0)


def test_a_second_fit_keeps_the_record_of_the_first(tmp_path: Path) -> None:
    for _ in range(3):
        fit_tiny(tmp_path, [Search(Stages())])
    assert sorted(path.name for path in tmp_path.glob("autolr*")) == ["autolr", "autolr-1", "autolr-2"]
    assert all((path / "summary.json").exists() for path in tmp_path.glob("autolr*"))


def test_unknown_monitor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected `validation_step` to log 'loss_b' .* logged \['val_loss'\]"):
        fit_tiny(tmp_path, [Search(Stages(), monitor="loss_b")])


def test_no_validation(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Expected a `validation_step`, a validation dataloader"):
        fit_tiny(tmp_path, [Search(Stages())], limit_val_batches=0)
    fit_tiny(tmp_path, [Search(Stages(evaluate="holdout"), objective="holdout")], limit_val_batches=0)
    fit_tiny(tmp_path, [ScheduleCallback(Constant())], limit_val_batches=0)


def test_a_known_schedule_scores_no_candidates(tmp_path: Path) -> None:
    with_undo = Tabulated((Segment(2, 0.5, undone=True), Segment(4, 0.1, back_to=0)))
    looks = Ratchet(objective="holdout")
    for callback in (
        ScheduleCallback(with_undo),
        ScheduleCallback(Cosine(), ratchet=looks),
        RefinedScheduleCallback(ratchet=looks),
    ):
        fit_tiny(tmp_path, [callback], limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match="Expected a `validation_step`"):
        fit_tiny(tmp_path, [ScheduleCallback(Cosine(), ratchet=True)], limit_val_batches=0)


class Manual(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_holdout_under_manual_optimization(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Expected automatic optimization for `objective='holdout'`"):
        fit_tiny(tmp_path, [Search(Stages(), objective="holdout")], Manual())


class Unheard(SingleDeviceStrategy):
    """Derived from a tested one: fine."""


def test_unsupported_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    fit_tiny(tmp_path, [Search(Stages())], strategy=Unheard(torch.device("cpu")))
    monkeypatch.setattr("lightning_autolr.engine.checks.TESTED_STRATEGIES", ("DDPStrategy",))
    with pytest.raises(MisconfigurationException, match=r"Expected a strategy out of .*, got SingleDeviceStrategy"):
        fit_tiny(tmp_path, [Search(Stages())], strategy=strategy)
    fit_tiny(tmp_path, [ScheduleCallback(Constant())])
    fit_tiny(tmp_path, [Search(Stages(), allow_untested=True)])


def test_communication_hook(tmp_path: Path) -> None:
    strategy = DDPStrategy(ddp_comm_hook=lambda state, bucket: None)
    trainer: Any = type("Trainer", (), {"strategy": strategy, "enable_validation": True})
    with pytest.raises(
        MisconfigurationException, match="Expected DistributedDataParallel without a communication hook"
    ):
        check_trainer(trainer, Tiny(), {"validation"}, allow_untested=False)


class OneShot:
    """Batches that come once."""

    def __init__(self) -> None:
        self.batches = iter(loader(36))

    def __iter__(self) -> OneShot:
        return self

    def __next__(self) -> Any:
        return next(self.batches)


def test_loader_that_is_its_own_iterator(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a loader that can be iterated twice, got OneShot"):
        fit_tiny(tmp_path, [Search(Stages())], train=OneShot())
    trainer, _ = fit_tiny(tmp_path, [Search(Stages(), probe_dataloader=loader())], train=OneShot())
    assert trainer.global_step == 6


def test_empty_probe_loader(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected the training loader to yield batches for probes, got none"):
        fit_tiny(tmp_path, [Search(Stages(), probe_dataloader=[])])


def test_finite_stream_shorter_than_the_search(tmp_path: Path) -> None:
    """Later draws of an ordered stream begin later; at its end they begin again."""

    class Finite(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter([NoisyData(30, jitter=False)[i] for i in range(30)])

    search = Search(Stages(num_stages=6, num_steps=2, probe_steps=3))
    trainer, _ = fit_tiny(tmp_path, [search], train=torch.utils.data.DataLoader(Finite(), batch_size=6), max_steps=12)
    assert trainer.global_step == 12


class OnePass(torch.utils.data.IterableDataset):
    """Goes on from where it stands, and is over then."""

    def __init__(self) -> None:
        self.data, self.position = NoisyData(60, jitter=False), 0

    def __iter__(self) -> Any:
        while self.position < len(self.data):
            self.position += 1
            yield self.data[self.position - 1]


def test_a_search_near_the_end_of_a_stream_that_is_read_once(tmp_path: Path) -> None:
    """Probes that are longer than the rest read the rest again."""
    search = Search(Stages(num_stages=4, num_steps=2, probe_steps=5))
    stream = torch.utils.data.DataLoader(OnePass(), batch_size=6)
    trainer, _ = fit_tiny(tmp_path, [search], train=stream, max_epochs=1, max_steps=-1)
    assert trainer.global_step == 10
    probes = [e.answer for e in search.trace if hasattr(e.answer, "evaluations")]
    assert len(probes) == 8
    assert all(len(probe.losses) == 5 for probe in probes)


class Wrapper:
    """Asks the wrapped loader for everything, so it cannot be copied."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __iter__(self) -> Any:
        return iter(self.wrapped)

    def __len__(self) -> int:
        return len(self.wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


def test_a_loader_that_cannot_be_copied_is_read_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RecursionError):
        copy.copy(Wrapper(loader()))
    trainer, _ = fit_tiny(tmp_path, [Search(Stages())], train=Wrapper(loader()))
    assert trainer.global_step == 6


def test_all_learning_rates_zero(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected at least one parameter group with a learning rate > 0"):
        fit_tiny(tmp_path, [Search(Stages())], Tiny(lr=0.0))


def test_run_without_end_for_an_open_schedule(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a run of known length"):
        fit_tiny(tmp_path, [ScheduleCallback(Cosine())], max_steps=-1, max_epochs=-1)


class Lazy(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(3)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_parameters(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Expected parameters with shapes, got lazy ones"):
        fit_tiny(tmp_path, [Search(Stages())], Lazy(), num_sanity_val_steps=0)


class Skips(Tiny):
    """Returns nothing for some batches, logs its loss under a name of its own, and takes no index."""

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        loss = self.loss(batch)
        self.log("my_loss", loss)
        return None if self.trainer.global_step % 2 else {"loss": loss, "extra": 1}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert not outputs or outputs["extra"] == 1


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`:UserWarning")
def test_unusual_modules(tmp_path: Path) -> None:
    trainer, _ = fit_tiny(tmp_path, [Search(Stages())], Skips())
    assert trainer.global_step == 6


def test_one_callback_sets_the_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"Expected one callback that sets .* and ScheduleCallback"):
        fit_tiny(tmp_path, [Search(Stages()), ScheduleCallback(Constant())])


def test_options_of_the_other_method() -> None:
    with pytest.raises(ValueError, match="Expected caution, warmup only with method='early', got method='published'"):
        AutoLRSCallback(method="published", warmup="autowu", caution=1.0)
    with pytest.raises(ValueError, match="Expected kappa only with method='published'"):
        AutoLRSCallback(kappa=3.0)
    with pytest.raises(ValueError, match=r"Expected a whole tau >= 1, got tau=0\."):
        AutoLRSCallback(tau=0)
    with pytest.raises(ValueError, match="Expected method to be 'early' or 'published', got 'late'"):
        AutoLRSCallback(method="late")  # type: ignore[arg-type]


def test_a_refined_schedule_with_a_ratchet_is_checked_like_any_search(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Expected a `validation_step`"):
        fit_tiny(tmp_path, [RefinedScheduleCallback(ratchet=True)], limit_val_batches=0)
