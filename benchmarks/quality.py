"""Does it train better? Final test loss at equal total optimizer steps, search included.

    python benchmarks/quality.py                    # everything (hours on 2 cores); goes on where it stopped
    python benchmarks/quality.py --tasks digits --methods autolrs cosine --seeds 2
    python benchmarks/quality.py --short            # a smoke test
    python benchmarks/quality.py --table            # only the table of what was run

Every method has the same number of optimizer steps; what it searches with is not trained with. ("autolrs, search not counted"
has its private steps on top, as the callback does unless it is told otherwise; undone steps are steps there, too.) Fixed
schedules are shown twice: with the library's default learning rate, and tuned: with the best of five by validation loss on the
first seed (that tuning is not counted). The oracle of a task is the tuned schedule with the lowest validation loss over the
seeds that all tuned ones have and whose last weights are tested; "best checkpoint" arms are tested on the weights of their
lowest validation loss. Results are read on a test split that no method sees. "Sooner": how many times sooner than the tuned
cosine its final validation loss is reached, counting the steps of the schedule, and counting all. One line of JSON per run in
``--out``; several processes may share it, each with its own ``--tasks``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import Callback
from quiet import quiet_trainer
from scipy.stats import bootstrap

from lightning_autolr import AutoLRSCallback, BeamSearchCallback, FactorSearchCallback, ScheduleCallback, SearchCallback
from lightning_autolr.core.requests import Requests, Run, Train
from lightning_autolr.schedules import (
    Constant,
    Cosine,
    Linear,
    OneCycle,
    Rex,
    Schedule,
    Step,
    Warmup,
    WarmupStableDecay,
)
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.range_test import RangeTest
from lightning_autolr.tasks import (
    ByteTransformer,
    CharLMData,
    ClassificationTask,
    ConvNet,
    DigitsData,
    FashionMNISTData,
    MLPMixer,
)


@dataclass(frozen=True)
class Task:
    """A network, its data, its optimizer, and how long it is trained."""

    network: Callable[[], torch.nn.Module]
    data: Callable[[], LightningDataModule]
    optimizer: Callable[..., torch.optim.Optimizer]
    grid: tuple[float, ...]
    steps: int
    default_lr: float = 1e-3  # torch's, for SGD and AdamW alike
    num_classes: int = 10
    extra: dict[str, Any] = field(default_factory=dict)


SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
AdamW = partial(torch.optim.AdamW, weight_decay=0.01)
SGD_GRID = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAM_GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)

TASKS = {
    "digits": Task(lambda: ConvNet(widths=(16, 32)), DigitsData, SGD, SGD_GRID, 2000),
    "noisy digits": Task(lambda: ConvNet(widths=(16, 32)), lambda: DigitsData(label_noise=0.1), AdamW, ADAM_GRID, 2000),
    "fashion": Task(
        lambda: ConvNet(widths=(8, 16), batch_norm=True),
        lambda: FashionMNISTData(num_train=10_000, num_val=1000),
        SGD,
        SGD_GRID,
        1000,
    ),
    "mixer": Task(
        lambda: MLPMixer(28, width=24, depth=2),
        lambda: FashionMNISTData(num_train=10_000, num_val=1000),
        AdamW,
        ADAM_GRID,
        1000,
    ),
    "char-lm": Task(
        lambda: ByteTransformer(width=48, context=32, depth=2),
        lambda: CharLMData(batch_size=16, context=32, val_fraction=0.005, test_fraction=0.02),
        AdamW,
        ADAM_GRID,
        1000,
        num_classes=256,
    ),
}

BEST = ", best checkpoint"  # at the end of its name, a method is tested on the weights of its lowest validation loss

SCHEDULES: dict[str, Schedule] = {
    "constant": Constant(),
    "linear": Linear(),
    "cosine": Cosine(),
    "warm-up cosine": Warmup(Cosine(), 0.05),
    "rex": Rex(),
    "step": Step(),
    "one-cycle": OneCycle(),
    "warm-up stable decay": WarmupStableDecay(),
    "cosine" + BEST: Cosine(),
    "warm-up stable decay" + BEST: WarmupStableDecay(),
}


@dataclass(frozen=True)
class RangeThen(AbstractSearch):
    """The best recipe without tuning today: a range test, then a fixed schedule over the steps that are left."""

    schedule: Schedule

    def requests(self, run: Run) -> Requests:
        suggestion = yield from RangeTest(repeats=1, rule="edge").measure()  # the rule for schedules that decay
        left = (run.total_steps or 0) - 100
        yield Train(suggestion.lr or run.lr, left, self.schedule.stretched(left))


class RangeThenCallback(SearchCallback):
    def __init__(self, schedule: Schedule, **options: Any) -> None:
        super().__init__(**options)
        self.search = RangeThen(schedule)


class ScheduleFreeMode(Callback):
    """Schedule-free optimizers have one set of weights to train with and another to evaluate."""

    def _set(self, trainer: Any, mode: str) -> None:
        for optimizer in trainer.optimizers:
            getattr(optimizer, mode)()

    def on_train_start(self, trainer: Any, *args: Any) -> None:
        self._set(trainer, "train")

    def on_validation_start(self, trainer: Any, *args: Any) -> None:
        self._set(trainer, "eval")

    def on_validation_end(self, trainer: Any, *args: Any) -> None:
        self._set(trainer, "train")

    def on_train_end(self, trainer: Any, *args: Any) -> None:
        self._set(trainer, "eval")


def searches(task: Task) -> dict[str, Callable[[], list[Callback]]]:
    """Methods that need no learning rate from the user."""

    def warmed() -> list[Callback]:
        return [RangeThenCallback(Warmup(Cosine(), 0.05), count_search=True)]

    return {
        "autolrs": lambda: [AutoLRSCallback(count_search=True)],
        "autolrs, search not counted": lambda: [AutoLRSCallback()],
        "autolrs, published": lambda: [
            AutoLRSCallback(tau=task.steps // 20, method="published", objective="auto", count_search=True)
        ],
        "range test + cosine": lambda: [RangeThenCallback(Cosine(), count_search=True)],
        "range test + warm-up cosine": warmed,
        "range test + warm-up cosine" + BEST: warmed,
        "factor search": lambda: [FactorSearchCallback(count_search=True, every=task.steps // 20)],
        "factor search, scores shuffled": lambda: [
            FactorSearchCallback(count_search=True, every=task.steps // 20, shuffle_scores=True)
        ],
        "beam search": lambda: [BeamSearchCallback(count_search=True, interval=task.steps // 20)],
        **autowu(),
    }


def autowu() -> dict[str, Callable[[], list[Callback]]]:
    from lightning_autolr import AutoWUCallback

    return {"autowu": lambda: [AutoWUCallback()]}


def optimizers(task: Task) -> dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[[], list[Callback]]]]:
    """Optimizers that set their own step size."""
    import prodigyopt
    import schedulefree

    free = schedulefree.SGDScheduleFree if task.optimizer is SGD else schedulefree.AdamWScheduleFree
    return {
        "prodigy + cosine": (partial(prodigyopt.Prodigy, lr=1.0), lambda: [ScheduleCallback(Cosine())]),
        "schedule-free": (free, lambda: [ScheduleFreeMode()]),
    }


def run(
    task: Task, name: str, method: str, lr: float | None, seed: int, steps: int | None, folder: Path
) -> dict[str, Any]:
    """One training; everything there is to know about it."""
    total = steps or task.steps
    optimizer = partial(task.optimizer, lr=task.default_lr if lr is None else lr)
    if method in SCHEDULES:
        callbacks: list[Callback] = [ScheduleCallback(SCHEDULES[method])]
    elif method in (own := optimizers(task)):
        optimizer, make = own[method]  # type: ignore[assignment]
        callbacks = make()
    else:
        callbacks = searches(task)[method]()
    seed_everything(seed, verbose=False)
    module = ClassificationTask(task.network(), num_classes=task.num_classes, optimizer=optimizer)
    curve = Curve()
    place = folder / f"{name}-{method}-{total}-{lr}-{seed}".replace(" ", "_")
    trainer = quiet_trainer(place, total, callbacks=[*callbacks, curve], val_check_interval=max(1, total // 20))
    begun = time.perf_counter()
    data = task.data()
    trainer.fit(module, data)
    if method.endswith(BEST):
        module.load_state_dict(curve.best_weights or module.state_dict())
    seconds = time.perf_counter() - begun
    (tested,) = trainer.test(module, data, verbose=False)
    (validated,) = trainer.validate(module, data, verbose=False)
    summary = next((c.summary for c in callbacks if isinstance(c, SearchCallback)), {})
    account = {
        k: summary.get(k, 0) for k in ("search_steps", "probe_steps", "undone_steps", "eval_batches", "search_seconds")
    }
    finite = math.isfinite(tested["test_loss"])
    return {
        "task": name,
        "method": method,
        "lr": lr,
        "seed": seed,
        "total_steps": total,
        "real_steps": trainer.global_step,
        "test_loss": tested["test_loss"] if finite else 1e4,
        "test_acc": tested["test_acc"],
        "val_loss": validated["val_loss"] if math.isfinite(validated["val_loss"]) else 1e4,
        "seconds": seconds,
        "learning_rates": summary.get("learning_rates", [])[:100],
        "curve": curve.points,
        **account,
    }


class Curve(Callback):
    """Validation loss at real steps, and the weights where it was lowest."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self.best_weights: dict[str, torch.Tensor] = {}

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if trainer.state.fn == "fit" and "val_loss" in trainer.callback_metrics:
            loss = float(trainer.callback_metrics["val_loss"])
            if loss < min((x for _, x in self.points), default=math.inf):
                self.best_weights = {name: x.detach().clone() for name, x in module.state_dict().items()}
            self.points.append((trainer.global_step, loss))


