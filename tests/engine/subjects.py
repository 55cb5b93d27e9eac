"""What the engine is tested on: a module with every kind of state that a search could disturb, and how to compare runs."""

from __future__ import annotations

import csv
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

from lightning_autolr.core.requests import Probe, Requests, Run, Train
from lightning_autolr.engine.driver import SearchCallback
from lightning_autolr.schedules import Linear, Schedule
from lightning_autolr.search.base import AbstractSearch


class NoisyData(Dataset):
    """Three-class points, jittered with all three random number generators as an augmentation would."""

    def __init__(self, size: int = 60, jitter: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        self.y = torch.arange(size) % 3
        self.x = torch.randn(size, 8, generator=generator) + nn.functional.one_hot(self.y, 8)
        self.jitter = jitter

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = self.x[i]
        if self.jitter:
            x = x + 0.1 * torch.randn(8) + 0.1 * float(np.random.randn()) + 0.1 * random.gauss(0, 1)
        return x.float(), self.y[i]


class Stream(IterableDataset):
    """The same points as an endless stream that remembers its position in an attribute."""

    def __init__(self) -> None:
        self.data = NoisyData(jitter=False)
        self.position = 0

    def __iter__(self) -> Any:
        while True:
            yield self.data[self.position % len(self.data)]
            self.position += 1


class Positioned:
    """A loader of somebody's own, whose iterators share its position."""

    def __init__(self) -> None:
        self.loader, self.position = DataLoader(NoisyData(), batch_size=6), 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        batches = list(self.loader)
        self.position %= len(batches)
        while self.position < len(batches):
            self.position += 1
            yield batches[self.position - 1]


@dataclass
class Options:
    """A row of the table."""

    optimizer: str = "sgd"
    manual: bool = False
    optimizers: int = 1
    alternate: bool = False  # the second optimizer skips every third batch
    scheduler: str | None = None
    dataloader_iter: bool = False
    compiled: bool = False
    compiled_step: bool = False
    tensor_lr: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    combined: bool = False
    own_loader: bool = False
    precision_plugin: Any = None
    search: dict[str, Any] = field(default_factory=dict)


def make_optimizer(name: str, groups: Any, tensor_lr: bool = False) -> torch.optim.Optimizer:
    lr = torch.tensor(0.05) if tensor_lr else 0.05
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, dampening=0.5, weight_decay=1e-3)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    if name == "fused":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if name == "lbfgs":
        return torch.optim.LBFGS([p for g in groups for p in g["params"]], lr=0.05, max_iter=3)
    return torch.optim.Adam(groups, lr=lr, amsgrad=True)


class Meter:
    """A plain object of a user's class."""

    def __init__(self) -> None:
        self.count, self.total = 0, torch.zeros(())


