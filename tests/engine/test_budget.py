"""Searches whose steps count towards the run's: the plan ends where the run ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_autolr import AutoLRSCallback
from lightning_autolr.core.requests import Probe, ProbeResult, Status, Train
from tests.engine.small import Tiny, fit_tiny


def planned_and_made(folder: Path) -> tuple[int, int, AutoLRSCallback]:
    callback = AutoLRSCallback(count_search=True, figures=False)
    fit_tiny(folder, [callback], module=Tiny(lr=100.0), max_steps=800)
    last = [e for e in callback.trace if isinstance(e.request, Train)][-1]
    return last.request.num_steps, len(last.answer.losses), callback


def test_a_divergence_that_is_noticed_late_is_paid_for(tmp_path: Path) -> None:
    planned, made, callback = planned_and_made(tmp_path)
    probes = [e.answer for e in callback.trace if isinstance(e.request, Probe)]
    assert any(a.status is Status.DIVERGED and a.num_steps > len(a.losses) for a in probes)
    assert planned == made == 1  # the last step, alone: the run can still go back to its best weights
    assert callback.summary["probe_steps"] == sum(a.num_steps for a in probes)
    assert sum(s.num_steps for s in callback.schedule) + callback.summary["probe_steps"] == 800


def test_the_control_sees_steps_that_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProbeResult, "num_steps", property(lambda self: len(self.losses)))
    planned, made, _ = planned_and_made(tmp_path)
    assert planned > made
