"""Comparisons: the arithmetic, the bookkeeping of runs, the page, and the whole thing once."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from html.parser import HTMLParser
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lightning_autolr.core.record import Entry
from lightning_autolr.core.requests import LineProbe, LineResult, Probe, ProbeResult, Train, TrainResult
from lightning_autolr.report import jobs
from lightning_autolr.report.compare import Comparison, compare_configs, paired_interval, summarize
from lightning_autolr.report.curves import Course, comparison_figure, read_course
from lightning_autolr.report.jobs import FinishedRun, Job
from lightning_autolr.report.page import write_page

CONFIGS = Path(__file__).parents[2] / "configs"
COSTS = {"schedule_steps": 90.0, "search_steps": 10.0, "seconds": 4.0, "search_seconds": 1.0}


def run(name: str, seed: int, loss: float, **others: float) -> FinishedRun:
    return FinishedRun(name, seed, Path(name), metrics={"test_loss": loss, **others}, costs=COSTS)


def failed(name: str, seed: int, error: str = "ValueError: no") -> FinishedRun:
    return FinishedRun(name, seed, Path(name), error=error)


# --- statistics


def test_the_interval_of_many_normal_values_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(0.5, 2.0, 400)
    low, high = paired_interval(values.tolist())
    half = 1.96 * values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_interval_of_skewed_values_reaches_further_on_the_long_side() -> None:
    values = np.random.default_rng(0).exponential(1.0, 40)
    low, high = paired_interval(values.tolist())
    assert high - values.mean() > 1.1 * (values.mean() - low)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_no_interval_where_none_can_be_told(values: list[float]) -> None:
    assert paired_interval(values) is None


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.1, 0.2, 0.1], [0.1, 0.1, 0.2, 0.2]])
def test_few_values_have_an_interval_within_their_range(values: list[float]) -> None:
    low, high = paired_interval(values)
    rounding = 1e-12
    assert min(values) - rounding <= low < sum(values) / len(values) < high <= max(values) + rounding


def test_means_errors_and_paired_differences() -> None:
    runs = [run("a", 0, 1.0, test_acc=0.5), run("b", 0, 0.8), run("a", 1, 3.0, test_acc=0.7), run("b", 1, 2.6)]
    comparison = summarize(runs, "test_loss")
    a, b = comparison.methods
    assert (a.name, b.name) == ("a", "b")
    assert a.means == {"test_loss": 2.0, "test_acc": pytest.approx(0.6)}
    assert a.errors["test_loss"] == pytest.approx(1.0)  # standard deviation sqrt(2), over sqrt(2)
    assert b.difference == pytest.approx(-0.3)
    assert b.interval is not None
    assert b.interval == pytest.approx((-0.4, -0.2))  # of two differences, resampled: the lower, the mean, the higher
    assert a.interval is None
    assert a.difference == 0
    assert (a.schedule_steps, a.search_steps, a.seconds, a.search_seconds) == tuple(COSTS.values())
    assert comparison.metrics == ("test_loss", "test_acc")


def test_differences_are_taken_over_the_seeds_that_both_finished() -> None:
    runs = [run("a", 0, 1.0), run("a", 1, 5.0), failed("b", 0), run("b", 1, 4.0), run("b", 2, 9.0), failed("a", 2)]
    a, b = summarize(runs, "test_loss").methods
    assert b.difference == -1.0
    assert (a.num_done, a.num_failed, b.num_done, b.num_failed) == (2, 1, 2, 1)


def test_a_diverged_run_is_not_averaged_away() -> None:
    runs = [run("a", 0, 1.0), run("b", 0, math.nan), run("a", 1, 1.0), run("b", 1, 0.1), run("c", 0, math.inf)]
    comparison = summarize(runs, "test_loss")
    row = comparison.rows()[1]
    assert row["test_loss"] == "diverged"
    assert comparison.methods[1].interval is None
    assert comparison.best == "a"
    assert "diverged" in comparison.rows()[2]["test_loss"]


def test_infinite_values_on_both_sides_do_not_stop_the_report() -> None:
    runs = [run("a", 0, math.inf), run("b", 0, 1.0), run("a", 1, 1.0), run("b", 1, math.inf)]
    assert math.isnan(summarize(runs, "test_loss").methods[1].difference)


@pytest.mark.parametrize(("metric", "best"), [("test_loss", "a"), ("test_acc", "b")])
def test_the_best_has_the_least_loss_or_the_largest_accuracy(metric: str, best: str) -> None:
    runs = [run("a", 0, 1.0, test_acc=0.5), run("b", 0, 2.0, test_acc=0.9)]
    assert summarize(runs, metric).best == best


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"one of \['test_loss'\]"):
        summarize([run("a", 0, 1.0)], "test_los")


def test_written_files_hold_every_run(tmp_path: Path) -> None:
    comparison = summarize([run("a", 0, 1.0), run("b", 0, math.nan), failed("b", 1)], "test_loss")
    comparison.write(tmp_path)
    with open(tmp_path / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["name"], r["seed"], r["error"]) for r in rows] == [
        ("a", "0", ""),
        ("b", "0", ""),
        ("b", "1", "ValueError: no"),
    ]
    assert [r["test_loss"] for r in rows] == ["1.0", "nan", ""]
    content = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)  # no NaN in it
    assert [m["name"] for m in content["methods"]] == ["a", "b"]
    assert content["runs"][1]["metrics"]["test_loss"] is None


# --- jobs

OURS = {"class_path": "lightning_autolr.AutoLRSCallback", "init_args": {"tau": 3, "seed": 0, "count_search": False}}


def config(*callbacks: dict[str, Any]) -> dict[str, Any]:
    return {
        "seed_everything": 5,
        "trainer": {"max_steps": 9, "logger": {"a": 1}, "callbacks": list(callbacks)},
        "model": {},
    }


def test_a_job_is_the_configuration_with_its_own_seed() -> None:
    original = config(OURS)
    job = Job.of("x", original, 7, Path("out"), equal_total_steps=True)
    (callback,) = job.config["trainer"]["callbacks"]
    assert callback["init_args"] == {"tau": 3, "seed": 7, "count_search": True}
    assert job.config["seed_everything"] == 7
    assert job.config["trainer"]["logger"] is None
    assert job.folder == Path("out/x/seed_7")
    assert original == config(OURS)  # untouched


@pytest.mark.parametrize("callbacks", [None, [], {"class_path": "users.Own", "init_args": {"seed": 1}}])
def test_other_configurations_have_their_learning_rate_watched(callbacks: Any) -> None:
    values = config()
    values["trainer"]["callbacks"] = callbacks
    *own, monitor = Job.of("x", values, 7, Path("out"), equal_total_steps=True).config["trainer"]["callbacks"]
    assert monitor["class_path"].endswith("LearningRateMonitor")
    assert own == ([callbacks] if callbacks else [])  # the seeds of others are theirs


def test_a_progress_bar_that_was_asked_for_is_left_alone() -> None:
    bar = {"class_path": "lightning.pytorch.callbacks.RichProgressBar"}
    assert Job.of("x", config(), 0, Path(), False).config["trainer"]["enable_progress_bar"] is False
    assert "enable_progress_bar" not in Job.of("x", config(bar), 0, Path(), False).config["trainer"]


def pretend(loss: Callable[[dict[str, Any]], float], log: list[str]) -> Callable[..., None]:
    """A stand-in for a training process: writes the result at once, or fails where ``loss`` raises."""

    def fit(folder: Path, parallel: int = 1, started: Any = None) -> None:
        log.append(f"{folder.parent.name}-{folder.name}")
        (folder / "metrics.csv").write_text("step,autolr/lr,val_loss\n0,0.1,\n5,,2.0\n")
        try:
            value = loss(jobs.yaml.safe_load((folder / "job.yaml").read_text()))
        except ValueError as error:
            (folder / "log.txt").write_text(f"Traceback\n  ...\nValueError: {error}\n")
            return
        (folder / "result.json").write_text(json.dumps({**COSTS, "metrics": {"test_loss": value}}))

    return fit


def compare(out: Path, configs: dict[str, Any], **options: Any) -> Comparison:
    settings = {"seeds": [0, 1], "equal_total_steps": False, "metric": "test_loss", "engine": "local", "jobs": 1}
    return compare_configs(configs, **{**settings, **options}, out=out, console=Console(file=StringIO()))


@pytest.mark.parametrize("parallel", [1, 3])
def test_finished_runs_are_not_repeated_and_changed_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: int
) -> None:
    log: list[str] = []
    monkeypatch.setattr(jobs, "_fit", pretend(lambda c: c["trainer"]["max_steps"] + c["seed_everything"], log))
    configs = {"a": config(), "b": config(OURS)}
    first = compare(tmp_path, configs, jobs=parallel)
    assert sorted(log) == ["a-seed_0", "a-seed_1", "b-seed_0", "b-seed_1"]
    assert [m.means["test_loss"] for m in first.methods] == [9.5, 9.5]
    assert compare(tmp_path, configs, seeds=[0, 1, 2]).methods[0].means["test_loss"] == 10
    assert sorted(log[4:]) == ["a-seed_2", "b-seed_2"]
    configs["b"]["trainer"]["max_steps"] = 3
    assert compare(tmp_path, configs).methods[1].means["test_loss"] == 3.5
    assert sorted(log[6:]) == ["b-seed_0", "b-seed_1"]
    compare(tmp_path, configs, equal_total_steps=True)
    assert sorted(log[8:]) == ["b-seed_0", "b-seed_1"]  # `a` has no search to count


def test_a_misspelt_metric_is_told_after_the_first_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(values: dict[str, Any]) -> float:
        time.sleep(1.0 * (values["seed_everything"] > 0))  # while one of these runs, the others are called off
        return 1.0

    log: list[str] = []
    monkeypatch.setattr(jobs, "_fit", pretend(loss, log))
    configs = {"a": config(), "b": config(OURS)}
    with pytest.raises(ValueError, match=r"one of \['test_loss'\], got metric='test_los'.*kept"):
        compare(tmp_path, configs, metric="test_los", seeds=[0, 1, 2])
    assert {"a-seed_0", "b-seed_0"} <= set(log)
    assert len(log) < 6
    made = len(log)
    compare(tmp_path, configs, seeds=[0])
    assert len(log) == made


def test_failed_runs_are_shown_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(values: dict[str, Any]) -> float:
        if values["seed_everything"] == 1:
            raise ValueError("Expected more, got <less>.")
        return 1.0

    log: list[str] = []
    monkeypatch.setattr(jobs, "_fit", pretend(loss, log))
    comparison = compare(tmp_path, {"a": config()})
    (failure,) = comparison.failures
    assert failure.error == "ValueError: Expected more, got <less>."
    assert comparison.rows()[0]["runs"] == "1 (1 failed)"
    page = write_page(comparison, tmp_path / "page.html").read_text()
    assert "got &lt;less&gt;." in page
    monkeypatch.setattr(jobs, "_fit", pretend(lambda _: 2.0, log))
    assert not compare(tmp_path, {"a": config()}).failures
    assert log == ["a-seed_0", "a-seed_1", "a-seed_1"]


def test_no_more_runs_at_a_time_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def fit(folder: Path, *_: Any) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1

    monkeypatch.setattr(jobs, "_fit", fit)
    compare(tmp_path, {"a": config(), "b": config()}, jobs=2, seeds=[0, 1, 2])
    assert most == 2


@pytest.mark.parametrize(
    "options", [{"seeds": []}, {"jobs": 0}, {"jobs": -1, "engine": "ray"}], ids=["seeds", "jobs", "ray"]
)
def test_impossible_comparisons_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        compare(tmp_path, {"a": config()}, **options)


def test_without_ray_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"lightning-autolr\[ray\]"):
        compare(tmp_path, {"a": config()}, engine="ray")


# --- curves and page


def write_run(folder: Path) -> None:
    (folder / "autolr").mkdir(parents=True)
    (folder / "metrics.csv").write_text(
        "autolr/lr,epoch,step,train_loss,val_loss\n0.1,,0,,\n,0,4,3.0,\n,0,9,,2.0\n0.2,,10,,\n,1,19,,1.5\n"
    )
    entries = [
        Entry(Probe(0.1, num_steps=30), ProbeResult(losses=(1.0,) * 30), global_step=0, search_steps=30, seconds=1.0),
        Entry(Probe(0.9, num_steps=30), ProbeResult(losses=(1.0,) * 7), global_step=0, search_steps=37, seconds=1.0),
        Entry(Train(0.1, num_steps=10), TrainResult((1.0,) * 10), global_step=0, search_steps=37, seconds=1.0),
        Entry(LineProbe(0.1, (1.0, 2.0), horizon=3), LineResult(1.0, (1.0, 1.0)), 10, search_steps=40, seconds=1.0),
    ]
    (folder / "autolr/trace.jsonl").write_text("".join(json.dumps(e.to_json()) + "\n" for e in entries))


def test_total_steps_count_what_was_tried_before(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    course = read_course(tmp_path / "run", "test_loss")
    assert course.lr == [(0, 0.1), (10, 0.2)]
    assert course.score == [(9, 2.0), (19, 1.5)]
    assert course.score_name == "val_loss"
    assert [course.total(step) for step in (0, 9, 10, 19)] == [37, 46, 50, 59]  # 37, and 3 more from step 10 on


def test_a_run_without_search_or_validation(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,lr-SGD,train_loss\n0,0.5,1.0\n")
    assert read_course(tmp_path, "test_loss") == Course([(0, 0.5)], [(0, 1.0)], "train_loss", [])
    assert read_course(tmp_path, "test_loss").total(3) == 3


def test_the_figure_draws_what_is_finite() -> None:
    course = Course([(0, 0.1)], [(0, 1.0), (5, math.nan), (9, 2.0)], "val_loss", [(0, 4.0)])
    figure = comparison_figure({"a": [course], "b": []}, {"a": [1.0, math.inf], "b": []}, "test_loss")
    lr, schedule, final, total = figure.axes
    assert schedule.lines[0].get_xydata().tolist() == [[0, 1], [9, 2]]
    assert total.lines[0].get_xydata().tolist() == [[4, 1], [13, 2]]
    assert [t.get_text().strip() for t in final.texts] == ["1 diverged"]
    assert lr.get_xlabel() == schedule.get_xlabel() == "schedule steps"
    assert "search included" in total.get_xlabel()


class Page(HTMLParser):
    """What a page would fetch, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            v for k, v in attrs if k in ("src", "href", "xlink:href", "data") and v and not v.startswith("#")
        ]


