"""Benchmarks run, in their short form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "needs", "expected"),
    [
        ("candidates.py --short", "sklearn", "| digits | 8 |"),
        ("autowu_switch.py --seeds 1 --total-steps 200", "torch", "| noise alone |"),
        ("beam_and_factors.py --short", "sklearn", "| 0.001 | scores shuffled (control) |"),
        ("decision_cost.py --short", "torch", "| 3 | disk | False | 4 | 0.00 |"),
        ("large_batch.py --short", "pytorch_optimizer", "### Batch size 4,096: 30 steps"),
        ("looks.py --short", "torch", "| 0 |"),
    ],
)
def test_short_form(command: str, needs: str, expected: str, tmp_path: Path) -> None:
    pytest.importorskip(needs)
    if ("large_batch" in command or "looks" in command) and not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    name, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, FOLDER / name, *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert expected in done.stdout
