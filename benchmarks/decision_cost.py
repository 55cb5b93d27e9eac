"""What factor search and beam search cost: the time of a factor decision, and the memory of both.

    python benchmarks/decision_cost.py [--short]

Time: a decision (fork, one update, losses at N factors, restore) against its arithmetic alone, one forward and backward pass
and N forward passes of the same network on the same batch in plain torch. They take turns in one process; medians over the
rounds. Memory: the bytes that are held at once beside the training itself, in units of the parameters' bytes; for
factor search as torch's profiler sees them, for beam search as the stores of the kept states hold them.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_autolr import BeamSearchCallback
from lightning_autolr.core.requests import LineProbe
from lightning_autolr.engine.files import DiskStore, MemoryStore, Store
from lightning_autolr.engine.lr import LearningRate
from lightning_autolr.engine.probe import ProbeOptions, Prober
from lightning_autolr.tasks import ByteTransformer, ClassificationTask, ConvNet
from lightning_autolr.tasks.data import TensorData

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=1e-3),
    "SGD with momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, lr=1e-3),
}
FACTORS = {3: (2.0, 1.0, 0.5), 5: (4.0, 2.0, 1.0, 0.5, 0.25), 7: (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125)}


@dataclass(frozen=True)
class Subject:
    """A network and batches for it that keep the arithmetic the larger part."""

    network: Callable[[], nn.Module]
    batch_size: int
    inputs: Callable[[int], Tensor]
    classes: Callable[[int], Tensor]

    def loader(self, num_batches: int = 2) -> DataLoader[Any]:
        size = num_batches * self.batch_size
        data = TensorData(self.inputs(size), self.classes(size))
        return DataLoader(data, batch_size=self.batch_size, shuffle=True, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


SUBJECTS = {
    "MLP, 784-1024-1024-10, batch 2,048": Subject(
        lambda: mlp(1024), 2048, lambda n: torch.randn(n, 784), lambda n: torch.randint(10, (n,))
    ),
    "ConvNet with batch norm, 28 x 28, batch 256": Subject(
        lambda: ConvNet(batch_norm=True), 256, lambda n: torch.randn(n, 1, 28, 28), lambda n: torch.randint(10, (n,))
    ),
    "Transformer, 2 layers of 128, batch 16 x 128": Subject(
        lambda: ByteTransformer(),
        16,
        lambda n: torch.randint(256, (n, 128)),
        lambda n: torch.randint(256, (n, 128)),
    ),
}


@dataclass
class Decide(Callback):
    """Makes factor decisions before the second step, by the engine and in plain torch, in turns."""

    factors: tuple[float, ...]
    rounds: int
    engine: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    profiled: int = 0  # most bytes held at once during one decision
    gradients: int = 0  # and during one backward pass

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            return  # the optimizer has no state yet
        prober = Prober(trainer, LearningRate(trainer.optimizers), ProbeOptions())

        def decide(number: int) -> None:
            with prober.session():
                prober.answer(LineProbe(1e-3, self.factors, draw=number), "")

        count = len(self.factors)
        decide(0)  # checks once that the update is linear in the learning rate
        for number in range(self.rounds):
            self.engine.append(_seconds(partial(decide, 1 + number)))
            self.plain.append(_seconds(partial(_arithmetic, module, batch, count)))
        prober.close()
        module.zero_grad()
        self.profiled = most_bytes(partial(decide, 0))
        prober.close()
        module.zero_grad()
        self.gradients = most_bytes(lambda: module.training_step(batch, 0).backward())


def _arithmetic(module: Any, batch: Any, num_forwards: int) -> None:
    state = copy.deepcopy(module.state_dict())
    module.training_step(batch, 0).backward()
    with torch.no_grad():
        for _ in range(num_forwards):
            module.training_step(batch, 0)
    module.zero_grad()
    module.load_state_dict(state)


def _models(network: nn.Module, batch: tuple[Tensor, Tensor], count: int) -> None:
    """The published way: a copy of the model for each factor, with its own gradients."""
    models = [copy.deepcopy(network) for _ in range(count)]
    for model in models:
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()


def _seconds(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def most_bytes(work: Callable[[], None]) -> int:
    """The most bytes of tensors that were held at once during the work, beyond those held before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


