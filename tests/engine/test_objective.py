"""What scores a candidate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_autolr import AutoLRSCallback
from lightning_autolr.core.requests import Evaluation, Probe, ProbeResult
from lightning_autolr.engine.batches import split
from lightning_autolr.engine.driver import SearchCallback
from tests.engine.small import Stages, Tiny, fit_tiny
from tests.engine.subjects import Search


def probes(callback: SearchCallback) -> list[tuple[Probe, ProbeResult]]:
    return [
        (entry.request, entry.answer)
        for entry in callback.trace
        if isinstance(entry.request, Probe) and isinstance(entry.answer, ProbeResult)
    ]


@pytest.mark.parametrize("evaluate", ["train", "validation"])
def test_training_losses_cost_nothing(tmp_path: Path, evaluate: Any) -> None:
    callback = Search(Stages(evaluate=evaluate, probe_steps=5), objective=evaluate)
    fit_tiny(tmp_path, [callback])
    assert probes(callback)
    for _, answer in probes(callback):
        (evaluation,) = answer.evaluations
        assert (evaluation == Evaluation(5, answer.losses[2:])) is (evaluate == "train")
    assert (callback.summary["eval_batches"] == 0) is (evaluate == "train")


def test_the_trace_says_what_a_score_is(tmp_path: Path) -> None:
    class Scored(Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log_dict({"val_loss": (loss := self.loss(batch)), "val_acc": 1 - loss, "val_error": loss})

    for options, name in (
        ({}, ""),
        ({"monitor": "val_acc", "mode": "max"}, "-val_acc"),
        ({"monitor": "val_error"}, "val_error"),
        ({"monitor": "val_acc", "mode": "max", "objective": "train"}, ""),
    ):
        callback = Search(Stages(evaluate=options.get("objective", "validation"), probe_steps=5), **options)
        fit_tiny(tmp_path, [callback], Scored())
        assert {e.name for _, answer in probes(callback) for e in answer.evaluations} == {name}


@pytest.mark.parametrize(
    ("options", "objective"),
    [({}, "train"), ({"objective": "validation"}, "validation"), ({"method": "published"}, "validation")],
)
def test_what_autolrs_asks_for(tmp_path: Path, options: dict[str, Any], objective: str) -> None:
    callback = AutoLRSCallback(figures=False, tau=20, min_lr=1e-3, max_lr=0.1, **options)
    assert callback.objective == objective
    fit_tiny(tmp_path, [callback], max_steps=800)
    early = "method" not in options
    tried = {q.evaluate for q, _ in probes(callback) if q.num_steps and not q.permuted}
    looks = {request.evaluate for request, _ in probes(callback) if not request.num_steps}
    assert tried == {objective}
    assert looks == ({"validation"} if early else set())


def test_auto_takes_validation_losses_where_there_are_any(tmp_path: Path) -> None:
    for batches, expected in ((1.0, {"none", "validation"}), (0, {"none"})):
        callback = AutoLRSCallback(
            figures=False, tau=20, tau_max=20, min_lr=1e-3, max_lr=0.1, method="published", objective="auto"
        )
        fit_tiny(tmp_path, [callback], max_steps=80, limit_val_batches=batches)
        assert {request.evaluate for request, _ in probes(callback)} == expected


class Silent(Tiny):
    """Manual optimization that neither returns nor logs a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_without_a_training_loss(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`training_step` neither returns a loss nor logs one"):
        fit_tiny(tmp_path, [AutoLRSCallback(figures=False)], Silent(), max_steps=400)
    fit_tiny(tmp_path, [AutoLRSCallback(figures=False, objective="validation")], Silent(), max_steps=100)


@pytest.mark.parametrize("wrong", [{"num_steps": 1}, {"num_steps": 4, "evaluate_every": 2}])
def test_a_probe_says_no(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="Expected two steps or more, and no evaluate_every, with evaluate='train'"):
        Probe(lr=0.1, evaluate="train", **wrong)


class Particular(Tiny):
    """Notices how it is validated."""

    def on_validation_start(self) -> None:
        self.seen: list[float] = []

    def on_validation_model_eval(self) -> None:
        self.eval()
        self.norm.train()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self.trainer.validating
        assert self.norm.training
        self.seen.append(float(self.loss(batch)))
        self.log(f"{self.trainer.state.stage.value}_loss", self.seen[-1])

    def on_validation_end(self) -> None:
        assert self.seen
        del self.seen


def test_a_private_validation_looks_like_one_to_the_module(tmp_path: Path) -> None:
    callback = Search(Stages(), monitor="validate_loss")
    fit_tiny(tmp_path, [callback], Particular(), num_sanity_val_steps=0)
    assert len(probes(callback)) == 4


class Logits(Tiny):
    """Returns something, and it is not the loss."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val/loss", self.loss(batch))
        return self.layer(batch[0])


def test_only_a_number_that_is_returned_is_a_loss(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"Expected `validation_step` to log 'val_loss' or, for .* logged \['val/loss'\]"
    ):
        fit_tiny(tmp_path, [Search(Stages())], Logits())


@pytest.mark.filterwarnings("ignore:Total length of")
def test_an_empty_validation_loader_is_said_to_be_empty(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected validation batches, got none: the validation dataloader is empty"):
        fit_tiny(tmp_path, [Search(Stages())], val=[DataLoader([], batch_size=1)])


def test_a_batch_of_pairs_is_not_cut() -> None:
    """A graph comes as one batch: the rows of its edges belong to all of its nodes."""
    nodes, edges = torch.zeros(12, 3), torch.zeros(12, 12)
    assert split((nodes, edges), 4) == [(nodes, edges)]
    assert len(split((nodes, edges[:, :5]), 4)) == 4


def test_module_that_reads_its_score_at_the_end_of_a_validation(tmp_path: Path) -> None:
    """It sees what this validation logged, and nobody sees it afterwards."""

    class Best(Tiny):
        best = float("inf")

        def on_validation_epoch_end(self) -> None:
            score = float(self.trainer.callback_metrics["val_loss"])
            self.best = min(self.best, score)
            self.log("score", score)

        def on_validation_end(self) -> None:
            assert self.trainer.callback_metrics["score"] == self.trainer.callback_metrics["val_loss"]

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert "val_loss" not in self.trainer.callback_metrics

    scores = {}
    for monitor in ("val_loss", "score"):
        torch.manual_seed(0)
        search = Search(Stages(num_stages=1), monitor=monitor)
        fit_tiny(tmp_path, [search], Best(), num_sanity_val_steps=0, max_steps=3)
        scores[monitor] = [answer.evaluations[0].mean for _, answer in probes(search)]
    assert scores["score"] == pytest.approx(scores["val_loss"])
