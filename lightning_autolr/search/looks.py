"""What looks at the loss of the same evaluation batches say, together with the training losses between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from statistics import fmean, median

from lightning_autolr.core.losses import paired
from lightning_autolr.core.requests import ProbeResult

__all__ = ["Finding", "Looks"]

_OVERFITTED = 0.15  # training losses are so much below the lowest look, or below what they were then, as a share of it
_LITTLE = 0.1  # of the first loss: while less has been gained, losing half of it means nothing


class Finding(Enum):
    """What a look says, in words for the user."""

    LOWEST = "The loss fell."
    HIGHER = "The loss was lower before, but not for long."
    BLEW_UP = "The loss blew up"
    OVERFITS = "The network overfits"


@dataclass
class _TrainLosses:
    """Medians of the training losses between two looks each."""

    first: float | None = None
    best: float = math.inf
    last: float = math.inf
    at_lowest_look: float = math.inf
    since: list[float] = field(default_factory=list)

    def add(self, losses: Sequence[float]) -> None:
        self.since += losses
        if losses and self.first is None:
            self.first = losses[0]

    def look(self) -> float:
        """The median since the last look."""
        if self.since:
            self.last = median(self.since)
            self.best = min(self.best, self.last)
            self.since = []
        return self.last

    def are_lost(self) -> bool:
        """Whether more than half of what was gained is lost again."""
        return self.first is not None and not self.last <= self.best + max(0.0, 0.5 * (self.first - self.best))


class Looks:
    """All looks of a run.

    Args:
        patience: looks in each of the two windows that are compared, >= 1.
        first: the look before the first step.
    """

    def __init__(self, patience: int, first: ProbeResult) -> None:
        self._patience, self._first, self._best = patience, first, first
        self._train_losses = _TrainLosses()
        # (loss, median of the training losses before it) since the last undo, below the highest learning rate
        self._seen: list[tuple[float, float]] = []
        self._lr = self._highest_lr = 0.0

    def add_training(self, lrs: Sequence[float], losses: Sequence[float]) -> None:
        """A piece of training: some of its learning rates, the last one's at the end, and all of its losses."""
        self._highest_lr = max(self._highest_lr, *lrs)
        self._lr = lrs[-1]
        self._train_losses.add(losses)

    def judge(self, look: ProbeResult | None) -> Finding:
        """What a look says; None is a divergence, after which nothing is looked at."""
        train_loss = self._train_losses.look()
        learnt = max(self._best.loss, self._train_losses.at_lowest_look)
        if self._lr >= self._highest_lr * (1 - 1e-9):
            self._seen = []
        elif look is not None:
            self._seen.append((look.loss, train_loss))
        if look is not None and look.loss < self._best.loss:
            self._best, self._train_losses.at_lowest_look = look, train_loss
            return Finding.LOWEST
        if look is None or self._blew_up(look):
            finding = Finding.BLEW_UP
        elif _overfits(self._seen, self._patience, learnt):
            finding = Finding.OVERFITS
        else:
            return Finding.HIGHER
        self._seen = []  # what comes next starts from elsewhere
        return finding

    def _blew_up(self, look: ProbeResult) -> bool:
        """Whether more than half of all that was gained since the first look is lost again, in training losses too."""
        if not math.isfinite(look.loss):
            return True
        mean, error = paired(self._best, look)
        gained = self._first.loss - self._best.loss
        return self._train_losses.are_lost() and mean > max(4 * error, 0.5 * gained, _LITTLE * abs(self._first.loss))


def _overfits(seen: Sequence[tuple[float, float]], window: int, learnt: float) -> bool:
    """Whether the last ``window`` looks are above the ``window`` before them, and the training losses far below ``learnt``."""
    if len(seen) < 2 * window:
        return False
    before, after = seen[-2 * window : -window], seen[-window:]
    rises = median(look for look, _ in after) > median(look for look, _ in before)
    return rises and fmean(train_loss for _, train_loss in after) < learnt - _OVERFITTED * abs(learnt)
