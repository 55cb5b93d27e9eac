"""The piece of real training that is going on: its steps, losses and gradient norms."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_autolr.core.requests import Status, Train, decode, diverged
from lightning_autolr.engine.grad_norms import GradNorms
from lightning_autolr.engine.ranks import mean_over_ranks
from lightning_autolr.schedules import Segment, to_plain

__all__ = ["ActiveSegment"]

_LOOK_EVERY = 10  # steps between looks at the training loss, when somebody wants to know whether it diverges


@dataclass
class ActiveSegment:
    """What came so far of a :class:`~lightning_autolr.core.requests.Train`.

    Losses stay on the device until somebody has to know them.

    Args:
        train: what was asked for.
        start: id of the state kept before the first step, if one was.
        global_step: the Trainer's at the first step.
        back_to: see :class:`~lightning_autolr.schedules.Segment`.
        leaps: likewise.
        as_left: likewise.
        steps_done: steps made.
        losses: of the steps that were read.
        grad_norms: likewise, where asked for; NaN for a step without gradients.
        skipped: steps that gave no loss.
        judged: how many of ``losses`` were looked at for divergence.
        begun: when it began, in seconds of ``time.perf_counter``.
    """

    train: Train
    start: str | None = None
    global_step: int = 0
    back_to: int | None = None
    leaps: bool = False
    as_left: bool = False
    steps_done: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    judged: int = 0
    begun: float = field(default_factory=lambda: time.perf_counter())

    def __post_init__(self) -> None:
        self._unread: list[Tensor] = []
        self._micro_losses: list[Tensor] = []
        self._measured: GradNorms | None = None

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.train.lr * self.train.shape(self.steps_done)

    @property
    def momentum(self) -> float | None:
        """Momentum of the next step, where it is scheduled."""
        return None if self.train.momentum is None else self.train.momentum(self.steps_done)

    @property
    def is_finished(self) -> bool:
        return self.steps_done == self.train.num_steps

    @property
    def is_guarded(self) -> bool:
        """Whether somebody wants to know when it diverges, and its losses have to tell."""
        train = self.train
        return train.diverges is None and (train.keep_start or train.stop_above is not None)

    @property
    def is_due(self) -> bool:
        """Whether the losses have to be looked at now."""
        return self.is_finished or (self.is_guarded and self.steps_done % _LOOK_EVERY == 0)

    def measure_gradients(self, trainer: Any, optimizer: Any) -> None:
        """Right before an optimizer's step."""
        if self.train.grad_norm is not None:
            if self._measured is None:
                self._measured = GradNorms(trainer, self.train.grad_norm)
            self._measured.measure(optimizer)

    def add_loss(self, loss: Tensor) -> None:
        """The loss of one batch; a step may have several."""
        self._micro_losses.append(loss)

    def end_step(self) -> None:
        """An optimizer step was made of the losses since the last call."""
        if self._measured is not None:
            self._measured.end_step()
        elif self.train.grad_norm is not None:
            self.grad_norms.append(math.nan)  # no step so far had gradients
        if self._micro_losses:
            self._unread.append(torch.stack(self._micro_losses).mean())
            self._micro_losses = []
        else:
            self.skipped.append(self.steps_done)
        self.steps_done += 1

    def read(self, strategy: Any, judge: bool = False) -> Status:
        """Fetch the losses, means over ranks (collective), and say whether the segment diverged by one not judged yet."""
        new, self._unread = mean_over_ranks(strategy, self._unread), []
        self.losses.extend(new)
        if self._measured is not None:
            self.grad_norms.extend(self._measured.read())
        if not judge:
            return Status.OK  # read for a checkpoint: the next look has to judge them
        if not self.is_guarded:
            return Status.DIVERGED if self.train.diverges and self.is_finished else Status.OK
        unjudged, self.judged = self.losses[self.judged :], len(self.losses)
        return Status.DIVERGED if any(diverged(x, self.train.stop_above) for x in unjudged) else Status.OK

    def to_segment(self, status: Status = Status.OK) -> Segment:
        """For the record: what was made of it, and how it ended."""
        train = self.train
        return Segment(
            self.steps_done,
            train.lr,
            train.shape,
            momentum=train.momentum,
            back_to=self.back_to,
            leaps=self.leaps,
            goes_on=train.goes_on,
            diverged=status is Status.DIVERGED,
            as_left=self.as_left,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values; everything must have been read."""
        values = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**values, "train": to_plain(self.train)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ActiveSegment:
        return cls(**{**state, "train": decode(state["train"]), "begun": time.perf_counter()})
