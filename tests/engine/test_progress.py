"""The user's own progress bar after a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar

from tests.engine.small import Stages, Tiny, fit_tiny
from tests.engine.subjects import Search


class ReadsBar(Tiny):
    """Writes down what the bar says, in real and private steps alike."""

    def on_train_batch_end(self, *args: Any) -> None:
        SEEN.append(self.trainer.progress_bar_callback.train_progress_bar.desc)


SEEN: list[str] = []  # not in the module, where a search would put it back


def test_the_text_of_the_bar_is_as_it_was(tmp_path: Path) -> None:
    SEEN.clear()
    options = {"enable_progress_bar": True, "max_epochs": 1, "max_steps": -1}
    fit_tiny(tmp_path, [Search(Stages(num_steps=1, num_stages=3)), TQDMProgressBar()], ReadsBar(), **options)
    assert {text for text in SEEN if not text.startswith("Search")} == {"Epoch 0: "}
