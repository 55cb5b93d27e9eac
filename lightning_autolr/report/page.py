"""A comparison as one HTML page that needs no network."""

from __future__ import annotations

import math
from io import StringIO
from pathlib import Path

import matplotlib
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from lightning_autolr.report.compare import Comparison
from lightning_autolr.report.curves import comparison_figure, read_course
from lightning_autolr.report.jobs import FinishedRun

__all__ = ["write_page"]

_LOG_LINES = 30


def write_page(comparison: Comparison, path: Path) -> Path:
    """Write the page: table, failures, curves, configurations.

    Args:
        comparison: what to show; the folders of its runs are read.
        path: of the page.

    Returns:
        The same path.
    """
    done = [run for run in comparison.runs if not run.error]
    names = [method.name for method in comparison.methods]
    courses = {n: [read_course(run.folder, comparison.metric) for run in done if run.name == n] for n in names}
    finals = {n: [run.metrics.get(comparison.metric, math.nan) for run in done if run.name == n] for n in names}
    environment = Environment(loader=PackageLoader("lightning_autolr.report"), autoescape=True)
    page = environment.get_template("comparison.html").render(
        metric=comparison.metric,
        rows=comparison.rows(),
        best=comparison.best,
        seeds=sorted({run.seed for run in comparison.runs}),
        failures=comparison.failures,
        logs=[_tail(run.folder / "log.txt") for run in comparison.failures],
        figure=_svg(comparison_figure(courses, finals, comparison.metric)),
        configs={n: next(_job(run) for run in comparison.runs if run.name == n) for n in names},
    )
    path.write_text(page, encoding="utf-8")
    return path


def _svg(figure: Figure) -> Markup:
    """The figure as an element of the page."""
    text = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "autolr"}):  # equal data, equal page
        figure.savefig(text, format="svg", metadata={"Date": None})
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])


def _job(run: FinishedRun) -> str:
    return (run.folder / "job.yaml").read_text()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:]) if log.exists() else ""
