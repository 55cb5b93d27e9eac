"""What a run counts of its epoch: it stays as it is when the run goes back to earlier weights.

Metrics, and lists of outputs and counters of the LightningModule, describe the data that was seen, and the data go on. Were
they put back with the weights, an epoch would end with the counts of another one, or with none at all. A checkpoint does not
hold them either. What the layers below it count is theirs, and describes their own buffers: it goes back with these.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_autolr.engine.compat import OWNERS, local_tensor
from lightning_autolr.engine.files import same_bits
from lightning_autolr.engine.state import is_record

__all__ = ["tallies_stay"]

_COLLECTIONS = (list, deque, set)
_LEFT_ALONE = frozenset(vars(nn.Module())) | OWNERS  # torch's own attributes of modules: weights, parts, hooks


@contextmanager
def tallies_stay(module: nn.Module) -> Iterator[None]:
    """In this block states of metrics, and what the module and its plain objects count, may change; afterwards they are as
    before. Counts stay beside tensors that did not change: those that describe tensors which went back go with them."""
    metrics = [
        (part, name, metric)
        for part in module.modules()
        if not isinstance(part, Metric)
        for name, metric in part.named_children()
        if isinstance(metric, Metric)
    ]
    known: dict[int, Any] = {}  # metrics of a group share their states, and go on sharing them
    states = [_MetricState(part, known) for part in module.modules() if isinstance(part, Metric)]
    owners = list(_owners(vars(module), lambda: dict(module.named_buffers(recurse=False)), set()))
    # The inner owners first: what holds them looks at what became of them.
    tallies: list[_MetricState | _Owner] = [*states, *reversed(owners)]
    yield
    for part, name, metric in metrics:
        if dict(part.named_children()).get(name) is not metric:  # made anew since, for each epoch say
            part.add_module(name, metric)
    for tally in tallies:
        tally.put_back()


class _MetricState:
    """All that a metric holds but networks: what it has added up, how often, and the value that it remembers."""

    def __init__(self, metric: Metric, known: dict[int, Any]) -> None:
        def kept(value: Any) -> Any:
            if id(value) not in known:
                if isinstance(value, Tensor):
                    known[id(value)] = value.detach().clone()
                else:
                    known[id(value)] = list(map(kept, value)) if type(value) is list else copy.copy(value)
            return known[id(value)]

        self._attributes = vars(metric)
        own = {name: value for name, value in self._attributes.items() if name not in _LEFT_ALONE}
        changing = (Tensor, list, deque)
        self._values = {name: kept(x) if isinstance(x, changing) else x for name, x in own.items()}

    def put_back(self) -> None:
        self._attributes.update(self._values)


class _Owner:
    """What the attributes of one object, or the entries of one dict, count.

    Args:
        attributes: by name.
        buffers: gives the tensors that belong to them besides.
    """

    def __init__(self, attributes: dict[Any, Any], buffers: Callable[[], dict[str, Tensor]]) -> None:
        self._attributes, self._buffers = attributes, buffers
        own = _own(attributes)
        self._numbers = {name: _copied(value) for name, value in own.items() if _is_number(value)}
        self._collections = {name: (x, list(x)) for name, x in own.items() if type(x) in _COLLECTIONS}
        self._objects = {name: x for name, x in own.items() if _inside(x) is not None and not _holds_tensors(x)}
        self._tensors = {name: _copied(tensor) for name, tensor in self._described().items()}

    def put_back(self) -> None:
        self._attributes.update(self._objects)  # perhaps made anew since
        for name, (collection, contents) in self._collections.items():
            now = self._attributes.get(name)
            if _holds_tensors(contents) and isinstance(now, _COLLECTIONS) and len(now) == len(contents):
                continue  # no tally: as many tensors as before, such as a moving average of the weights
            self._attributes[name] = collection
            collection.clear()
            collection.update(contents) if isinstance(collection, set) else collection.extend(contents)
        now = self._described()
        if now.keys() == self._tensors.keys() and all(_is_same(now[name], x) for name, x in self._tensors.items()):
            self._attributes.update(self._numbers)

    def _described(self) -> dict[Any, Tensor]:
        """Tensors that the numbers may be about: of the owner itself, and in its collections and dicts."""
        found: dict[Any, Tensor] = {}
        for name, value in (*_own(self._attributes).items(), *self._buffers().items()):
            inner = value if type(value) in _COLLECTIONS else _inside(value)
            items = {} if inner is None else inner if isinstance(inner, dict) else dict(enumerate(inner))
            found |= {(name, key): x for key, x in {None: value, **items}.items() if _is_tensor(x)}
        return found


def _owners(attributes: dict[Any, Any], buffers: Callable[[], dict[str, Tensor]], seen: set[int]) -> Iterator[_Owner]:
    """The owner of these attributes, and those of the plain objects and the dicts among them."""
    if id(attributes) not in seen:
        seen.add(id(attributes))
        yield _Owner(attributes, buffers)
        for value in list(_own(attributes).values()):
            if (inner := _inside(value)) is not None:
                yield from _owners(inner, dict, seen)


def _own(attributes: dict[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in attributes.items() if name not in _LEFT_ALONE}


def _inside(value: Any) -> dict[Any, Any] | None:
    """The attributes of a plain object, the entries of a dict; None for all else."""
    if type(value) is dict:
        return value
    return vars(value) if hasattr(value, "__dict__") and is_record(value) else None


def _holds_tensors(value: Any) -> bool:
    """Or modules, such as the list in which a recurrent layer has its weights once more."""
    inner = _inside(value)
    items: Iterable[Any] = value if inner is None else inner.values()
    return any(_is_tensor(x) or isinstance(x, nn.Module) for x in items)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not _is_number(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not isinstance(value, nn.Parameter)
    return type(value) in (int, float) or isinstance(value, np.number)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _is_same(now: Tensor, before: Tensor) -> bool:
    if now.shape != before.shape or now.dtype != before.dtype or now.device != before.device:
        return False
    return now.is_meta or (now.layout is torch.strided and same_bits(local_tensor(now), local_tensor(before)))
