"""Loggers hear of real steps only, and never of one that lies before the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor

from tests.engine.small import Stages, Tiny, fit_tiny
from tests.engine.subjects import Search


class Strict(Logger):
    """Refuses a step that goes back, and any metric while a search is running."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.last = -1
        self.is_searching = False

    @property
    def name(self) -> str:
        return "strict"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        assert step >= self.last, f"step {step} after {self.last}"
        assert not self.is_searching, f"{metrics} from a probe"
        self.last = step
        self.rows.append((step, dict(metrics)))

    def values(self, name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in self.rows if name in metrics}


class Talkative(Tiny):
    """Logs in every way there is, and tells the logger whether the step is a private one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logger = self.trainer.logger
        strict = self.strict
        strict.is_searching = logger is not strict
        loss = super().training_step(batch, batch_idx)
        self.log("on_step", loss)
        self.log_dict({"on_epoch": loss}, on_step=False, on_epoch=True)
        self.logger.log_metrics({"direct": 1.0}, step=self.trainer.fit_loop.epoch_loop._batches_that_stepped)
        strict.is_searching = False
        return loss


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "max_epochs": 3, "max_steps": -1}, {"val_check_interval": 2}]
)
def test_steps_never_go_back(options: dict[str, Any], tmp_path: Path) -> None:
    logger, module = Strict(), Talkative()
    module.strict = logger
    search = Search(Stages(num_steps=2, num_stages=3))
    trainer, _ = fit_tiny(tmp_path, [search], module, logger=logger, log_every_n_steps=1, **options)
    steps = trainer.global_step
    lrs = logger.values("autolr/lr")
    assert list(lrs) == list(range(steps))
    assert list(lrs.values()) == [segment.lr for segment in search.schedule for _ in range(segment.num_steps)]
    assert logger.values("autolr/stage") == {step: step // 2 for step in range(steps)}
    # Nothing is left to do at the end, and Lightning logs the rest under the step that would come next.
    searched = {step: value for step, value in logger.values("autolr/search_steps").items() if step < steps}
    assert searched == {step: 4.0 * (1 + step // 2) for step in range(steps)}
    assert len([1 for _, metrics in logger.rows if "direct" in metrics]) == steps * trainer.accumulate_grad_batches


def test_logging_interval_is_kept_but_the_first_step_of_a_stage_is_always_there(tmp_path: Path) -> None:
    logger = Strict()
    search = Search(Stages(num_steps=3, num_stages=4))
    fit_tiny(tmp_path, [search], logger=logger, log_every_n_steps=5, max_steps=12)
    assert list(logger.values("autolr/lr")) == [0, 3, 4, 6, 9]


def test_an_interval_of_zero_logs_nothing(tmp_path: Path) -> None:
    logger = Strict()
    fit_tiny(tmp_path, [Search(Stages())], logger=logger, log_every_n_steps=0)
    assert logger.values("autolr/lr") == {}


def test_weights_do_not_depend_on_the_logger(tmp_path: Path) -> None:
    outcomes = []
    for logger in (False, Strict()):
        torch.manual_seed(0)
        _, module = fit_tiny(tmp_path, [Search(Stages())], Tiny(), logger=logger, log_every_n_steps=1)
        outcomes.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*outcomes)