Job = tuple[str, str, float | None, int]  # task, method, learning rate (None: the default), seed


def jobs(
    task: Task, name: str, methods: list[str], seeds: int, rows: list[dict[str, Any]], untuned: bool
) -> Iterator[Job]:
    """All runs of a task, seed by seed. ``rows`` grows meanwhile: what was tuned on the first seed is read from it."""
    for seed in range(seeds):
        for method in [*searches(task), *optimizers(task), *SCHEDULES]:
            if methods and method not in methods:
                continue
            if untuned or method not in SCHEDULES:
                yield name, method, None, seed
            if method in SCHEDULES:
                for lr in task.grid if seed == 0 else (tuned(name, method, rows),):
                    yield name, method, lr, seed


def tuned(name: str, method: str, rows: list[dict[str, Any]]) -> float:
    """The learning rate of the grid with the lowest validation loss on the first seed."""
    of = [r for r in rows if (r["task"], r["method"], r["seed"]) == (name, method, 0) and r["lr"] is not None]
    return float(min(of, key=lambda r: r["val_loss"])["lr"])


Arms = dict[str, dict[int, dict[str, Any]]]  # what is compared: name, seed, run


def arms_of(rows: list[dict[str, Any]], name: str) -> Arms:
    """The methods of a task; a schedule at the default learning rate is one, and at its tuned one another."""
    arms: Arms = {}
    mine = [r for r in rows if r["task"] == name]
    for method in dict.fromkeys(r["method"] for r in mine):
        of = [r for r in mine if r["method"] == method]
        default = {r["seed"]: r for r in of if r["lr"] is None}
        if default:
            arms[f"{method}, default LR" if method in SCHEDULES else method] = default
        if any(r["lr"] is not None for r in of):
            best = tuned(name, method, rows)
            arms[f"{method}, tuned ({best:g})"] = {r["seed"]: r for r in of if r["lr"] == best}
    return arms


