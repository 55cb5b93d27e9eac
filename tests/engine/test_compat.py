"""Every private name that ``engine/compat.py`` uses exists in what is installed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

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
    assert len(compat.val_loaders(trainer)) == 1


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


def test_private_names_stand_in_compat_only() -> None:
    """No other module reaches into an underscore of Lightning's or torch's objects."""
    import ast

    own = {
        "_foreach_add_",
        "_foreach_copy_",
        "_foreach_neg_",
        "_foreach_norm",
        "_is_view",
    }
    folder = Path(compat.__file__).parent
    found = []
    for path in sorted(folder.glob("*.py")):
        if path.name == "compat.py":
            continue
        tree = ast.parse(path.read_text())
        defined = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        for node in ast.walk(tree):
            is_private = (
                isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            )
            on_self = (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("self", "cls")
            )
            if is_private and not on_self and node.attr not in own | defined:
                found.append(f"{path.name}:{node.lineno} {node.attr}")
    assert found == []
