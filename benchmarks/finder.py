"""Lightning's own learning-rate finder against our range test, run live on the installed Lightning.

    python benchmarks/finder.py [--seeds 8]

A small MLP on three-class points, Adam. What is right is measured first: the best constant learning rate of a grid.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # the finder draws its own bars

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import lr_scheduler as sched
from torch.utils.data import DataLoader, TensorDataset

from lightning_autolr import RangeTestCallback

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: sched.StepLR(o, 10, 0.5),
    "CosineAnnealingLR": lambda o: sched.CosineAnnealingLR(o, 100),
    "LinearLR": lambda o: sched.LinearLR(o, 0.5, total_iters=20),
    "LambdaLR": lambda o: sched.LambdaLR(o, lambda t: 0.99**t),
    "OneCycleLR": lambda o: sched.OneCycleLR(o, max_lr=[g["lr"] for g in o.param_groups], total_steps=100),
    "SequentialLR": lambda o: sched.SequentialLR(
        o, [sched.LinearLR(o, 0.1, total_iters=10), sched.StepLR(o, 20)], [10]
    ),
}


class MLP(LightningModule):
    """What a user would write, with switches for what finders have trouble with."""

    def __init__(
        self, lr: float = 1e-3, scheduler: str | None = None, groups: bool = False, negative: bool = False
    ) -> None:
        super().__init__()
        self.lr = lr
        self.scheduler, self.groups, self.negative = scheduler, groups, negative
        self.optimizers_wanted, self.tensor_lr = 1, False
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
        self.seen: list[float] = []
        self.used: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.last_loss = float(loss.detach())
        return loss - 5 if self.negative else loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(float(args[1][0].sum()))
        self.used.append([float(g["lr"]) for o in self.trainer.optimizers for g in o.param_groups])

    def configure_optimizers(self) -> Any:
        lr: Any = torch.tensor(self.lr) if self.tensor_lr else self.lr
        first, last = list(self.net[0].parameters()), list(self.net[2].parameters())
        if self.optimizers_wanted == 2:
            return [torch.optim.Adam(first, lr), torch.optim.Adam(last, lr)]
        groups = [{"params": first, "lr": 0.1 * self.lr}, {"params": last}] if self.groups else first + last
        optimizer = torch.optim.Adam(groups, lr)
        if self.scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": SCHEDULERS[self.scheduler](optimizer), "interval": "step"}]


class TwoOptimizers(MLP):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimizers_wanted = 2

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return loss


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(1024) % 3
    x = torch.randn(1024, 16, generator=generator) + nn.functional.one_hot(y, 16) * 1.5
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)


def fit(module: LightningModule, *callbacks: Callback, seed: int = 0, **settings: Any) -> LightningModule:
    seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            **{
                "accelerator": "cpu",
                "max_epochs": 1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": folder,
                "callbacks": list(callbacks),
                **settings,
            }
        ).fit(module, loader())
    return module


class Milestones(LearningRateFinder):
    """The example of Lightning's documentation."""

    def __init__(self, milestones: tuple[int, ...]) -> None:
        super().__init__()
        self.milestones, self.found = milestones, []

    def on_fit_start(self, *args: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch in self.milestones or trainer.current_epoch == 0:
            self.lr_find(trainer, pl_module)
            self.found.append((len(self.optimal_lr.results["lr"]), self.optimal_lr.suggestion()))


def theirs(module: MLP, seed: int = 0) -> float | None:
    finder = LearningRateFinder()
    fit(module, finder, seed=seed)
    return finder.optimal_lr.suggestion()


def ours(module: MLP, seed: int = 0, **options: Any) -> RangeTestCallback:
    callback = RangeTestCallback(**{"apply": True, "seed": seed, **options})
    fit(module, callback, seed=seed)
    return callback


def attempt(what: Callable[[], str]) -> str:
    try:
        return what()
    except Exception as error:  # the outcome that the table reports
        return f"{type(error).__name__}"


def spread(values: list[float | None]) -> str:
    found = sorted(v for v in values if v is not None)
    if not found:
        return "none"
    return f"{found[0]:.1e} ... {statistics.median(found):.1e} ... {found[-1]:.1e} ({len(found)} of {len(values)})"


def best_constant(lrs: list[float]) -> tuple[float, str]:
    losses = {}
    for lr in lrs:
        module = MLP(lr)
        fit(module, max_epochs=3)
        x, y = next(iter(DataLoader(loader().dataset, batch_size=1024)))
        losses[lr] = float(nn.functional.cross_entropy(module.net(x), y))
    return min(losses, key=losses.__getitem__), ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in losses.items())


