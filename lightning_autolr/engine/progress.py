"""Says in the user's own progress bar what is being tried; one log line per search where there is no bar."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info

__all__ = ["Progress"]


class Progress:
    """Shows the label of what is going on; ``clear`` puts the bar's own text back.

    Args:
        trainer: the Trainer, before its callbacks are swapped.
    """

    def __init__(self, trainer: Any) -> None:
        self._bar = trainer.progress_bar_callback
        self._text = ""
        self._before: str | None = None

    def show(self, text: str) -> None:
        if text == self._text:
            return
        if self._bar is None and text.partition(",")[0] != self._text.partition(",")[0]:
            rank_zero_info(text.partition(",")[0])
        self._text = text
        if isinstance(self._bar, TQDMProgressBar):
            bar = self._bar.train_progress_bar
            self._before = bar.desc if self._before is None else self._before
            bar.set_description_str(text)  # as it is: the bar's own text ends in a colon already
        elif isinstance(self._bar, RichProgressBar) and self._bar.progress is not None:
            task = self._bar.progress.tasks[self._bar.train_progress_bar_id]  # type: ignore[index]
            self._before = task.description if self._before is None else self._before
            self._bar.progress.update(task.id, description=text)
            self._bar.refresh()

    def clear(self) -> None:
        if self._before is not None:
            self.show(self._before)
        self._before, self._text = None, ""
