"""The one place that writes learning rates."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_autolr.engine import compat

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
        schedulers: the module's own ones.

    Attributes:
        is_private: whether steps are private ones, in which the module's schedulers have no say.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        multiply: bool = False,
        state: dict[str, Any] | None = None,
        schedulers: Sequence[Any] = (),
    ) -> None:
        self._optimizers = list(optimizers)
        if not any(o.param_groups for o in optimizers):
            raise ValueError("Expected an optimizer, got none: `configure_optimizers` has to return one.")
        if own := [type(o).__name__ for o in optimizers if any(g.get("lr") is None for g in o.param_groups)]:
            raise ValueError(
                f"Expected a learning rate in each parameter group, got none in {', '.join(own)}, which sets its own. Set "
                "one (Adafactor of transformers: `relative_step=False, lr=1e-3`)."
            )
        configured = [[_number(g.get("initial_lr", g["lr"])) for g in o.param_groups] for o in self._optimizers]
        self.reference = state["reference"] if state else max((lr for o in configured for lr in o), default=0.0)
        if not self.reference > 0:
            raise ValueError(
                f"Expected at least one parameter group with a learning rate > 0, got {configured}. Configure the optimizer "
                "with the ratios that its groups should have, such as 1.0 and 0.1."
            )
        self.ratios = state["ratios"] if state else [[lr / self.reference for lr in o] for o in configured]
        self.value, self.is_private = self.reference, False
        self.momentum: float | None = None
        self._own = _OwnRates(self._optimizers, schedulers, state) if multiply else None
        self._in_step = False
        hooked = [(compat.hooked_optimizer(o), o) for o in self._optimizers]
        self._handles = [inner.register_step_pre_hook(partial(self._before_step, o)) for inner, o in hooked]
        if multiply:
            self._handles += [inner.register_step_post_hook(partial(self._after_step, o)) for inner, o in hooked]

    @property
    def memory(self) -> dict[str, Any]:
        """Part of the training state: a fork captures and restores it with the rest. See :class:`_OwnRates`."""
        return {} if self._own is None else self._own.memory

    def set(self, value: float, momentum: float | None = None) -> None:
        """Train with ``value`` (and momentum, or first beta) from the next optimizer step on."""
        self._meet_new_groups()
        self.value, self.momentum, self._in_step = value, momentum, False
        if self._own is None:
            self._write()

    def show(self) -> None:
        """Write what the next step will be trained with, for those who read the groups when a batch starts."""
        self._write()

    def hide(self) -> None:
        """Let the module's schedulers find their own values again, should no optimizer step come in between.

        Called before each backward, which may be part of a step (its closure): then the step needs what we wrote.
        """
        if self._own is not None and not self._in_step:
            for index in range(len(self._optimizers)):
                self._own.put_back(index)

    def start_segment(self) -> None:
        """From here on the module's schedulers count relative to what they say now (``on_scheduler="multiply"``)."""
        if self._own is not None:
            self._own.start()

    def state_dict(self) -> dict[str, Any]:
        tops = [] if self._own is None else self._own.tops
        return copy.deepcopy({"reference": self.reference, "ratios": self.ratios, "tops": tops, "memory": self.memory})

    def close(self) -> None:
        """Stop writing."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: Optimizer, hooked: Optimizer, args: Any, kwargs: Any) -> None:
        self._in_step = True
        self._meet_new_groups()
        self._write(optimizer)

    def _after_step(self, optimizer: Optimizer, hooked: Optimizer, args: Any, kwargs: Any) -> None:
        self._in_step = False
        assert self._own is not None
        self._own.put_back(next(i for i, o in enumerate(self._optimizers) if o is optimizer))

    def _meet_new_groups(self) -> None:
        """A finetuning callback adds groups at a learning rate that fits to what the others have at that moment."""
        for ratios, optimizer in zip(self.ratios, self._optimizers, strict=True):
            for group in optimizer.param_groups[len(ratios) :]:
                ratios.append(_number(group["lr"]) / (self.value if self.value > 0 else self.reference))

    def _write(self, only: Optimizer | None = None) -> None:
        which = {o: optimizer for o, optimizer in enumerate(self._optimizers) if only in (None, optimizer)}
        if self._own is not None:
            self._own.read_before_writing(which)
        for o, optimizer in which.items():
            for g, group in enumerate(optimizer.param_groups):
                lr = self.value * self.ratios[o][g]
                if self._own is not None and not self.is_private:
                    lr *= self._own.factor(o, g)
                _write_number(group, "lr", lr)
                if self.momentum is not None and "betas" in group:
                    group["betas"] = (self.momentum, *group["betas"][1:])
                elif self.momentum is not None and "momentum" in group:
                    group["momentum"] = self.momentum


class _OwnRates:
    """What the module's schedulers say (``on_scheduler="multiply"``), though the groups mostly hold what we wrote.

    Attributes:
        memory: plain lists by optimizer and group: the learning rate without us (``own``), the highest one so far
            (``highest``), what it counts relative to (``at_start``); and by optimizer whether its groups hold what we wrote
            (``ours``).
        tops: how high the learning rate of each group will go, where that is known.
    """

    def __init__(self, optimizers: list[Optimizer], schedulers: Sequence[Any], state: dict[str, Any] | None) -> None:
        self._optimizers = optimizers
        state = state if state and state["memory"] else None  # a run that is resumed may not have multiplied before
        self.tops = state["tops"] if state else _tops(optimizers, schedulers)
        nothing: list[list[float]] = [[] for _ in optimizers]
        ours = [False] * len(optimizers)
        self.memory: dict[str, Any] = {"own": nothing, "highest": nothing, "at_start": nothing, "ours": ours}
        if state:
            self.memory.update(copy.deepcopy(state["memory"]))
        else:
            self.start()

    def start(self) -> None:
        """From here on count relative to what they say now.

        As long as they were not at their top yet, as in a warm-up, they count relative to that: what is asked for is trained
        with there, and no more than it.
        """
        self._read()
        self.memory["at_start"] = [
            [
                top if highest < top * (1 - 1e-6) else own
                for own, highest, top in zip_longest(*lrs, fillvalue=0.0)  # groups that were added have no top
            ]
            for lrs in zip(self.memory["own"], self.memory["highest"], self.tops, strict=True)
        ]

    def factor(self, optimizer_idx: int, group_idx: int) -> float:
        """What a learning rate is multiplied with."""
        own, at_start = (self.memory[key][optimizer_idx] for key in ("own", "at_start"))
        counts = group_idx < len(at_start) and at_start[group_idx] > 0
        return float(own[group_idx] / at_start[group_idx]) if counts else 1.0

    def read_before_writing(self, indices: Collection[int]) -> None:
        """Read them all; from now on the groups of these optimizers hold what we write."""
        self._read()
        self.memory["ours"] = [ours or o in indices for o, ours in enumerate(self.memory["ours"])]

    def put_back(self, index: int) -> None:
        """A chainable scheduler computes its next value from what stands in the group."""
        if self.memory["ours"][index]:
            for group, lr in zip(self._optimizers[index].param_groups, self.memory["own"][index], strict=True):
                _write_number(group, "lr", lr)
            self.memory["ours"] = [ours and o != index for o, ours in enumerate(self.memory["ours"])]

    def _read(self) -> None:
        """Note what they say, for the groups that do not hold what we wrote."""
        self.memory["own"] = [
            own + [_number(g["lr"]) for g in optimizer.param_groups[len(own) :]]
            if ours
            else [_number(g["lr"]) for g in optimizer.param_groups]
            for own, ours, optimizer in zip(self.memory["own"], self.memory["ours"], self._optimizers, strict=True)
        ]
        self.memory["highest"] = [
            [max(a, b) for a, b in zip_longest(highest, own, fillvalue=0.0)]
            for highest, own in zip(self.memory["highest"], self.memory["own"], strict=True)
        ]


def _tops(optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> list[list[float]]:
    """How high the learning rate of each group goes: as configured, or a one-cycle or cyclic schedule's peak."""
    tops = [[_peak(group) for group in optimizer.param_groups] for optimizer in optimizers]
    for scheduler in _with_inner(schedulers):
        for peaks, optimizer in zip(tops, optimizers, strict=True):
            if getattr(scheduler, "optimizer", None) is optimizer and hasattr(scheduler, "max_lrs"):
                peaks[:] = [max(a, _number(b)) for a, b in zip_longest(peaks, scheduler.max_lrs, fillvalue=0.0)]
    return tops


def _peak(group: dict[str, Any]) -> float:
    return _number(group.get("max_lr", group.get("initial_lr", group["lr"])))


def _with_inner(schedulers: Sequence[Any]) -> list[Any]:
    """Schedulers, and those that sequences of them are made of."""
    found = list(schedulers)
    for scheduler in found:  # grows
        found += compat.inner_schedulers(scheduler)
    return found


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
    the old ones back, so these are scaled too: the rest of the schedule keeps its shape. The largest learning rate of
    a one-cycle or cyclic schedule is its peak.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    nested = _with_inner(schedulers)
    factor = lr / max([*map(_peak, groups), *(_number(x) for s in nested for x in getattr(s, "max_lrs", []))])
    for group in groups:
        for key in ("lr", "initial_lr", "max_lr", "min_lr"):
            if key in group:
                _write_number(group, key, _number(group[key]) * factor)
    for scheduler in nested:
        for name in compat.CACHED_LRS:
            if (values := getattr(scheduler, name, None)) is not None:
                setattr(scheduler, name, [_number(v) * factor for v in values])
