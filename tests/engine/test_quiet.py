"""What a module finds when it looks around itself in a private step: what is there in a real one, but nothing that hears it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from tests.engine.small import Stages, Tiny, fit_tiny
from tests.engine.subjects import Search


class Counts(Callback):
    """Real batches."""

    batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.batches += 1

    def on_before_optimizer_step(self, *args: Any) -> None:
        assert type(self) is Counts


class LooksAround(Tiny):
    """Writes down what it sees, in real and private steps alike."""

    def _look(self) -> None:
        trainer, logger = self.trainer, self.logger
        counts = next(c for c in trainer.callbacks if isinstance(c, Counts))
        best = trainer.checkpoint_callback.best_model_path
        logger.experiment.log_metrics({})
        SEEN.append(
            (trainer.log_dir, logger.log_dir, logger.name, logger.version, logger.root_dir, counts.batches, best)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._look()
        self.logger.log_metrics({"from_the_step": 1.0}, step=0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._look()
        return super().validation_step(batch, batch_idx)


SEEN: list[tuple[Any, ...]] = []  # not in the module, where a search would put it back


class Summary:
    """Like an experiment of a service: settings, items, and a name for files."""

    def __init__(self) -> None:
        self.name, self.config, self.best = "run-1", {"lr": 1.0}, self
        self.items: list[Any] = []

    def __setitem__(self, key: str, value: Any) -> None:
        self.items.append((key, value))

    def __len__(self) -> int:
        return len(self.items) + 1

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def add(self, value: Any) -> Summary:
        self.items.append(value)
        return self


class Service(CSVLogger):
    run_id = "r1"
    summary = Summary()

    @property
    def experiment(self) -> Any:
        return self.summary

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def save(self) -> None: ...


class Writes(Tiny):
    """Does to its logger what one can do to it in a plain run."""

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            logger: Any = self.logger
            os.path.join(logger.experiment.name, logger.run_id)
            logger.experiment.config.update(lr=2.0)
            logger.experiment.best["step"] = self.trainer.global_step
            logger.experiment.state = "validated"
            logger.experiment.add(1).add(self.trainer.global_step)
            assert logger.experiment.best
            assert len(logger.experiment.best) >= 0
            assert "loss" not in logger.experiment.best


def test_what_is_done_to_a_logger_in_a_search_is_done_to_nothing(tmp_path: Path) -> None:
    logger = Service(tmp_path)
    fit_tiny(tmp_path, [Search(Stages())], Writes(), logger=logger, max_steps=8)
    made = [1, 4, ("step", 4), 1, 8, ("step", 8)]  # two real validations, and eight private ones
    assert sorted(logger.summary.items, key=str) == sorted(made, key=str)
    assert logger.summary.config == {"lr": 2.0}


def test_a_module_finds_its_logger_and_callbacks(tmp_path: Path) -> None:
    SEEN.clear()
    logger, counts = CSVLogger(tmp_path, version=3), Counts()
    callback = Search(Stages())
    options: dict[str, Any] = {"logger": logger, "enable_checkpointing": True, "log_every_n_steps": 1}
    trainer, _ = fit_tiny(tmp_path, [callback, counts, ModelCheckpoint(monitor="val_loss")], LooksAround(), **options)
    assert counts.batches == trainer.global_step == 6
    assert len(SEEN) > 6 + callback.summary["probe_steps"] > 12
    assert {seen[:5] for seen in SEEN} == {(logger.log_dir, logger.log_dir, logger.name, 3, logger.root_dir)}
    assert sum(name == "from_the_step" for row in logger.experiment.metrics for name in row) <= 6
    assert trainer.logger is logger


class Lost(Tiny):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        next(c for c in self.trainer.callbacks if isinstance(c, Counts))
        return super().training_step(batch, batch_idx)


def test_a_search_without_end_for_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="got a StopIteration from the module"):
        fit_tiny(tmp_path, [Search(Stages())], Lost())


class ByIndex(Tiny):
    """Four batches in an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert batch_idx < 4
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_batches_are_counted_as_in_an_epoch(tmp_path: Path, accumulated: int) -> None:
    callback = Search(Stages(probe_steps=9))
    fit_tiny(tmp_path, [callback], ByIndex(), accumulate_grad_batches=accumulated, max_steps=3)
    assert all(e.answer.status == "ok" for e in callback.trace)


class WithoutGrad(torch.optim.SGD):
    """Calls its closure where nothing is to be differentiated."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure()
        super().step()
        return loss


def test_an_optimizer_that_calls_its_closure_without_gradients(tmp_path: Path) -> None:
    class Unusual(Tiny):
        def configure_optimizers(self) -> Any:
            return WithoutGrad(self.parameters(), lr=0.1)

    callback = Search(Stages())
    fit_tiny(tmp_path, [callback], Unusual())
    assert callback.summary["probe_steps"] > 0
