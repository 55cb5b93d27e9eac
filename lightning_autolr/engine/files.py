"""Where the tensors of a fork lie: on their own device, in pinned CPU memory, or in a file."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_autolr.engine.compat import foreach_copy_

__all__ = ["PLACES", "DiskStore", "MemoryStore", "Place", "Store", "make_store", "same_bits"]

Place = Literal["device", "cpu", "disk"]
PLACES: tuple[Place, ...] = get_args(Place)

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class Store(ABC):
    """Keeps a copy of a list of tensors."""

    @abstractmethod
    def save(self, tensors: Sequence[Tensor]) -> None:
        """Copy the contents of ``tensors``."""

    @abstractmethod
    def load(self, tensors: Sequence[Tensor]) -> None:
        """Copy the saved contents into ``tensors``, which match the saved ones in number and shape."""

    @abstractmethod
    def clear(self) -> None:
        """Drop the copy."""


class MemoryStore(Store):
    """Copies in memory. Buffers whose place in the list, shape and dtype still fit are used again.

    Args:
        on_cpu: keep them in CPU memory (pinned when the tensors come from an accelerator), else on each tensor's device.
    """

    def __init__(self, on_cpu: bool = False) -> None:
        self._on_cpu = on_cpu
        self._buffers: list[Tensor] = []

    def save(self, tensors: Sequence[Tensor]) -> None:
        spare = self._buffers
        self._buffers = []
        for i, tensor in enumerate(tensors):
            old = spare[i] if i < len(spare) else None
            fits = (
                old is not None
                and old.shape == tensor.shape
                and old.dtype == tensor.dtype
                and old.layout == tensor.layout
            )
            fits = fits and (self._on_cpu or old.device == tensor.device)  # type: ignore[union-attr]
            self._buffers.append(old if fits and old is not None else self._empty(tensor))
        _copy(self._buffers, tensors)

    def load(self, tensors: Sequence[Tensor]) -> None:
        _put_back(tensors, self._buffers)

    def clear(self) -> None:
        self._buffers = []

    def _empty(self, tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            return tensor.clone()
        if self._on_cpu and tensor.device.type != "cpu":
            return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
        return torch.empty_like(tensor)


class DiskStore(Store):
    """Copies in a file, written and read by the Trainer's own checkpoint I/O plugin; every rank has its own.

    Args:
        checkpoint_io: the plugin (``trainer.strategy.checkpoint_io``). Asynchronous plugins are asked to write at once,
            since the copy may be needed the next moment.
        folder: where to make the temporary file; None is the system's temporary folder.
    """

    def __init__(self, checkpoint_io: Any, folder: str | None = None) -> None:
        while getattr(checkpoint_io, "checkpoint_io", None) is not None:
            checkpoint_io = checkpoint_io.checkpoint_io
        self._io, self._parent = checkpoint_io, folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def _path(self) -> str:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="autolr-", dir=self._parent)
        return os.path.join(self._folder.name, "fork.ckpt")

    def save(self, tensors: Sequence[Tensor]) -> None:
        self._io.save_checkpoint(
            {"tensors": [t.clone(memory_format=torch.preserve_format) for t in tensors]}, self._path
        )

    def load(self, tensors: Sequence[Tensor]) -> None:
        _put_back(tensors, self._io.load_checkpoint(self._path)["tensors"])

    def clear(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def make_store(place: Place, checkpoint_io: Any) -> Store:
    """The store for ``fork="device" | "cpu" | "disk"``."""
    return DiskStore(checkpoint_io) if place == "disk" else MemoryStore(on_cpu=place == "cpu")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors of one shape and dtype hold the same, NaN and the sign of zero included."""
    if a.is_quantized:
        return False
    return torch.equal(_bits_of(a), _bits_of(b))


def _bits_of(tensor: Tensor) -> Tensor:
    """As whole numbers; a view that conjugates or negates what lies in memory cannot be read as such."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype is torch.complex128:  # wider than any whole number
        tensor = torch.view_as_real(tensor)
    return tensor.view(_BITS[tensor.element_size()])


def _put_back(targets: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Into memory that torch did not allocate only what has changed: it may be read-only, such as a mapped file."""
    pairs = zip(targets, saved, strict=True)
    changed = [(t, s) for t, s in pairs if not (_is_on_foreign_memory(t) and same_bits(t, s))]
    _copy([t for t, _ in changed], [s for _, s in changed])


def _is_on_foreign_memory(tensor: Tensor) -> bool:
    is_plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_nested
    return is_plain and tensor.device.type == "cpu" and not tensor.untyped_storage().resizable()


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy many tensors, in few launches where they are alike, and wait for transfers between devices."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        if target.is_inference():
            # Made by user code in inference mode (a list of validation outputs, say): writable only there.
            with torch.inference_mode():
                target.copy_(source)
        elif target.layout is not torch.strided or target.is_conj() or target.is_neg():
            target.copy_(source)  # no launch takes these with others
        else:
            group = groups.setdefault((target.device, source.device, target.dtype), ([], []))
            group[0].append(target)
            group[1].append(source)
    for (to, from_, _), (into, out_of) in groups.items():
        # Only for CUDA is there somebody who waits, below.
        foreach_copy_(into, out_of, non_blocking=to != from_ and "cuda" in (to.type, from_.type))
    for to, from_, _ in groups:
        if to != from_ and "cuda" in (to.type, from_.type):
            torch.cuda.synchronize(to if to.type == "cuda" else from_)
