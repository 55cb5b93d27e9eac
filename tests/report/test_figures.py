"""What the figures show: their lines and marks against the trace they are drawn from. How they look is for eyes."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
import pytest

from lightning_autolr.core import surrogate
from lightning_autolr.core.minimum import PastMinimum
from lightning_autolr.core.record import Entry
from lightning_autolr.core.requests import (
    LineProbe,
    LineResult,
    Probe,
    ProbeResult,
    Requests,
    Run,
    Status,
    Train,
    TrainResult,
)
from lightning_autolr.report.figures import (
    autowu_figure,
    beam_figure,
    candidates_figure,
    drawings_of,
    drawings_of_search,
    factors_figure,
    figures_of,
    probes_figure,
    range_test_figure,
    save_figure,
    schedule_figure,
)
from lightning_autolr.report.figures import candidates as figure_of_candidates
from lightning_autolr.report.figures.style import BLUE, GREEN, PURPLE, RED
from lightning_autolr.report.inspect import Candidate, Search, pieces_of, range_suggestion, searches_of
from lightning_autolr.schedules import Linear, Segment
from lightning_autolr.search import ladder
from lightning_autolr.search.autolrs import AutoLRS
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.beam import BeamSearch
from lightning_autolr.search.factors import FactorSearch
from lightning_autolr.search.fixed import Fixed
from lightning_autolr.search.range_test import RangeTest
from tests.report.traces import by_hand, entries_of, named, probe, recorded, segments_of
from tests.toy import Ranged
from tests.zoo import noisy_quadratic, off_centre

PAIRS = by_hand()
TRACE, SEGMENTS = entries_of(PAIRS), segments_of(PAIRS)


class Warmup(AbstractSearch):
    """The trace of AutoWU's warm-up without its tests, which take time."""

    def requests(self, run: Run) -> Requests:
        for i in range(4):
            yield Train(1e-3 * 2**i, 10, kind="climb")


