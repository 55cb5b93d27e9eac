"""How steady is the best candidate? Its learning rate over seeds, by what scores a candidate and by its length.

    python benchmarks/candidates.py [--short]

On the networks of ``quality.py``, annealed candidates of one length are made from the first weights, on a grid of learning
rates (factors of 1.4), on the same batches. For each seed the best learning rate is the vertex of a parabola through the best
candidate and two neighbours on either side. Printed are its geometric mean over the seeds, and the geometric standard
deviation behind the sign x: 1.2 is a seed's error of 20 %.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import seed_everything
from quality import TASKS
from quiet import quiet_trainer

from lightning_autolr import SearchCallback
from lightning_autolr.core.requests import Evaluation, Probe, ProbeResult, Requests, Run
from lightning_autolr.schedules import Linear
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.tasks import ClassificationTask

SCORES = ("training losses of the second half", "validation")


@dataclass(frozen=True)
class Everywhere(AbstractSearch):
    """Candidates of every length at every learning rate, then nothing more."""

    lengths: Sequence[int]
    grid: Sequence[float]
    found: dict[tuple[int, float], ProbeResult] = field(default_factory=dict)

    def requests(self, run: Run) -> Requests:
        for length in self.lengths:
            for lr in self.grid:
                self.found[length, lr] = yield Probe(lr, length, draw=1, shape=Linear())


class EverywhereCallback(SearchCallback):
    def __init__(self, search: Everywhere) -> None:
        super().__init__(figures=False)
        self.search = search


def candidates(name: str, seed: int, lengths: Sequence[int], num_lrs: int) -> dict[tuple[int, float], ProbeResult]:
    """Answers by length and learning rate; the grid of learning rates lies around the one of ``quality.py``."""
    task = TASKS[name]
    low, high = math.log10(task.grid[0] / 2), math.log10(task.grid[-1] * 2)
    search = Everywhere(lengths, np.logspace(low, high, num_lrs).tolist())
    seed_everything(seed, verbose=False)
    module = ClassificationTask(task.network(), task.num_classes, partial(task.optimizer, lr=task.default_lr))
    with tempfile.TemporaryDirectory() as folder:
        quiet_trainer(Path(folder), 1, callbacks=[EverywhereCallback(search)]).fit(module, task.data())
    return search.found


def score(answer: ProbeResult, by: str) -> float:
    if by == SCORES[1] or not math.isfinite(answer.loss):
        return answer.loss
    return Evaluation.of_training(answer.losses).mean


def best(scores: Mapping[float, float]) -> float:
    """Log of the learning rate at the vertex."""
    lrs = sorted(lr for lr in scores if math.isfinite(scores[lr]))
    i = min(range(len(lrs)), key=lambda j: scores[lrs[j]])
    near = lrs[max(0, i - 2) : i + 3]
    x, y = np.log(near), np.minimum([scores[lr] for lr in near], 1.5 * scores[lrs[i]])
    a, b, _ = np.polyfit(x, y, 2) if len(near) > 2 else (0.0, 0.0, 0.0)
    return float(np.clip(-b / (2 * a), x[0], x[-1])) if a > 0 else math.log(lrs[i])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--short", action="store_true", help="one task, two seeds, short candidates")
    arguments = parser.parse_args()
    lengths, num_lrs = (25, 50), 18
    if arguments.short:
        arguments.tasks, arguments.seeds, lengths, num_lrs = ["digits"], 2, (4, 8), 6
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(f"| task | steps | {' | '.join(SCORES)} |\n|---|--:|--:|--:|")
    for name in arguments.tasks:
        runs = [candidates(name, seed, lengths, num_lrs) for seed in range(arguments.seeds)]
        for length in lengths:
            cells = []
            for by in SCORES:
                lrs = [best({lr: score(a, by) for (n, lr), a in run.items() if n == length}) for run in runs]
                cells.append(f"{math.exp(np.mean(lrs)):.2g} x{math.exp(np.std(lrs, ddof=1)):.2f}")
            print(f"| {name} | {length} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
