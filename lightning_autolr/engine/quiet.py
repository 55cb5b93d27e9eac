"""While a search runs nobody hears of it: not callbacks, loggers, `self.log`, nor the handlers of signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

__all__ = ["LogSink", "deferred_signals", "quiet"]


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


class _Guard(Callback):
    """The only callback while a search is running: refuses to write a candidate's weights into a checkpoint."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        raise RuntimeError(
            "Expected no checkpoint to be saved while learning rates are tried, since the weights of this moment are a "
            "candidate's. Save from `on_train_batch_end` or later hooks instead of from within `training_step`."
        )


@contextmanager
def quiet(trainer: Any, module: nn.Module, heard_by: list[Callback]) -> Iterator[LogSink]:
    """Silence the Trainer; everything is put back on the way out, whatever happens.

    Args:
        trainer: the Trainer.
        module: its LightningModule.
        heard_by: callbacks that take part in private steps all the same (those which change gradients).

    Yields:
        The sink that receives ``self.log``.
    """
    sink = LogSink()
    callbacks, loggers, should_stop = trainer.callbacks, trainer.loggers, trainer.should_stop
    loggables = [m for m in module.modules() if hasattr(m, "log_dict") and hasattr(m, "log")]
    with ExitStack() as stack:
        stack.enter_context(deferred_signals())

        def put_back() -> None:
            trainer.callbacks, trainer.loggers, trainer.should_stop = callbacks, loggers, should_stop
            for loggable in loggables:
                loggable.__dict__.pop("log", None)

        stack.callback(put_back)
        # A new list, never a changed one: Lightning is iterating over the old one right now.
        trainer.callbacks = [*heard_by, _Guard()]
        trainer.loggers = [DummyLogger() for _ in loggers]
        for loggable in loggables:
            loggable.__dict__["log"] = sink
        yield sink


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold back signals that have a Python handler, except Ctrl-C, and deliver them at the end.

    A handler that saves a checkpoint at once, such as SLURM's requeueing, would else write a candidate's weights.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    held: dict[int, Any] = {}
    for number in set(signal.Signals) - {signal.SIGINT, signal.SIGCHLD}:
        handler = signal.getsignal(number)
        if callable(handler):
            held[number] = handler
            signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for number in received:
            held[number](number, None)
