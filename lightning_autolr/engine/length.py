"""How long a run is: planned, asked for, or running out of time."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, Timer

from lightning_autolr.core.requests import Run
from lightning_autolr.engine.steps import batches_per_step

__all__ = ["RunLength", "steps_made"]

_COUNTED_FOR = 20  # batches of manual optimization, after which optimizer steps are compared with what was planned


class RunLength:
    """The length of one fit, in steps as we count them: of the optimizer, or batches under manual optimization.

    Args:
        trainer: the Trainer, at the start of its training.
        configured: steps from here to the end of the run; "auto" asks the Trainer.
        count_search: whether they are for search and training together.
        saved: what :meth:`state_dict` gave, when the run is resumed.
    """

    def __init__(
        self, trainer: Any, configured: int | Literal["auto"], count_search: bool, saved: dict[str, Any] | None
    ) -> None:
        self._trainer, self._configured, self._count_search = trainer, configured, count_search
        saved = saved or {}
        self._first_step: int = saved.get("first_step", 0) if saved else steps_made(trainer)
        self._ends_at: int | None = saved.get("ends_at")
        self.planned: int | None = saved.get("total_steps")  # when the run began, if it is a resumed one
        # Asked for once: the Trainer counts its batches anew each time.
        total = _known_total(trainer) - self._first_step if configured == "auto" else configured
        self.total: int | None = None if total == math.inf else max(1, int(total))
        self._batches, self._first_global_step = 0, trainer.global_step
        self._per_epoch = trainer.num_training_batches  # as planned for; None once another number was spoken of

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"first_step": self._first_step, "ends_at": self._ends_at, "total_steps": self.total}

    def facts(self, lr: float) -> Run:
        """What a search may know of the run, whose configured learning rate is ``lr``."""
        trainer, batches = self._trainer, self._trainer.num_training_batches
        return Run(
            total_steps=self.total,
            lr=lr,
            has_validation=bool(trainer.enable_validation),
            steps_per_epoch=None if batches == math.inf else math.ceil(batches / batches_per_step(trainer)),
            count_search=self._count_search,
        )

    def finish_in(self, num_steps: int, trained: int) -> None:
        """End the run after ``num_steps`` steps more than the ``trained`` ones."""
        self._ends_at = trained + num_steps

    def is_over(self, trained: int, private_steps: int) -> bool:
        """Whether the run ends here although the Trainer does not know."""
        if self._ends_at is not None and trained >= self._ends_at:
            return True
        return self._count_search and self.total is not None and trained + private_steps >= self.total

    def is_cut_short(self, trained: int, private_steps: int) -> bool:
        """Whether a run that ends now was planned to go on."""
        return self.total is not None and trained < self.total and not self.is_over(trained, private_steps)

    def steps_left(self, trained: int, steps: int, since: float) -> int | None:
        """How many steps a run of unknown length has left, if that is known: from the user, or from ``max_time``.

        Args:
            trained: real steps so far.
            steps: some of the last of them ...
            since: ... and when they began, in seconds of ``time.perf_counter``.
        """
        if self._ends_at is not None:
            return max(0, self._ends_at - trained)
        if self.total is not None:
            return None
        seconds = self.time_left()
        per_step = (time.perf_counter() - since) / max(1, steps)
        return None if seconds is None else int(seconds / per_step)

    def time_left(self) -> float | None:
        """Seconds until ``max_time``, if it was given."""
        seconds = (c.time_remaining() for c in self._trainer.callbacks if isinstance(c, Timer))
        return min((s for s in seconds if s is not None), default=None)

    def other_epoch(self) -> str:
        """To be called at the start of each epoch: says, once, when it has another number of batches than the plan is for."""
        trainer, planned = self._trainer, self._per_epoch
        by_epochs = self._configured == "auto" and self.total is not None and trainer.max_steps == -1
        if not by_epochs or planned is None or trainer.num_training_batches == planned:
            return ""
        self._per_epoch = None
        return (
            f"has planned for {self.total} steps, epochs of {planned} batches: expected as many in epoch "
            f"{trainer.current_epoch}, got {trainer.num_training_batches}. The learning rate will not be at its end when the "
            "run is. Pass `total_steps=`, or end it by `max_steps`."
        )

    def count_batch(self) -> str:
        """To be called after each batch of manual optimization: says, once, how the run will differ from the plan."""
        trainer = self._trainer
        self._batches += 1
        if self._batches != _COUNTED_FOR or self._configured != "auto" or trainer.max_steps == -1:
            return ""
        return _other_count(trainer, self._batches, trainer.global_step - self._first_global_step)


def _counts_per_step(trainer: Any) -> int:
    """Under manual optimization Lightning counts the steps of each optimizer, where we count batches."""
    return 1 if trainer.lightning_module.automatic_optimization else max(1, len(trainer.optimizers))


def steps_made(trainer: Any) -> int:
    """The steps of the run until now as we count them, also those before a plain checkpoint."""
    return int(trainer.global_step) // _counts_per_step(trainer)


def _known_total(trainer: Any) -> float:
    """The steps of the run as we count them; infinite when nobody knows."""
    total = _steps_of_epochs(trainer)
    if trainer.max_steps != -1:
        total = min(total, math.ceil(trainer.max_steps / _counts_per_step(trainer)))
    return total


def _steps_of_epochs(trainer: Any) -> float:
    # Not the Trainer's estimate: that takes the accumulation of the moment, and the added epoch, for those of all epochs.
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if batches == math.inf or epochs in (None, -1):
        return math.inf
    scheduler = next((c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)), None)
    fixed = trainer.accumulate_grad_batches
    counts = (
        fixed if scheduler is None else scheduler.get_accumulate_grad_batches(epoch)
        for epoch in range(epochs - _adds_epoch(trainer))
    )
    return float(sum(math.ceil(batches / count) for count in counts))


def _adds_epoch(trainer: Any) -> bool:
    """Whether there is an epoch more, without a backward, in which averaged weights get their batch statistics."""
    averaging = [c for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging)]
    return any(c.pl_module_contains_batch_norm(trainer.lightning_module) for c in averaging)


def _other_count(trainer: Any, batches: int, steps: int) -> str:
    """What to say when ``max_steps`` will not end a manually optimized run where it was planned to end; empty if it will.

    What an optimizer does in a batch is known to the module only: it may accumulate, or train one optimizer more often.

    Args:
        trainer: the Trainer.
        batches: the batches of this fit until now.
        steps: by how much ``trainer.global_step`` grew in them.
    """
    per_batch = _counts_per_step(trainer)
    if steps == batches * per_batch:
        return ""
    endless = trainer.max_epochs in (None, -1)
    epochs = math.inf if endless else float(trainer.num_training_batches * trainer.max_epochs)
    max_steps = trainer.max_steps
    planned = min(epochs, math.ceil(max_steps / per_batch))
    found = min(epochs, math.ceil(max_steps * batches / steps) if steps else math.inf)
    if found == planned:
        return ""
    known = "later" if found == math.inf else f"after about {found:,.0f}"
    return (
        f"plans for {planned:,.0f} batches, out of {max_steps=} under manual optimization: expected each optimizer to step "
        f"once per batch, {batches * per_batch} steps in the first {batches} batches, got {steps}. The run will end {known}, "
        "and its learning rate was not planned for that. Pass `total_steps=`, the batches from the start to the end of the "
        "run, or end it by `max_epochs` alone."
    )
