"""The command line, ``lightning-autolr``: ``fit`` and its like, and commands of our own."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser

from lightning_autolr import commands
from lightning_autolr.fit import AutoLRCLI

__all__ = ["main"]

COMMANDS: dict[str, Callable[..., int]] = {
    name.replace("_", "-"): getattr(commands, name)
    for name in ("compare", "preview", "inspect", "replay", "refine", "range_test")
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``lightning-autolr``; returns the exit status.

    Args:
        argv: arguments without the program's name; None takes them from the command line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the user's own modules by class_path, as with `python -m`
    if arguments and arguments[0] in COMMANDS:
        return _run_command(arguments[0], COMMANDS[arguments[0]], arguments[1:])
    own = AutoLRCLI.subcommands()
    usage = None if arguments[0] in own else f"lightning-autolr {{{','.join([*own, *COMMANDS])}}} ..."
    AutoLRCLI(arguments, usage=usage, epilog=_further_commands())
    return 0


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
    except (
        FileExistsError,
        IsADirectoryError,
        NotADirectoryError,
    ) as error:  # a path that was given is of another kind
        print(f"lightning-autolr {name}: {error.strerror}: {error.filename}", file=sys.stderr)
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


def _further_commands() -> str:
    lines = (f"  {name:<12} {_first_line(function)}" for name, function in COMMANDS.items())
    return "\n".join(("further commands (each has --help):", *lines))


if __name__ == "__main__":
    sys.exit(main())
