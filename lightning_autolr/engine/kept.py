"""States of the real run that it may go back to, and how they get into checkpoints.

A fork holds the live objects by identity, which no file can. What goes into a checkpoint is the state as Lightning would
save it, taken with the kept state put in place for a moment.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_autolr.core.record import Record
from lightning_autolr.core.requests import Answer, Probe, ProbeResult, Request
from lightning_autolr.engine.compat import average_models
from lightning_autolr.engine.probe import Prober

__all__ = ["KeptStates"]


class KeptStates:
    """States to go back to, each with its place in the record and the checkpoints that were the best ones then.

    Args:
        trainer: the Trainer.
        prober: holds the states, also the ends of private steps, which have no place in the record.
        record: of what was trained.
    """

    def __init__(self, trainer: Any, prober: Prober, record: Record) -> None:
        self._trainer, self._prober, self._record = trainer, prober, record
        # The segment to come, and whether it had gone back itself by then.
        self._kept_at: dict[str, tuple[int, bool]] = {}
        self._best_at: dict[str, dict[str, float]] = {}

    def keep(self, state: str) -> None:
        """Keep the present state under this name."""
        self._prober.keep(state)
        self._put_down(state, has_gone_back=True)

    def learn(self, request: Request, answer: Answer) -> None:
        """What a probe kept and released. What it kept without a step is a state of the real run, too."""
        if not isinstance(request, Probe) or not isinstance(answer, ProbeResult):
            return
        self._forget(request.release)
        is_real = request.num_steps == 0 and request.start is None and not request.permuted
        if answer.end is not None and is_real:
            self._put_down(answer.end, has_gone_back=False)

    def release(self, states: Collection[str]) -> None:
        """Drop states."""
        for state in states:
            self._prober.release(state)
        self._forget(states)

    def go_back(self, state: str, who: str) -> tuple[int, bool] | None:
        """Go on from a state, undoing what was trained since; ``who`` tells the user of lost checkpoints.

        Returns:
            Its place in the record, as ``back_to`` and ``as_left`` of :class:`~lightning_autolr.schedules.Segment`; None if it
            is the end of a probe, whose steps are in no segment.
        """
        best = _best_checkpoints(self._trainer)
        if new := sorted(path for path, _ in best.items() - self._best_at.get(state, best).items()):
            rank_zero_warn(
                f"{who} undoes a stage in which a checkpoint was saved as the best one: {', '.join(new)}. The file stays, and "
                "holds weights that training does not go on from."
            )
        self._prober.resume_from(state)
        if state not in self._kept_at:
            return None
        index, has_gone_back = self._kept_at[state]
        later = self._record.segments[index:]
        as_left = bool(later) and later[0].back_to is not None and not has_gone_back
        self._prober.cost.steps_undone += self._record.go_back(index, as_left)
        return index, as_left

    def _put_down(self, state: str, has_gone_back: bool) -> None:
        self._kept_at[state] = len(self._record.segments), has_gone_back
        self._best_at[state] = _best_checkpoints(self._trainer)

    def _forget(self, states: Iterable[str]) -> None:
        for state in states:
            self._kept_at.pop(state, None)
            self._best_at.pop(state, None)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; collective."""
        return {
            "kept_at": dict(self._kept_at),
            "best_at": {state: dict(best) for state, best in self._best_at.items()},
            "kept": self._dump(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Keep the states of a checkpoint again."""
        self._kept_at, self._best_at = dict(saved["kept_at"]), saved["best_at"]
        for name, state in saved["kept"].items():
            with self._prober.set_aside():
                _load(self._trainer, self._prober, state)
                self._prober.keep(name)

    def _dump(self) -> dict[str, Any]:
        if not self._prober.kept:
            return {}
        states = {}
        with self._prober.set_aside():
            for name, fork in self._prober.kept.items():
                fork.restore()
                states[name] = _dump(self._trainer, self._prober)
        return states


def _best_checkpoints(trainer: Any) -> dict[str, float]:
    """Their paths and scores: a better one may be written over the last."""
    monitored = [c for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None) is not None]
    found = {getattr(c, "best_model_path", ""): getattr(c, "best_model_score", None) for c in monitored}
    return {path: float(score) for path, score in found.items() if path and score is not None}


@torch.no_grad()
def _dump(trainer: Any, prober: Prober) -> dict[str, Any]:
    module = trainer.lightning_module
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return copy.deepcopy(
        {
            "tensors": {name: tensor.detach() for name, tensor in tensors.items()},
            "persistent": list(module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "precision": trainer.precision_plugin.state_dict(),
            "lr": prober.lr.memory,
            "averages": [dict(model.state_dict()) for model in average_models(trainer)],
        }
    )


@torch.no_grad()
def _load(trainer: Any, prober: Prober, state: dict[str, Any]) -> None:
    module = trainer.lightning_module
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if missing := sorted(set(state["tensors"]) & set(state["persistent"]) - set(tensors)):
        raise ValueError(
            f"Expected the module to have {', '.join(missing[:4])} when its training is resumed, got none: part of the weights "
            "that the search goes back to. What comes later, as by a pruning callback, must be there from the start: make it "
            "in the module's `__init__` or `configure_model`."
        )
    for name, tensor in state["tensors"].items():
        if name in tensors:  # else the module makes the buffer when it needs it
            if tensors[name].shape != tensor.shape:  # such as a cache that has grown
                tensors[name].data = tensors[name].new_empty(tensor.shape)
            tensors[name].copy_(tensor)
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        # Those that a finetuning callback added since are not part of it. A new list: the old one is what is put back.
        optimizer.param_groups = optimizer.param_groups[: len(saved["param_groups"])]
        optimizer.load_state_dict(copy.deepcopy(saved))
    # The scheduler of a weight averaging comes later than we do.
    for config, saved in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=False):
        config.scheduler.load_state_dict(copy.deepcopy(saved))
    if state["precision"]:
        trainer.precision_plugin.load_state_dict(state["precision"])
    for model, saved in zip(average_models(trainer), state.get("averages", ()), strict=False):
        model.load_state_dict(saved)
    prober.lr.memory.update(copy.deepcopy(state["lr"]))
