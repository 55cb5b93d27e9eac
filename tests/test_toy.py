"""The toy driver itself: closed forms, and the rules that it enforces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from lightning_autolr.core.requests import LineProbe, Probe, Request, Requests, Run, Status, Train
from lightning_autolr.search.base import AbstractSearch
from tests.toy import run_toy
from tests.zoo import Cliff, Plateau, Quadratic, noisy_quadratic, off_centre


@dataclass(frozen=True)
class Script(AbstractSearch):
    """Asks for these requests, whatever the answers."""

    script: tuple[Request, ...]

    def requests(self, run: Run) -> Requests:
        for request in self.script:  # noqa: UP028 (answers can be sent to a generator only, not to a tuple)
            yield request


def answers(problem: Any, *script: Request, **options: Any) -> list[Any]:
    return [answer for _, answer in run_toy(Script(script), problem, **options).trace]


def test_training_follows_the_closed_form_of_a_quadratic() -> None:
    run = run_toy(Script((Train(lr=0.3, num_steps=7),)), Quadratic(curvature=(2.0,)))
    assert run.losses == pytest.approx([(1 - 0.6) ** (2 * t) for t in range(7)])
    assert run.state == pytest.approx(np.array([0.4**7]))
    assert run.path == (0.3,) * 7
    assert run.finished


@pytest.mark.parametrize("lr", [0.01, 0.2, 0.7])
def test_the_noise_has_the_second_moment_of_the_noisy_quadratic_model(lr: float) -> None:
    problem = noisy_quadratic(dimensions=10, noise=0.3)
    ends = [run_toy(Script((Train(lr=lr, num_steps=20),)), problem, seed=seed).state for seed in range(200)]
    losses = [problem.loss(end) for end in ends]
    standard_error = np.std(losses) / np.sqrt(len(losses))
    assert np.mean(losses) == pytest.approx(problem.expected_loss([lr] * 20), abs=4 * standard_error)


def test_probes_of_one_draw_are_paired_and_leave_nothing_behind() -> None:
    probe, other = Probe(lr=0.1, num_steps=5, draw=3), Probe(lr=0.1, num_steps=5, draw=4)
    first, second, different = answers(noisy_quadratic(), probe, probe, other)
    assert first == second
    assert first.losses != different.losses
    train = Train(lr=0.1, num_steps=5)
    assert answers(noisy_quadratic(), train) == answers(noisy_quadratic(), probe, train)[1:]


def test_a_probe_in_two_parts_is_one_probe() -> None:
    problem = noisy_quadratic()
    (whole,) = answers(problem, Probe(lr=0.1, num_steps=8, draw=1))
    half = Probe(lr=0.1, num_steps=4, draw=1, keep_end=True)
    rest = Probe(lr=0.1, num_steps=4, draw=1, offset=4, start="s1", release=("s1",))
    one, two = answers(problem, half, rest)
    assert whole.losses == one.losses + two.losses
    assert whole.evaluations[-1].losses == two.evaluations[-1].losses


def test_evaluations_on_the_way_and_at_the_end() -> None:
    (result,) = answers(Quadratic(), Probe(lr=0.5, num_steps=5, evaluate_every=2))
    assert [e.step for e in result.evaluations] == [2, 4, 5]
    assert [e.mean for e in result.evaluations] == pytest.approx([0.5 * 0.25**t for t in (2, 4, 5)])
    (untrained,) = answers(Quadratic(), Probe(lr=0.5, num_steps=0, evaluate="holdout"))
    assert untrained.loss == pytest.approx(0.5)


def test_a_segment_can_be_undone() -> None:
    back = Train(lr=0.1, num_steps=2, start="s1", release=("s1",))
    run = run_toy(Script((Train(lr=0.5, num_steps=3, keep_start=True), back)), Quadratic())
    assert run.path == (0.1, 0.1)
    assert run.train_lrs == [0.5] * 3 + [0.1] * 2
    assert run.kept == ()


@pytest.mark.parametrize(("factor", "status"), [(0.99, Status.OK), (1.01, Status.DIVERGED)])
def test_the_cliff_is_where_it_is_said_to_be(factor: float, status: Status) -> None:
    problem = Cliff()
    (result,) = answers(problem, Probe(lr=factor * 2 / problem.start[0] ** 2, num_steps=300))
    assert result.status is status
    assert (len(result.losses) < 300) is (status is Status.DIVERGED)


def test_nobody_looks_at_a_segment_that_is_not_guarded() -> None:
    for guard, status in (
        ({}, Status.OK),
        ({"stop_above": 1e9}, Status.DIVERGED),
        ({"keep_start": True}, Status.DIVERGED),
    ):
        (result,) = answers(Cliff(), Train(lr=3.0, num_steps=50, **guard))
        assert result.status is status


def test_stop_above_ends_the_step_that_rose_above_it() -> None:
    (result,) = answers(Quadratic(), Train(lr=3.0, num_steps=9, stop_above=10.0))
    assert result.losses == (0.5, 2.0, 8.0, 32.0)
    assert result.status is Status.DIVERGED


@pytest.mark.parametrize("lr", [1e-3, 1.0, 1e3])
def test_the_plateau_is_flat(lr: float) -> None:
    (result,) = answers(Plateau(), Probe(lr=lr, num_steps=10))
    assert result.losses == pytest.approx((1.0,) * 10, abs=1e-9)


def test_off_centre_is_solved_in_one_step() -> None:
    (result,) = answers(off_centre(), Probe(lr=0.25, num_steps=1))
    assert result.loss == 0


@pytest.mark.parametrize("exact", [False, True])
def test_a_line_probe_moves_along_the_gradient(exact: bool) -> None:
    (result,) = answers(Quadratic(), LineProbe(lr=0.5, factors=(2.0, 1.0, 0.5), exact=exact))
    assert result.base == 0.5
    assert result.losses == pytest.approx([0.5 * (1 - 0.5 * f) ** 2 for f in (2.0, 1.0, 0.5)])


def test_the_run_ends_inside_a_segment() -> None:
    run = run_toy(Script((Probe(lr=0.1, num_steps=4), Train(lr=0.1, num_steps=None))), Quadratic(), total_steps=10)
    assert (len(run.train_lrs), run.search_steps, run.finished) == (10, 4, True)
    script = Script((Train(lr=0.1, num_steps=5), Train(lr=0.2, num_steps=10), Train(lr=0.3, num_steps=1)))
    cut = run_toy(script, Quadratic(), total_steps=7)
    assert (cut.train_lrs, cut.finished, len(cut.trace)) == ([0.1] * 5 + [0.2] * 2, False, 2)
    script = Script((Probe(lr=0.1, num_steps=4), Train(lr=0.1, num_steps=None)))
    assert len(run_toy(script, Quadratic(), total_steps=10, count_search=True).train_lrs) == 6


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([Probe(lr=0.1, num_steps=1, start="nowhere")], "nowhere"),
        ([Probe(lr=0.1, num_steps=1, release=("nowhere",))], "nowhere"),
        ([Train(lr=0.1, num_steps=1, keep_start=True), *[Train(lr=0.1, num_steps=1, release=("s1",))] * 2], "s1"),
        ([Train(lr=0.1, num_steps=None)], "needs a run that ends"),
    ],
)
def test_broken_rules_are_found(script: list[Request], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        answers(Quadratic(), *script)


def test_validation_needs_validation_batches() -> None:
    with pytest.raises(AssertionError, match="no validation"):
        answers(Quadratic(), Probe(lr=0.1, num_steps=1), has_validation=False)
