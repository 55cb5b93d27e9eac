"""The command line, ``lightning-autolr``: LightningCLI with this package's short names, and commands of its own."""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import docstring_parser
import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, DefaultHelpFormatter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

# The first three for their names alone: jsonargparse finds the classes it has seen by their short names.
import lightning_autolr.callbacks
import lightning_autolr.schedules
import lightning_autolr.tasks  # noqa: F401
from lightning_autolr.report.trace import account_of

__all__ = ["AutoLRCLI", "main", "resolve"]


class AutoLRCLI(LightningCLI):
    """LightningCLI that evaluates after ``fit``, says what came of it and where it lies, and writes ``result.json``.

    The network is evaluated as it is at the end of training, on the validation and the test data, as far as there are
    any (``--trainer.limit_test_batches 0`` leaves the test out).

    Args:
        args: the command line, without the program's name.
    """

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            args=list(args),
            # A run folder that is used again is the user's wish; LightningCLI would refuse it.
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "prog": "lightning-autolr",
                "description": "Train with Lightning under learning rates that are found while you train.",
                "epilog": _further_commands(),
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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``lightning-autolr``; returns the exit status.

    Args:
        argv: arguments without the program's name; None takes them from the command line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the user's own modules by class_path, as with `python -m`
    commands = _commands()
    if arguments and arguments[0] in commands:
        return _run_command(arguments[0], commands[arguments[0]], arguments[1:])
    AutoLRCLI(arguments)
    return 0


def _commands() -> dict[str, Callable[..., int]]:
    from lightning_autolr import commands  # not above: they use this module

    names = ("compare", "preview", "inspect", "replay", "refine", "range_test")
    return {name.replace("_", "-"): getattr(commands, name) for name in names}


def _run_command(name: str, function: Callable[..., int], arguments: list[str]) -> int:
    """Parse what stands before ``--`` by the function's signature; what stands after it is for ``fit``."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _parser_of(name, function)
    options = parser.parse_args([_dashed(argument) for argument in arguments[:at]]).as_dict()
    if "overrides" in inspect.signature(function).parameters:
        options["overrides"] = arguments[at + 1 :]
    elif arguments[at + 1 :]:
        parser.error(f"{name} takes no arguments for fit, got {arguments[at + 1 :]}")
    try:
        return function(**options)
    except (FileNotFoundError, ImportError, ValueError) as error:
        if not str(error).startswith("Expected "):  # not a message of ours to the user: a bug wants its traceback
            raise
        print(f"lightning-autolr {name}: {error}", file=sys.stderr)
        return 2


def _parser_of(name: str, function: Callable[..., int]) -> ArgumentParser:
    """Options of a command: its parameters, with the types of their annotations and the help of its docstring.

    A parameter without a default is positional, a list of them takes several, a bool is a flag.
    """
    said = docstring_parser.parse((function.__doc__ or "").replace("``", ""))
    described = {parameter.arg_name: " ".join((parameter.description or "").split()) for parameter in said.params}
    hints = get_type_hints(function)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "overrides"]
    rest = " [-- OPTION_OF_FIT ...]" if "overrides" in hints else ""
    places = "".join(f" {p.name.upper()}" for p in parameters if p.default is p.empty).replace("CONFIGS", "CONFIG...")
    parser = ArgumentParser(
        prog=f"lightning-autolr {name}",
        usage=f"lightning-autolr {name}{places} [OPTION ...]{rest}",
        description=said.description or "",
    )
    for parameter in parameters:
        words: dict[str, Any] = {"help": described[parameter.name]}
        if parameter.default is parameter.empty:
            several = get_origin(hints[parameter.name]) is list
            words |= {"nargs": "+", "type": str} if several else {"type": hints[parameter.name]}
            parser.add_argument(parameter.name, metavar="CONFIG" if several else parameter.name.upper(), **words)
        else:
            kind = {"action": "store_true"} if parameter.default is False else {"type": hints[parameter.name]}
            parser.add_argument(f"--{parameter.name.replace('_', '-')}", default=parameter.default, **kind, **words)
    return parser


def _dashed(argument: str) -> str:
    """``--max_lr=1`` is ``--max-lr=1``: either is taken."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") else argument


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").partition("\n")[0]


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help whose description and end are not folded."""


def _further_commands() -> str:
    lines = (f"  {name:<12} {_first_line(function)}" for name, function in _commands().items())
    return "\n".join(("further commands (each has --help):", *lines))


if __name__ == "__main__":
    sys.exit(main())