@pytest.fixture
def given_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed hyper-parameters: fitting takes time and is tested elsewhere."""
    monkeypatch.setattr(surrogate, "_fit", lambda model: model.covar_module.base_kernel.initialize(lengthscale=0.3))


def rendered(figure: Any) -> bytes:
    """Pixels as PNG; drawing raises what the making of a figure does not."""
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()


def lines(axes: Any, color: str, style: str | None = None) -> list[Any]:
    return [x for x in axes.lines if x.get_color() == color and style in (None, x.get_linestyle())]


def candidates(trace: Sequence[Entry] = TRACE) -> Search:
    return next(s for s in searches_of(trace) if s.kind == "candidates")


# -- which figures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "names"),
    [
        (Fixed(Linear(), 0.1), {"schedule"}),
        (BeamSearch(beam_size=1, factors=(2, 0.5), interval=4), {"schedule", "beam"}),
        (FactorSearch(factors=(2, 1, 0.5), every=4), {"schedule", "factors"}),
        (Ranged(RangeTest(1e-4, 8.0, 20, repeats=1)), {"range_test_000"}),
        (Warmup(), {"schedule", "autowu"}),
    ],
)
def test_what_fits_a_trace(search: Any, names: set[str]) -> None:
    assert set(drawings_of(*recorded(search, off_centre(), 40))) == names


def test_a_coarse_search_has_its_own_names_where_another_comes_after_it() -> None:
    trace, segments = recorded(AutoLRS(), replace(off_centre(), floor=1000.0), 400, lr=0.01)
    names = set(drawings_of(trace, segments))
    assert names == {"schedule", "coarse_candidates_000", "coarse_probes_000", "candidates_001", "probes_001"}
    coarse, fine = searches_of(trace, segments)
    assert (coarse.train, fine.train) == (None, trace[-1].request)
    assert {c.steps for c in coarse.candidates} != {c.steps for c in fine.candidates}
    trace, segments = recorded(AutoLRS(), off_centre(), 400, lr=0.01)
    assert set(drawings_of(trace, segments)) == {"schedule", "candidates_000", "probes_000"}
    (only,) = searches_of(trace, segments)
    assert len(only.candidates) == sum(isinstance(e.request, Probe) and e.request.kind == "coarse" for e in trace)


def test_each_search_among_candidates_has_two() -> None:
    assert set(drawings_of(TRACE, SEGMENTS)) == {"schedule", "candidates_000", "probes_000"}
    assert drawings_of([], []) == {}
    assert drawings_of_search(Search(0, "candidates", 0, 0, (), (Candidate(0.1, 1.0),))) == {}


@pytest.mark.usefixtures("given_process")
def test_they_are_png_of_720_by_540(tmp_path: Any) -> None:
    drawn = figures_of(TRACE, SEGMENTS)
    for name, figure in drawn.items():
        path = save_figure(figure, tmp_path / "sub" / f"{name}.png")
        header = path.read_bytes()[:24]
        assert header[:4] == b"\x89PNG"
        assert (int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")) == (720, 540)
    assert save_figure(drawn["schedule"], tmp_path / "schedule.svg").read_text().startswith("<?xml")


def test_nothing_global_is_touched() -> None:
    before = dict(matplotlib.rcParams)
    rendered(schedule_figure(pieces_of(TRACE, SEGMENTS), searches_of(TRACE, SEGMENTS)))
    assert dict(matplotlib.rcParams) == before


def test_neither_matplotlib_on_import_nor_pyplot_ever() -> None:
    code = (
        "import sys; from lightning_autolr.report import figures as f; assert 'matplotlib' not in sys.modules;"
        "from lightning_autolr.report.inspect import Piece; from lightning_autolr.schedules import Segment;"
        "import io; f.schedule_figure([Piece(0, Segment(3, 0.1))]).savefig(io.BytesIO());"
        "assert 'matplotlib.pyplot' not in sys.modules and 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"lightning-autolr\[plots\]"):
        figures_of(TRACE, SEGMENTS)


# -- the whole run ------------------------------------------------------------------------------------------------------


def test_schedule_shows_every_step_and_what_was_undone() -> None:
    figure = schedule_figure(pieces_of(TRACE, SEGMENTS), searches_of(TRACE, SEGMENTS))
    top, bottom = figure.axes
    kept = {
        x: y
        for line in lines(top, BLUE, "-")
        for x, y in zip(*line.get_data(), strict=True)
        if len(line.get_xdata()) > 2
    }
    assert [kept[step] for step in (0, 1, 2, 3)] == [0.1] * 4
    assert [kept[step] for step in (8, 9, 10)] == [0.05] * 3
    assert 6 not in kept
    assert [(p.get_x(), p.get_width()) for p in top.patches] == [(4, 4)]
    (marks,) = [x for x in top.lines if x.get_marker() == "v"]
    assert list(marks.get_xdata()) == [0]
    (looks,) = [x for x in bottom.lines if x.get_marker() == "o"]
    assert list(looks.get_xdata()) == [0, 4, 8]
    assert list(looks.get_ydata()) == [3.0, 1.0, 4.0]
    assert top.get_yscale() == "log"
    assert figure.get_suptitle() == (
        "10 steps trained, 4 of them undone\n8 private steps of search (80% of the steps trained)"
    )


def test_an_anneal_to_zero_does_not_take_the_whole_axis() -> None:
    segments = [Segment(1000, 0.1), Segment(1000, 0.1, Linear())]
    (top, _) = schedule_figure(pieces_of([], segments)).axes
    assert 1e-6 < 1e-4 <= top.get_ylim()[0] * 1.01 < 0.1


def test_a_long_run_is_thinned_and_no_extreme_is_lost() -> None:
    losses = np.ones(20_000)
    losses[7_777] = 5.0
    trace = entries_of([(Train(0.1, None), TrainResult(tuple(losses)))])
    _, bottom = schedule_figure(pieces_of(trace, [Segment(20_000, 0.1)])).axes
    assert sum(len(line.get_xdata()) for line in bottom.lines) <= 400
    assert max(c.get_paths()[0].vertices[:, 1].max() for c in bottom.collections) == 5.0


def test_beam_path_is_what_was_trained() -> None:
    trace, segments = recorded(BeamSearch(beam_size=2, factors=(2, 0.5), interval=4), off_centre(), 20, lr=0.01)
    rounds = searches_of(trace, segments)
    top, bottom = beam_figure(rounds).axes
    path = max(top.collections, key=lambda c: c.get_linewidth()[0]).get_segments()
    assert [(edge[1][0], edge[1][1]) for edge in path] == [(4 * (i + 1), s.lr) for i, s in enumerate(segments)]
    assert path[0][0][1] == pytest.approx(0.01)  # the middle of 0.02 and 0.005
    children = sum(len(c.get_segments()) for c in top.collections if c.get_linewidth()[0] in (0.7, 1.4))
    assert children == 2 + 4 * 4
    (best,) = lines(bottom, BLUE)
    assert list(best.get_ydata()) == [s.best.score for s in rounds if s.best]


def test_factors_are_scored_column_by_column() -> None:
    trace, segments = recorded(FactorSearch(factors=(2, 1, 0.5), every=5), off_centre(), 15, lr=0.01)
    decisions = searches_of(trace, segments)
    figure = factors_figure(decisions)
    top, bottom = figure.axes[:2]
    (rates,) = lines(top, BLUE)
    assert list(rates.get_ydata()) == [0.01, *(s.lr for s in segments)]
    cells = np.asarray(bottom.collections[0].get_array()).reshape(3, 3)
    assert np.allclose(cells.mean(axis=0), 0)
    assert np.allclose(cells.std(axis=0), 1)
    assert cells[:, 0].tolist() == sorted(cells[:, 0], reverse=True)  # rows are 0.5, 1, 2; the largest was best
    (ratios,) = [x for x in bottom.lines if x.get_marker() == "o"]
    assert ratios.get_ydata() == pytest.approx(
        [b / a for a, b in zip(rates.get_ydata()[:-1], rates.get_ydata()[1:], strict=True)]
    )


def test_autowu_shows_the_minimum_and_the_switch() -> None:
    steps = np.arange(200)
    losses = (steps / 100 - 1.2) ** 2 + 1  # its minimum is at step 120
    pairs = [
        (Train(10.0 ** (i - 5), 50, kind="climb"), TrainResult(tuple(losses[50 * i : 50 * i + 50]))) for i in range(4)
    ]
    pairs.append((Train(0.003, None, label="decay"), TrainResult(tuple(np.ones(100)))))
    top, middle, bottom = autowu_figure(pieces_of(entries_of(pairs), segments_of(pairs))).axes
    for axes in (top, middle, bottom):
        (minimum,), (switch,) = lines(axes, GREEN), lines(axes, RED)
        assert minimum.get_xdata()[0] == pytest.approx(120, abs=5)
        assert switch.get_xdata()[0] == 200
    (probability,) = lines(middle, BLUE)
    assert list(probability.get_xdata()) == [50, 100, 150, 200]
    assert probability.get_ydata()[-1] == pytest.approx(1)
    assert probability.get_ydata()[0] < PastMinimum().confidence
    with pytest.raises(ValueError, match="Expected a warm-up of AutoWU"):
        autowu_figure(pieces_of(TRACE, SEGMENTS))


# -- one search ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("given_process")
def test_stage_shows_scores_errors_process_and_choice() -> None:
    top, below = candidates_figure(candidates()).axes
    (scores,) = top.containers
    assert list(scores[0].get_xdata()) == [0.01, 0.1, 0.3]
    assert list(scores[0].get_ydata()) == [3.0, 1.0, 1.5]
    bars = scores[2][0].get_segments()
    assert bars[0][1][1] - bars[0][0][1] == pytest.approx(2 / math.sqrt(3))
    (mean,) = lines(top, BLUE)
    x, y = mean.get_data()
    assert (x[0], x[-1]) == pytest.approx((0.01, 0.3))  # the best one and its neighbours, not the one that diverged
    assert 0.9 < np.interp(0.1, x, y) < 1.1  # where the errors are small it goes through the scores
    assert lines(below, PURPLE)[0].get_ydata().min() >= 0
    for axes in (top, below):
        assert lines(axes, GREEN)[0].get_xdata()[0] == 0.1
    assert [list(x.get_xdata()) for x in lines(top, RED)] == [[1.0]]
    assert top.get_xscale() == "log"


@pytest.mark.parametrize("total_steps", [1000, 3000])
def test_the_process_is_given_what_the_search_gave_it(total_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[Any, list[Any]] = {ladder: [], figure_of_candidates: []}

    def listen(module: Any) -> None:
        def heard(observations: Any, bounds: Any, lrs: Any) -> Any:
            given[module].append((observations, bounds))
            return surrogate.posterior(observations, bounds, lrs)

        monkeypatch.setattr(module, "posterior", heard)

    listen(ladder)
    listen(figure_of_candidates)
    trace, segments = recorded(AutoLRS(), noisy_quadratic(), total_steps, lr=0.01)
    for search in searches_of(trace, segments):
        if search.kind == "candidates":
            candidates_figure(search)
    assert given[ladder]
    assert given[figure_of_candidates][-1] == given[ladder][-1]


def test_stage_without_enough_for_a_process() -> None:
    pairs = [probe(0.1, [2.0], [1.0, 1.2]), probe(0.2, [2.0], [0.9, 1.0])]
    (only,) = candidates_figure(candidates(entries_of(pairs))).axes
    assert not lines(only, BLUE)


def test_probes_end_in_their_forecasts() -> None:
    losses = 2 * np.exp(-0.05 * np.arange(40)) + 0.5
    pairs = [
        (Probe(lr, 40, evaluate="none", forecast_horizon=400, estimator="bounded"), ProbeResult(tuple(losses + lr)))
        for lr in (0.1, 0.2)
    ]
    pairs.append((Train(0.1, 400), TrainResult((1.0,))))
    axes, bar = probes_figure(candidates(entries_of(pairs))).axes
    ends = [x for x in axes.lines if x.get_marker() == "D"]
    assert [(list(x.get_xdata()), list(x.get_ydata())) for x in ends] == [
        ([400], [pytest.approx(0.6)]),
        ([400], [pytest.approx(0.7)]),
    ]
    curve = next(x for x in axes.lines if x.get_linestyle() == "--")
    assert curve.get_ydata()[0] == pytest.approx(2.6)  # the fit goes through the first loss
    assert bar.get_ylabel() == "learning rate"


def test_probes_with_evaluations() -> None:
    axes, _ = probes_figure(candidates()).axes
    points = [x for x in axes.lines if x.get_marker() == "o" and len(x.get_xdata())]
    assert [(list(x.get_xdata()), list(x.get_ydata())) for x in points] == [([2], [3.0]), ([2], [1.0]), ([2], [1.5])]
    assert axes.get_ylim()[1] < 10  # the loss of the one that diverged is 2e30


@pytest.mark.parametrize(
    ("evaluate", "name"),
    [("train", "mean training loss, second half"), ("validation", "loss on the evaluation batches")],
)
def test_figures_say_what_scored_the_candidates(evaluate: Any, name: str) -> None:
    trace, _ = recorded(AutoLRS(objective=evaluate, coarse_steps=0), off_centre(), 100, lr=0.01)
    figure = probes_figure(candidates(trace))
    assert name in [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert candidates_figure(candidates(trace)).axes[0].get_ylabel().replace("\n", " ") == name


def test_a_score_that_is_no_loss_has_an_axis_of_its_own() -> None:
    trace = entries_of(named(PAIRS, "-val_acc"))
    figure = schedule_figure(pieces_of(trace, segments_of(PAIRS)), searches_of(trace))
    _, bottom, right = figure.axes
    assert (bottom.get_ylabel(), right.get_ylabel()) == ("training loss", "-val_acc")
    (dots,) = right.lines
    assert list(dots.get_ydata()) == [3.0, 1.0, 4.0]
    assert [x for x in bottom.lines if x.get_marker() == "o"] == []
    axes, _ = probes_figure(candidates(trace)).axes
    assert not [x for x in axes.lines if x.get_marker() == "o" and len(x.get_xdata())]
    assert candidates_figure(candidates(trace)).axes[0].get_ylabel().startswith("-val_acc on")


def test_range_test_shows_every_climb_and_the_interval() -> None:
    trace, _ = recorded(Ranged(RangeTest(1e-4, 8.0, 60, repeats=2)), noisy_quadratic())
    suggestion = range_suggestion(searches_of(trace)[0])
    (axes,) = range_test_figure(suggestion).axes
    assert sum(len(x.get_xdata()) > 10 for x in axes.lines) == 4  # as measured, and smoothed
    assert lines(axes, GREEN)[0].get_xdata()[0] == suggestion.lr
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((suggestion.lower, suggestion.upper))


# -- strange traces: drawn all the same, without a warning --------------------------------------------------------------

NAN, INF = math.nan, math.inf
STRANGE = {
    "one step": [(Train(0.1, 1), TrainResult((1.0,)))],
    "no losses": [(Train(0.1, 3), TrainResult(()))],
    "losses not finite": [(Train(0.1, 3), TrainResult((1.0, INF, NAN)))],
    "negative losses": [(Train(0.1, 3), TrainResult((-1.0, -20.0, -30.0)))],
    "learning rate 0": [(Train(0.1, 2, shape=Linear()), TrainResult((1.0, 1.0)))],
    "all diverged": [
        (Probe(lr, 2), ProbeResult((1.0, INF), (), Status.DIVERGED)) for lr in (0.1, 0.2, 0.3)
    ],
    "no steps before it diverged": [(Probe(lr, 2), ProbeResult((), (), Status.DIVERGED)) for lr in (0.1, 0.2)],
    "equal scores": [probe(lr, [1.0, 1.0], [1.0, 1.0]) for lr in (0.1, 0.2, 0.3)],
    "equal learning rates": [probe(0.1, [1.0, 1.0], [1.0, 1.0]) for _ in range(3)],
    "evaluations not finite": [probe(lr, [1.0, 1.0], [1.0, NAN]) for lr in (0.1, 0.2, 0.3)],
    "line probe not finite": [(LineProbe(0.1, (2.0, 1.0, 0.5)), LineResult(1.0, (INF, NAN, NAN)))],
    "no step at all": [(LineProbe(0.1, (0.0, 2.0, 0.5)), LineResult(0.9, (1.0, 0.5, 0.7)))],
    "one factor": [(LineProbe(0.1, (2.0,)), LineResult(1.0, (0.5,)))],
    "climb that ran away at once": [
        (Probe(1.0, 10, evaluate="none", kind="range test"), ProbeResult((1.0, NAN), (), Status.DIVERGED))
    ],
    "beam of failures": [
        (Probe(lr, 2, evaluate="none", kind="beam"), ProbeResult((NAN,), (), Status.DIVERGED))
        for lr in (0.1, 0.2)
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.usefixtures("given_process")
def test_strange_traces(name: str) -> None:
    pairs = STRANGE[name]
    drawings = drawings_of(entries_of(pairs), segments_of(pairs))
    assert drawings
    for draw in drawings.values():
        rendered(draw())


def test_a_figure_of_a_long_run_is_quick() -> None:
    segments = [Segment(100, 0.1 / (1 + i)) for i in range(300)]
    pieces = pieces_of([], segments)
    begun = time.process_time()
    schedule_figure(pieces)
    assert time.process_time() - begun < 5
