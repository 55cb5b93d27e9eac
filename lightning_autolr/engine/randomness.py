"""Random number generators: those of the process, and those that a user's data and code hold."""

from __future__ import annotations

import copy
import inspect
import random
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_autolr.engine.compat import MODULE_ATTRIBUTES, is_foreign

__all__ = ["GENERATORS", "Generator", "RandomState", "generators_of", "restore_of"]

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

_INSTALLED = tuple({sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib", "platstdlib")})
_FEW = 100  # entries of a collection that is looked through: one with more is data
_MANY = 100_000  # objects that are looked at
_NO_HOLDERS = (Tensor, np.ndarray, str, bytes, int, float, type, ModuleType, Trainer)


class RandomState:
    """Where the random number generators stand: Python's, NumPy's, torch's on the CPU and on the training device.

    Args:
        device: of the training.
        held: other generators.
    """

    def __init__(self, device: torch.device, held: Iterable[Generator] = ()) -> None:
        self._device = device
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state()
        self._torch = torch.get_rng_state()
        self._accelerator = _module_of(device).get_rng_state(*_one_of(device)) if _module_of(device) else None
        self._held = [restore_of(generator) for generator in held]

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._accelerator is not None:
            _module_of(self._device).set_rng_state(self._accelerator, *_one_of(self._device))
        for put_back in self._held:
            put_back()

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, so that ``torch.load(weights_only=True)`` reads them; without the held generators."""
        kind, keys, position, has_gauss, gauss = self._numpy
        keys = torch.from_numpy(np.asarray(keys).astype(np.int64))
        numpy_state = [str(kind), keys, int(position), int(has_gauss), float(gauss)]
        return {"python": self._python, "numpy": numpy_state, "torch": self._torch, "accelerator": self._accelerator}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> RandomState:
        self = cls(device)
        version, internal, gauss = state["python"]
        self._python = (version, tuple(internal), gauss)
        kind, keys, position, has_gauss, cached = state["numpy"]
        self._numpy = (kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached)
        self._torch = state["torch"].cpu()
        if self._accelerator is not None and state["accelerator"] is not None:
            self._accelerator = state["accelerator"].cpu()
        return self

    @staticmethod
    def seed(seed: int, device: torch.device, held: Iterable[Generator] = ()) -> None:
        """Seed all of them, and no other device's."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        if accelerator := _module_of(device):
            with torch.device(device):
                accelerator.manual_seed(seed)
        for generator in held:
            _seed_one(generator, seed)


def _module_of(device: torch.device) -> Any:
    """``torch.cuda`` and its like, or None on the CPU and on devices without generators."""
    module = getattr(torch, device.type, None)
    return module if device.type != "cpu" and hasattr(module, "get_rng_state") else None


def _one_of(device: torch.device) -> tuple[torch.device, ...]:
    """Which of several devices; of Apple's there is one, and its functions do not take it."""
    return () if device.type == "mps" else (device,)


def restore_of(generator: Generator) -> Callable[[], object]:
    """What brings a generator back to where it stands now."""
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, np.random.Generator):
        return partial(setattr, generator.bit_generator, "state", copy.deepcopy(generator.bit_generator.state))
    if isinstance(generator, np.random.RandomState):
        return partial(generator.set_state, generator.get_state())
    return partial(generator.setstate, generator.getstate())


def _seed_one(generator: Generator, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed % 2**32)


def generators_of(roots: Iterable[object]) -> list[Generator]:
    """Generators that objects hold: datasets, transforms, modules, functions that collate.

    Looked for in attributes, in what a function is closed over, in collections of at most 100 entries, and among the globals
    of the code that the objects and functions come from, and of the user's own code that this imports.
    """
    waiting, seen, code = list(roots), dict[int, object](), set[str]()
    while waiting and len(seen) < _MANY:
        obj = waiting.pop()
        if obj is None or id(obj) in seen or isinstance(obj, _NO_HOLDERS):
            continue
        seen[id(obj)] = obj
        if not isinstance(obj, GENERATORS):
            waiting.extend(_parts(obj))
            code |= (
                {obj.__module__} if isinstance(obj, FunctionType) else {kind.__module__ for kind in type(obj).__mro__}
            )
    held = [obj for obj in seen.values() if isinstance(obj, GENERATORS)]
    return list({id(generator): generator for generator in [*held, *_in_code(code)]}.values())


def _parts(obj: Any) -> Iterator[object]:
    if isinstance(obj, (dict, list, tuple, set)):
        yield from (obj.values() if isinstance(obj, dict) else obj) if len(obj) <= _FEW else ()
    elif isinstance(obj, MethodType):
        yield from (obj.__self__, obj.__func__)
    elif isinstance(obj, partial):
        yield from (obj.func, *obj.args, *obj.keywords.values())
    elif isinstance(obj, FunctionType):
        yield from inspect.getclosurevars(obj).nonlocals.values()
    elif isinstance(obj, nn.Module):
        yield from (value for name, value in vars(obj).items() if name not in MODULE_ATTRIBUTES)
    elif hasattr(obj, "__dict__"):
        yield from vars(obj).values()


def _in_code(names: Iterable[str]) -> Iterator[Generator]:
    """Globals of modules, and of the modules of the user's own that these import."""
    waiting, seen = list(names), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or is_foreign(name) or name not in sys.modules:
            continue
        seen.add(name)
        for value in list(vars(sys.modules[name]).values()):
            if isinstance(value, GENERATORS):
                yield value
            other = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(other, str) and _is_users_own(other):
                waiting.append(other)


def _is_users_own(name: str) -> bool:
    """Whether a module is no installed one."""
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return not file.startswith(_INSTALLED)
