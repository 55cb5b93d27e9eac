"""Comparisons of configurations: the same seeds for each, paired differences, costs, nothing hidden."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy.stats import bootstrap, sem

from lightning_autolr.core.losses import more_is_better
from lightning_autolr.report.jobs import FinishedRun, Job, run_jobs

__all__ = ["Comparison", "Method", "compare_configs", "paired_interval"]


@dataclass(frozen=True)
class Method:
    """What one configuration came to over its seeds.

    Args:
        name: of the configuration.
        num_done: runs that finished.
        num_failed: runs that did not.
        means: mean of each metric over finished runs. Not finite when it was not in one of them: diverged runs count.
        errors: standard error of each mean; NaN for one run.
        difference: mean over seeds of this metric minus the first configuration's; NaN when no seed finished in both.
        interval: 95 % of it, or None where it cannot be told (fewer than two pairs, or a value that is not finite).
        schedule_steps: mean number of steps that made the weights.
        search_steps: mean number of steps that were tried and thrown away.
        seconds: mean time of a run, search included.
        search_seconds: mean time spent in search.
    """

    name: str
    num_done: int
    num_failed: int
    means: dict[str, float]
    errors: dict[str, float]
    difference: float
    interval: tuple[float, float] | None
    schedule_steps: float
    search_steps: float
    seconds: float
    search_seconds: float


@dataclass(frozen=True)
class Comparison:
    """The runs of several configurations, and what they say. The first configuration is the reference."""

    metric: str
    runs: tuple[FinishedRun, ...]
    methods: tuple[Method, ...]

    @property
    def failures(self) -> tuple[FinishedRun, ...]:
        return tuple(run for run in self.runs if run.error)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metric that is compared, and the others on the same data."""
        known = {name for run in self.runs for name in run.metrics}
        split = self.metric.partition("_")[0]
        return (self.metric, *sorted(n for n in known - {self.metric} if n.startswith(f"{split}_")))

    @property
    def best(self) -> str | None:
        """The configuration with the best mean, among those with a finite one."""
        sign = -1 if more_is_better(self.metric) else 1
        means = {method.name: sign * method.means.get(self.metric, math.nan) for method in self.methods}
        finite = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        return min(finite, key=finite.__getitem__) if finite else None

    def rows(self) -> list[dict[str, str]]:
        """The table as text, one row per configuration."""
        return [self._row(method) for method in self.methods]

    def _row(self, method: Method) -> dict[str, str]:
        low, high = method.interval or (math.nan, math.nan)
        reference = method is self.methods[0]
        interval = f" [{low:+.4f}, {high:+.4f}]" if method.interval else ""
        return {
            "method": method.name,
            "runs": f"{method.num_done}" + (f" ({method.num_failed} failed)" if method.num_failed else ""),
            **{name: _number(method.means.get(name), method.errors.get(name)) for name in self.metrics},
            f"{self.metric} - {self.methods[0].name}": "" if reference else _signed(method.difference) + interval,
            "steps": f"{method.schedule_steps:.0f}",
            "+ search": f"{method.search_steps:.0f}",
            "seconds (in search)": f"{method.seconds:.0f} ({method.search_seconds:.0f})",
        }

    def table(self) -> Table:
        """The table for a terminal."""
        table = Table(
            box=box.SIMPLE,
            caption="mean ± standard error; differences with paired 95 % bootstrap intervals",
        )
        rows = self.rows()
        for name in rows[0]:
            table.add_column(
                name,
                justify="left" if name in ("method", "runs") else "right",
                overflow="fold",
                no_wrap=name != "method",
            )
        for row in rows:
            table.add_row(*row.values())
        return table

    def write(self, folder: Path) -> None:
        """Write ``runs.csv`` (one row per run) and ``comparison.json`` (everything)."""
        with open(folder / "runs.csv", "w", newline="") as file:
            rows = [{**run.costs, **run.metrics} for run in self.runs]
            names = list(dict.fromkeys(name for row in rows for name in row))
            writer = csv.DictWriter(file, ["name", "seed", "error", "folder", *names])
            writer.writeheader()
            for run, row in zip(self.runs, rows, strict=True):
                writer.writerow(
                    {"name": run.name, "seed": run.seed, "error": run.error, "folder": str(run.folder), **row}
                )
        content = {
            "metric": self.metric,
            "methods": [asdict(method) for method in self.methods],
            "runs": [{**asdict(run), "folder": str(run.folder)} for run in self.runs],
        }
        (folder / "comparison.json").write_text(json.dumps(_without_nan(content), indent=2, allow_nan=False))


