"""Kept states in checkpoints, so that a stage can still be undone after a resume.

A fork holds the live objects by identity, which no file can. What goes into a checkpoint is the state as Lightning would
save it, taken with the kept state put in place for a moment.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from lightning_autolr.engine.probe import Prober

__all__ = ["dump_kept", "load_kept"]


def dump_kept(trainer: Any, prober: Prober) -> dict[str, Any]:
    """Each kept state as tensors and plain values."""
    if not prober.kept:
        return {}
    with prober.set_aside():
        states = {}
        for name, fork in prober.kept.items():
            fork.restore()
            states[name] = _dump(trainer, prober)
    return states


def load_kept(trainer: Any, prober: Prober, states: dict[str, Any]) -> None:
    """Keep the states of a checkpoint again."""
    for name, state in states.items():
        with prober.set_aside():
            _load(trainer, prober, state)
            prober.keep(name)


@torch.no_grad()
def _dump(trainer: Any, prober: Prober) -> dict[str, Any]:
    module = trainer.lightning_module
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return copy.deepcopy(
        {
            "tensors": {name: tensor.detach() for name, tensor in tensors.items()},
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "precision": trainer.precision_plugin.state_dict(),
            "lr": prober.lr.memory,
        }
    )


@torch.no_grad()
def _load(trainer: Any, prober: Prober, state: dict[str, Any]) -> None:
    module = trainer.lightning_module
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in state["tensors"].items():
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
    prober.lr.memory.update(copy.deepcopy(state["lr"]))
