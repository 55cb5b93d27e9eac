"""Every private name that ``engine/compat.py`` uses exists in what is installed."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, CyclicLR, SequentialLR, StepLR
from torch.utils.data import DataLoader, RandomSampler

from lightning_autolr.engine import compat
from tests.engine.small import Tiny, fit_tiny, loader


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    trainer = Trainer(
        fast_dev_run=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(Tiny(), loader(), loader(12, shuffle=False))
    return trainer


def test_loops(trainer: Any) -> None:
    epoch_loop = trainer.fit_loop.epoch_loop
    assert epoch_loop._batches_that_stepped == compat.logger_step(trainer) == 2
    assert compat.combined_loader(trainer) is trainer.fit_loop._combined_loader
    assert isinstance(trainer.fit_loop._combined_loader, CombinedLoader)
    assert callable(epoch_loop.val_loop.setup_data)
    assert isinstance(epoch_loop.val_loop._combined_loader, CombinedLoader)
    assert len(compat.ValLoaders(trainer).combined.flattened) == compat.num_val_loaders(trainer) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {4, 8, 12}),
        ({"check_val_every_n_epoch": 2}, {4, 8, 12}),  # one read too many does no harm
        ({"val_check_interval": 2}, {2, 4, 6, 8, 10, 12}),
        ({"val_check_interval": 6, "check_val_every_n_epoch": None}, {6, 12}),
        ({"limit_val_batches": 0}, set()),
    ],
)
def test_when_it_validates(tmp_path: Path, options: dict[str, Any], expected: set[int]) -> None:
    class Watch(Callback):
        told, seen = set[int](), set[int]()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if compat.validates_after(trainer, batch_idx):
                self.told.add(trainer.global_step)

        def on_validation_start(self, trainer: Any, module: Any) -> None:
            self.seen.add(trainer.global_step)

    watch = Watch()
    fit_tiny(tmp_path, [watch], max_steps=12, num_sanity_val_steps=0, **options)
    assert watch.told == expected >= watch.seen


def test_data_fetcher(trainer: Any) -> None:
    assert _DataLoaderIterDataFetcher.__name__ == "_DataLoaderIterDataFetcher"
    assert hasattr(trainer.fit_loop, "_data_fetcher")
    assert not compat.takes_dataloader_iter(trainer)


def test_combined_loader_keeps_its_mode() -> None:
    combined = CombinedLoader({"a": loader(), "b": loader(12)}, mode="max_size_cycle")
    assert combined._mode == "max_size_cycle"
    clone = compat.clone_combined(combined, [compat.clone_loader(leaf) for leaf in combined.flattened])
    assert clone._mode == combined._mode
    assert len(list(iter(clone))) == 4


def test_data_loader_is_its_attributes() -> None:
    original = loader()
    assert {"_iterator", "persistent_workers", "batch_sampler", "sampler", "generator"} <= set(vars(original))
    clone = compat.clone_loader(original)
    assert type(clone) is DataLoader
    with pytest.raises(ValueError, match="attribute should not be set"):
        original.sampler = None  # the reason why we go through __dict__
    compat.set_in_loader(clone, sampler=None)
    assert original.sampler is not None


def test_module_hook() -> None:
    assert list(inspect.signature(LightningModule._on_before_batch_transfer).parameters) == [
        "self",
        "batch",
        "dataloader_idx",
    ]


def test_steps_of_any_signature() -> None:
    class WithoutIndex(Tiny):
        def training_step(self, batch: Any) -> Any:  # type: ignore[override]
            return self.loss(batch)

    assert compat.takes_batch_idx(Tiny().training_step)
    assert not compat.takes_batch_idx(WithoutIndex().training_step)


def test_comm_hooks_are_noticed() -> None:
    assert not compat.has_comm_hook(DDPStrategy())
    assert compat.has_comm_hook(DDPStrategy(ddp_comm_hook=print))
    assert compat.has_comm_hook(DDPStrategy(ddp_comm_state=object()))


def test_fsdp2_modules_are_recognized() -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    assert callable(FSDPModule.reshard)
    assert callable(DTensor.to_local)
    assert compat.local_tensor(torch.ones(2)).sum() == 2


def test_samplers_in_a_sampler() -> None:
    inner = RandomSampler(range(4))
    assert compat.wrapped_sampler(DistributedSamplerWrapper(inner, num_replicas=1, rank=0).dataset) is inner
    assert compat.wrapped_sampler(inner) is None


def test_schedulers_and_what_they_cache() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    parts = [StepLR(optimizer, 1), StepLR(optimizer, 2)]
    assert compat.inner_schedulers(SequentialLR(optimizer, parts, [3])) == parts
    assert compat.inner_schedulers(ChainedScheduler(parts)) == parts
    assert compat.inner_schedulers(parts[0]) == []
    cached = set(vars(parts[0])) | set(vars(CyclicLR(optimizer, 0.1, 0.2)))
    assert set(compat.CACHED_LRS) <= cached


def test_a_module_knows_who_runs_it() -> None:
    assert set(vars(LightningModule())) >= compat.OWNERS


def test_tensors() -> None:
    ones = [torch.ones(2), torch.ones(3)]
    compat.foreach_add_(ones, ones)
    compat.foreach_neg_(ones)
    assert [float(norm) for norm in compat.foreach_norm(ones, 1)] == [4, 6]
    compat.foreach_copy_(ones, [torch.zeros(2), torch.zeros(3)])
    assert not torch.cat(ones).any()
    assert compat.is_view(ones[0][:1])
    assert not compat.is_view(ones[0])


def test_batch_norms() -> None:
    assert all(isinstance(m, compat.BatchNorm) for m in (nn.BatchNorm1d(1), nn.BatchNorm3d(1), nn.SyncBatchNorm(1)))
    assert not isinstance(nn.LayerNorm(1), compat.BatchNorm)


def private_names(source: str) -> Iterator[tuple[int, str]]:
    """Names with an underscore that are not the file's own: imported, reached into, or given to ``getattr``."""
    tree = ast.parse(source)
    own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            yield from ((node.lineno, name) for name in [node.attr] if name not in own)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_private_names_stand_in_compat_only() -> None:
    """No other module of the engine reaches into an underscore of Lightning's or torch's objects."""
    others = [path for path in sorted(Path(compat.__file__).parent.glob("*.py")) if path.name != "compat.py"]
    found = [(path.name, *place) for path in others for place in private_names(path.read_text())]
    assert [place for place in found if re.fullmatch(r"_[a-zA-Z]\w*", place[2])] == []
