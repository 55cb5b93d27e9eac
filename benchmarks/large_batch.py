"""Large batches: AutoWU against tuned and scaled learning rates. Fashion-MNIST, LAMB, batch sizes 256 and 4,096, equal epochs.

    python benchmarks/large_batch.py            # everything; goes on where it stopped
    python benchmarks/large_batch.py --short    # a smoke test
    python benchmarks/large_batch.py --table    # only the tables of what was run

Every run sees as many batches as every other one of its batch size: 20 epochs of 40,960 pictures, that is 3,200 steps of 256 or
200 of 4,096; steps that were undone and steps of a search are among them. "Tuned" learning rates are the best of five by
validation loss on the first seed (that tuning is not counted); "scaled" ones are the learning rate tuned for the cosine at
256, times the ratio of the batch sizes or its square root, with five epochs of linear warm-up before the cosine. The test split
is read once, at the end of each run. One line of JSON per run in ``--out``.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import seed_everything
from quiet import quiet_trainer
from scipy import stats
from torch import nn

from lightning_autolr import AutoLRSCallback, AutoWUCallback, ScheduleCallback, SearchCallback
from lightning_autolr.core.requests import Train
from lightning_autolr.engine.driver import Entry
from lightning_autolr.schedules import Constant, Cosine, Schedule, Warmup
from lightning_autolr.tasks import ClassificationTask, FashionMNISTData

BATCH_SIZES = (256, 4096)
NUM_TRAIN, NUM_EPOCHS, WARMUP_EPOCHS = 40_960, 20, 5
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

TUNED: dict[str, Schedule] = {"constant": Constant(), "cosine": Cosine()}
SCALED = {"linear scaling": 1.0, "square-root scaling": 0.5}  # exponent of the ratio of the batch sizes
AUTOMATIC: dict[str, Callable[[], SearchCallback]] = {
    "AutoWU": lambda: AutoWUCallback(figures=False),
    "AutoWU, constant then cosine": lambda: AutoWUCallback(immediate_cooldown=False, figures=False),
    "AutoWU from 1e-3": lambda: AutoWUCallback(min_lr=1e-3, figures=False),
    "AutoWU, published rules": lambda: AutoWUCallback(compat=True, figures=False),
    "AutoLRS": lambda: AutoLRSCallback(count_search=True, figures=False),
    "AutoLRS after AutoWU": lambda: AutoLRSCallback(warmup="autowu", count_search=True, figures=False),
}
ORACLE = "cosine"

Job = tuple[int, str, float | None, int]  # batch size, method, learning rate (None: it finds its own), seed


class Perceptron(nn.Sequential):
    """Two hidden layers with batch normalisation and dropout."""

    def __init__(self, widths: tuple[int, int] = (256, 128), dropout: float = 0.3) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in ((28 * 28, widths[0]), widths):
            layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Linear(widths[-1], 10))


@functools.cache
def data(batch_size: int) -> FashionMNISTData:
    return FashionMNISTData(batch_size=batch_size, eval_batch_size=2500, num_train=NUM_TRAIN, num_val=5000)


def num_steps(batch_size: int, epochs: int) -> int:
    return epochs * (NUM_TRAIN // batch_size)


def callback_of(method: str, epochs: int) -> SearchCallback | ScheduleCallback:
    if method in AUTOMATIC:
        return AUTOMATIC[method]()
    return ScheduleCallback(TUNED[method] if method in TUNED else Warmup(Cosine(), min(WARMUP_EPOCHS / epochs, 0.5)))


def run(batch_size: int, method: str, lr: float | None, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """One training, and what its warm-up found."""
    from pytorch_optimizer import Lamb  # the tables want no optimizer

    seed_everything(seed, verbose=False)
    optimizer = partial(Lamb, lr=1e-2 if lr is None else lr, weight_decay=0.01)
    module = ClassificationTask(Perceptron(), optimizer=optimizer)
    callback = callback_of(method, epochs)
    total = num_steps(batch_size, epochs)
    name = f"{batch_size}-{method}-{lr}-{seed}".replace(" ", "_")
    trainer = quiet_trainer(folder / name, total, callbacks=[callback], val_check_interval=total)
    begun = time.perf_counter()
    trainer.fit(module, data(batch_size))
    seconds = time.perf_counter() - begun
    (validated,) = trainer.validate(module, data(batch_size), verbose=False)
    (tested,) = trainer.test(module, data(batch_size), verbose=False)
    summary = callback.summary
    return {
        "batch_size": batch_size,
        "method": method,
        "lr": lr,
        "seed": seed,
        "steps": total,
        "real_steps": trainer.global_step,
        "search_steps": summary["search_steps"],
        "undone_steps": summary["undone_steps"],
        "val_loss": _finite(validated["val_loss"]),
        "test_loss": _finite(tested["test_loss"]),
        "test_acc": tested["test_acc"],
        "seconds": seconds,
        **(warmup_of(callback.trace) if "AutoWU" in method else {}),
    }


def warmup_of(trace: list[Entry]) -> dict[str, Any]:
    """How far AutoWU's warm-up went, and what followed."""
    climb = [e for e in trace if isinstance(e.request, Train) and e.request.kind == "climb"]
    steps = sum(len(e.answer.losses) for e in climb)
    last = climb[-1].request
    after = next(e.request for e in trace if e not in climb and isinstance(e.request, Train))
    return {
        "warmup_steps": steps,
        "reached_lr": last.lr * last.shape(len(climb[-1].answer.losses) - 1),
        "found_lr": after.lr,
        "reason": after.reason,
        "losses": [round(loss, 4) for e in climb for loss in e.answer.losses],
    }


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else 1e4


