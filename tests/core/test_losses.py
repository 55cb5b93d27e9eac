"""What losses say: differences on the same batches, and when they are too high."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_autolr.core.losses import divergence_limit, paired
from lightning_autolr.core.requests import Evaluation, ProbeResult


def test_paired_differences() -> None:
    a = ProbeResult(evaluations=(Evaluation(0, (1.0, 2.0, 3.0)),))
    b = ProbeResult(evaluations=(Evaluation(0, (1.5, 2.5, 4.5)),))
    mean, error = paired(a, b)
    assert mean == pytest.approx(2.5 / 3)
    assert error == pytest.approx(np.std([0.5, 0.5, 1.5], ddof=1) / math.sqrt(3))


def test_unlike_numbers_of_losses_cannot_be_paired() -> None:
    """A training step may leave losses out."""
    a = ProbeResult(evaluations=(Evaluation(0, (1.0, 2.0, 3.0)),))
    mean, error = paired(a, ProbeResult(evaluations=(Evaluation(0, (1.0, 4.0)),)))
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(math.sqrt(1.0 / 3 + 4.5 / 2))
    assert paired(a, ProbeResult(evaluations=(Evaluation(0, (4.0,)),)))[0] == pytest.approx(2.0)
    assert paired(a, a) == (0.0, 0.0)


@pytest.mark.parametrize("losses", [(4.0,), (1.0, 2.0)])
def test_of_one_loss_the_error_is_taken_for_zero(losses: tuple[float, ...]) -> None:
    """And nothing warns of it."""
    one, other = ProbeResult(evaluations=(Evaluation(0, (3.0,)),)), ProbeResult(evaluations=(Evaluation(0, losses),))
    mean, error = paired(one, other)
    assert mean == pytest.approx(np.mean(losses) - 3.0)
    assert error == pytest.approx(0.5 if len(losses) > 1 else 0.0)


def test_a_loss_above_the_divergence_limit_is_no_noise() -> None:
    """Three times the first loss and three times the spread above it; of the highest only the first twenty count."""
    assert divergence_limit([]) is None
    assert divergence_limit([2.0, 2.5, 1.5]) == 2 + 3 * 2 + 3 * (2.5 - 1.5)
    assert divergence_limit([-1.0]) == 2.0
    assert divergence_limit([1.0] * 20 + [100.0]) == 4.0
