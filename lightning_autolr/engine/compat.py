"""Every private name of Lightning and torch that the engine depends on. A test asserts that each of them exists."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, _foreach_add_, _foreach_copy_, _foreach_neg_, _foreach_norm, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import DataLoader

__all__ = [
    "CACHED_LRS",
    "LIVE_MODULES",
    "MODULE_ATTRIBUTES",
    "OWNERS",
    "BatchNorm",
    "ValLoaders",
    "average_models",
    "clone_combined",
    "clone_loader",
    "combined_loader",
    "float_of_sums",
    "foreach_add_",
    "foreach_copy_",
    "foreach_neg_",
    "foreach_norm",
    "has_comm_hook",
    "hooked_optimizer",
    "inner_schedulers",
    "is_foreign",
    "is_named_tuple",
    "is_sequential",
    "is_view",
    "local_tensor",
    "logger_step",
    "num_val_loaders",
    "on_before_batch_transfer",
    "parts_of_loader",
    "remove_log_methods",
    "reshard",
    "set_in_loader",
    "stops_at_shortest",
    "takes_batch_idx",
    "takes_dataloader_iter",
    "validates_after",
    "wrapped_sampler",
]

BatchNorm = _BatchNorm  # of any number of dimensions, and the synchronized one
# On many tensors in few launches.
foreach_add_, foreach_copy_, foreach_neg_, foreach_norm = _foreach_add_, _foreach_copy_, _foreach_neg_, _foreach_norm

CACHED_LRS = ("base_lrs", "max_lrs", "_last_lr")  # lists of learning rates that a scheduler may hold
# Who holds something of these is alive beside the training (a tracker's client, a pool of workers): let it be.
LIVE_MODULES = {
    "_queue", "_thread", "asyncio", "concurrent", "ctypes", "multiprocessing", "queue", "selectors", "socket", "sqlite3", "ssl",
    "subprocess", "threading",
}  # fmt: skip
_FOREIGN = sys.stdlib_module_names | {
    "PIL", "lightning", "lightning_autolr", "lightning_fabric", "lightning_utilities", "mlflow", "numpy", "omegaconf",
    "pandas", "pytorch_lightning", "tensorboard", "tensorboardX", "tokenizers", "torch", "torchmetrics",
    "torchvision", "transformers", "triton", "wandb",
}  # fmt: skip
MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"_modules"}  # of torch's own: tensors and hooks
OWNERS = frozenset({"_trainer", "_fabric"})  # attributes by which a module knows who runs it
_UNSET = object()  # an attribute that is not there


def average_models(trainer: Any) -> list[nn.Module]:
    """Of callbacks that average the weights, such as ``EMAWeightAveraging``."""
    found = (getattr(callback, "_average_model", None) for callback in trainer.callbacks)
    return [model for model in found if isinstance(model, nn.Module)]


def is_foreign(module: str) -> bool:
    """Whether code is Python's, torch's, Lightning's or of one of the packages around them: it knows what is in its objects."""
    return module.partition(".")[0] in _FOREIGN


def is_named_tuple(value: Any) -> bool:
    return hasattr(value, "_fields")


def remove_log_methods(callback: Any) -> None:
    """Take the module's ``log`` and ``log_dict`` off, which Lightning sets on every callback: they keep the module alive."""
    for name in ("log", "log_dict"):
        vars(callback).pop(name, None)


def float_of_sums(device: torch.device) -> torch.dtype:
    """What to add up in on a device: Apple's MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def logger_step(trainer: Any) -> int:
    """The step at which Lightning logs: batches that stepped, which is not ``global_step`` with several optimizers."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def validates_after(trainer: Any, batch_idx: int) -> bool:
    """Whether the Trainer may validate after this batch. Not seen: an interval of time as ``val_check_interval``."""
    loop, every = trainer.fit_loop.epoch_loop, trainer.val_check_batch
    if not trainer.enable_validation or every is None:
        return False
    if every == math.inf:  # a stream: at its end
        return bool(loop.batch_progress.is_last_batch)
    done = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    return bool((done + 1) % every == 0)


def combined_loader(trainer: Any) -> Any:
    """The training loader with its mode; ``trainer.train_dataloader`` has lost the mode of a user's CombinedLoader."""
    return trainer.fit_loop._combined_loader


def clone_combined(combined: Any, flattened: list[Any]) -> Any:
    """A CombinedLoader of the same structure and mode over other loaders, without limits."""
    clone = type(combined)(combined.iterables, mode=combined._mode)
    clone.flattened = flattened
    return clone


def takes_dataloader_iter(trainer: Any) -> bool:
    """Whether the module's ``training_step`` asks for the iterator instead of a batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return type(fetcher).__name__ == "_DataLoaderIterDataFetcher"


def takes_batch_idx(step: Any) -> bool:
    """Whether a ``training_step`` or ``validation_step`` asks for the batch index, by whatever name."""
    return bool(is_param_in_hook_signature(step, "batch_idx", min_args=2))


def is_sequential(combined: Any) -> bool:
    """Whether loaders come one after the other; in all other modes a batch is made of one of each."""
    return bool(combined._mode == "sequential")


def stops_at_shortest(combined: Any) -> bool:
    """Whether combined loaders end with the first of them, and not with the last."""
    return bool(combined._mode == "min_size")


def num_val_loaders(trainer: Any) -> int:
    """How many validation loaders there are to the module, which is told the number of the one if there are several."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    return int(loop.num_dataloaders) if is_sequential(loop._combined_loader) else 1