def oracle_of(arms: Arms) -> str:
    """The tuned schedule with the lowest validation loss over the seeds that all of them have."""
    schedules = [a for a in arms if ", tuned" in a and BEST not in a]
    shared = set.intersection(*(set(arms[a]) for a in schedules)) if schedules else set()
    return min(schedules, key=lambda a: np.mean([arms[a][s]["val_loss"] for s in sorted(shared)]), default="")


def table(rows: list[dict[str, Any]]) -> str:
    """Per task: test loss by method, with the interval of the paired difference to the best tuned schedule."""
    lines = []
    for name in dict.fromkeys(row["task"] for row in rows):
        arms = arms_of(rows, name)
        oracle = oracle_of(arms)
        lines += ["", f"### {name}", ""]
        lines += [
            "| method | seeds | test loss | minus the oracle's (95 %) | autolrs minus it (95 %) | accuracy | search "
            "| evaluation batches | sooner |"
        ]
        lines += ["|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
        target = next((a for a in arms if a.startswith("cosine, tuned")), None)
        for arm in sorted(arms, key=lambda a: np.mean([r["test_loss"] for r in arms[a].values()])):
            runs = list(arms[arm].values())
            loss = [r["test_loss"] for r in runs]
            spread = np.std(loss, ddof=1) / math.sqrt(len(loss)) if len(loss) > 1 else math.nan
            share = np.mean([r["search_steps"] for r in runs]) / runs[0]["total_steps"]
            lines.append(
                f"| {arm}{' (oracle)' if arm == oracle else ''} | {len(loss)} | {np.mean(loss):.4f} ± {spread:.4f} "
                f"| {difference(arms, arm, oracle)} | {difference(arms, 'autolrs', arm)} "
                f"| {100 * np.mean([r['test_acc'] for r in runs]):.2f} | {share:.0%} "
                f"| {np.mean([r['eval_batches'] for r in runs]):.0f} | {_sooner(arms, arm, target)} |"
            )
    return "\n".join(lines)


def difference(arms: Arms, arm: str, other: str) -> str:
    """Of test losses, paired by seed."""
    seeds = sorted(set(arms.get(arm, {})) & set(arms.get(other, {}))) if other != arm else []
    differences = np.array([arms[arm][s]["test_loss"] - arms[other][s]["test_loss"] for s in seeds])
    if not seeds:
        return "-"
    if len(seeds) < 3 or np.ptp(differences) == 0:
        return f"{differences.mean():+.4f}"
    interval = bootstrap((differences,), np.mean, method="basic", rng=0).confidence_interval
    return f"{differences.mean():+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _sooner(arms: Arms, arm: str, target: str | None) -> str:
    """How many times sooner the tuned cosine's final validation loss was reached, in steps of the schedule and in all."""
    if target is None:
        return "-"
    times = []
    for seed in sorted(set(arms[arm]) & set(arms[target])):
        run, goal = arms[arm][seed], arms[target][seed]["val_loss"]
        points = [*run["curve"], (run["real_steps"], run["val_loss"])]
        reached = next((step for step, loss in points if loss <= goal), None)
        if reached is None:
            return "not in all"
        times.append((run["total_steps"] / reached, run["total_steps"] / (reached + run.get("probe_steps", 0))))
    return " / ".join(f"{np.exp(np.mean(np.log(column))):.2f}" for column in zip(*times, strict=True))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(description: str, tasks: dict[str, Task], out: Path, folder: Path) -> None:
    """Run what the command line asks for.

    Args:
        description: for the help.
        tasks: by name; the first one is that of the short form.
        out: the file of results, unless the command line names another.
        folder: where runs write to.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(tasks), default=list(tasks))
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps instead of each task's own")
    parser.add_argument("--tuned", action="store_true", help="no schedules at their default learning rate")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--short", action="store_true", help="one task, a few steps")
    parser.add_argument("--table", action="store_true", help="print the table of what was run, and run nothing")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.tasks, arguments.seeds, arguments.steps = list(tasks)[:1], 1, 120
        arguments.methods, arguments.out = ["autolrs", "cosine"], folder.with_name(f"{folder.name}-short.jsonl")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = read(arguments.out)
    done = {(r["task"], r["method"], r["lr"], r["seed"]) for r in rows}
    wanted = (
        jobs(tasks[name], name, arguments.methods, arguments.seeds, rows, not arguments.tuned)
        for name in arguments.tasks
    )
    for job in () if arguments.table else itertools.chain.from_iterable(wanted):
        if job in done:
            continue
        name, method, lr, seed = job
        row = run(tasks[name], name, method, lr, seed, arguments.steps, folder)
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(
            f"{name}, {method}, lr {lr}, seed {seed}: test {row['test_loss']:.4f}, "
            f"{row['search_steps']} of {row['total_steps']} steps search, {row['seconds']:.0f} s",
            flush=True,
        )
    print(table(rows))


if __name__ == "__main__":
    main(__doc__ or "", TASKS, Path("benchmarks/results/quality.jsonl"), Path("runs/quality"))
