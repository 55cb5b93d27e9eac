"""A schedule as an ordinary torch scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_autolr.schedules.base import Schedule, unresolved
from lightning_autolr.schedules.plain import from_plain, to_plain
from lightning_autolr.schedules.tabulated import Segment, goes_back

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR


def to_lr_scheduler(schedule: Schedule, optimizer: Optimizer) -> LambdaLR:
    """A ``torch.optim.lr_scheduler.LambdaLR`` that follows a schedule; step it once per optimizer step.

    Parameter groups keep their ratios. A schedule of learning rates gives them to the group with the largest one. The
    state holds the schedule too, as plain values which ``torch.load(weights_only=True)`` takes: after
    ``load_state_dict`` it is the saved schedule that goes on. The momentum is left alone.

    In Lightning return ``{"scheduler": to_lr_scheduler(...), "interval": "step"}``.

    Args:
        schedule: resolved, that is with all its numbers of steps known.
        optimizer: any torch optimizer.

    Raises:
        ValueError: a number of steps is open, a table has undone segments, or a learning rate to take ratios from is
            not > 0.

    >>> import torch
    >>> from lightning_autolr.schedules import Linear
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    >>> scheduler = to_lr_scheduler(Linear(num_steps=2), optimizer)
    >>> optimizer.step()
    >>> scheduler.step()
    >>> scheduler.get_last_lr()
    [0.25]
    """
    from torch.optim.lr_scheduler import LambdaLR

    if not schedule.is_resolved:
        raise unresolved(schedule)
    if goes_back(schedule):
        raise ValueError(
            "Expected a table without undone segments, because a torch scheduler cannot put weights back, got "
            f"{schedule}. Leave those steps out with `table.kept()`."
        )
    if schedule.absolute:
        _as_ratios(optimizer)
    return LambdaLR(optimizer, _Factor(schedule))


def _as_ratios(optimizer: Optimizer) -> None:
    """Make the largest initial learning rate exactly 1: a factor on it is the learning rate, to the last bit."""
    bases = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    largest = max(float(base) for base in bases)
    if not largest > 0.0:
        raise ValueError(f"Expected a learning rate > 0 in some parameter group to take ratios from, got {bases}.")
    for group, base in zip(optimizer.param_groups, bases, strict=True):
        group["initial_lr"] = base / largest


class _Factor:
    """The schedule as ``LambdaLR`` wants it: its state is ``__dict__``, and ``load_state_dict`` writes into that.

    A schedule itself would not do: loading would change a frozen value that others hold, and keep the wrong class; and
    nested schedules in a checkpoint are objects, which ``torch.load(weights_only=True)`` refuses. So ``__dict__`` has
    plain values, and the slot beside it has the schedule that was made of them.
    """

    __slots__ = ("__dict__", "_made")

    def __init__(self, schedule: Schedule) -> None:
        self.schedule: dict[str, Any] = to_plain(schedule)
        self._made = (self.schedule, schedule)

    def __call__(self, step: int) -> float:
        source, schedule = self._made
        if source is not self.schedule:
            schedule = from_plain(self.schedule, (Segment,))
            self._made = (self.schedule, schedule)
        return schedule(step)