class ValLoaders:
    """The validation loaders of a fit, set up for us alone where Lightning does so later (``check_val_every_n_epoch > 1``).

    What ``val_dataloader()`` leaves behind is taken off again: Lightning calls it as if this had not been.

    Attributes:
        combined: the CombinedLoader; None where nothing is validated.
    """

    def __init__(self, trainer: Any) -> None:
        loop = trainer.fit_loop.epoch_loop.val_loop
        self._own: list[tuple[object, dict[str, Any]]] = []
        self.combined = loop._combined_loader
        if self.combined is None:
            holders = [obj for obj in (loop, trainer.lightning_module, trainer.datamodule) if obj is not None]
            before = [dict(vars(obj)) for obj in holders]
            loop.setup_data()
            self.combined = loop._combined_loader
            for obj, old in zip(holders, before, strict=True):
                own = {name: value for name, value in vars(obj).items() if old.get(name, _UNSET) is not value}
                _exchange(obj, {name: old.get(name, _UNSET) for name in own})
                self._own.append((obj, own))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In this block the Trainer has them, too: ``trainer.val_dataloaders``, ``trainer.num_val_batches``."""
        before = [(obj, _exchange(obj, own)) for obj, own in self._own]
        try:
            yield
        finally:
            for obj, values in before:
                _exchange(obj, values)


def _exchange(obj: object, values: dict[str, Any]) -> dict[str, Any]:
    """Set attributes, or take them off where they are ``_UNSET``. Returns what they were."""
    before = {name: vars(obj).get(name, _UNSET) for name in values}
    for name, value in values.items():
        if value is _UNSET:
            vars(obj).pop(name, None)
        else:
            vars(obj)[name] = value
    return before


def on_before_batch_transfer(module: Any, batch: Any, dataloader_idx: int = 0) -> Any:
    """The module's and datamodule's hook, as the training loop calls it."""
    return module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)


def clone_loader(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A second DataLoader on the same dataset, sharing nothing with the iterator of the first.

    ``persistent_workers`` must be off, or iterating the clone would reset the original's workers. The class is kept
    (subclasses add behaviour), so ``__init__`` cannot be called.
    """
    clone: DataLoader[Any] = object.__new__(type(loader))
    clone.__dict__.update(loader.__dict__)
    clone.__dict__.update(_iterator=None, persistent_workers=False)
    return clone


def parts_of_loader(loader: DataLoader[Any]) -> tuple[Any, ...]:
    """All its attributes, less the iterator that it is read by."""
    return tuple(value for name, value in vars(loader).items() if name != "_iterator")


def has_comm_hook(strategy: Any) -> bool:
    """Whether DistributedDataParallel compresses gradients or averages models by a hook with a state of its own."""
    return any(
        getattr(strategy, name, None) is not None for name in ("_ddp_comm_hook", "_ddp_comm_state", "_model_averager")
    )


def hooked_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose step hooks are called: for a wrapper that left out ``super().__init__()``, the one inside.

    Raises:
        ValueError: there is none.
    """
    inside = [
        o for o in vars(optimizer).values() if isinstance(o, Optimizer) and o.param_groups is optimizer.param_groups
    ]
    for candidate in (optimizer, *inside):
        if _has_hooks(candidate) and getattr(type(candidate).step, "hooked", False):
            return candidate
    if _has_hooks(optimizer):
        return optimizer
    raise ValueError(
        f"Expected an optimizer with step hooks, got {type(optimizer).__name__}, which was made without "
        "`torch.optim.Optimizer.__init__`. Call `super().__init__(...)` in its `__init__`."
    )


def _has_hooks(optimizer: Optimizer) -> bool:
    return hasattr(optimizer, "_optimizer_step_pre_hooks")


def wrapped_sampler(holder: Any) -> Any:
    """The sampler inside; None if there is none. Lightning gives it to a DistributedSampler as if it were a dataset."""
    return getattr(holder, "_sampler", None)


def inner_schedulers(scheduler: Any) -> list[Any]:
    """Those that a sequence or a chain of schedulers is made of."""
    return list(getattr(scheduler, "_schedulers", []))


def is_view(tensor: Tensor) -> bool:
    """Whether its memory is another tensor's."""
    return bool(tensor._is_view())


def set_in_loader(loader: DataLoader[Any], **attributes: Any) -> None:
    """Set attributes that an initialized DataLoader refuses to have set."""
    loader.__dict__.update(attributes)


def local_tensor(tensor: Tensor) -> Tensor:
    """A DTensor's local part (sharing its storage); any other tensor as it is."""
    local: Tensor = operator.methodcaller("to_local")(tensor) if hasattr(tensor, "to_local") else tensor
    return local


def reshard(roots: Iterable[object]) -> None:
    """Free the gathered parameters of FSDP2 modules, so that the shards are what is read and written.

    After a forward without backward the root group stays gathered, and a copy into the shards would go unseen.
    """
    for module in (module for root in roots if isinstance(root, nn.Module) for module in root.modules()):
        if type(module).__name__.startswith("FSDP") and hasattr(module, "reshard"):
            operator.methodcaller("reshard")(module)
