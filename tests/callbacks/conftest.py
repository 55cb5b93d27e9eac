"""No figures in tests of something else: they would take most of the time."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "test_figure_log" not in request.node.nodeid:
        monkeypatch.setattr("lightning_autolr.engine.figure_log.FigureLog.log", lambda *_: None)