def kept(module: MLP, suggestion: float | None, scheduler: str) -> str:
    """Whether the run used the rates that a module configured with the suggestion would use."""
    if suggestion is None:
        return "no suggestion"
    wanted = fit(MLP(suggestion, scheduler)).used
    wrong = [
        i
        for i, (a, b) in enumerate(zip(module.used[-len(wanted) :], wanted, strict=False))
        if abs(a[0] / b[0] - 1) > 0.01
    ]
    return "kept" if not wrong else f"lost at step {wrong[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    seeds = range(parser.parse_args().seeds)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    table = Table("what", f"Lightning {lightning.__version__}", "ours", title="Learning-rate finders")
    best, losses = best_constant([1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    table.add_row("best constant learning rate, and final losses", f"{best:g}", losses)
    table.add_row(
        f"suggestion over {len(seeds)} seeds: lowest ... median ... highest",
        spread([theirs(MLP(), seed) for seed in seeds]),
        spread([ours(MLP(), seed).suggestions[0].lr for seed in seeds]),
    )
    for name in SCHEDULERS:
        a, b = MLP(scheduler=name), MLP(scheduler=name)
        found = theirs(a)
        table.add_row(
            f"learning rate after the test, {name}", kept(a, found, name), kept(b, ours(b).suggestions[0].lr, name)
        )

    def ratio(module: MLP) -> str:
        return f"{module.used[-1][0] / module.used[-1][1]:.2g}"

    a, b = MLP(groups=True), MLP(groups=True)
    theirs(a), ours(b)
    table.add_row("two groups configured at 0.1 : 1", ratio(a), ratio(b))

    def milestones() -> str:
        callback = Milestones((0, 1, 2))
        fit(MLP(), callback, max_epochs=3)
        return "; ".join(f"{n} points, {s if s is None else format(s, '.1e')}" for n, s in callback.found)

    def own_milestones() -> str:
        callback = RangeTestCallback(milestones=(0, 1, 2))
        fit(MLP(), callback, max_epochs=3)
        return "; ".join(
            f"{len(s.curves[0].lrs)} points, {s.lr if s.lr is None else format(s.lr, '.1e')}"
            for s in callback.suggestions.values()
        )

    table.add_row("at epochs 0, 1, 2 (the documentation's example)", attempt(milestones), attempt(own_milestones))
    table.add_row(
        "a loss below zero",
        attempt(lambda: str(theirs(MLP(negative=True)))),
        attempt(lambda: f"{ours(MLP(negative=True)).suggestions[0].lr:.1e}"),
    )
    table.add_row(
        "two optimizers",
        attempt(lambda: str(theirs(TwoOptimizers()))),
        attempt(lambda: f"{ours(TwoOptimizers()).suggestions[0].lr:.1e}"),
    )

    def stays_tensor(find: Callable[[MLP], Any]) -> str:
        module = MLP()
        module.tensor_lr = True
        kinds: list[str] = []
        module.on_train_end = lambda: kinds.append(type(module.trainer.optimizers[0].param_groups[0]["lr"]).__name__)
        find(module)
        return kinds[-1]

    table.add_row(
        "a learning rate that is a tensor stays",
        attempt(lambda: stays_tensor(theirs)),
        attempt(lambda: stays_tensor(ours)),
    )
    plain = MLP()
    a, b = copy.deepcopy(plain), copy.deepcopy(plain)
    fit(plain)
    theirs(a), ours(b, apply=False)
    table.add_row(
        "order of the run's batches",
        *("unchanged" if module.seen[-len(plain.seen) :] == plain.seen else "changed" for module in (a, b)),
    )
    reference = copy.deepcopy(plain.net.state_dict())
    same = all(torch.equal(reference[k], v) for k, v in b.net.state_dict().items())
    table.add_row("weights after a test that is not applied", "-", "the same bits" if same else "differ")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
