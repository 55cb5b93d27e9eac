"""What the engine costs: private steps against plain ones, fork and restore against a copy, a suggestion, and memory.

All of it side by side in one process, in rounds that alternate, with medians over the rounds, so that a busy machine slows
down both sides of a ratio::

    python benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import math
import statistics
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_autolr.core.requests import Probe, Requests, Run, Train
from lightning_autolr.core.surrogate import Observation, suggest
from lightning_autolr.engine.driver import SearchCallback
from lightning_autolr.engine.files import MemoryStore
from lightning_autolr.engine.state import Fork
from lightning_autolr.search.base import AbstractSearch


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    cost: str
    against: str
    ratio: float | None = None
    aim: float | None = None


class Net(LightningModule):
    """A convolutional network whose step takes some milliseconds, as real ones do at least."""

    def __init__(self, width: int = 32, optimizer: str = "adamw") -> None:
        super().__init__()
        self.optimizer = optimizer
        layers: list[nn.Module] = []
        for i, channels in enumerate((3, width, 2 * width, 4 * width)):
            out = (width, 2 * width, 4 * width, 4 * width)[i]
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 4, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self.body(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.body(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=0.001)


@dataclass(frozen=True)
class Alternate(AbstractSearch):
    """As many private steps as real ones, again and again."""

    num_steps: int
    rounds: int

    def requests(self, run: Run) -> Requests:
        for number in range(self.rounds):
            yield Probe(run.lr, self.num_steps, draw=number, evaluate="none", stage=number)
            yield Train(run.lr, self.num_steps, stage=number)


class Timed(SearchCallback):
    """Notes when each real step and each session begins and ends."""

    def __init__(self, search: AbstractSearch) -> None:
        super().__init__(objective="train")
        self.search = search


def data(size: int, batch: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=True)


def private_steps(num_steps: int, rounds: int, batch: int) -> Row:
    """(a) The seconds of all probes, fork and restore included, against those of the real training between them.

    Both are read from the trace, so both see the same machine at almost the same time.
    """
    torch.manual_seed(0)
    callback = Timed(Alternate(num_steps, rounds + 1))
    trainer = _trainer(max_steps=num_steps * (rounds + 1), callbacks=[callback])
    trainer.fit(Net(), data(64 * batch, batch), data(2 * batch, batch))
    seconds = [(type(entry.request), entry.seconds) for entry in callback.trace]
    private = [s for kind, s in seconds if kind is Probe][1:]
    plain = [s for kind, s in seconds if kind is Train][1:]
    ratios = [a / b for a, b in zip(private, plain, strict=True)]
    cost = 1e3 * statistics.median(private) / num_steps
    real = 1e3 * statistics.median(plain) / num_steps
    return Row(
        f"(a) {num_steps} private steps", f"{cost:.2f} ms/step", f"{real:.2f} ms/step", statistics.median(ratios), 1.05
    )


def fork_and_restore(optimizer: str, rounds: int, width: int) -> list[Row]:
    """(b) Capture and restore against one flat copy of the same bytes."""
    module, opt = _trained(optimizer, width)
    fork = Fork([module, opt], MemoryStore())
    fork.capture()
    source, target = (torch.ones(fork.num_bytes // 4) for _ in range(2))
    work: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source), "fork": fork.capture, "restore": fork.restore
    }  # fmt: skip
    times = _alternate(work, rounds)
    size = f"{fork.num_bytes / 2**20:.0f} MiB, {len(fork._tensors)} tensors"
    return [
        Row(
            f"(b) {name}, {optimizer}, {size}", f"{1e3 * statistics.median(times[name]):.2f} ms",
            f"{1e3 * statistics.median(times['copy']):.2f} ms",
            statistics.median(a / b for a, b in zip(times[name], times["copy"], strict=True)), 1.3,
        )
        for name in ("fork", "restore")
    ]  # fmt: skip


def suggestions(rounds: int) -> list[Row]:
    """(c) One suggestion of the Gaussian process."""
    rows = []
    for count in (3, 10, 30):
        rng = np.random.default_rng(0)
        x = rng.uniform(-4, 0, count)
        seen = [Observation(10.0**v, (v + 2) ** 2 + 0.05 * rng.normal()) for v in x]
        times = _alternate({"suggest": functools.partial(suggest, seen, (1e-4, 1.0))}, rounds, time.process_time)[
            "suggest"
        ]
        median = statistics.median(times)
        rows.append(
            Row(
                f"(c) a suggestion after {count} observations",
                f"{1e3 * median:.0f} ms",
                "0.2 s at 10",
                median / 0.2,
                1.0,
            )
        )
    return rows


def memory(optimizer: str, width: int) -> Row:
    """(d) What a fork allocates against the bytes of parameters, buffers and optimizer state."""
    module, opt = _trained(optimizer, width)
    bytes_of = [t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())]
    bytes_of += [t.numel() * t.element_size() for s in opt.state.values() for t in s.values() if isinstance(t, Tensor)]
    store = MemoryStore()
    fork = Fork([module, opt], store)
    gc.collect()
    tracemalloc.start()
    fork.capture()
    python = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    for _ in range(3):  # used again, so nothing is added
        fork.restore()
        fork.capture()
    extra = python + sum(b.untyped_storage().nbytes() for b in store._buffers)
    total = sum(bytes_of)
    return Row(
        f"(d) memory of a fork, {optimizer}", f"{extra / 2**20:.1f} MiB", f"{total / 2**20:.1f} MiB", extra / total, 1.1
    )


def _trained(optimizer: str, width: int) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = Net(width, optimizer)
    opt: torch.optim.Optimizer = module.configure_optimizers()
    cross_entropy(module.body(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    opt.step()
    opt.zero_grad()
    return module, opt


def _alternate(
    work: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each piece of work, one after the other in each round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, do in work.items():
            begun = clock()
            do()
            if number:
                times[name].append(clock() - begun)
    return times


def _trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="auto", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=-1,
        enable_model_summary=False, limit_val_batches=0, default_root_dir=tempfile.mkdtemp(), **options,
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    cells = [("what", "cost", "against", "ratio", "aim")]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        aim = (
            ""
            if row.aim is None
            else f"<= {row.aim:g}{'' if row.ratio is None or row.ratio <= row.aim else '  missed'}"
        )
        cells.append((row.what, row.cost, row.against, ratio, aim))
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=50, help="private steps in a round")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=256, help="of the network that is copied")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    rows = [private_steps(arguments.steps, arguments.rounds, arguments.batch)]
    for optimizer in ("sgd", "adamw"):
        rows += fork_and_restore(optimizer, 3 * arguments.rounds, arguments.width)
    rows += suggestions(arguments.rounds)
    rows += [memory(optimizer, arguments.width) for optimizer in ("sgd", "adamw")]
    assert all(row.ratio is None or math.isfinite(row.ratio) for row in rows)
    print(table(rows))


if __name__ == "__main__":
    main()
