"""Figures and the account of a run, for whatever logger the user has. Rank 0 only."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_autolr.core.record import Entry
from lightning_autolr.core.requests import Request, Train
from lightning_autolr.report.figures import Drawing, drawings_of, drawings_of_search, save_figure
from lightning_autolr.report.inspect import searches_of
from lightning_autolr.schedules import Segment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FigureLog", "log_account", "log_figure", "options_of"]

_MOST_FIGURES = 30  # of searches, in a run: they cost a fraction of a second each
_OF_THE_RUN = ("beam", "factors", "autowu")


class FigureLog:
    """Draws what a search found, when it has ended, and the whole run at its end.

    Drawing never ends a run: without matplotlib there is one message, and a figure that fails is a warning.

    Args:
        loggers: of the Trainer.
        folder: where the run's ``trace.jsonl`` lies.
    """

    def __init__(self, loggers: Sequence[Any], folder: str) -> None:
        self._loggers, self._folder = loggers, folder
        self._left = _MOST_FIGURES
        self._can_draw = True

    def after_search(
        self, trace: Sequence[Entry], segments: Sequence[Segment], upcoming: Request | None, step: int
    ) -> None:
        """Log the figures of the search that ends the trace, as long as there were not too many before.

        Args:
            trace: every request and its answer so far.
            segments: the schedule so far.
            upcoming: what comes next.
            step: at which to log.
        """
        begin = len(trace)
        while begin and not isinstance(trace[begin - 1].request, Train):
            begin -= 1
        if len(trace) - begin < 2:
            return
        train = upcoming if isinstance(upcoming, Train) else None
        made = sum(segment.num_steps for segment in segments)
        for search in searches_of(trace[begin:], upcoming=train, step=made):
            for name, draw in drawings_of_search(search).items():
                if self._left > 0:
                    self._left -= 1
                    self.log(name, draw, step)

    def at_end(self, trace: Sequence[Entry], segments: Sequence[Segment], step: int) -> None:
        """Log the figures of the whole run; that of the schedule is written to ``schedule.png`` too."""
        drawings = drawings_of(trace, segments)
        for name in _OF_THE_RUN:
            if name in drawings:
                self.log(name, drawings[name], step)
        if "schedule" in drawings:
            self.log("schedule", drawings["schedule"], step, Path(self._folder) / "schedule.png")

    def log(self, name: str, draw: Drawing, step: int, path: Path | None = None) -> None:
        """Draw and log a figure, once; what goes wrong is said and does not end the run.

        Args:
            name: what it shows.
            draw: makes it.
            step: at which to log, as Lightning's loggers count it.
            path: a file to write in any case; without it there is one in ``figures`` if no logger takes the figure.
        """
        if not self._can_draw:
            return
        try:
            figure = draw()
            if path is not None:
                save_figure(figure, path)
            log_figure(self._loggers, name, figure, step, None if path else os.path.join(self._folder, "figures"))
        except ImportError as error:
            self._can_draw = False
            rank_zero_info(f"There will be no figures. {error}")
        except Exception as error:  # whatever a logger or a strange trace does, the training goes on
            rank_zero_warn(f"The figure {name!r} at step {step} could not be drawn or logged: {error!r}")


def log_figure(
    loggers: Sequence[Any], name: str, figure: Figure, step: int, folder: str | os.PathLike[str] | None
) -> Path | None:
    """Give a figure to every logger that takes figures; if there is none, write a PNG file.

    TensorBoard, Weights & Biases, MLflow and Comet take figures; CSV files do not.

    Args:
        loggers: of the Trainer.
        name: what it shows; loggers see ``autolr/<name>``, a name for all steps, so that there is one slider.
        figure: any matplotlib figure. It is not closed and not changed.
        step: as Lightning's loggers count it. It must not go back from call to call.
        folder: for the file, ``<name>_<step>.png``; None writes none.

    Returns:
        The file, if one was written.
    """
    taken = [_give(logger, f"autolr/{name}", figure, step) for logger in loggers]
    if any(taken) or folder is None:
        return None
    return save_figure(figure, Path(folder) / f"{name}_{step:07d}.png")


def log_account(
    loggers: Sequence[Any], options: dict[str, Any], metrics: dict[str, float], score: float | None, step: int
) -> None:
    """Log what a search cost, and for TensorBoard's hparams tab with what options and to what end.

    Other loggers get the metrics alone: what they keep as hyper-parameters is the user's (MLflow refuses to change one, and
    ``hparams.yaml`` is read by ``load_from_checkpoint``). TensorBoard knows one set of hyper-parameters per run; if the
    user's module has logged some already, theirs and ours stand in a run below, ``<run>/autolr``.

    Args:
        loggers: of the Trainer.
        options: of the search.
        metrics: what it cost, by full name.
        score: the monitored value at the end of the run, if there is one.
        step: as Lightning's loggers count it.
    """
    final = {} if score is None else {"hp_metric": score}
    for logger in loggers:
        if not _is_a(logger, "TensorBoardLogger"):
            logger.log_metrics(metrics, step=step)
        elif not logger.hparams:
            logger.log_hyperparams(_plain(options), {**final, **metrics}, step)
        else:
            logger.log_metrics(metrics, step=step)
            every = _plain({**dict(logger.hparams), **options})
            logger.experiment.add_hparams(every, {**final, **metrics}, run_name="autolr", global_step=step)


def options_of(callback: Any) -> dict[str, Any]:
    """Name of a callback's method and the options of its search, as ``autolr/<option>``."""
    search = getattr(callback, "search", None)
    options = {"method": type(callback).__name__.removesuffix("Callback")}
    if dataclasses.is_dataclass(search):
        options |= {field.name: getattr(search, field.name) for field in dataclasses.fields(search)}
    return {f"autolr/{name}": value for name, value in options.items()}


def _give(logger: Any, name: str, figure: Figure, step: int) -> bool:
    """Whether the logger took it. Classes are known by name: there are two Lightning packages with a class each."""
    if _is_a(logger, "TensorBoardLogger"):
        logger.experiment.add_figure(name, figure, global_step=step, close=False)
    elif _is_a(logger, "WandbLogger"):
        logger.log_image(key=name, images=[_image(figure)], step=step)
    elif _is_a(logger, "MLFlowLogger"):
        logger.experiment.log_figure(logger.run_id, figure, f"{name}_{step:07d}.png")
    elif _is_a(logger, "CometLogger"):
        logger.experiment.log_figure(figure_name=name, figure=figure, step=step)
    else:
        return False
    return True


def _is_a(logger: Any, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(logger).__mro__)


def _image(figure: Figure) -> Any:
    """As pixels: W&B would turn a figure into a plotly chart of its own taste."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """What TensorBoard can show: numbers and words."""
    return {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in values.items()}
