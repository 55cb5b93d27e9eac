"""What a module finds when it looks around itself in a private step: what is there in a real one, but nothing that hears it."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_autolr.engine.quiet import UsedInSearchError
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


class Settings:
    """Like the settings of a service: read by name, and no dictionary."""

    def __init__(self) -> None:
        self.values = {"temperature": 2.0, "layers": [1, 2], "run": self}

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


class Recorded(Service):
    """Has a record of its own, and methods that return something."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.history: dict[str, Any] = defaultdict(list, loss=[], best=({"rows": deque([0])},))
        self.history["itself"] = self.history
        self.notes, self.counts = Namespace(rows=[]), Counter(steps=1)
        self.best, self.scores = torch.tensor(1.0), np.ones(2)
        self.stage, self.begun, self.summaries = Stage.FIRST, datetime(2025, 1, 1), [Summary()]
        self.settings, self.calls = Settings(), 0

    def count(self) -> int:
        self.calls += 1
        return self.calls

    def where(self) -> str:
        return str(self.log_dir)


class Stage(Enum):
    FIRST = 1


class Records(Tiny):
    """Writes into the logger's own record, at any depth."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logger: Any = self.logger
        logger.history["loss"].append(1.0)
        logger.history["new"].append(1.0)
        logger.history["itself"]["itself"]["loss"].append(1.0)
        logger.history["best"][0]["rows"].append(1)
        logger.notes.rows.append(1)
        logger.summaries[0].add(1)
        logger.best.add_(1)
        logger.scores[0] += 1
        logger.settings["layers"].append(3)
        return super().training_step(batch, batch_idx)


def test_a_record_of_a_logger_hears_of_real_steps_only(tmp_path: Path) -> None:
    logger = Recorded(tmp_path)
    search = Search(Stages())
    fit_tiny(tmp_path, [search], Records(), logger=logger)
    assert search.summary["probe_steps"] > 0
    assert [len(logger.history[name]) for name in ("loss", "new")] == [12, 6]
    assert len(logger.history["best"][0]["rows"]) == 7
    assert len(logger.notes.rows) == len(logger.summaries[0].items) == 6
    assert [float(logger.best), *logger.scores] == [7, 7, 1]
    assert len(logger.settings["layers"]) == 8


class Reads(Tiny):
    """Computes with what its logger holds."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logger: Any = self.logger
        loss = super().training_step(batch, batch_idx)
        assert (loss.detach() < logger.best) in (True, False)
        assert logger.scores.sum() == 2
        assert logger.counts["steps"] == 1
        assert logger.stage is Stage.FIRST
        assert logger.begun < datetime(2026, 1, 1)
        assert isinstance(logger.experiment, Summary)
        assert isinstance(logger.settings["run"], Settings)
        logger.settings["absent"] if logger is not self.original else None
        return loss / logger.settings["temperature"]


def test_what_a_logger_holds_can_be_computed_with(tmp_path: Path) -> None:
    search, module = Search(Stages()), Reads()
    module.original = Recorded(tmp_path)
    fit_tiny(tmp_path, [search], module, logger=module.original)
    assert search.summary["probe_steps"] > 0


USES: dict[str, Callable[[Any], Any]] = {
    "logger.count()": lambda logger: logger.count() > 5,
    "logger.where()": lambda logger: os.path.join(logger.where(), "x"),
    "logger.experiment.add()": lambda logger: torch.ones(2) / logger.experiment.add(1),
    "logger.experiment.best": lambda logger: 1 + logger.experiment.best,
    "logger.settings['run']": lambda logger: float(logger.settings["run"]),
}


@pytest.mark.parametrize("name", USES)
def test_what_a_logger_would_have_returned_cannot_be_computed_with(name: str, tmp_path: Path) -> None:
    class Uses(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            USES[name](self.logger)
            return super().training_step(batch, batch_idx)

    with pytest.raises(UsedInSearchError, match=re.escape(f"computed from `{name}` while")):
        fit_tiny(tmp_path, [Search(Stages())], Uses(), logger=Recorded(tmp_path))


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