def compare_configs(
    configs: Mapping[str, dict[str, Any]],
    *,
    seeds: Sequence[int],
    equal_total_steps: bool,
    metric: str,
    engine: Literal["local", "ray"],
    jobs: int,
    out: Path,
    console: Console,
) -> Comparison:
    """Run what is not yet there, and compare.

    Args:
        configs: resolved configurations of ``fit`` by name; the first is the reference.
        seeds: at least one.
        equal_total_steps: let search steps count in ``max_steps``.
        metric: the value to compare.
        engine: "local" processes or "ray" tasks.
        jobs: runs at a time, >= 1; 0 with Ray is "no limit of ours".
        out: folder of the runs, ``OUT/NAME/seed_N``.
        console: where progress is shown.

    Raises:
        ValueError: no seed, no configuration, a number of jobs out of range, or a metric that no run has.
    """
    if not configs or not seeds:
        raise ValueError(f"Expected at least one configuration and one seed, got {list(configs)} and {list(seeds)}.")
    if jobs < (0 if engine == "ray" else 1):
        raise ValueError(f"Expected jobs >= 1 (with Ray: >= 0), got {jobs=}.")
    # Seed by seed, so that whatever is finished when somebody looks is a fair comparison.
    todo = [Job.of(name, config, seed, out, equal_total_steps) for seed in seeds for name, config in configs.items()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs = {}
    with Progress(*columns, console=console) as progress, closing(run_jobs(todo, engine, jobs)) as finished:
        task = progress.add_task("runs", total=len(todo))
        for run in finished:
            runs[run.name, run.seed] = run
            outcome = run.error or (f"{metric} {run.metrics[metric]:.4f}" if metric in run.metrics else f"no {metric}")
            progress.console.print(f"{run.name}, seed {run.seed}: {outcome}, {run.costs.get('seconds', 0.0):.0f} s")
            progress.advance(task)
            if len(runs) >= len(configs):  # not only after all of them, where the name is misspelt
                _check_metric(list(runs.values()), metric)
    comparison = summarize([runs[job.name, job.seed] for job in todo], metric)
    comparison.write(out)
    return comparison


def summarize(runs: Sequence[FinishedRun], metric: str) -> Comparison:
    """Means, errors and paired differences; the first run's configuration is the reference."""
    names = list(dict.fromkeys(run.name for run in runs))
    done = {(run.name, run.seed): run for run in runs if not run.error}
    _check_metric(runs, metric)
    methods = []
    for name in names:
        own = {seed: run for (n, seed), run in done.items() if n == name}
        pairs = [(run, done[names[0], seed]) for seed, run in own.items() if (names[0], seed) in done]
        differences = [a.metrics.get(metric, math.nan) - b.metrics.get(metric, math.nan) for a, b in pairs]
        values = {
            m: [run.metrics.get(m, math.nan) for run in own.values()] for run in own.values() for m in run.metrics
        }
        costs = {c: _mean([run.costs.get(c, math.nan) for run in own.values()]) for c in FinishedRun.COSTS}
        methods.append(
            Method(
                name,
                len(own),
                sum(run.name == name and bool(run.error) for run in runs),
                {m: _mean(v) for m, v in values.items()},
                {m: _standard_error(v) for m, v in values.items()},
                _mean(differences),
                paired_interval(differences) if name != names[0] else None,
                **costs,
            )
        )
    return Comparison(metric, tuple(runs), tuple(methods))


def _check_metric(runs: Sequence[FinishedRun], metric: str) -> None:
    known = {name for run in runs if not run.error for name in run.metrics}
    if known and metric not in known:
        raise ValueError(
            f"Expected a metric that the runs have, one of {sorted(known)}, got {metric=}. Finished runs are kept and not made "
            "again."
        )


def paired_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Bootstrap interval of the mean of paired differences: bias-corrected and accelerated, 9,999 resamples.

    With few pairs it is too narrow (three pairs have ten different resamples): read it as a scale, not as a test.

    Args:
        differences: one per seed.
        level: in (0, 1).

    Returns:
        Its ends, or None with fewer than two differences or one that is not finite.

    >>> paired_interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    >>> low, high = paired_interval([0.8, 1.0, 1.1, 1.2, 0.9])
    >>> low < 1.0 < high
    True

    References: Efron, "Better Bootstrap Confidence Intervals", 1987.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])  # nothing to resample
    method = "BCa" if len(values) > 2 else "percentile"  # two values are symmetric: there is no skewness to correct
    interval = bootstrap((values,), np.mean, confidence_level=level, method=method, random_state=0).confidence_interval
    return float(interval.low), float(interval.high)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan  # fsum raises on inf - inf


def _standard_error(values: Sequence[float]) -> float:
    finite = len(values) > 1 and all(math.isfinite(v) for v in values)
    return float(sem(values)) if finite else math.nan


def _number(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    if not math.isfinite(value):
        return "diverged"
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None and math.isfinite(error) else "")


def _signed(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else "-"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return value
