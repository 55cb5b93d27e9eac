"""What does the ratchet see under batch normalisation, with training's running statistics and with new ones?

    python benchmarks/looks.py             # some minutes
    python benchmarks/looks.py --short     # a smoke test

The ConvNet on Fashion-MNIST of ``quality.py``, a warmed-up cosine to 0.3, and forty looks at the validation loss of the same
weights: with the running statistics that training left, and with new ones (``Probe(update_bn=True)``). A jump is the absolute
difference of two neighbouring looks; the trend alone makes the same small ones in both. The looks of the first quarter, where
all losses fall fast, are left out.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import seed_everything
from quality import TASKS
from quiet import quiet_trainer

from lightning_autolr import SearchCallback
from lightning_autolr.core.requests import Probe, Requests, Run, Train
from lightning_autolr.schedules import Cosine, Shifted, Warmup
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.tasks import ClassificationTask

PEAK = 0.3
NUM_LOOKS = 40


@dataclass(frozen=True)
class Looks(AbstractSearch):
    """Train in pieces, and look twice after each."""

    as_trained: list[float] = field(default_factory=list)
    anew: list[float] = field(default_factory=list)

    def requests(self, run: Run) -> Requests:
        total = run.total_steps or NUM_LOOKS
        shape, piece = Warmup(Cosine(), 0.05).stretched(total), total // NUM_LOOKS
        for number in range(NUM_LOOKS):
            yield Train(PEAK, piece, Shifted(shape, number * piece), goes_on=number > 0)
            for update_bn, losses in ((False, self.as_trained), (True, self.anew)):
                answer = yield Probe(PEAK, 0, update_bn=update_bn)
                losses.append(answer.loss)


class LooksCallback(SearchCallback):
    def __init__(self, search: Looks) -> None:
        super().__init__(figures=False)
        self.search = search


def looks(seed: int, num_steps: int) -> Looks:
    task, search = TASKS["fashion"], Looks()
    seed_everything(seed, verbose=False)
    module = ClassificationTask(task.network(), task.num_classes, partial(task.optimizer, lr=task.default_lr))
    with tempfile.TemporaryDirectory() as folder:
        quiet_trainer(Path(folder), num_steps, callbacks=[LooksCallback(search)]).fit(module, task.data())
    return search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one seed, few steps")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    seeds, num_steps = (1, 2 * NUM_LOOKS) if arguments.short else (arguments.seeds, 5000)
    print("| seed | jumps, as trained: median, highest | anew: median, highest | highest look, as trained | anew |")
    print("|--:|--:|--:|--:|--:|")
    for seed in range(seeds):
        found = looks(seed, num_steps)
        cells = [f"{seed}"]
        kept = [np.array(losses[NUM_LOOKS // 4 :]) for losses in (found.as_trained, found.anew)]
        for losses in kept:
            jumps = np.abs(np.diff(losses))
            cells.append(f"{np.median(jumps):.3f}, {jumps.max():.3f}")
        print(f"| {' | '.join([*cells, *(f'{losses.max():.3f}' for losses in kept)])} |", flush=True)


if __name__ == "__main__":
    main()
