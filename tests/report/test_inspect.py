"""What is read from a trace: candidates, their errors and forecasts, what was chosen; and the tables made of it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_autolr.commands import inspect
from lightning_autolr.core.losses import paired
from lightning_autolr.core.range_rules import RULES, RangeSuggestion, Rule
from lightning_autolr.core.record import Entry
from lightning_autolr.core.requests import LineProbe, Probe, ProbeResult, Request, Status, Train
from lightning_autolr.core.surrogate import Observation, Suggestion
from lightning_autolr.report.figures import drawings_of
from lightning_autolr.report.inspect import (
    Inspection,
    inspect_run,
    pieces_of,
    range_suggestion,
    searches_of,
)
from lightning_autolr.schedules import OneCycle, Segment, Tabulated, to_plain
from lightning_autolr.search import published
from lightning_autolr.search.autolrs import AutoLRS
from lightning_autolr.search.autowu import AutoWU
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.beam import BeamSearch
from lightning_autolr.search.factors import FactorSearch
from lightning_autolr.search.range_test import RangeTest
from tests.report.traces import by_hand, entries_of, named, probe, recorded, segments_of
from tests.toy import Ranged, run_toy
from tests.zoo import noisy_quadratic, off_centre

PAIRS = by_hand()
TRACE, SEGMENTS = entries_of(PAIRS), segments_of(PAIRS)


def write(folder: Path, trace: list[Entry], segments: list[Segment], summary: dict[str, float] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trace.jsonl").write_text("".join(json.dumps(entry.to_json()) + "\n" for entry in trace))
    if segments:
        Tabulated(tuple(segments)).to_file(folder / "schedule.json")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def shown(inspection: Inspection, width: int = 150) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(inspection)
    return console.export_text()


# -- candidates ---------------------------------------------------------------------------------------------------------


def test_candidates_with_their_paired_errors() -> None:
    search = next(s for s in searches_of(TRACE, SEGMENTS) if s.kind == "candidates")
    assert [c.lr for c in search.candidates] == [0.01, 0.1, 0.3, 1.0]
    assert [c.score for c in search.candidates] == [3.0, 1.0, 1.5, math.inf]
    # differences to the best are (1, 2, 3): standard deviation 1 over three batches; (.5, .5, .5) have none
    assert search.candidates[0].stderr == pytest.approx(1 / math.sqrt(3))
    assert [c.stderr for c in search.candidates[1:]] == [None, 0.0, None]
    assert search.candidates[3].status is Status.DIVERGED
    assert search.best is search.candidates[1]
    assert search.train is PAIRS[5][0]
    assert (search.base, search.step, search.number, search.steps, search.seconds) == (3.0, 0, 0, 8, 4.0)


def test_errors_where_the_numbers_of_losses_differ_are_those_of_the_search() -> None:
    """Of a single loss nothing is known, and nothing is said."""
    pairs: list[Any] = [probe(0.1, [2.0], [1.0, 1.2, 1.1]), probe(0.2, [2.0], [2.0, 3.0]), probe(0.4, [2.0], [3.0])]
    (search,) = searches_of(entries_of(pairs))
    results = [answer for _, answer in pairs]
    assert [c.result for c in search.candidates] == results
    assert [c.stderr for c in search.candidates] == [None, paired(results[0], results[1])[1], None]


def test_looks_stand_where_they_were_taken() -> None:
    looks = [s for s in searches_of(TRACE, SEGMENTS) if s.kind == "look"]
    assert [(s.step, s.base) for s in looks] == [(0, 3.0), (4, 1.0), (8, 4.0)]


def test_a_part_of_a_trace() -> None:
    upcoming = PAIRS[5][0]
    assert isinstance(upcoming, Train)
    part = next(s for s in searches_of(TRACE[1:5], upcoming=upcoming, step=70) if s.candidates)
    assert (part.step, part.train) == (70, upcoming)


def test_probes_in_two_parts_are_one_candidate() -> None:
    pairs = [
        (Probe(0.1, 2, keep_end=True, evaluate="none"), ProbeResult((4.0, 3.0), end="x")),
        (Probe(0.2, 2, keep_end=True, evaluate="none"), ProbeResult((4.0, 2.0), end="y")),
        (Probe(0.1, 1, offset=2, start="x", evaluate="none", release=("x", "y")), ProbeResult((2.0,))),
    ]
    (search,) = searches_of(entries_of(pairs))
    assert [(c.lr, c.losses) for c in search.candidates] == [(0.1, (4.0, 3.0, 2.0)), (0.2, (4.0, 2.0))]
    assert [c.score for c in search.candidates] == [3.0, 3.0]


@pytest.mark.parametrize("estimator", ["bounded", "reference"])
@pytest.mark.parametrize("objective", ["train", "validation"])
def test_forecasts_of_the_published_method_are_those_it_chose_by(
    estimator: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evenly(observations: Sequence[Observation], bounds: tuple[float, float], **_: Any) -> Suggestion:
        return Suggestion(bounds[0] * 5 ** len(observations))

    monkeypatch.setattr(published, "suggest", evenly)  # which candidates are tried does not matter here
    search = published.PublishedAutoLRS(
        1e-3, 0.5, tau=160, tau_max=320, num_candidates=4, objective=objective, estimator=estimator
    )
    trace, segments = recorded(search, noisy_quadratic(), 700)
    searches = [s for s in searches_of(trace, segments) if s.candidates]
    assert [s.horizon for s in searches] == [160, 320]
    for found in searches:
        assert found.best is not None
        assert found.train is not None
        assert found.best.lr == found.train.lr
        assert f"{found.best.score:.4g}" in found.train.reason


def test_children_of_a_beam_and_the_one_that_was_trained() -> None:
    trace, segments = recorded(BeamSearch(beam_size=2, factors=(2, 0.5), interval=4), off_centre(), 20, lr=0.01)
    rounds = searches_of(trace, segments)
    assert [s.kind for s in rounds] == ["beam"] * 5
    assert [s.step for s in rounds] == [0, 4, 8, 12, 16]
    assert [len(s.candidates) for s in rounds] == [2, 4, 4, 4, 4]
    rows = [row for row in Inspection(Path(), tuple(trace), tuple(segments)).rows() if row["what"] == "beam"]
    for number, search in enumerate(rounds):
        chosen = [row for row in rows if row["search"] == number and row["chosen"]]
        assert [(row["lr"], row["best"]) for row in chosen] == [(search.train.lr, True)]
    assert (
        sum(s.steps for s in rounds)
        == run_toy(BeamSearch(beam_size=2, factors=(2, 0.5), interval=4), off_centre(), 20, lr=0.01).search_steps
    )


@pytest.mark.parametrize(
    ("options", "has_base"),
    [({}, False), ({"evaluate_on": "same"}, True), ({"normalize": "improvement"}, True)],
)
def test_factors_are_learning_rates(options: dict[str, Any], has_base: bool) -> None:
    trace, segments = recorded(FactorSearch(factors=(2, 1, 0.5), every=5, **options), off_centre(), 15, lr=0.01)
    searches = searches_of(trace, segments)
    first = trace[0].request
    assert isinstance(first, LineProbe)
    assert [c.lr for c in searches[0].candidates] == [0.02, 0.01, 0.005]
    assert searches[0].best is searches[0].candidates[0]  # far below 0.25, which solves the problem, twice is better
    assert searches[0].base == (32.0 if has_base else None)  # half of 4 times 4 squared
    assert [s.step for s in searches] == [0, 5, 10]


@pytest.mark.parametrize("rule", RULES)
def test_range_test_says_again_what_it_said(rule: Rule) -> None:
    search = Ranged(RangeTest(1e-4, 8.0, 60, repeats=2, rule=rule))
    trace, _ = recorded(search, noisy_quadratic(), 10)
    (found,) = searches_of(trace)
    assert len(found.candidates) == 2
    assert search.suggestion is not None
    assert range_suggestion(found).lr == pytest.approx(search.suggestion.lr)
    assert range_suggestion(found).reason == search.suggestion.reason


@pytest.mark.parametrize(
    ("search", "figures"),
    [
        (AutoLRS(), {"schedule", "candidates", "probes"}),
        (published.PublishedAutoLRS(1e-2, 0.3, tau=400, num_candidates=2), {"schedule", "candidates", "probes"}),
        (AutoWU(1e-3, num_tests=1, patience=1), {"schedule", "autowu"}),
        (BeamSearch(interval=40), {"schedule", "beam"}),
        (FactorSearch(every=40), {"schedule", "factors"}),
        (Ranged(RangeTest(1e-4, 8.0, 60, repeats=2, rule="edge"), apply=True), {"schedule", "range_test"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_is_read_out_of_labels_and_reasons(search: AbstractSearch, figures: set[str]) -> None:
    trace, segments = recorded(search, noisy_quadratic(), 400, lr=0.01)
    wordless = [replace(entry, request=reworded(entry.request)) for entry in trace]
    assert [entry.request for entry in wordless] == [entry.request for entry in trace]  # nor compared on resume
    kinds = [{name.rstrip("_0123456789") for name in drawings_of(t, segments)} for t in (trace, wordless)]
    assert kinds == [figures, figures]
    words = {"label": "x", "reason": "x"}
    first, second = (Inspection(Path(), tuple(t), tuple(segments)) for t in (trace, wordless))
    assert [{**row, **words} for row in first.rows()] == [{**row, **words} for row in second.rows()]
    assert cells_without_words(first) == cells_without_words(second)


def reworded(request: Request) -> Request:
    return replace(request, label="x", reason="x") if isinstance(request, Train) else replace(request, label="x")


def cells_without_words(inspection: Inspection) -> list[list[Any]]:
    return [list(column.cells) for table in inspection.tables() for column in table.columns if column.header != "why"]


# -- tables -------------------------------------------------------------------------------------------------------------


def test_account_without_a_summary_counts_the_trace() -> None:
    account = Inspection(Path(), tuple(TRACE), tuple(SEGMENTS)).account()
    assert account["schedule_steps"] == 6
    assert account["undone_steps"] == 4
    assert account["probe_steps"] == 8
    assert account["search_steps"] == 12


def test_pieces_pair_segments_with_what_was_asked_for() -> None:
    unfinished = Segment(1, 0.05)
    pieces = pieces_of(TRACE, [*SEGMENTS, unfinished])
    assert [(p.start, p.stop, p.segment.undone) for p in pieces] == [
        (0, 4, False),
        (4, 8, True),
        (8, 10, False),
        (10, 11, False),
    ]
    assert [p.train.reason if p.train else None for p in pieces] == [
        "The best of 4.",
        "Good.",
        "Worse, so undone.",
        None,
    ]


def test_tables_say_what_why_and_at_what_cost(tmp_path: Path) -> None:
    text = shown(inspect_run(write(tmp_path, TRACE, SEGMENTS)))
    assert "10 steps trained, 4 of them undone" in text
    assert "8 private steps of search (80% of the steps trained)" in text
    for words in ("The best of 4.", "Worse, so undone.", "undone", "best, chosen", "diverged", "± 0.58", "did not end"):
        assert words in text
    rows = [line for line in text.splitlines() if "Worse, so undone." in line]
    assert len(rows) == 1
    assert "8-10" in rows[0]
    assert "0.05" in rows[0]


def test_tables_say_what_a_score_is_that_is_no_loss() -> None:
    shown_as = [
        shown(Inspection(Path(), tuple(entries_of(pairs)), tuple(SEGMENTS)))
        for pairs in (PAIRS, named(PAIRS, "-val_acc"))
    ]
    assert ["-val_acc" in text for text in shown_as] == [False, True]


def test_what_was_chosen_between_the_candidates_has_a_row() -> None:
    pairs = [*PAIRS[1:5], (Train(0.15, 4), PAIRS[5][1])]
    text = shown(Inspection(Path(), tuple(entries_of(pairs)), tuple(segments_of(pairs))))
    assert [line for line in text.splitlines() if "0.15" in line and "chosen" in line]


def test_long_tables_are_cut_in_the_middle_and_the_csv_is_not(tmp_path: Path) -> None:
    trace, segments = recorded(FactorSearch(factors=(2, 1, 0.5), every=2), noisy_quadratic(), 200, lr=0.01)
    inspection = Inspection(tmp_path, tuple(trace), tuple(segments))
    assert "60 more" in shown(inspection)
    with inspection.to_csv(tmp_path / "rows.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 100 * 3 + 100


def test_csv_has_every_candidate_and_segment_with_full_precision(tmp_path: Path) -> None:
    inspection = inspect_run(write(tmp_path, TRACE, SEGMENTS))
    with inspection.to_csv(tmp_path / "sub" / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == ["candidates"] * 4 + ["train"] * 3
    assert float(rows[0]["stderr"]) == 1 / math.sqrt(3)
    assert [row["chosen"] for row in rows[:4]] == ["False", "True", "False", "False"]
    assert [row["undone"] for row in rows[4:]] == ["False", "True", "False"]
    assert rows[3]["score"] == "inf"


# -- folders ------------------------------------------------------------------------------------------------------------


def test_the_run_folder_or_the_one_inside_it(tmp_path: Path) -> None:
    write(tmp_path / "autolr", TRACE, SEGMENTS, {"schedule_steps": 6, "search_steps": 99})
    outer, inner = inspect_run(tmp_path), inspect_run(tmp_path / "autolr")
    assert outer == inner
    assert outer.account()["search_steps"] == 99
    assert outer.trace == tuple(TRACE)
    assert "did not end" not in shown(outer)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Expected a trace\.jsonl"):
        inspect_run(tmp_path)


def test_a_trace_that_a_crash_cut_short(tmp_path: Path) -> None:
    write(tmp_path, TRACE[:3], [])
    with (tmp_path / "trace.jsonl").open("a") as file:
        file.write('{"request": {"type": "Pro')
    inspection = inspect_run(tmp_path)
    assert len(inspection.trace) == 3
    assert "0.01" in shown(inspection)


def test_range_tests_of_the_callback(tmp_path: Path) -> None:
    trace, _ = recorded(Ranged(RangeTest(1e-4, 2.0, 60, repeats=2)), off_centre(), 10)
    suggestion = range_suggestion(searches_of(trace)[0])
    tests = [{"at": 3, "unit": "epoch", "suggestion": to_plain(suggestion)}]
    (tmp_path / "range_test.json").write_text(json.dumps(tests))
    inspection = inspect_run(tmp_path)
    assert inspection.range_tests == (("epoch 3", suggestion),)
    assert "epoch 3" in shown(inspection)


@pytest.mark.parametrize(
    ("lrs", "undone", "rows"),
    [
        ((0.1, 0.12, 0.1, 0.09), (), ["0-3 0-12 0.1 to 0.12 to 0.09"]),
        ((0.1, 0.1, 0.01, 0.01), (), ["0-1 0-6 0.1", "2-3 6-12 0.01"]),
        ((0.1, 0.1, 0.1, 0.1), (1, 2), ["0 0-3 0.1", "1-2 3-9 0.1", "3 9-12 0.1"]),
    ],
)
def test_stages_in_which_nothing_was_decided_are_one_row(
    lrs: tuple[float, ...], undone: tuple[int, ...], rows: list[str], tmp_path: Path
) -> None:
    segments = tuple(Segment(3, lr, undone=index in undone) for index, lr in enumerate(lrs))
    (_, table) = Inspection(tmp_path, segments=segments).tables()
    cells = zip(*(column.cells for column in table.columns[:3]), strict=True)
    assert [" ".join(str(cell) for cell in row) for row in cells] == rows


def test_a_peak_within_a_piece_is_shown(tmp_path: Path) -> None:
    (_, table) = Inspection(tmp_path, segments=(Segment(1000, 0.1, OneCycle()),)).tables()
    (course,) = table.columns[2].cells
    first, peak, last = (float(number) for number in str(course).split(" to "))
    assert peak == pytest.approx(0.1, rel=0.01)
    assert max(first, last) < 0.02


def test_without_a_search_there_is_no_account(tmp_path: Path) -> None:
    found = RangeSuggestion(0.1, 0.05, 0.2, "it says so")
    (only,) = Inspection(tmp_path, range_tests=(("epoch 0", found),)).tables()
    assert only.title == "Range tests"


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "autolr", TRACE, SEGMENTS)
    assert inspect(str(tmp_path), csv=str(tmp_path / "rows.csv"), figures=str(tmp_path / "figures")) == 0
    assert "What was tried" in capsys.readouterr().out
    assert (tmp_path / "rows.csv").exists()
    assert sorted(f.name for f in (tmp_path / "figures").iterdir()) == [
        "candidates_000.png",
        "probes_000.png",
        "schedule.png",
    ]


def test_the_step_that_tells_whether_a_network_is_trained_is_counted_and_no_candidate() -> None:
    trace, _ = recorded(AutoLRS(), noisy_quadratic(), 2000)
    asked = [e.request for e in trace if isinstance(e.request, Probe) and e.request.permuted]
    searches = searches_of(trace)
    assert len(asked) == 1
    assert sum(s.steps for s in searches) == sum(
        len(e.answer.losses) for e in trace if isinstance(e.answer, ProbeResult)
    )
    stepped = [e for e in trace if isinstance(e.request, Probe) and e.request.num_steps]
    assert sum(len(s.candidates) for s in searches) == len(stepped) - len(asked)
