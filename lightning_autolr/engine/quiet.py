"""While a search runs nobody hears of it: not callbacks, loggers, `self.log`, nor the handlers of signals."""

from __future__ import annotations

import copy
import signal
import threading
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date, time, timedelta
from enum import Enum
from numbers import Number
from pathlib import PurePath
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from lightning_autolr.engine.compat import is_named_tuple

__all__ = ["LogSink", "SavedInSearchError", "UsedInSearchError", "deferred_signals", "quiet"]

_PLAIN = (
    type(None), str, bytes, frozenset, Number, np.generic, Enum, PurePath, date, time, timedelta, torch.dtype, torch.device,
)  # fmt: skip
_CONTAINERS = (dict, list, set, deque, tuple, Namespace)
_READS = {"get_logdir"}  # methods that are called for what they return

_NOTHING = object()  # what a stand-in stands for where there is no original
# What user code does with a number, a text or a path; a stand-in has none of them to give.
_USES = [
    f"__{use}__" for use in
    ("lt", "le", "gt", "ge", "neg", "pos", "abs", "round", "int", "float", "complex", "index", "fspath")
] + [
    f"__{side}{use}__" for side in ("", "r")
    for use in ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul", "and", "or", "xor")
]  # fmt: skip

_MAY_WAIT = frozenset(set(signal.Signals) - {signal.SIGINT, signal.SIGCHLD})


class LogSink:
    """Stands in for ``LightningModule.log`` and keeps what is logged, under the names the user gave."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.dataloader_idx: int | None = None

    def __call__(self, name: str, value: Any, *args: Any, add_dataloader_idx: bool = True, **kwargs: Any) -> None:
        if self.dataloader_idx is not None and add_dataloader_idx:
            name = f"{name}/dataloader_idx_{self.dataloader_idx}"
        self.values[name] = value.detach() if isinstance(value, Tensor) else value

    def take(self) -> dict[str, Any]:
        """What was logged since the last call."""
        values, self.values = self.values, {}
        return values


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``Trainer.save_checkpoint``: a candidate's weights must not get into a file."""
    raise SavedInSearchError(
        "Expected no checkpoint to be saved while learning rates are tried, since the weights of this moment are a "
        "candidate's. Save from a callback's `on_train_batch_end` instead of from within the module's steps."
    )