def test_the_page_is_one_file_with_everything_in_it(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b & <b>"):
        folder = tmp_path / name
        write_run(folder)
        (folder / "job.yaml").write_text(f"model: {name}\n")
        runs.append(FinishedRun(name, 0, folder, metrics={"test_loss": 0.5, "test_acc": 0.9}, costs=COSTS))
    text = write_page(summarize(runs, "test_loss"), tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.fetched == []
    assert page.tags.count("svg") == 1
    assert "script" not in page.tags
    assert "b &amp; &lt;b&gt;" in text
    assert "<b>" not in re.sub(r"<b>\w", "", text)
    assert "model: a" in text
    again = write_page(summarize(runs, "test_loss"), tmp_path / "again.html").read_text()
    assert again == text


# --- the whole thing

SHORT = ["--", "--trainer.max_steps=20", "--trainer.val_check_interval=10"]
COMPARE = [
    sys.executable,
    "-m",
    "lightning_autolr",
    "compare",
    *(str(CONFIGS / f"digits/{m}.yaml") for m in ("rex", "beam")),
]


@pytest.mark.slow
def test_two_methods_from_the_command_line_at_equal_total_steps(tmp_path: Path) -> None:
    options = ["--seeds=2", "--jobs=2", "--equal-total-steps", "--out=there"]
    done = subprocess.run([*COMPARE, *options, *SHORT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "there/comparison.json").read_text())
    for method in content["methods"]:
        assert method["num_done"] == 2
        assert method["schedule_steps"] + method["search_steps"] <= 20
    assert content["methods"][0]["schedule_steps"] == 20
    assert "rex" in done.stdout
    assert (tmp_path / "there/comparison.html").exists()


def running_in(folder: Path) -> list[str]:
    """Command lines of processes that train in this folder."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it may end while we look
            lines.append(file.read_bytes().replace(b"\0", b" ").decode())
    return [line for line in lines if str(folder) in line and " fit " in line]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_kill_ends_the_runs_too(tmp_path: Path) -> None:
    process = subprocess.Popen([*COMPARE, "--seeds=1", "--jobs=2", f"--out={tmp_path}", *SHORT], cwd=tmp_path)
    deadline = time.monotonic() + 300
    while len(running_in(tmp_path)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert running_in(tmp_path) == []


def test_a_run_does_not_outlive_what_started_it() -> None:
    child = "import time; from lightning_autolr.report.jobs import end_with_parent as end; end(); print('begun', flush=True)"
    parent = (
        "import os, subprocess, sys, time\n"
        "env = {**os.environ, 'LIGHTNING_AUTOLR_PARENT': str(os.getpid())}\n"
        f"subprocess.run([sys.executable, '-c', {child + '; time.sleep(120)'!r}], env=env)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.kill()
    process.communicate(timeout=60)  # its output ends when both have ended


def test_a_run_by_hand_has_no_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_AUTOLR_PARENT", raising=False)
    threads = threading.active_count()
    jobs.end_with_parent()
    assert threading.active_count() == threads


def test_a_run_whose_parent_is_gone_already_does_not_begin() -> None:
    code = "import time; from lightning_autolr.report.jobs import end_with_parent; end_with_parent(); time.sleep(120)"
    environment = {**os.environ, "LIGHTNING_AUTOLR_PARENT": "1" if os.getpid() != 1 else "2"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 1


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    first = tmp_path / "there/rex/seed_0/result.json"
    process = subprocess.Popen([*COMPARE, "--seeds=1", "--out=there", *SHORT], cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 300
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert first.exists()
    written = first.stat().st_mtime_ns
    again = subprocess.run([*COMPARE, "--seeds=1", "--out=there", *SHORT], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert first.stat().st_mtime_ns == written
    assert (tmp_path / "there/beam/seed_0/result.json").exists()


@pytest.mark.slow
def test_a_failing_method_is_reported_and_the_status_says_so(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(f"config: {CONFIGS / 'digits/rex.yaml'}\ndata.init_args.num_val: 5000\n")
    done = subprocess.run(
        [sys.executable, "-m", "lightning_autolr", "compare", str(bad), "--seeds=1", "--out=there", *SHORT],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Expected num_val and num_test >= 1 with a sum below 1797" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")
def test_on_ray(tmp_path: Path) -> None:
    options = ["--seeds=1", "--engine=ray", "--jobs=2", "--out=there"]
    done = subprocess.run([*COMPARE, *options, *SHORT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "there/comparison.json").exists(), done.stdout + done.stderr
    assert len(json.loads((tmp_path / "there/comparison.json").read_text())["runs"]) == 2
    assert (tmp_path / "there/beam/seed_0/autolr/trace.jsonl").exists()
