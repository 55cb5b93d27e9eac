"""Capture a training state and put it back, bit for bit, into the very same objects.

A *fork* walks everything that training can change (modules with all their buffers and plain attributes, the plain objects of
the user's classes among them, optimizers, learning-rate schedulers, the gradient scaler), copies what it finds into buffers
that are used again for the next fork, and on restore puts the original objects back with their contents restored in place.
Aliases therefore survive: the metric compute groups of torchmetrics, learning rates that are tensors, what a compiled graph
guards or a CUDA graph captured.

``load_state_dict`` is not used: for an optimizer it aliases the saved tensors, casts them to the parameter's dtype and
replaces the live ones; and what is not in a state dict (non-persistent buffers, metric states, counters) would be lost.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import MemberDescriptorType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_autolr.engine.compat import (
    LIVE_MODULES,
    OWNERS,
    float_of_sums,
    is_foreign,
    is_view,
    local_tensor,
    reshard,
)
from lightning_autolr.engine.files import Store
from lightning_autolr.engine.randomness import GENERATORS, restore_of

__all__ = ["Fork", "is_record", "slots_of", "take_gradients"]

# Not part of a training state: who owns the module, and the sink that stands in for `log` while a search is running.
_LEFT_ALONE = OWNERS | {"log"}
_DATA = {"dgl", "torch_geometric"}  # their objects are data, perhaps large: of a batch, but no state of a module
_UNSET = object()  # what a slot holds that was never set
_NEUTRAL = {"abc", "collections.abc", "typing"}  # bases that bring no state along
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)
_WALKED = (nn.Module, Optimizer, LRScheduler, torch.amp.GradScaler, SimpleNamespace)


class Fork:
    """One captured training state.

    Args:
        roots: the modules, optimizers, schedulers and scalers to capture; others may be set before a capture.
        store: where the copied tensors lie.
    """

    def __init__(self, roots: Iterable[object], store: Store) -> None:
        self.roots = list(roots)
        self._store = store
        self._tensors: list[Tensor] = []
        self._put_back: list[Callable[[], object]] = []

    @torch.no_grad()
    def capture(self) -> None:
        """Copy the present state, into the buffers of the last capture where they fit."""
        reshard(self.roots)
        walk = _Walk()
        walk.visit_roots(self.roots)
        self._tensors, self._put_back = walk.tensors, walk.put_back
        self._store.save([_storage_view(t) for t in self._tensors])

    @torch.no_grad()
    def restore(self) -> None:
        """Put the captured objects and their contents back. May be called any number of times."""
        reshard(self.roots)
        for put_back in self._put_back:
            put_back()
        self._store.load([_storage_view(t) for t in self._tensors])

    def release(self) -> None:
        """Drop the copies."""
        self._tensors, self._put_back = [], []
        self._store.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of all captured tensors."""
        return sum(t.numel() * t.element_size() for t in map(_storage_view, self._tensors))

    @torch.no_grad()
    def fingerprint(self) -> str:
        """A short text that is equal for equal trainable weights; one reduction on the device."""
        views = [_storage_view(t) for t in self._tensors if isinstance(t, nn.Parameter)]
        sums = [view.to(float_of_sums(view.device)).sum() for view in views]
        if not sums:
            return ""
        total = torch.stack([s.to(sums[0].device) for s in sums])
        weights = torch.arange(1, len(sums) + 1, dtype=total.dtype, device=total.device)
        return float((total * weights).sum()).hex()