class Subject(LightningModule):
    """A small classifier that keeps state wherever a module can keep it."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.automatic_optimization = not options.manual
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.2)
        self.early_drop = nn.Dropout(0.1)
        self.last = nn.Linear(16, 3)
        self.frozen_copy = nn.Linear(8, 16)
        self.frozen_copy.requires_grad_(False)
        self.body = torch.compile(self.first, backend="eager") if options.compiled else None
        self.register_buffer("running", torch.zeros(3), persistent=False)
        self.accuracy = MulticlassAccuracy(3)
        self.metrics = MetricCollection([MulticlassF1Score(3), MulticlassAUROC(3, thresholds=None)])
        self.val_accuracy = MulticlassAccuracy(3)
        self.count = 0
        self.history: list[float] = []
        self.notes: dict[str, Any] = {"seen": 0, "array": np.zeros(2)}
        self.meter = Meter()
        self.own_generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x) if self.body is None else self.body(x)
        hidden = self.early_drop(hidden)
        return self.last(self.drop(torch.relu(self.norm(hidden))) + 0.01 * torch.rand((), generator=self.own_generator))

    def step(self, batch: Any) -> Tensor:
        x, y = batch
        scores = self(x)
        loss = cross_entropy(scores.float(), y)
        self.count += 1
        if self.count == 3:
            self.early_drop.eval()  # for good
        self.history.append(float(loss.detach()))
        self.running += torch.bincount(y, minlength=3)
        self.notes["seen"] += len(y)
        self.notes["array"] += 1
        self.meter.count += 1
        self.meter.total += loss.detach()
        self.accuracy(scores, y)
        self.metrics.update(scores.float(), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(y))
        self.log("train_acc", self.accuracy, on_step=False, on_epoch=True, batch_size=len(y))
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if isinstance(batch, dict):
            batch = tuple(torch.cat(parts) for parts in zip(*batch.values(), strict=True))
        if not self.options.manual:
            return self.step(batch)
        optimizers = self.optimizers()
        for number, optimizer in enumerate(optimizers if isinstance(optimizers, list) else [optimizers]):
            if self.options.alternate and number == 1 and batch_idx % 3 == 1:
                continue
            loss = self.step(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        if self.options.scheduler:
            schedulers = self.lr_schedulers()
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                scheduler.step()
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():  # a momentum encoder
            for slow, fast in zip(self.frozen_copy.parameters(), self.first.parameters(), strict=True):
                slow.lerp_(fast, 0.1)

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.metrics.compute(), batch_size=1)
        self.metrics.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        scores = self(x)
        self.val_accuracy(scores, y)
        self.log("val_loss", cross_entropy(scores.float(), y), batch_size=len(y))
        self.log("val_acc", self.val_accuracy, batch_size=len(y))

    def configure_optimizers(self) -> Any:
        configured = self._configure_optimizers()
        if self.options.compiled_step:
            for optimizer in configured:
                optimizer.step = torch.compile(optimizer.step, backend="eager")
        return configured

    def _configure_optimizers(self) -> Any:
        o = self.options
        parts = [[self.first, self.norm], [self.last]]
        groups = [{"params": [p for m in part for p in m.parameters()]} for part in parts]
        groups[1]["lr"] = torch.tensor(0.005) if o.tensor_lr else 0.005  # type: ignore[assignment]
        if o.optimizers == 2:
            optimizers = [make_optimizer(o.optimizer, [g], o.tensor_lr) for g in groups]
        else:
            optimizers = [make_optimizer(o.optimizer, groups, o.tensor_lr)]
        if o.scheduler is None:
            return optimizers
        make = {
            "step": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 3, 0.5),
            "onecycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=100),
            "lambda": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
        }[o.scheduler]
        return optimizers, [{"scheduler": make(opt), "interval": "step"} for opt in optimizers]


class IterSubject(Subject):
    """Fetches its own batches."""

    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class Spy(Callback):
    """Counts hooks and remembers the training batches."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.batches: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.calls["on_train_batch_end"] += 1
        first = next(iter(batch.values())) if isinstance(batch, dict) else batch
        if first is not None:
            self.batches.append(first[0].clone())


def _counter(name: str) -> Any:
    def hook(self: Spy, *args: Any, **kwargs: Any) -> None:
        self.calls[name] += 1

    return hook


_COUNTED = """
    on_train_batch_start on_before_backward on_after_backward on_before_optimizer_step on_before_zero_grad on_validation_start
    on_validation_end on_validation_batch_end on_train_epoch_start on_train_epoch_end on_save_checkpoint
"""
for _name in _COUNTED.split():
    setattr(Spy, _name, _counter(_name))


@dataclass(frozen=True)
class Scripted(AbstractSearch):
    """Uses everything the engine offers: paired candidates, probes in two parts, kept states, an undone stage."""

    num_stages: int = 3
    num_steps: int = 5
    lrs: tuple[float, ...] = (0.2, 0.02, 1e4)
    shape: Schedule = field(default=Linear(num_steps=8))
    undo: bool = True
    evaluate: str = "validation"

    def requests(self, run: Run) -> Requests:
        for stage in range(self.num_stages):
            scores = {}
            for lr in self.lrs:
                half = yield Probe(lr, 2, draw=stage, keep_end=True, stage=stage, evaluate="none")
                rest = yield Probe(
                    lr, 2, draw=stage, offset=2, start=half.end, shape=self.shape, release=(half.end,),
                    evaluate=self.evaluate, update_bn=stage < 2, stage=stage,
                )  # fmt: skip
                scores[lr] = rest.loss
            best = min(scores, key=scores.__getitem__)
            trained = yield Train(best, self.num_steps, self.shape, keep_start=self.undo, stage=stage)
            if self.undo and stage == 1:
                again = yield Probe(best, 0, evaluate=self.evaluate, update_bn=True)
                assert again.evaluations
                yield Train(best / 3, self.num_steps, start=trained.start, release=(trained.start,), stage=stage)
            elif self.undo:
                yield Probe(best, 0, evaluate="none", release=(trained.start,))


