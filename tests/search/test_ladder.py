"""Where the peak lies, given made-up scores of short and long candidates."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest

from lightning_autolr.core.requests import Evaluation, ProbeResult, Status
from lightning_autolr.core.surrogate import FitError
from lightning_autolr.search import ladder as module
from lightning_autolr.search.ladder import Ladder, Peak


def scored(loss: float, spread: float = 0.01) -> ProbeResult:
    return ProbeResult((1.0,), (Evaluation(1, (loss - spread, loss, loss + spread)),))


def ladder(scores: dict[float, float]) -> Ladder:
    made = Ladder(1e-9, 1e9, 2.5)
    for lr, loss in scores.items():
        made.add(lr, scored(loss) if math.isfinite(loss) else ProbeResult((math.nan,), (), Status.DIVERGED))
    return made


def parabola(lr: float, best: float) -> float:
    return 1 + 0.1 * math.log10(lr / best) ** 2


SHORT = {lr: parabola(lr, 0.3) for lr in (1e-3, 1e-2, 0.1, 1.0, 10.0)}
LONG = {lr: parabola(lr, 0.1) for lr in (0.04, 0.1, 0.25)}


def test_the_long_candidates_decide() -> None:
    lr, reason = Peak(scored(2.0), ladder(SHORT), ladder(LONG)).choose()
    assert 0.07 < lr < 0.15
    assert "3 candidates" in reason


def test_the_choice_lies_between_neighbours_of_the_best() -> None:
    rising = {lr: parabola(lr, 1.0) for lr in (0.01, 0.025, 0.0625)}
    lr, _ = Peak(scored(2.0), ladder({}), ladder(rising)).choose()
    assert 0.025 <= lr <= 0.0625


def test_how_bad_a_bad_candidate_is_says_nothing() -> None:
    """One that exploded to 40 or to 4e6 has the same say, and the others are told apart as if it were not there."""
    choices = [Peak(scored(2.0), ladder({**SHORT, 10.0: bad}), ladder(LONG)).choose()[0] for bad in (40.0, 4e6)]
    assert choices[0] == choices[1]
    assert 0.07 < choices[0] < 0.15


def test_suggests_in_reach_of_what_was_tried_until_no_gain_is_expected() -> None:
    suggestion = Peak(scored(2.0), ladder(SHORT), ladder(LONG)).suggest()
    assert suggestion is None or 1e-3 <= suggestion.lr <= 10.0
    noisy = ladder({})
    for lr, loss in LONG.items():
        noisy.add(lr, ProbeResult((1.0,), (Evaluation(1, (loss - lr, loss + 10 * lr, loss - 9 * lr)),)))
    assert Peak(scored(2.0), ladder(SHORT), noisy).suggest() is None  # nothing is worth its noise


def test_short_candidates_say_where_not_to_look() -> None:
    two = {0.04: 1.016, 0.1: 1.0}
    alone = Peak(scored(2.0), ladder({}), ladder(two))
    told = Peak(scored(2.0), ladder(SHORT), ladder(two))
    (lone,), (known,) = ([s.lr] if (s := p.suggest()) else [0.1] for p in (alone, told))
    assert known != lone
    assert known < 2.0


def test_all_diverged() -> None:
    lr, reason = Peak(scored(2.0), ladder({}), ladder({1.0: math.inf, 0.4: math.inf})).choose()
    assert lr == pytest.approx(0.04)
    assert "diverged" in reason


def test_a_surrogate_that_fails_is_named() -> None:
    with patch.object(module, "posterior", side_effect=FitError("no curvature")):
        lr, reason = Peak(scored(2.0), ladder(SHORT), ladder(LONG)).choose()
    assert lr == 0.1
    assert "no curvature" in reason
