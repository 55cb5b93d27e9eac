"""While a search runs nobody hears of it: not callbacks, loggers, `self.log`, nor the handlers of signals."""

from __future__ import annotations

import copy
import signal
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import PurePath
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

__all__ = ["LogSink", "SavedInSearchError", "deferred_signals", "quiet"]

_PLAIN = (type(None), str, bytes, int, float, PurePath)
_CONTAINERS = (dict, list, set, tuple, Namespace)
_READS = {"get_logdir"}  # methods that are called for what they return

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
    """Stands in for a logger's object, an experiment say: what is plain in it can be read, all else is done to nothing."""

    def __init__(self, original: Any) -> None:
        vars(self).update(_original=original)  # past our own `__setattr__`

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # such as what `copy` and `pickle` look for
            raise AttributeError(name)
        value = getattr(self._original, name, self)
        if isinstance(value, _CONTAINERS):
            return copy.copy(value)
        return value if isinstance(value, _PLAIN) or name in _READS else _Silence(value)

    def __setattr__(self, name: str, value: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Silence(None)

    def __getitem__(self, key: Any) -> Any:
        return _Silence(None)

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


class _SilentLogger(DummyLogger):
    """Looks like a logger, says where it writes, and writes nothing."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self._original = original

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # what `isinstance` asks for
        return type(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(_Silence(self._original), name)

    @property
    def experiment(self) -> Any:
        return _Silence(getattr(self._original, "experiment", None))

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
