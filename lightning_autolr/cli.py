"""The command line, ``lightning-autolr``: LightningCLI with this package's short names, and commands of its own."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console

# Imported for their names alone: jsonargparse finds the classes it has seen by their short names.
import lightning_autolr.callbacks
import lightning_autolr.schedules
import lightning_autolr.tasks  # noqa: F401
from lightning_autolr.report.compare import Comparison, compare_configs
from lightning_autolr.report.page import write_page

__all__ = ["AutoLRCLI", "compare", "main", "resolve"]


class AutoLRCLI(LightningCLI):
    """LightningCLI that evaluates after ``fit``, says what came of it and where it lies, and writes ``result.json``.

    The network is evaluated as it is at the end of training, on the validation and the test data, as far as there are
    any (``--trainer.limit_test_batches 0`` leaves the test out).
    """

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            args=list(args),
            # A run folder that is used again is the user's wish; LightningCLI would refuse it.
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "lightning-autolr", "description": _description()},
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # LightningCLI's own method warns when arguments come from a caller: here they always do.
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    def before_fit(self) -> None:
        self._begun = time.perf_counter()

    def after_fit(self) -> None:
        seconds = time.perf_counter() - self._begun
        trainer: Any = self.trainer
        if trainer.fast_dev_run:
            return
        steps = trainer.global_step
        metrics = self._evaluate()
        log_dir = trainer.log_dir  # asked for on every rank: it is broadcast
        if trainer.is_global_zero and log_dir is not None:
            _report(Path(log_dir), metrics, steps, seconds)

    def _evaluate(self) -> dict[str, float]:
        loops = {"validate": "val_dataloader", "test": "test_dataloader"}
        metrics: dict[str, float] = {}
        for loop, loader in loops.items():
            step = "validation_step" if loop == "validate" else "test_step"
            sources = [s for s in (self.model, self.datamodule) if s is not None]
            if is_overridden(step, self.model) and any(is_overridden(loader, s) for s in sources):
                run: Callable[..., list[Any]] = getattr(self.trainer, loop)
                for part in run(self.model, datamodule=self.datamodule, verbose=False):
                    metrics.update({name: float(value) for name, value in part.items()})
        return metrics


def _report(folder: Path, metrics: dict[str, float], steps: int, seconds: float) -> None:
    """Write ``result.json`` and print what came of the run."""
    found = folder / "autolr"
    summary = json.loads((found / "summary.json").read_text()) if (found / "summary.json").exists() else {}
    result = {
        "metrics": metrics,
        "steps": steps,
        "schedule_steps": summary.get("schedule_steps", steps),
        "search_steps": summary.get("search_steps", 0),
        "eval_batches": summary.get("eval_batches", 0),
        "seconds": seconds,
        "search_seconds": summary.get("search_seconds", 0.0),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    files = {"schedule": found / "schedule.json", "picture": found / "schedule.png", "trace": found / "trace.jsonl"}
    searched = f" and {result['search_steps']} in search" if result["search_steps"] else ""
    print(f"\n{result['schedule_steps']} steps of training{searched}, in {seconds:.0f} s.")
    for name, value in metrics.items():
        print(f"  {name:<10} {value:.4f}")
    for name, file in {**files, "result": folder / "result.json"}.items():
        if file.exists():
            print(f"  {name:<10} {file}")


def resolve(config: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration that ``fit --config CONFIG`` would run, with all defaults filled in.

    Args:
        config: path of a file for ``fit``.
        overrides: further arguments of ``fit``.

    Raises:
        SystemExit: the configuration is not valid; the reason has been printed.
    """
    printed = StringIO()
    try:
        with redirect_stdout(printed):
            AutoLRCLI(args=["fit", "--config", config, *overrides, "--print_config"])
    except SystemExit as end:
        if end.code:
            raise
    values: dict[str, Any] = yaml.safe_load(printed.getvalue())
    return values


def compare(
    configs: list[str],
    seeds: int = 3,
    equal_total_steps: bool = False,
    metric: str = "test_loss",
    engine: Literal["local", "ray"] = "local",
    jobs: int = 1,
    out: str = "runs/compare",
    overrides: Sequence[str] = (),
) -> Comparison:
    """Train every configuration with the same seeds and compare them with the first one.

    Arguments after ``--`` go to every ``fit``: ``compare a.yaml b.yaml --seeds 2 -- --trainer.max_steps 500``. Finished
    runs are not repeated unless their configuration changed.

    Args:
        configs: files for ``fit``. Differences are taken to the first one.
        seeds: number of seeds: 0, 1, ...
        equal_total_steps: let search steps count in ``max_steps``, so that every run makes the same number in all.
        metric: the value to compare, as logged on the test or validation data. Smaller is better unless its name ends
            in acc or accuracy.
        engine: where the runs are made: in processes here, or as tasks of a Ray cluster.
        jobs: runs at a time; with Ray, "as many as the cluster takes" is 0.
        out: folder for the runs, ``runs.csv``, ``comparison.json`` and ``comparison.html``.
        overrides: further arguments of ``fit``, as after ``--``.
    """
    resolved = {name: resolve(path, overrides) for name, path in _named(configs).items()}
    console = Console(width=None if sys.stdout.isatty() else 140)  # a file has no width to fit in
    comparison = compare_configs(
        resolved,
        seeds=range(seeds),
        equal_total_steps=equal_total_steps,
        metric=metric,
        engine=engine,
        jobs=jobs,
        out=Path(out),
        console=console,
    )
    page = write_page(comparison, Path(out) / "comparison.html")
    console.print(comparison.table())
    for run in comparison.failures:
        console.print(f"[red]failed:[/] {run.name}, seed {run.seed}: {run.error} (see {run.folder / 'log.txt'})")
    console.print(f"Page: {page}", soft_wrap=True)
    return comparison


def _named(paths: Sequence[str]) -> dict[str, str]:
    """The shortest names which tell the files apart: stems, or with their folders."""
    for parts in range(1, 1 + max(len(Path(p).parts) for p in paths)):
        names = ["-".join(Path(p).with_suffix("").parts[-parts:]) for p in paths]
        if len(set(names)) == len(paths):
            return dict(zip(names, paths, strict=True))
    raise ValueError(f"Expected different configurations, got {list(paths)}.")


def _compare_command(arguments: list[str], overrides: list[str]) -> int:
    parser = _command_parser("compare", compare)
    parser.add_argument("configs", nargs="+", help="files for fit; differences are taken to the first one")
    parser.add_function_arguments(compare, skip={"configs", "overrides"})
    options = parser.parse_args(arguments).as_dict()
    return 1 if compare(**options, overrides=overrides).failures else 0


def _command_parser(name: str, function: Callable[..., Any]) -> ArgumentParser:
    return ArgumentParser(prog=f"lightning-autolr {name}", description=_first_line(function))


_COMMANDS: dict[str, tuple[Callable[..., Any], Callable[[list[str], list[str]], int]]] = {
    "compare": (compare, _compare_command),
}


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").partition("\n")[0]


def _description() -> str:
    own = " ".join(f"{name}: {_first_line(function)}" for name, (function, _) in _COMMANDS.items())
    return f"Train with Lightning under learning rates that are found while you train. Further commands: {own}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``lightning-autolr``; returns the exit status.

    Args:
        argv: arguments without the program's name; None takes them from the command line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the user's own modules by class_path, as with `python -m`
    if arguments and arguments[0] in _COMMANDS:
        at = arguments.index("--") if "--" in arguments else len(arguments)
        return _COMMANDS[arguments[0]][1](arguments[1:at], arguments[at + 1 :])
    AutoLRCLI(args=arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
