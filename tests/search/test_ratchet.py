"""Training that takes back what did harm: looks with made-up losses, and every search on problems with known answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from lightning_autolr.core.requests import Evaluation, Probe, ProbeResult, Run, Status, Train, TrainResult
from lightning_autolr.schedules import Constant, Linear, Tabulated, WarmupStableDecay
from lightning_autolr.search.autolrs import AutoLRS
from lightning_autolr.search.autowu import AutoWU
from lightning_autolr.search.base import AbstractSearch, replay
from lightning_autolr.search.beam import BeamSearch
from lightning_autolr.search.factors import FactorSearch
from lightning_autolr.search.fixed import Fixed
from lightning_autolr.search.looks import _overfits
from lightning_autolr.search.published import PublishedAutoLRS
from lightning_autolr.search.ratchet import Guarded, Ratchet
from tests.report.traces import segments_of
from tests.toy import run_toy
from tests.zoo import Problem, Quadratic, noisy_quadratic, off_centre


@dataclass
class Curve:
    """Answers a search with made-up validation losses: one for each look of the ratchet.

    Training losses are those of the next look, unless others are given. With the running statistics that training left, kept
    weights have a loss that is higher by ``lag``.
    """

    looks: list[float]
    diverge_at: int | None = None
    training: list[float] | None = None
    lag: float = 0.0

    def run(self, search: AbstractSearch, total: int) -> list[tuple[Train, int]]:
        requests = search.requests(Run(total_steps=total, lr=0.1))
        request, trained, look, kept = next(requests), [], 0, 0
        self.trace = []
        kept_losses: dict[str, float] = {}
        try:
            while True:
                if isinstance(request, Train):
                    kept += request.keep_start
                    if request.keep_start:
                        kept_losses[f"s{kept}"] = self.looks[min(look, len(self.looks)) - 1]
                    diverged = self.diverge_at == len(trained)
                    training = self.looks if self.training is None else self.training
                    answer = TrainResult(
                        (training[min(look, len(training) - 1)],) * (request.num_steps or 1),
                        Status.DIVERGED if diverged else Status.OK,
                        f"s{kept}" if request.keep_start else None,
                    )
                    trained.append((request, look))
                elif request.num_steps == 0:
                    if request.update_bn:
                        look += 1
                    loss = self.looks[min(look, len(self.looks)) - 1]
                    if request.start is not None:
                        loss = kept_losses[request.start] + self.lag
                    answer = ProbeResult(evaluations=(Evaluation(0, (loss - 0.01, loss + 0.01)),))
                else:
                    score = abs(math.log(request.lr))
                    answer = ProbeResult((1.0,) * request.num_steps, (Evaluation(0, (score, score + 0.1)),))
                self.trace.append((request, answer))
                request = requests.send(answer)
        except StopIteration:
            return trained


FALLING = Guarded(Fixed(Linear()))  # 400 steps, a look before them and one after every 10


def test_a_falling_loss_is_never_undone() -> None:
    trained = Curve([1 / (1 + i) for i in range(100)]).run(FALLING, 400)
    assert not any(q.start for q, _ in trained)
    assert len({q.lr for q, _ in trained}) == 1
    assert sum(q.num_steps for q, _ in trained) == 400


@pytest.mark.parametrize("patience", [3, 5])
def test_overfitting_goes_back_to_the_lowest_loss_and_halves(patience: int) -> None:
    learning = [2 - 0.08 * i for i in range(23)]
    losses = learning + [0.3 + 0.05 * i for i in range(100)]  # lowest after 22 stages
    training = learning + [0.24 / (1 + i) for i in range(100)]
    search = Guarded(Fixed(Linear()), Ratchet(patience=patience))
    trained = Curve(losses, training=training).run(search, 400)
    first_undo = next(i for i, (q, _) in enumerate(trained) if q.start)
    medians = [np.median(losses[max(0, k - patience + 1) : k + 1]) for k in range(40)]  # of the looks up to number k
    window = next(k for k in range(2 * patience, 40) if medians[k] > medians[k - patience])
    assert first_undo == window
    assert trained[first_undo][0].lr == pytest.approx(trained[first_undo - 1][0].lr / search.ratchet.shrink)
    assert all(q.lr == trained[0][0].lr for q, _ in trained[:first_undo])
    lowest = next(i for i, (q, look) in enumerate(trained) if look == 23)  # the stage that began at the lowest loss
    assert trained[lowest][0].keep_start
    assert trained[first_undo][0].start == self_id(trained, lowest)


def self_id(trained: list[tuple[Train, int]], index: int) -> str:
    return f"s{sum(q.keep_start for q, _ in trained[: index + 1])}"


def test_a_jitter_around_a_falling_trend_is_not_undone() -> None:
    rng = np.random.default_rng(0)
    losses = [2 - 0.03 * i + 0.06 * rng.standard_normal() for i in range(100)]
    lows = np.minimum.accumulate(losses[:40])
    assert max(np.diff(np.flatnonzero(np.diff(lows)))) >= 4  # there is no new lowest for some looks
    assert not any(q.start for q, _ in Curve(losses).run(FALLING, 400)[:-1])


def test_the_run_ends_on_its_best_weights() -> None:
    losses = [2 - 0.04 * i for i in range(40)] + [0.9]  # the last look is worse than the one before
    trained = Curve(losses).run(FALLING, 400)
    last = trained[-1][0]
    assert last.start is not None
    assert last.num_steps == 1
    assert not any(q.start for q, _ in trained[:-1])


def test_the_end_compares_weights_as_they_are() -> None:
    losses = [2 - 0.04 * i for i in range(40)] + [0.9]
    assert Curve(losses, lag=0.45).run(FALLING, 400)[-1][0].start is not None  # 0.44 + 0.45 < 0.9
    assert Curve(losses, lag=0.47).run(FALLING, 400)[-1][0].start is None


def test_a_blow_up_is_undone_at_once_even_at_the_highest_rate() -> None:
    hold = Guarded(Fixed(Constant()))
    trained = Curve([1.0, 0.9, 0.8, 50.0, 0.7], None).run(hold, 400)
    assert trained[3][0].start is not None
    assert trained[3][0].lr == pytest.approx(trained[2][0].lr / 2)
    diverged = Curve([1 / (1 + i) for i in range(100)], diverge_at=4).run(hold, 400)
    assert diverged[5][0].start is not None


def test_a_look_that_jumps_while_training_does_not_is_no_blow_up() -> None:
    looks = [2.0, 1.0, 0.8, 1.9, 0.7, *(0.6 - 0.01 * i for i in range(40))]
    falling = [2 - 0.04 * i for i in range(50)]
    assert not any(q.start for q, _ in Curve(looks, training=falling).run(FALLING, 400))
    assert any(q.start for q, _ in Curve(looks).run(FALLING, 400))


def test_losses_that_rise_are_harm_only_where_the_network_overfits() -> None:
    low, high = [0.9, 1.3, 0.8, 0.7, 0.8], [0.75, 0.7, 0.9, 1.0, 1.0]  # as batch norm's statistics jitter
    looks = [2.0, *low, *high, *(0.69 - 0.005 * i for i in range(50))]

    def is_undone(training: list[float]) -> bool:
        return any(q.start for q, _ in Curve(looks, training=training).run(FALLING, 400)[:-1])

    assert not is_undone([0.7 - 0.002 * i for i in range(61)])
    assert is_undone([0.7 - 0.02 * i for i in range(61)])  # far below the lowest look
    assert is_undone(
        [1.7 - 0.1 * i for i in range(61)]
    )  # above it, as with noisy labels, and far below what they were then
    assert not is_undone([1.7 - 0.002 * i for i in range(61)])


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_overfitting_is_a_difference_where_losses_are_negative(shift: float) -> None:
    """As those of a density model may be: training losses above the lowest look are not far below it."""
    jitters = [(shift - 1.0, shift - 0.9)] * 5 + [(shift - 0.99, shift - 0.9)] * 5
    assert not _overfits(jitters, 5, learnt=shift - 1.0)
    overfits = [(look, train - 0.6) for look, train in jitters]
    assert _overfits(overfits, 5, learnt=shift - 1.0)


def test_noise_at_the_highest_rate_undoes_nothing() -> None:
    rng = np.random.default_rng(0)
    losses = [1.0, *(0.5 + 0.05 * rng.standard_normal(19))] + [0.4 - 0.01 * i for i in range(30)]
    shape = WarmupStableDecay(num_decay_steps=0.5, num_warmup_steps=0.0)
    assert not any(q.start for q, _ in Curve(losses).run(Guarded(Fixed(shape)), 400))


SEARCHES: dict[str, AbstractSearch] = {
    "constant": Fixed(Constant()),
    "linear": Fixed(Linear(), peak_lr=0.5),
    "AutoLRS": AutoLRS(),
    "published": PublishedAutoLRS(min_lr=1e-3, max_lr=1.0, tau=100, num_candidates=4),
    "AutoWU": AutoWU(min_lr=1e-3, max_lr=3.0, test_every=40),
    "beam": BeamSearch(interval=50),
    "factors": FactorSearch(every=50),
}


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("problem", [noisy_quadratic(), off_centre()], ids=["noisy", "off centre"])
def test_any_search_can_be_guarded(name: str, problem: Problem) -> None:
    guarded = Guarded(SEARCHES[name], Ratchet(num_looks=20))
    run = run_toy(guarded, problem, total_steps=400)
    assert len(run.train_lrs) == 400
    assert len(run.kept) <= 1 + run_toy(SEARCHES[name], problem, total_steps=400).most_kept
    looks = [
        a for q, a in run.trace if isinstance(q, Probe) and q.num_steps == 0 and q.label == "ratchet" and a.evaluations
    ]
    assert len(looks) >= 15
    middle = len(run.trace) // 2
    assert replay(guarded.requests(Run(total_steps=400, lr=0.1)), run.trace[:middle]) == run.trace[middle][0]


REPLAYED = {
    **SEARCHES,
    "beam": BeamSearch(beam_size=1, interval=50),
    "one that diverges": Fixed(Constant(), peak_lr=7.0),
}


@pytest.mark.parametrize("name", REPLAYED)
@pytest.mark.parametrize("problem", [noisy_quadratic(), off_centre()], ids=["noisy", "off centre"])
def test_what_it_does_can_be_replayed(name: str, problem: Problem) -> None:
    """The same steps lead to the same weights, and those that were not undone are the way to them."""
    run = run_toy(Guarded(REPLAYED[name], Ratchet(num_looks=20)), problem, total_steps=400)
    table = Tabulated(tuple(segments_of(run.trace)))
    again = run_toy(Fixed(table), problem, total_steps=400)
    assert again.train_lrs == run.train_lrs
    assert again.path == run.path == tuple(table.kept()(step) for step in range(len(run.path)))
    assert np.array_equal(again.state, run.state)


def test_a_rate_that_is_too_high_is_survived() -> None:
    # Rates above 2 / h = 2 diverge: without the ratchet the weights are lost.
    problem = Quadratic(curvature=(1.0, 0.1))
    start = problem.loss(np.asarray(problem.start))
    with np.errstate(over="ignore", invalid="ignore"):
        lost = problem.loss(run_toy(Fixed(Constant(), peak_lr=7.0), problem, total_steps=400).state)
        held = problem.loss(run_toy(Guarded(Fixed(Constant(), peak_lr=7.0)), problem, total_steps=400).state)
    assert not lost < start
    assert held < 0.01 * start


def test_of_unknown_length_it_looks_at_its_own_pace() -> None:
    requests = Guarded(Fixed(Constant()), Ratchet(longest_stage=30)).requests(Run(total_steps=None, lr=0.1))
    request, lengths = next(requests), []
    for number in range(30):
        if isinstance(request, Train):
            lengths.append(request.num_steps)
            answer = TrainResult((1.0,) * 30, start=f"s{number}")
        else:
            answer = ProbeResult((), (Evaluation(0, (1 / (1 + number), 1 / (1 + number))),))
        request = requests.send(answer)
    assert set(lengths) == {30}


def test_needs_something_to_look_at() -> None:
    with pytest.raises(ValueError, match="holdout"):
        next(Guarded(Fixed(Constant())).requests(Run(total_steps=10, has_validation=False)))


@pytest.mark.parametrize(
    "wrong", [{"shrink": 1.0}, {"patience": 0}, {"num_looks": 0}, {"longest_stage": 0}, {"objective": "none"}]
)
def test_says_no(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        replace(Ratchet(), **wrong)
