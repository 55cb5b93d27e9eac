"""What the user sees of a search: progress, logged values, figures, warnings, and the account at the end."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_autolr.core.record import Record, account_of
from lightning_autolr.core.requests import LineProbe, Probe, Request
from lightning_autolr.engine import compat
from lightning_autolr.engine.figure_log import FigureLog, log_account
from lightning_autolr.engine.progress import Progress

__all__ = ["Announcer"]


class Announcer:
    """Speaks for a callback during one fit.

    Args:
        name: of the callback.
        trainer: the Trainer, at the start of its training.
        record: of the run.
        figures: whether to draw.
    """

    def __init__(self, name: str, trainer: Any, record: Record, figures: bool) -> None:
        self.name, self._trainer, self._record = name, trainer, record
        self._progress = Progress(trainer)
        draws = figures and trainer.is_global_zero and record.folder is not None
        self._figures = FigureLog(trainer.loggers, record.folder or "") if draws else None
        self._has_warned = False

    def info(self, text: str) -> None:
        rank_zero_info(f"{self.name}: {text}")

    def show(self, request: Probe | LineProbe, step: int) -> None:
        """A step of a probe, in the progress bar."""
        steps = request.num_steps if isinstance(request, Probe) else request.horizon
        name = self.name.removesuffix("Callback")
        self._progress.show(f"{name} {request.label or f'stage {request.stage}'}, step {step // 10 * 10}/{steps}")

    def end_search(self, then: Request | None) -> None:
        """A row of probes is over, and ``then`` comes next."""
        self._progress.clear()
        if self._figures is not None:
            step = compat.logger_step(self._trainer)
            self._figures.after_search(self._record.trace, self._record.segments, then, step)

    def log_step(self, scalars: Mapping[str, float], always: bool) -> None:
        """Values of the step to come, as often as the Trainer logs, or ``always``."""
        trainer = self._trainer
        step, every = compat.logger_step(trainer), trainer.log_every_n_steps
        if every and (always or (step + 1) % every == 0):  # 0, as with `barebones`: never
            for logger in trainer.loggers:
                logger.log_metrics(dict(scalars), step=step)

    def warn_not_finite(self, where: str) -> None:
        """Once per run: not every loss that is NaN is the learning rate's fault."""
        if not self._has_warned:
            rank_zero_warn(
                f"{self.name}: a training loss was not finite, {where}. That counts as a divergence: the learning "
                "rate is blamed for it. Where the module survives such losses by itself, let it return a finite one, or None "
                "to skip the batch; `ratchet=False` takes nothing back in the real training."
            )
        self._has_warned = True

    def warn_ended_early(self, made: int, planned: int | None) -> None:
        """The ratchet goes back to the best weights before the last step that was planned."""
        rank_zero_warn(
            f"{self.name}: the run was ended after {made} of {planned} steps, by early stopping perhaps. It keeps its last "
            "weights; only at the planned end the ratchet goes back to the best ones. Take those of a `ModelCheckpoint`, or "
            "leave the stopping to the ratchet, and plan a shorter run."
        )

    def say_account(self, summary: Mapping[str, Any]) -> None:
        """Print what the run took, and what it found."""
        folder = self._record.folder
        lrs = [lr for lr, _ in groupby(f"{lr:.2e}" for lr in summary["learning_rates"])]
        found = ", ".join(lrs[:12]) + (f" and {len(lrs) - 12} more" if len(lrs) > 12 else "")
        where = f" The record is in {folder}." if folder else ""
        kept, undone = summary["schedule_steps"], summary["undone_steps"]
        if undone > 20 * max(1, kept):
            rank_zero_warn(
                f"{self.name} took back {undone} of {kept + undone} steps: nothing after them was better by what it looks at. "
                "Are `monitor` and `mode` ('max' for a score, of which more is better) what they should be?"
            )
        self.info(f"{'; '.join(account_of(summary))}. Peak learning rate{'s' * (len(lrs) > 1)}: {found}.{where}")

    def log_figures(self) -> None:
        """Of the whole run."""
        if self._figures is not None:
            self._figures.at_end(self._record.trace, self._record.segments, compat.logger_step(self._trainer))

    def log_account(self, summary: Mapping[str, Any], options: dict[str, Any], score: float | None) -> None:
        """What the search cost, and with what options and to what end."""
        trainer = self._trainer
        if trainer.is_global_zero and not trainer.fast_dev_run:
            names = ("schedule_steps", "search_steps", "undone_steps", "search_seconds")
            metrics = {f"autolr/{name}": float(summary[name]) for name in names}
            log_account(trainer.loggers, options, metrics, score, compat.logger_step(trainer))
