"""What a module counts of its epoch: it stays as it is when the run goes back to earlier weights.

Metrics, lists of outputs and counters describe the data that was seen, and the data go on. Were they put back with the
weights, an epoch would end with the counts of another one, or with none at all. A checkpoint does not hold them either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torchmetrics import Metric

from lightning_autolr.engine.files import MemoryStore
from lightning_autolr.engine.state import Fork, is_record

__all__ = ["tallies_stay"]


@contextmanager
def tallies_stay(module: nn.Module) -> Iterator[None]:
    """In this block, states of metrics, and numbers, lists, deques and sets that are attributes of modules or of their plain
    objects, may change; afterwards they are as before."""
    metrics = Fork([m for m in module.modules() if isinstance(m, Metric)], MemoryStore())
    metrics.capture()
    before = [(owner, name, value, _contents(value)) for owner, name, value in _tallies(module)]
    yield
    for owner, name, value, contents in before:
        owner[name] = value
        if contents is not None:
            value.clear()
            value.update(contents) if isinstance(value, set) else value.extend(contents)
    metrics.restore()


def _tallies(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    for part in module.modules():
        if isinstance(part, Metric):
            continue
        records = [value for value in vars(part).values() if is_record(value) and hasattr(value, "__dict__")]
        for owner in (part.__dict__, *(record.__dict__ for record in records)):
            for name, value in owner.items():
                if type(value) in (int, float) or (type(value) in (list, deque, set) and not _holds_weights(value)):
                    yield owner, name, value


def _holds_weights(values: Iterable[Any]) -> bool:
    """Such as the list in which a recurrent layer has its weights once more."""
    return any(isinstance(value, (nn.Parameter, nn.Module)) for value in values)


def _contents(value: Any) -> list[Any] | None:
    return None if isinstance(value, (int, float)) else list(value)