class _Silence:
    """Stands in for a logger's object, an experiment say: what is plain in it can be read, all else is done to nothing.

    Args:
        original: the object.
        name: how user code came to it, for messages.
    """

    def __init__(self, original: Any, name: str) -> None:
        vars(self).update(_original=original, _name=name)  # past our own `__setattr__`

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # what `isinstance` asks for
        return _Silence if self._original is _NOTHING else type(self._original)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # such as what `copy` and `pickle` look for
            raise AttributeError(name)
        value = getattr(self._original, name, _NOTHING)
        return value if name in _READS and value is not _NOTHING else _own(value, f"{self._name}.{name}", {})

    def __setattr__(self, name: str, value: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Silence(_NOTHING, f"{self._name}()")

    def __getitem__(self, key: Any) -> Any:
        try:
            value = self._original[key] if hasattr(type(self._original), "__getitem__") else _NOTHING
        except LookupError:  # it may have been set in this step, which was done to nothing
            value = _NOTHING
        return _own(value, f"{self._name}[{key!r}]", {})

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None: ...


def _refuse_to_be_used(self: _Silence, *args: Any) -> Any:
    raise UsedInSearchError(
        f"Expected nothing to be computed from `{self._name}` while learning rates are tried, since loggers are silent then: "
        "their methods are not called. Read it before training, in `on_fit_start` say, and keep it in an attribute."
    )


for _use in _USES:
    setattr(_Silence, _use, _refuse_to_be_used)


def _own(value: Any, name: str, memo: dict[int, Any]) -> Any:
    """What may be read of a logger: plain values, copies of what could be written into, and stand-ins for all else."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, tuple):
        items = [_own(item, name, memo) for item in value]
        return type(value)(*items) if is_named_tuple(value) else tuple(items)
    if not isinstance(value, _CONTAINERS):
        return value if isinstance(value, _PLAIN) else _Silence(value, name)
    copied = memo[id(value)] = copy.copy(value)
    if isinstance(copied, (dict, Namespace)):
        entries = copied if isinstance(copied, dict) else vars(copied)
        for key, item in entries.items():  # one by one: `update` of a `Counter` adds
            entries[key] = _own(item, name, memo)
    elif isinstance(copied, (list, deque)):
        for i, item in enumerate(copied):
            copied[i] = _own(item, name, memo)
    return copied


class _SilentLogger(DummyLogger):
    """Looks like a logger, says where it writes, and writes nothing."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self._original = original

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # what `isinstance` asks for
        return type(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(_Silence(self._original, "logger"), name)

    @property
    def experiment(self) -> Any:
        return _own(getattr(self._original, "experiment", _NOTHING), "logger.experiment", {})

    @property
    def name(self) -> Any:
        return self._original.name

    @property
    def version(self) -> Any:
        return self._original.version

    @property
    def save_dir(self) -> Any:
        return self._original.save_dir

    @property
    def root_dir(self) -> Any:
        return getattr(self._original, "root_dir", None)

    @property
    def log_dir(self) -> Any:
        return getattr(self._original, "log_dir", None)


class _SilentCallback(Callback):
    """Looks like a callback, for modules that ask the Trainer for one, and hears nothing: its hooks are those of the base."""

    def __init__(self, original: Callback) -> None:
        self._original = original

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # what `isinstance` asks for
        return type(self._original)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # such as what `copy` and `pickle` look for
            raise AttributeError(name)
        return getattr(self._original, name)


class SavedInSearchError(Exception):
    """The module asked for a checkpoint in the midst of a probe."""


class UsedInSearchError(Exception):
    """The module computes with what a logger would have returned, had it been asked."""


@contextmanager
def quiet(trainer: Any, module: nn.Module, heard_by: list[Callback]) -> Iterator[tuple[LogSink, list[int]]]:
    """Silence the Trainer; everything is put back on the way out, whatever happens.

    Args:
        trainer: the Trainer.
        module: its LightningModule.
        heard_by: callbacks that take part in private steps all the same (those which change gradients).

    Yields:
        The sink that receives ``self.log``, and the signals that wait to be delivered.
    """
    sink = LogSink()
    callbacks, loggers, should_stop = trainer.callbacks, trainer.loggers, trainer.should_stop
    loggables = [m for m in module.modules() if hasattr(m, "log_dict") and hasattr(m, "log")]
    with ExitStack() as stack:
        waiting = stack.enter_context(deferred_signals())

        def put_back() -> None:
            trainer.callbacks, trainer.loggers, trainer.should_stop = callbacks, loggers, should_stop

        stack.callback(put_back)
        # A new list, never a changed one: Lightning is iterating over the old one right now.
        # Progress bars stay: they draw from a thread of their own and look themselves up in it. No private step calls them.
        heard = [c for c in callbacks if isinstance(c, ProgressBar) or c in heard_by]
        silent = [c if c in heard else _SilentCallback(c) for c in callbacks]
        trainer.callbacks = [*silent, *(c for c in heard_by if c not in callbacks)]
        trainer.loggers = [_SilentLogger(logger) for logger in loggers]
        stack.enter_context(_instead(trainer, "save_checkpoint", _refuse_to_save))
        for loggable in loggables:
            # An override of `log` is heard: what it makes of a name is what the user monitors.
            if isinstance(loggable, LightningModule) and "log" not in vars(loggable):
                stack.enter_context(_logging_to(loggable, sink))
            else:
                stack.enter_context(_instead(loggable, "log", sink))
        for callback in heard_by:  # Lightning gave them the module's method
            stack.enter_context(_instead(callback, "log", sink))
        yield sink, waiting


@contextmanager
def _instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute of the instance; there may have been none."""
    attributes = vars(owner)
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        attributes.pop(name, None)
        attributes.update(before)


_SINKS: dict[int, LogSink] = {}  # by the id of the module that logs to it; fits may run in several threads
# As it was when the first of them came: others may have put theirs in its place.
_ORIGINAL = {"log": LightningModule.log}


@contextmanager
def _logging_to(module: LightningModule, sink: LogSink) -> Iterator[None]:
    """What reaches Lightning's own ``log`` goes into the sink, also when it comes by ``super().log``."""
    if not _SINKS:
        _ORIGINAL["log"] = LightningModule.log
    _SINKS[id(module)] = sink
    LightningModule.log = _log  # type: ignore[method-assign]
    try:
        yield
    finally:
        del _SINKS[id(module)]
        if not _SINKS:
            LightningModule.log = _ORIGINAL["log"]  # type: ignore[method-assign]


def _log(self: LightningModule, *args: Any, **kwargs: Any) -> None:
    if (sink := _SINKS.get(id(self))) is not None:
        sink(*args, **kwargs)
    else:
        _ORIGINAL["log"](self, *args, **kwargs)


@contextmanager
def deferred_signals(numbers: frozenset[signal.Signals] = _MAY_WAIT) -> Iterator[list[int]]:
    """Hold back signals that have a Python handler, and deliver them at the end.

    A handler that saves a checkpoint at once, such as SLURM's requeueing, would else write a candidate's weights. Ctrl-C is
    not held back unless asked for: as an exception it goes through everything that puts the state back.

    Yields:
        The signals received so far.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    held = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    for number in held:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for received_number in received:
            held[signal.Signals(received_number)](received_number, None)