class Search(SearchCallback):
    """Runs any search object."""

    def __init__(self, search: AbstractSearch | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.search = search or Scripted()


def loaders(options: Options) -> tuple[Any, Any]:
    settings: dict[str, Any] = {"batch_size": 6, "shuffle": True, **options.loader}
    if options.stream:
        return DataLoader(Stream(), batch_size=6), DataLoader(NoisyData(18, jitter=False), batch_size=6)
    if options.own_loader:
        return Positioned(), DataLoader(NoisyData(18, jitter=False), batch_size=6)
    if settings.get("generator"):
        settings["generator"] = torch.Generator().manual_seed(7)
    train: Any = DataLoader(NoisyData(), **settings)
    if options.combined:
        from lightning.pytorch.utilities import CombinedLoader

        other = DataLoader(NoisyData(40), batch_size=4, shuffle=True)
        train = CombinedLoader({"a": train, "b": other}, mode="max_size_cycle")
    return train, DataLoader(NoisyData(18, jitter=False), batch_size=6)


def fit(
    options: Options, callback: Callback | None, folder: Path, seed: int = 0, ckpt_path: str | None = None, **more: Any
) -> dict[str, Any]:
    """Train and return everything that could have been disturbed."""
    seed_everything(seed, verbose=False)
    module = (IterSubject if options.dataloader_iter else Subject)(options)
    spy = Spy()
    ema = EMAWeightAveraging(decay=0.9)
    checkpoint = ModelCheckpoint(folder / "ckpt", save_last=True, monitor="val_loss", every_n_train_steps=None)
    stop = EarlyStopping("val_loss", patience=100)
    extra = [options.precision_plugin()] if options.precision_plugin else None
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "val_check_interval": 0.5,
        "log_every_n_steps": 1,
    }
    if options.stream:
        settings.update(max_epochs=-1, max_steps=20, val_check_interval=5)
    settings.update(options.trainer | more)
    trainer = Trainer(
        callbacks=[c for c in (callback, spy, ema, stop, checkpoint) if c is not None],
        logger=CSVLogger(folder, name="", version=""),
        plugins=extra,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    train, val = loaders(options)
    trainer.fit(module, train, val, ckpt_path=ckpt_path)
    return outcome(trainer, module, spy, ema, folder)


def outcome(trainer: Any, module: Subject, spy: Spy, ema: Any, folder: Path) -> dict[str, Any]:
    last = torch.load(folder / "ckpt" / "last.ckpt", weights_only=True)
    last["callbacks"] = {k: v for k, v in last["callbacks"].items() if not k.startswith(("Search", "ScheduleCallback"))}
    for state in last["callbacks"].values():  # paths differ from run to run
        for key in [k for k in state if "path" in k or "dirpath" in k or "best_k" in k]:
            state.pop(key)
    with open(folder / "metrics.csv") as file:
        # The account of the search is what the two runs should differ in; the learning rates are not.
        heard = [k for k in file.readline().strip().split(",") if not k.startswith("autolr/") or k == "autolr/lr"]
        file.seek(0)
        rows = [{k: row[k] for k in heard} for row in csv.DictReader(file)]
    return {
        "weights": dict(module.named_parameters()),
        "buffers": dict(module.named_buffers()),
        "attributes": [
            module.count,
            module.history,
            module.notes,
            vars(module.meter),
            module.own_generator.get_state(),
        ],
        "metric states": [m.metric_state for m in (module.accuracy, module.val_accuracy)],
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "ema": ema.state_dict(),
        "last.ckpt": last,
        "metrics": [row for row in rows if any(v for k, v in row.items() if k not in ("step", "epoch"))],
        "global_step": trainer.global_step,
        "calls": dict(spy.calls),
        "batches": spy.batches,
        "rng": [torch.get_rng_state(), random.getstate(), np.random.get_state()[1]],
    }


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two nested values are not the same to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = (
            a.shape == b.shape
            and a.dtype == b.dtype
            and torch.equal(a.detach().nan_to_num(7), b.detach().nan_to_num(7))
        )
        return [] if same else [path]
    if isinstance(a, np.ndarray):
        return [] if np.array_equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{path}.{k} (missing)" for k in set(a) ^ set(b)]
        return missing + [d for k in a if k in b for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{path} (length {len(a)} and {len(b)})"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}[{i}]")]
    return [] if a == b or (a != a and b != b) else [f"{path} ({a} and {b})"]
