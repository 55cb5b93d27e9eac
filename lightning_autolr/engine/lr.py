"""The one place that writes learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["LearningRate", "OnScheduler", "rescale_configured"]

OnScheduler = Literal["override", "multiply", "error"]


class LearningRate:
    """Writes the learning rate of all parameter groups of all optimizers, each in its own ratio.

    The *reference* is the largest configured learning rate; a group configured at a tenth of it is always written a tenth
    of what is asked for. The write is repeated right before every optimizer step, so that nothing the module or its
    schedulers wrote in between is trained with.

    Args:
        optimizers: all optimizers of the run.
        multiply: multiply what the module's own schedulers write instead of replacing it.
        state: the ``state_dict`` of an earlier run of this training; its optimizers hold written learning rates.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], multiply: bool = False, state: dict[str, Any] | None = None
    ) -> None:
        self._optimizers = list(optimizers)
        configured = [[_number(g.get("initial_lr", g["lr"])) for g in o.param_groups] for o in self._optimizers]
        self.reference = state["reference"] if state else max((lr for o in configured for lr in o), default=0.0)
        if not self.reference > 0:
            raise ValueError(
                f"Expected at least one parameter group with a learning rate > 0, got {configured}. Configure the optimizer "
                "with the ratios that its groups should have, such as 1.0 and 0.1."
            )
        self.ratios = state["ratios"] if state else [[lr / self.reference for lr in o] for o in configured]
        self.value = self.reference
        self.momentum: float | None = None
        self._schedulers_own = [[_number(g["lr"]) for g in o.param_groups] for o in self._optimizers]
        self._at_segment_start = self._schedulers_own
        self._handles = [o.register_step_pre_hook(self._before_step) for o in self._optimizers]
        self._multiply = multiply
        if multiply:
            self._handles += [o.register_step_post_hook(self._after_step) for o in self._optimizers]

    def set(self, value: float, momentum: float | None = None) -> None:
        """Write ``value`` (and the momentum, or first beta) into all groups."""
        if self._multiply and not self._wrote():
            self._schedulers_own = [[_number(g["lr"]) for g in o.param_groups] for o in self._optimizers]
        self.value, self.momentum = value, momentum
        self._write()

    def start_segment(self) -> None:
        """From here on the module's schedulers count relative to what they say now (``on_scheduler="multiply"``)."""
        if self._multiply:
            if not self._wrote():
                self._schedulers_own = [[_number(g["lr"]) for g in o.param_groups] for o in self._optimizers]
            self._at_segment_start = self._schedulers_own

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference, "ratios": [list(r) for r in self.ratios]}

    def close(self) -> None:
        """Stop writing."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._write()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A chainable scheduler computes its next value from what stands in the group: let it find its own.
        index = next(i for i, o in enumerate(self._optimizers) if o is optimizer)
        for group, lr in zip(optimizer.param_groups, self._schedulers_own[index], strict=True):
            _write_number(group, "lr", lr)

    def _wanted(self, optimizer_idx: int, group_idx: int, group: dict[str, Any]) -> float:
        ratios = self.ratios[optimizer_idx]
        while len(ratios) <= group_idx:  # groups that a finetuning callback added
            ratios.append(_number(group.get("initial_lr", group["lr"])) / self.reference)
        lr = self.value * ratios[group_idx]
        if self._multiply and group_idx < len(self._schedulers_own[optimizer_idx]):
            at_start = self._at_segment_start[optimizer_idx][group_idx]
            lr *= self._schedulers_own[optimizer_idx][group_idx] / at_start if at_start > 0 else 1.0
        return lr

    def _wrote(self) -> bool:
        """Whether what stands in the groups is what we wrote last."""
        return all(
            _number(group["lr"]) == self._wanted(o, g, group)
            for o, optimizer in enumerate(self._optimizers)
            for g, group in enumerate(optimizer.param_groups)
        )

    def _write(self) -> None:
        for o, optimizer in enumerate(self._optimizers):
            for g, group in enumerate(optimizer.param_groups):
                _write_number(group, "lr", self._wanted(o, g, group))
                if self.momentum is not None:
                    if "betas" in group:
                        group["betas"] = (self.momentum, *group["betas"][1:])
                    elif "momentum" in group:
                        group["momentum"] = self.momentum


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)


def _write_number(group: dict[str, Any], key: str, value: float) -> None:
    if isinstance(group[key], Tensor):
        group[key].fill_(value)  # the very tensor that a captured or compiled optimizer reads
    elif group[key] != value:
        group[key] = value


def rescale_configured(optimizers: Sequence[Optimizer], schedulers: Sequence[Any], lr: float) -> None:
    """Scale everything the user configured so that the largest learning rate becomes ``lr``.

    Schedulers read learning rates that they cached (``base_lrs``, ``max_lrs``, ``initial_lr``, ``max_lr``) and would bring
    the old ones back, so these are scaled too: the rest of the schedule keeps its shape. A one-cycle schedule's largest
    learning rate is its peak.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    largest = max(_number(g.get("max_lr", g.get("initial_lr", g["lr"]))) for g in groups)
    factor = lr / largest
    for group in groups:
        for key in ("lr", "initial_lr", "max_lr", "min_lr"):
            if key in group:
                _write_number(group, key, _number(group[key]) * factor)
    pending = list(schedulers)
    while pending:
        scheduler = pending.pop()
        pending += getattr(scheduler, "_schedulers", [])
        for name in ("base_lrs", "max_lrs", "_last_lr"):
            if (values := getattr(scheduler, name, None)) is not None:
                setattr(scheduler, name, [_number(v) * factor for v in values])
