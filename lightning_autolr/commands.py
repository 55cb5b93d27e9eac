"""What ``lightning-autolr`` can do beside training: each function is a command, its arguments are the options.

They return the exit status.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback

from lightning_autolr.callbacks import RangeTestCallback, ScheduleCallback, SearchCallback
from lightning_autolr.core.range_rules import Rule
from lightning_autolr.core.refine import refine_schedule
from lightning_autolr.fit import AutoLRCLI, resolve
from lightning_autolr.report.jobs import callbacks_of, writing_to
from lightning_autolr.schedules import Schedule, Tabulated

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["compare", "inspect", "preview", "range_test", "refine", "replay"]


# Options of the callback that made a run which its replay needs: the others are of the search.
_REPLAYED = ("on_scheduler", "fork", "allow_untested", "figures")


def compare(
    configs: list[str],
    seeds: int = 3,
    equal_total_steps: bool = False,
    metric: str = "test_loss",
    engine: Literal["local", "ray"] = "local",
    jobs: int = 1,
    out: str = "runs/compare",
    overrides: Sequence[str] = (),
) -> int:
    """Train several configurations with the same seeds and compare them with the first one.

    Arguments after ``--`` go to every ``fit``: ``compare a.yaml b.yaml --seeds 2 -- --trainer.max_steps 500``. Finished
    runs are not repeated unless their configuration changed. The status is 1 when a run failed.

    Args:
        configs: files for ``fit``; differences are taken to the first one.
        seeds: how many; they are 0, 1, ...
        equal_total_steps: let private steps count towards ``max_steps``, as undone ones always do, so that all runs do the same
            work.
        metric: the value to compare, as logged on the test or validation data (test_loss, val_loss, test_acc, ...); less is
            better unless its name ends in acc, accuracy, f1 or the like.
        engine: where the runs are made: in processes here, or as tasks of a Ray cluster.
        jobs: runs at a time; with Ray, 0 is as many as the cluster takes.
        out: folder for the runs, ``runs.csv``, ``comparison.json`` and ``comparison.html``.
        overrides: further arguments of ``fit``.
    """
    from lightning_autolr.report.compare import compare_configs
    from lightning_autolr.report.page import write_page

    console = _console()
    with _exiting_on_sigterm():
        comparison = compare_configs(
            {name: resolve(path, overrides) for name, path in _named(configs).items()},
            seeds=range(seeds),
            equal_total_steps=equal_total_steps,
            metric=metric,
            engine=engine,
            jobs=jobs,
            out=Path(out),
            console=console,
        )
    console.print(comparison.table())
    for run in comparison.failures:
        console.print(f"failed: {run.name}, seed {run.seed}: {run.error} (see {run.folder / 'log.txt'})", markup=False)
    console.print(f"Page: {write_page(comparison, Path(out) / 'comparison.html')}", soft_wrap=True)
    return 1 if comparison.failures else 0


def preview(
    configs: list[str], total_steps: int | None = None, out: str = "preview.png", overrides: Sequence[str] = ()
) -> int:
    """Plot the schedules of configurations without training.

    Args:
        configs: files for ``fit``, with a ScheduleCallback each: what a search will find cannot be shown beforehand.
        total_steps: optimizer steps of the run; by default the configuration's ``trainer.max_steps``.
        out: picture to write, PNG, SVG or PDF by its ending.
        overrides: further arguments of ``fit``.
    """
    from lightning_autolr.report.curves import preview_figure

    ending = Path(out).suffix.lower()
    if ending not in (".png", ".svg", ".pdf"):
        raise ValueError(f"Expected a picture that ends in .png, .svg or .pdf, got {out!r}.")
    schedules: dict[str, tuple[Schedule, float | None, int]] = {}
    for name, path in _named(configs).items():
        config = resolve(path, overrides)
        length = config["trainer"]["max_steps"] if total_steps is None else total_steps
        fixed = [c for c in _built(callbacks_of(config)) if isinstance(c, ScheduleCallback)]
        if not fixed:
            print(f"{name}: no ScheduleCallback in it, nothing to show before training.")
        elif length is None or length < 1:
            raise ValueError(f"Expected a known number of steps for {path}, got {length}: pass `--total-steps`.")
        else:
            followed = fixed[0].schedule_to_follow
            schedules[name] = followed if followed.is_resolved else followed.stretched(length), fixed[0].peak_lr, length
    if not schedules:
        return 1
    for name, (schedule, peak, length) in schedules.items():
        scale = 1.0 if schedule.absolute else peak or 1.0
        values = (f"{step}: {scale * schedule(step):.3g}" for step in (length * quarter // 4 for quarter in range(5)))
        print(f"{name:<12} " + "  ".join(values))
    preview_figure(schedules).savefig(out)
    print(f"Picture: {out}")
    return 0


def inspect(run_dir: str, csv: str | None = None, figures: str | None = None) -> int:
    """Show what a run tried, what it chose, why, and at what cost.

    Args:
        run_dir: folder of the run, such as ``lightning_logs/version_0``.
        csv: CSV file to write, one row per candidate and stage.
        figures: folder to write all figures to, as PNG.
    """
    from lightning_autolr.report.figures import drawings_of, range_test_figure, save_figure
    from lightning_autolr.report.inspect import inspect_run

    console, inspection = _console(), inspect_run(run_dir)
    console.print(inspection)
    if csv is not None:
        console.print(f"Rows: {inspection.to_csv(csv)}", soft_wrap=True)
    if figures is not None:
        drawings = drawings_of(inspection.trace, inspection.segments)
        for name, draw in drawings.items():
            save_figure(draw(), Path(figures) / f"{name}.png")
        for at, found in inspection.range_tests:
            save_figure(range_test_figure(found), Path(figures) / f"range_test_{at.replace(' ', '_')}.png")
        number = len(drawings) + len(inspection.range_tests)
        console.print(f"{number} figure{'s' * (number != 1)}: {figures}", soft_wrap=True)
    return 0


def replay(run_dir: str, out: str | None = None, overrides: Sequence[str] = ()) -> int:
    """Train again with the learning rates that a run found, without any search.

    With the same machine and number of devices the final weights are the same to the bit, unless a beam search took up the end
    of a private probe: a warning then says so.

    Args:
        run_dir: folder of a run made with ``fit``: it has ``config.yaml`` and ``autolr/schedule.json``.
        out: folder to write to; by default ``RUN_DIR/replay``.
        overrides: further arguments of ``fit``.
    """
    schedule = _existing(Path(run_dir, "autolr", "schedule.json")).resolve()
    config = yaml.safe_load(_existing(Path(run_dir, "config.yaml")).read_text())
    trainer, others, options = config["trainer"], [], {}
    is_search = False
    for callback in callbacks_of(config):
        if issubclass(_imported(callback["class_path"]), SearchCallback):
            is_search = _imported(callback["class_path"]) is not ScheduleCallback
            options = {k: v for k, v in callback.get("init_args", {}).items() if k in _REPLAYED}
        else:
            others.append(callback)
    length = Tabulated.from_file(schedule).length
    result = json.loads(_existing(Path(run_dir, "result.json")).read_text())
    if is_search and length == result["steps"]:
        # A resumed run is repeated from its beginning, since its checkpoint has nothing for the callback of the replay. A run
        # that began from other weights, and made fewer steps than they had, needs them.
        config.pop("ckpt_path", None)
    found = {
        "class_path": "lightning_autolr.ScheduleCallback",
        "init_args": {
            **options,
            "schedule": {
                "class_path": "lightning_autolr.schedules.Tabulated.from_file",
                "init_args": {"path": str(schedule)},
            },
            # The run may have ended before the Trainer's own limits. These stay, since the module may ask for them.
            "total_steps": length,
            "count_search": True,
        },
    }
    if trainer.get("max_time") is not None:  # it ended the run where the schedule ends, and may come earlier now
        trainer.update(max_time=None, max_epochs=trainer.get("max_epochs") or -1)
    trainer["callbacks"] = [found, *others]
    target = Path(out) if out else Path(run_dir, "replay")
    target.mkdir(parents=True, exist_ok=True)
    _fit(config, *writing_to(target), *overrides)
    after = json.loads(_existing(target / "result.json").read_text())["metrics"]
    for name, value in result["metrics"].items():
        print(f"{name:<12} {value:.6f} found, {after.get(name, float('nan')):.6f} replayed")
    return 0


def refine(run_dir: str, smoothing: float = 0.1, out: str | None = None) -> int:
    """Make a schedule from the gradient norms of a finished run (one with a GradNormCallback).

    Args:
        run_dir: folder of the run: it has ``autolr/grad_norms.json``.
        smoothing: width of the median filter as a share of the run, in [0, 1); 0 does not smooth.
        out: file for the schedule; by default ``RUN_DIR/autolr/refined.json``.
    """
    folder = Path(run_dir, "autolr")
    record = json.loads(_existing(folder / "grad_norms.json").read_text())
    target = Path(out) if out else folder / "refined.json"
    norms = [float(x) for x in record["norms"]]
    refine_schedule(norms, norm=record["norm"], smoothing=smoothing).to_file(target)
    print(
        f"Refined from {len(norms)} {record['norm']} norms: {target}. It is for a run of as many steps, with a peak "
        "learning rate of your own:\n"
        "  - class_path: lightning_autolr.ScheduleCallback\n"
        "    init_args:\n"
        "      schedule:\n"
        "        class_path: lightning_autolr.schedules.Tabulated.from_file\n"
        f"        init_args: {{path: {target}}}\n"
        "      peak_lr: 0.1"
    )
    return 0


def range_test(
    config: str,
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    num_steps: int = 100,
    repeats: int = 3,
    rule: Rule = "minimum",
    out: str = "runs/range_test",
    overrides: Sequence[str] = (),
) -> int:
    """Raise the learning rate over a few private steps and suggest one, with an interval.

    Args:
        config: a file for ``fit``; its callbacks are not used.
        min_lr: learning rate of the first step, > 0.
        max_lr: learning rate of the last step; a loss that runs away ends the test before.
        num_steps: private steps of one test, >= 10; the learning rate grows by the same factor at each.
        repeats: tests, each on other batches; the interval is from the lowest to the highest of their results.
        rule: "minimum" (a tenth of where the loss is lowest; for a constant learning rate), "edge" (a quarter of where it
            begins to rise; when a decay follows), "valley" (the middle of the main fall) or "steepest" (where it falls
            fastest).
        out: folder for ``autolr/range_test.json`` and the picture.
        overrides: further arguments of ``fit``.
    """
    options: dict[str, Any] = {
        "min_lr": min_lr,
        "max_lr": max_lr,
        "num_steps": num_steps,
        "repeats": repeats,
        "rule": rule,
        "stop": True,
    }
    RangeTestCallback(**options)  # what is wrong with the options is said here, in one line
    values = resolve(config, overrides)
    values["trainer"]["callbacks"] = [{"class_path": "lightning_autolr.RangeTestCallback", "init_args": options}]
    values["trainer"].update(
        enable_checkpointing=False, num_sanity_val_steps=0, limit_val_batches=0, limit_test_batches=0
    )
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    _fit(values, *writing_to(target), cli=_Silent)
    return inspect(str(target), figures=str(target / "autolr"))


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)  # a file has no width to fit in


@contextmanager
def _exiting_on_sigterm() -> Iterator[None]:
    """Let ``kill`` end the runs too: by default it would end this process alone, without any clean-up."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Silent(AutoLRCLI):
    """``fit`` that leaves it to others to say what came of it."""

    def after_fit(self) -> None:
        pass


def _fit(config: dict[str, Any], *options: str, cli: type[AutoLRCLI] = AutoLRCLI) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(config))
        cli(["fit", "--config", str(file), *options])


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"Expected {path}, got none: give the folder of a finished run.")
    return path


def _named(paths: Sequence[str]) -> dict[str, str]:
    """The shortest names which tell the files apart: stems, or with their folders."""
    for parts in range(1, 1 + max(len(Path(p).parts) for p in paths)):
        names = ["-".join(Path(p).with_suffix("").parts[-parts:]) for p in paths]
        if len(set(names)) == len(paths):
            return dict(zip(names, paths, strict=True))
    raise ValueError(f"Expected different configurations, got {list(paths)}.")


def _imported(class_path: str) -> type:
    module, _, name = class_path.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _built(callbacks: Sequence[dict[str, Any]]) -> Iterator[Callback]:
    """The callbacks of this package, from what a configuration says of them."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(Callback, "callback")
    for callback in callbacks:
        if callback["class_path"].startswith("lightning_autolr."):
            yield parser.instantiate_classes(parser.parse_object({"callback": callback})).callback
