"""Benchmarks run, in their short form."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_autolr.tasks import ByteTransformer

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
    assert expected in printed(command, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bible") is None, reason="needs Debian's bible-kjv")
def test_short_form_of_fine_tuning(tmp_path: Path) -> None:
    weights = tmp_path / "runs/pretrained/transformer.pt"  # untrained: to train it takes a minute
    weights.parent.mkdir(parents=True)
    torch.save(ByteTransformer(width=48, context=32, depth=2).state_dict(), weights)
    assert "| autolrs | 1 |" in printed("fine_tuning.py --short", tmp_path)


def printed(command: str, folder: Path) -> str:
    """What a benchmark prints when it is run in ``folder``."""
    name, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, FOLDER / name, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
