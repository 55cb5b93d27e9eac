"""The course of finished runs, read from their folders, and a figure that compares them."""

from __future__ import annotations

import bisect
import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_autolr.core.record import read_trace
from lightning_autolr.report.figures.axes import log_axis
from lightning_autolr.report.figures.style import styled
from lightning_autolr.report.inspect.searches import steps_of
from lightning_autolr.schedules import Schedule

__all__ = ["Course", "comparison_figure", "preview_figure", "read_course"]

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Course:
    """How one run went. Points are (schedule step, value).

    Args:
        lr: learning rate.
        score: the metric that is compared, on the validation data where there is one, else the training loss.
        score_name: what the score is.
        searches: (schedule step, steps of search up to there), rising.
    """

    lr: Points
    score: Points
    score_name: str
    searches: Points

    def total(self, step: int) -> int:
        """Steps of training and search together at a schedule step."""
        index = bisect.bisect_right(self.searches, (step, math.inf))
        return step + (int(self.searches[index - 1][1]) if index else 0)


def read_course(folder: Path, metric: str) -> Course:
    """Read ``metrics.csv`` and, if there is one, ``autolr/trace.jsonl``.

    Args:
        folder: of a finished run.
        metric: what is compared at the end, such as ``test_loss``; its course is that of ``val_loss``.
    """
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    wished = ("val_" + metric.partition("_")[2], "val_loss", "train_loss", "train_loss_step")
    score = next((name for name in wished if name in columns), "")
    lr = next((name for name in columns if name == "autolr/lr" or name.startswith("lr-")), "")
    return Course(_column(rows, lr), _column(rows, score), score, _searches(folder / "autolr" / "trace.jsonl"))


def _column(rows: list[dict[str, str]], name: str) -> Points:
    return [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]


def _searches(trace: Path) -> Points:
    """Private steps are those of probes; steps that were trained and undone are steps of the Trainer already."""
    points: list[tuple[int, float]] = []
    for entry in read_trace(str(trace)) if trace.exists() else ():
        made = steps_of(entry)
        if not made:
            continue
        points.append((entry.global_step, made + (points[-1][1] if points else 0)))
    return points


@styled
def comparison_figure(
    courses: Mapping[str, Sequence[Course]], finals: Mapping[str, Sequence[float]], metric: str
) -> Figure:
    """Learning rates, scores over schedule steps and over total steps, and final metrics.

    Args:
        courses: of each configuration, one per finished run.
        finals: final metric of the same runs.
        metric: its name.
    """
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(2, 2)
    (lr, schedule), (final, total) = axes
    palette = colormaps["tab10" if len(courses) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    handles = []
    for (name, runs), color in zip(courses.items(), itertools.cycle(palette)):
        for run in runs:
            style = {"color": color, "linewidth": 1.2, "alpha": 0.8}
            handle = lr.plot(*_xy(run.lr), **style)[0]
            schedule.plot(*_xy(run.score), **style)
            total.plot(*_xy([(run.total(step), value) for step, value in run.score]), **style)
        if runs:
            handles.append((handle, name))
    lr.set(xlabel="schedule steps", ylabel="learning rate")
    log_axis(lr)
    score = next((run.score_name for runs in courses.values() for run in runs), "")
    positive = all(value > 0 for runs in courses.values() for run in runs for _, value in run.score)
    for axis, steps in ((schedule, "schedule steps"), (total, "total steps, search included")):
        axis.set(xlabel=steps, ylabel=score)
        if positive and "loss" in score:
            log_axis(axis)
    schedule.sharey(total)
    _draw_finals(final, finals, metric, palette)
    if handles:
        figure.legend(
            *zip(*handles, strict=True), loc="outside upper center", ncols=min(6, len(handles)), frameon=False
        )
    return figure


@styled
def preview_figure(schedules: Mapping[str, tuple[Schedule, float | None, int]]) -> Figure:
    """Schedules over their steps.

    Args:
        schedules: by name, with the learning rate at factor 1 (None draws factors, unless the schedule holds rates), and
            the optimizer steps to show.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, (schedule, peak, length) in schedules.items():
        steps = np.unique(np.linspace(0, length, 1001).round().astype(int)).tolist()
        relative = peak is None and not schedule.absolute
        scale = 1.0 if schedule.absolute else peak or 1.0
        label = f"{name} (times the configured rate)" if relative else name
        axis.plot(steps, [scale * schedule(step) for step in steps], label=label)
    axis.set(xlabel="optimizer steps", ylabel="learning rate")
    axis.legend(frameon=False)
    return figure


def _xy(points: Points) -> tuple[list[float], list[float]]:
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def _draw_finals(axis: Axes, finals: Mapping[str, Sequence[float]], metric: str, palette: Sequence[object]) -> None:
    for row, (values, color) in enumerate(zip(finals.values(), itertools.cycle(palette))):
        finite = [value for value in values if math.isfinite(value)]
        axis.scatter(finite, [row] * len(finite), color=color, alpha=0.7)
        if finite:
            axis.scatter([sum(finite) / len(finite)], [row], color="black", marker="|", s=250)
        if len(finite) < len(values):
            text = f"  {len(values) - len(finite)} diverged"
            axis.annotate(text, (0, row), xycoords=("axes fraction", "data"), va="center", color="#c0392b")
    axis.set_yticks(range(len(finals)), list(finals))
    axis.invert_yaxis()
    axis.set(xlabel=f"final {metric} (bar: mean)")
    axis.grid(visible=False, axis="y")