def jobs(seeds: int, rows: list[dict[str, Any]]) -> Iterator[Job]:
    """All runs, seed by seed. ``rows`` grows meanwhile: what was tuned on the first seed is read from it."""
    for seed in range(seeds):
        # the scaled learning rates of the large batch rest on the tuned ones of the small, on the first seed
        for batch_size in BATCH_SIZES if seed == 0 else reversed(BATCH_SIZES):
            for method in AUTOMATIC:
                yield batch_size, method, None, seed
            for method in TUNED:
                for lr in GRID if seed == 0 else (tuned(batch_size, method, rows),):
                    yield batch_size, method, lr, seed
            ratio = batch_size / BATCH_SIZES[0]
            for method, exponent in SCALED.items() if ratio > 1 else list(SCALED.items())[:1]:
                yield batch_size, method, tuned(BATCH_SIZES[0], ORACLE, rows) * ratio**exponent, seed


def tuned(batch_size: int, method: str, rows: list[dict[str, Any]]) -> float:
    """The learning rate of the grid with the lowest validation loss on the first seed."""
    of = [r for r in rows if (r["batch_size"], r["method"], r["seed"]) == (batch_size, method, 0)]
    return float(min(of, key=lambda r: r["val_loss"])["lr"])


def table(rows: list[dict[str, Any]]) -> str:
    """Test losses by method, with the 95 % t interval of the paired difference to the tuned cosine; then the warm-ups."""
    lines: list[str] = []
    for batch_size in BATCH_SIZES:
        mine = [r for r in rows if r["batch_size"] == batch_size]
        arms = {}
        for method in dict.fromkeys(r["method"] for r in mine):
            of = [r for r in mine if r["method"] == method]
            lr = tuned(batch_size, method, rows) if method in TUNED else of[0]["lr"]
            name = method + ("" if lr is None else f", {'tuned, ' if method in TUNED else ''}LR {lr:.2g}")
            arms[name] = {r["seed"]: r for r in of if r["lr"] == lr}
        oracle = next((arm for name, arm in arms.items() if name.startswith(f"{ORACLE}, tuned")), {})
        if not mine:
            continue
        lines += ["", f"### Batch size {batch_size:,}: {mine[0]['steps']:,} steps", ""]
        lines += [
            "| method | seeds | test loss | against the tuned cosine (95 %) | test accuracy, % | undone | search |"
        ]
        lines += ["|---|--:|--:|--:|--:|--:|--:|"]
        for name, arm in sorted(arms.items(), key=lambda item: _mean(item[1], "test_loss")):
            loss, accuracy = _mean(arm, "test_loss"), 100 * _mean(arm, "test_acc")
            undone, search = _mean(arm, "undone_steps"), _mean(arm, "search_steps")
            lines.append(
                f"| {name} | {len(arm)} | {loss:.4f} | {_against(arm, oracle)} | {accuracy:.2f} | {undone:.0f} | {search:.0f} |"
            )
    lines += ["", "### What the warm-ups found", ""]
    lines += ["| batch size | method | steps of warm-up | went up to LR | went on at LR |", "|--:|---|---|---|---|"]
    for batch_size in BATCH_SIZES:
        for method in AUTOMATIC:
            of = [r for r in rows if (r["batch_size"], r["method"]) == (batch_size, method)]
            if of and "warmup_steps" in of[0]:
                cells = [", ".join(f"{r[key]:.2g}" for r in of) for key in ("reached_lr", "found_lr")]
                steps = ", ".join(str(r["warmup_steps"]) for r in of)
                lines.append(f"| {batch_size} | {method} | {steps} | {cells[0]} | {cells[1]} |")
    grid = [r for r in rows if r["seed"] == 0 and r["method"] in TUNED]
    lines += ["", "### The grids: validation loss on the first seed", ""]
    lines += [
        "| batch size | method | " + " | ".join(f"{lr:g}" for lr in GRID) + " |",
        "|--:|---|" + "--:|" * len(GRID),
    ]
    for key in dict.fromkeys((r["batch_size"], r["method"]) for r in grid):
        losses = {r["lr"]: r["val_loss"] for r in grid if (r["batch_size"], r["method"]) == key}
        lines.append(f"| {key[0]} | {key[1]} | " + " | ".join(f"{losses.get(lr, math.nan):.4f}" for lr in GRID) + " |")
    return "\n".join(lines)


