"""Beam and factor search inside a Trainer: what they hold in memory, and what a factor decision measures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback

from lightning_autolr import BeamSearchCallback, FactorSearchCallback, ScheduleCallback
from lightning_autolr.core.requests import LineProbe, LineResult, Train
from lightning_autolr.engine.files import DiskStore, MemoryStore
from lightning_autolr.engine.lr import LearningRate
from lightning_autolr.engine.probe import ProbeOptions, Prober
from lightning_autolr.schedules import Tabulated
from tests.engine.small import Tiny, fit_tiny
from tests.engine.subjects import differences


@pytest.mark.parametrize("fork", ["device", "cpu", "disk"])
@pytest.mark.parametrize(
    ("beam_size", "keep_ends", "copies"), [(1, False, 2), (2, False, 3), (3, False, 4), (3, True, 7)]
)
def test_copies_of_the_training_state_that_a_beam_holds(
    beam_size: int, keep_ends: bool, copies: int, fork: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M kept states (2 M with their ends) and the real run's own; nothing else, in no store."""
    seen: list[tuple[int, int, int, int]] = []
    keep = Prober.keep

    def keep_and_count(self: Prober, new_id: str) -> None:
        keep(self, new_id)
        forks = [self._here, *self.kept.values()]
        stores = [f._store for f in forks]
        buffers = [b for s in stores if isinstance(s, MemoryStore) for b in s._buffers]
        files = [s for s in stores if isinstance(s, DiskStore) and Path(s._path).exists()]
        seen.append((len(forks), sum(b.untyped_storage().nbytes() for b in buffers), len(files), forks[0].num_bytes))

    monkeypatch.setattr(Prober, "keep", keep_and_count)
    search = BeamSearchCallback(beam_size, interval=2, keep_ends=keep_ends, fork=fork)
    fit_tiny(tmp_path, [search], max_steps=12)
    state = max(num_bytes for *_, num_bytes in seen)
    assert state > 0
    assert max(number for number, *_ in seen) == copies
    assert max(in_memory for _, in_memory, *_ in seen) == (0 if fork == "disk" else copies * state)
    assert max(in_files for _, _, in_files, _ in seen) == (copies if fork == "disk" else 0)


def test_a_replay_warns_where_a_beam_took_up_the_end_of_a_probe(tmp_path: Path) -> None:
    search = BeamSearchCallback(2, interval=2, start_lrs=(0.05, 0.2))
    fit_tiny(tmp_path, [search], max_steps=40)
    jumps = [entry.request.start is not None for entry in search.trace if isinstance(entry.request, Train)]
    assert any(jumps)
    assert [s.leaps for s in search.schedule] == jumps
    found = Tabulated.from_file(tmp_path / "autolr" / "schedule.json")
    assert found.segments == search.schedule
    with pytest.warns(UserWarning, match="ends with other weights"):
        fit_tiny(tmp_path / "replay", [ScheduleCallback(found)], max_steps=40)


class Ask(Callback):
    """Asks for one line probe before the third step."""

    def __init__(self, request: LineProbe) -> None:
        self.request = request
        self.answer: Any = None
        self.expected: list[float] = []
        self.before = math.nan

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != 2:
            return
        prober = Prober(trainer, LearningRate(trainer.optimizers), ProbeOptions())
        before = {k: v.clone() for k, v in module.state_dict().items()}
        momenta = [s["momentum_buffer"].clone() for s in trainer.optimizers[0].state.values() if s]
        with prober.session():
            self.answer = prober.answer(self.request, "")
            batches = prober.draws.training(self.request.draw, 0, 2)
        prober.close()
        assert differences(before, module.state_dict()) == []
        assert differences(momenta, [s["momentum_buffer"] for s in trainer.optimizers[0].state.values() if s]) == []
        self.before = float(module.loss(batches[0]).detach())
        if momenta:
            self.expected = by_hand(module, momenta, batches, (0.0, *self.request.factors), self.request)
        module.load_state_dict(before)