@contextmanager
def weighed() -> Iterator[dict[str, int]]:
    """How many stores of forks held how many bytes at most, in memory and in files, while the block ran."""
    most = {"states": 0, "memory": 0, "files": 0}
    holding: dict[int, tuple[int, int]] = {}

    def watched(save: Any, clear: Any) -> tuple[Any, Any]:
        def save_and_weigh(self: Store, tensors: Any) -> None:
            save(self, tensors)
            if isinstance(self, MemoryStore):
                holding[id(self)] = (sum(b.untyped_storage().nbytes() for b in self._buffers), 0)
            elif isinstance(self, DiskStore):
                holding[id(self)] = (0, os.path.getsize(self._path))
            most["states"] = max(most["states"], len(holding))
            for i, what in enumerate(("memory", "files")):
                most[what] = max(most[what], sum(sizes[i] for sizes in holding.values()))

        def clear_and_forget(self: Store) -> None:
            clear(self)
            holding.pop(id(self), None)

        return save_and_weigh, clear_and_forget

    names = ("save", "clear")
    new = {kind: dict(zip(names, watched(kind.save, kind.clear), strict=True)) for kind in (MemoryStore, DiskStore)}
    with patch.multiple(MemoryStore, **new[MemoryStore]), patch.multiple(DiskStore, **new[DiskStore]):
        yield most


def fit(subject: Subject, callback: Callback, optimizer: Any, max_steps: int) -> ClassificationTask:
    seed_everything(0, verbose=False)
    module = ClassificationTask(subject.network(), num_classes=256, optimizer=optimizer)
    trainer = quiet_trainer(Path(tempfile.mkdtemp()), max_steps, callbacks=[callback])
    trainer.fit(module, subject.loader())
    return module


def num_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def time_table(rounds: int, subjects: dict[str, Subject]) -> str:
    """Of each decision."""
    lines = [
        "| network | factors | decision, ms | ratio to forward, backward and N forwards | 25 to 75 % |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, subject in subjects.items():
        for factors in FACTORS.values():
            decide = Decide(factors, rounds)
            fit(subject, decide, OPTIMIZERS["SGD with momentum"], 2)
            ratios = [a / b for a, b in zip(decide.engine, decide.plain, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cost = 1e3 * statistics.median(decide.engine)
            lines.append(f"| {name} | {len(factors)} | {cost:.0f} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def memory_table(width: int) -> str:
    """One decision's most bytes at once, in units of the parameters' bytes; batches are small, the parameters many."""
    subject = Subject(lambda: mlp(width), 8, lambda n: torch.randn(n, 784), lambda n: torch.randint(10, (n,)))
    lines = ["| optimizer | 3 factors | 5 factors | 7 factors | a training step's gradients |", "|---|--:|--:|--:|--:|"]
    for name, optimizer in OPTIMIZERS.items():
        cells = []
        for factors in FACTORS.values():
            decide = Decide(factors, 2)
            module = fit(subject, decide, optimizer, 2)
            cells.append(f"{decide.profiled / num_bytes(module):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {decide.gradients / num_bytes(module):.2f} |")
    network, batch = subject.network(), (torch.randn(8, 784), torch.randint(10, (8,)))
    cells = [f"{most_bytes(partial(_models, network, batch, n)) / num_bytes(network):.2f}" for n in FACTORS]
    lines.append(f"| (a model for each factor) | {' | '.join(cells)} | |")
    return "\n".join(lines)


def beam_table(width: int, rounds: int) -> str:
    """The stores of a beam search on a real module, at their fullest."""
    subject = Subject(lambda: mlp(width), 8, lambda n: torch.randn(n, 784), lambda n: torch.randint(10, (n,)))
    lines = ["| M | fork | keep_ends | copies at once | memory, training states | files, training states |"]
    lines += ["|--:|---|---|--:|--:|--:|"]
    for beam_size in (1, 2, 3):
        for fork, keep_ends in (("device", False), ("device", True), ("cpu", False), ("disk", False)):
            search = BeamSearchCallback(beam_size, interval=2, fork=fork, keep_ends=keep_ends, figures=False)
            with weighed() as most:
                module = fit(subject, search, OPTIMIZERS["SGD with momentum"], 2 * rounds)
            state = 2 * num_bytes(module)  # parameters and momentum
            lines.append(
                f"| {beam_size} | {fork} | {keep_ends} | {most['states']} | {most['memory'] / state:.2f} "
                f"| {most['files'] / state:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--short", action="store_true", help="one network, three rounds")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    subjects = dict(list(SUBJECTS.items())[:1]) if arguments.short else SUBJECTS
    rounds, width = (3, 128) if arguments.short else (arguments.rounds, 1024)
    print("### Time of a factor decision\n\n" + time_table(rounds, subjects), flush=True)
    print("\n### Memory of a factor decision, in units of the parameters\n\n" + memory_table(width), flush=True)
    print("\n### Memory of beam search, copies of the training state\n\n" + beam_table(width, 3), flush=True)


if __name__ == "__main__":
    main()
