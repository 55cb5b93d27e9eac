"""What a callback is before a fit and after it, however that ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_autolr import AutoLRSCallback
from tests.engine.small import Stages, fit_tiny
from tests.engine.subjects import Search


def test_empty_before_a_fit() -> None:
    callback = AutoLRSCallback()
    assert (callback.trace, callback.schedule) == ([], ())
    assert callback.summary["schedule_steps"] == callback.summary["probe_steps"] == 0


@pytest.mark.filterwarnings("ignore:.*`max_steps=0` reached")
def test_empty_after_a_fit_without_steps(tmp_path: Path) -> None:
    search = Search(Stages())
    fit_tiny(tmp_path, [search], max_steps=0)
    assert (search.trace, search.schedule, search.summary["learning_rates"]) == ([], (), [])