def by_hand(
    module: Tiny, momenta: list[Any], batches: list[Any], factors: tuple[float, ...], ask: LineProbe
) -> list[float]:
    """SGD with momentum 0.9, written out."""
    start = [p.detach().clone() for p in module.parameters()]
    gradients = torch.autograd.grad(module.loss(batches[0]), list(module.parameters()))
    losses = []
    with torch.no_grad():
        for factor in factors:
            for p, w, m, g in zip(module.parameters(), start, momenta, gradients, strict=True):
                p.copy_(w - factor * ask.lr * (0.9 * m + g))
            losses.append(float(module.loss(batches[0 if ask.evaluate_on == "same" else 1])))
        for p, w in zip(module.parameters(), start, strict=True):
            p.copy_(w)
    return losses


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("evaluate_on", ["same", "next"])
def test_a_line_probe_measures_what_it_says_and_leaves_no_trace(evaluate_on: Any, exact: bool, tmp_path: Path) -> None:
    ask = Ask(LineProbe(0.1, (4.0, 1.0, 0.25), draw=3, evaluate_on=evaluate_on, exact=exact))
    fit_tiny(tmp_path, [ask])
    assert isinstance(ask.answer, LineResult)
    assert list(ask.answer.losses) == pytest.approx(ask.expected[1:], rel=1e-5)
    assert ask.answer.base == pytest.approx(ask.before, rel=1e-5)
    if evaluate_on == "same":
        assert ask.answer.base == pytest.approx(ask.expected[0], rel=1e-5)


@pytest.mark.parametrize("exact", [False, True])
def test_no_step_is_a_factor_like_others(exact: bool, tmp_path: Path) -> None:
    ask = Ask(LineProbe(0.1, (0.0, 1.0, 0.0), draw=3, exact=exact))
    fit_tiny(tmp_path, [ask])
    assert list(ask.answer.losses) == pytest.approx(ask.expected[1:], rel=1e-5)
    assert ask.answer.losses[0] == ask.answer.losses[2]
    assert ask.answer.base == pytest.approx(ask.before, rel=1e-5)


def test_a_learning_rate_too_small_to_see_is_not_taken_for_a_strange_optimizer(tmp_path: Path) -> None:
    """Its update drowns in the rounding of the weights, but the optimizer is as linear as ever."""
    ask = Ask(LineProbe(1e-7, (2.0, 1.0, 0.0)))
    fit_tiny(tmp_path, [ask])
    assert list(ask.answer.losses) == pytest.approx(ask.answer.losses[2:] * 3, rel=1e-5)


class Squared(torch.optim.Optimizer):
    """An update that grows with the square of the learning rate."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] ** 2 * p.grad)
        return loss


class Strange(Tiny):
    def configure_optimizers(self) -> Any:
        return Squared(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("lr", [0.1, 1e-4])
def test_an_optimizer_that_is_not_linear_is_refused(lr: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"proportional to its learning rate, got \['Squared'\]"):
        fit_tiny(tmp_path, [Ask(LineProbe(lr, (2.0, 0.5)))], Strange(lr))
    fit_tiny(tmp_path, [Ask(LineProbe(lr, (2.0, 0.5), exact=True))], Strange(lr))


def test_the_clip_is_the_callbacks_to_set() -> None:
    assert FactorSearchCallback().search.outlier_clip == 3.0
    parser = ArgumentParser()
    parser.add_subclass_arguments(Callback, "callback")
    name = "lightning_autolr.FactorSearchCallback"
    for written, clip in (("null", None), ("1.5", 1.5)):
        config = parser.parse_string(
            f"callback: {{class_path: {name}, init_args: {{every: 8, outlier_clip: {written}}}}}"
        )
        assert parser.instantiate(config).callback.search.outlier_clip == clip
    with pytest.raises(ValueError, match="outlier_clip"):
        FactorSearchCallback(outlier_clip=-1.0)
