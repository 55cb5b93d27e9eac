"""``fit``: LightningCLI with this package's short names, and what it says at the end of a run."""

from __future__ import annotations

import json
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

# Imported for their names alone: jsonargparse finds the classes it has seen by their short names.
import lightning_autolr.callbacks
import lightning_autolr.schedules
import lightning_autolr.tasks  # noqa: F401
from lightning_autolr.core.record import account_of

__all__ = ["AutoLRCLI", "resolve"]


class AutoLRCLI(LightningCLI):
    """LightningCLI that evaluates after ``fit``, says what came of it and where it lies, and writes ``result.json``.

    The network is evaluated as it is at the end of training, on the validation and the test data, as far as there are
    any (``--trainer.limit_test_batches 0`` leaves the test out).

    Args:
        args: the command line, without the program's name.
        usage: the first line of the help; None is made of the options.
        epilog: what stands below the help.
    """

    def __init__(self, args: Sequence[str], usage: str | None = None, epilog: str = "") -> None:
        super().__init__(
            args=list(args),
            # A run folder that is used again is the user's wish; LightningCLI would refuse it.
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "prog": "lightning-autolr",
                "usage": usage,
                "description": "Train with Lightning under learning rates that are found while you train.",
                "epilog": epilog,
                "formatter_class": _Help,
            },
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
        sources = [s for s in (self.model, self.datamodule) if s is not None]
        metrics: dict[str, float] = {}
        for loop, step, loader in (
            (self.trainer.validate, "validation_step", "val_dataloader"),
            (self.trainer.test, "test_step", "test_dataloader"),
        ):
            if is_overridden(step, self.model) and any(is_overridden(loader, source) for source in sources):
                for part in loop(self.model, datamodule=self.datamodule, verbose=False):
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
    account = account_of(summary or {"schedule_steps": steps})
    print(f"\n{'; '.join([*account, f'{seconds:.0f} s in all'])}.")
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
            AutoLRCLI(["fit", "--config", config, *overrides, "--print_config"])
    except SystemExit as end:
        if end.code:
            print(f"The configuration was {config}.", file=sys.stderr)
            raise
    values: dict[str, Any] = yaml.safe_load(printed.getvalue())
    return values


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help whose description and end are not folded."""