class _Walk:
    """Visits each reachable object once; collects tensors, and how to put everything else back."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.put_back: list[Callable[[], object]] = []
        self._seen: dict[int, object] = {}  # keeps the objects alive, so that ids stay theirs
        self._records: list[object] = []  # still to be entered

    def visit_roots(self, roots: Iterable[object]) -> None:
        for root in roots:
            self.visit(root)
        while self._records:  # one by one: a chain of them may be longer than Python's stack
            self._visit_attributes(self._records.pop(), OWNERS)

    def visit(self, obj: Any) -> None:
        if isinstance(obj, _PLAIN) or id(obj) in self._seen:
            return
        self._seen[id(obj)] = obj
        if isinstance(obj, Tensor):
            self._visit_tensor(obj)
        elif isinstance(obj, (dict, list, deque, set)):
            self._visit_dict(obj) if isinstance(obj, dict) else self._visit_sequence(obj)
            if type(obj) not in (dict, list, deque, set):
                self._visit_attributes(obj, frozenset())
        elif isinstance(obj, tuple):
            self._visit_all(obj)
        elif isinstance(obj, _WALKED) or (dataclasses.is_dataclass(obj) and not isinstance(obj, type)):
            self._visit_attributes(obj, _LEFT_ALONE)
            self._visit_own_state(obj)
            if isinstance(obj, torch.jit.ScriptModule):  # its attributes are those of an object in C++
                self._visit_all([*obj.parameters(), *obj.buffers()])
        elif is_record(obj):
            self._records.append(obj)
        elif (state := _opaque_state(obj)) is not None:
            self.put_back.append(state)

    def _visit_all(self, items: Iterable[Any]) -> None:
        for item in items:
            self.visit(item)

    def _visit_tensor(self, tensor: Tensor) -> None:
        if tensor.is_meta:
            return
        if tensor.is_leaf:
            flag = tensor.requires_grad
            self.put_back.append(lambda: _set_requires_grad(tensor, flag))
            if flag and not isinstance(tensor, nn.Parameter):  # those of parameters are taken away before a search
                grad = tensor.grad
                self.put_back.append(lambda: setattr(tensor, "grad", grad))
                self.visit(grad)
        elif tensor.grad_fn is not None:
            return  # part of a live graph: training does not write into it, and writing would break its backward
        shape = tensor.shape
        self.put_back.append(lambda: _set_shape(tensor, shape))
        self.tensors.append(tensor)
        if isinstance(tensor, nn.Parameter) or vars(tensor):  # to which user code may attach something
            self._visit_dict(vars(tensor))

    def _visit_dict(self, obj: dict[Any, Any], left_alone: frozenset[str] = frozenset()) -> None:
        items = {key: value for key, value in obj.items() if key not in left_alone}

        def put_back() -> None:
            now = [(key, value) for key, value in obj.items() if key not in left_alone]
            if len(now) == len(items) and all(
                a is b and v is w for (a, v), (b, w) in zip(now, items.items(), strict=True)
            ):
                return
            others = {key: obj[key] for key in left_alone if key in obj}
            obj.clear()
            obj.update(items)
            obj.update(others)

        self.put_back.append(put_back)
        for value in items.values():
            self.visit(value)

    def _visit_attributes(self, obj: Any, left_alone: frozenset[str]) -> None:
        self._visit_dict(vars(obj) if hasattr(obj, "__dict__") else {}, left_alone)
        for name, slot in slots_of(obj):
            if name not in left_alone:
                self._visit_slot(obj, slot)

    def _visit_slot(self, obj: Any, slot: MemberDescriptorType) -> None:
        value = _read(slot, obj)

        def put_back() -> None:  # past the `__setattr__` of a frozen class
            if _read(slot, obj) is not value:
                slot.__delete__(obj) if value is _UNSET else slot.__set__(obj, value)

        self.put_back.append(put_back)
        self.visit(value)

    def _visit_sequence(self, obj: Any) -> None:
        items = list(obj)

        def put_back() -> None:
            if isinstance(obj, set):
                if set(map(id, obj)) != set(map(id, items)):  # one that is filled anew has another order
                    obj.clear()
                    obj.update(items)
            elif len(obj) != len(items) or any(a is not b for a, b in zip(obj, items, strict=True)):
                obj.clear()
                obj.extend(items)

        self.put_back.append(put_back)
        self._visit_all(items)

    def _visit_own_state(self, obj: Any) -> None:
        """A module may hold what no walk can see; it can hand it over by itself."""
        if hasattr(obj, "autolr_state_dict"):
            saved = copy.deepcopy(obj.autolr_state_dict())
            self.put_back.append(lambda: obj.autolr_load_state_dict(copy.deepcopy(saved)))


def slots_of(obj: Any) -> Iterator[tuple[str, MemberDescriptorType]]:
    """Name and descriptor of each attribute that is declared in ``__slots__``."""
    for kind in type(obj).__mro__:
        if "__slots__" in vars(kind):
            for name, slot in vars(kind).items():
                if isinstance(slot, MemberDescriptorType):
                    yield name, slot


def is_record(obj: Any) -> bool:
    """Whether an object is a plain one of a user's class, such as a meter or a moving average of the weights.

    Not one that is made on a class of somebody else, such as a dataset or a callback. And not one that holds an iterator, an
    open file, a lock or a thread: where these stand cannot be put back, and counters put back beside them would be wrong.
    """
    kind = type(obj)
    if is_foreign(kind.__module__) or isinstance(obj, type):
        return False
    bases = [base for base in kind.__mro__ if base is not object and base.__module__ not in _NEUTRAL]
    if any(is_foreign(base.__module__) or base.__module__.partition(".")[0] in _DATA for base in bases):
        return False
    held = [*(vars(obj).values() if hasattr(obj, "__dict__") else ()), *(_read(slot, obj) for _, slot in slots_of(obj))]
    return not any(isinstance(v, Iterator) or type(v).__module__.partition(".")[0] in LIVE_MODULES for v in held)


def _read(slot: MemberDescriptorType, obj: Any) -> Any:
    try:
        return slot.__get__(obj)
    except AttributeError:
        return _UNSET


def _set_shape(tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        tensor.data = tensor.new_empty(shape)


def _set_requires_grad(tensor: Tensor, flag: bool) -> None:
    if tensor.requires_grad != flag:
        tensor.requires_grad_(flag)


def _opaque_state(obj: Any) -> Callable[[], object] | None:
    """How to put back an object whose state is reached through its own methods; None for what is left alone."""
    if isinstance(obj, np.memmap) or (isinstance(obj, np.ndarray) and not obj.flags.writeable):
        return None  # a file, perhaps a large one; or nothing that training could change
    if isinstance(obj, np.ndarray):
        array = obj.copy()
        return lambda: np.copyto(obj, array)
    return restore_of(obj) if isinstance(obj, GENERATORS) else None


def _storage_view(tensor: Tensor) -> Tensor:
    """A plain tensor on the same memory: a DTensor's local part, or the whole storage where elements overlap."""
    tensor = local_tensor(tensor)
    if tensor.layout is torch.strided and any(
        s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        return tensor.detach().new_empty(0).set_(tensor.untyped_storage())
    return tensor.detach()


def take_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Set all gradients to None and yield the ones there were.

    Views into a bucket of DistributedDataParallel would be overwritten by private steps, so these are copied.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            grad, parameter.grad = parameter.grad, None
            yield parameter, grad.clone() if is_view(grad) else grad