def _mean(arm: dict[int, dict[str, Any]], key: str) -> float:
    return float(np.mean([r[key] for r in arm.values()]))


def _against(arm: dict[int, dict[str, Any]], oracle: dict[int, dict[str, Any]]) -> str:
    seeds = sorted(set(arm) & set(oracle))
    if arm == oracle or not seeds:
        return "-"
    differences = np.array([arm[s]["test_loss"] - oracle[s]["test_loss"] for s in seeds])
    if len(seeds) < 2:
        return f"{differences.mean():+.4f}"
    low, high = stats.t.interval(0.95, len(seeds) - 1, differences.mean(), stats.sem(differences))
    return f"{differences.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=NUM_EPOCHS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/large_batch.jsonl"))
    parser.add_argument("--short", action="store_true", help="the large batch, one seed, three methods, three epochs")
    parser.add_argument("--table", action="store_true", help="print the tables of what was run, and run nothing")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.epochs, arguments.out = 3, Path("runs/large-batch-short.jsonl")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = {(r["batch_size"], r["method"], r["lr"], r["seed"]) for r in rows}
    wanted: Iterator[Job] = jobs(arguments.seeds, rows)
    if arguments.short:
        wanted = iter([(4096, "AutoWU", None, 0), (4096, "AutoLRS after AutoWU", None, 0), (4096, "cosine", 1e-2, 0)])
    for job in () if arguments.table else wanted:
        if job in done:
            continue
        row = run(*job, arguments.epochs, Path("runs/large-batch"))
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(f"{job}: test loss {row['test_loss']:.4f}, {row['seconds']:.0f} s", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
