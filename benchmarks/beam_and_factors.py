"""Factor search: does the information in its losses matter? Bad starts, and the score of a candidate that explodes.

    python benchmarks/beam_and_factors.py            # everything; goes on where it stopped
    python benchmarks/beam_and_factors.py --short    # a smoke test
    python benchmarks/beam_and_factors.py --table    # only the tables of what was run
    python benchmarks/beam_and_factors.py --fashion  # the comparison on Fashion-MNIST out of what benchmarks/quality.py ran

Digits, a ConvNet of widths 16 and 32, 1,000 steps of 64 with everything counted, a decision every 50 steps. Test losses, read
once at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import seed_everything
from quiet import quiet_trainer
from scipy import stats

from lightning_autolr import FactorSearchCallback
from lightning_autolr.core.scores import scored_factor
from lightning_autolr.tasks import ClassificationTask, ConvNet, DigitsData

TASKS: dict[str, tuple[Any, Any]] = {
    "digits, SGD": (DigitsData, partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)),
    "noisy digits, AdamW": (partial(DigitsData, label_noise=0.1), partial(torch.optim.AdamW, weight_decay=0.01)),
}
CONTROL = {"shuffle_scores": True}
# from the optimizer's default learning rate: does the information matter, and in which form?
INFORMED: dict[str, dict[str, Any]] = {
    "default": {},
    "scores shuffled (control)": CONTROL,
    "evaluate_on='same'": {"evaluate_on": "same"},
    "temperature=0.25": {"temperature": 0.25},
    "evaluate_on='validation'": {"evaluate_on": "validation"},
    "horizon=5": {"horizon": 5},
    "three factors": {"factors": (2.0, 1.0, 0.5)},
    "every=20": {"every": 20},
    "start_rounds=10": {"start_rounds": 10},
}
MAIN = tuple(INFORMED)[:4]  # run with more seeds, and on the second task
STARTS: dict[str, dict[str, Any]] = {
    "as published: no clip, no guard": {"outlier_clip": None, "guard": None},
    "clip, guard (default)": {},
    "clip, guard, 10 start rounds": {"start_rounds": 10},
    "scores shuffled (control)": CONTROL,
}
BAD_STARTS = (1e-4, 10.0)
FOLDER = Path("runs/beam-and-factors")
FASHION = ("constant", "linear", "cosine", "step", "factor search", "factor search, scores shuffled", "beam search")


def run(task: str, options: dict[str, Any], lr: float, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    seed_everything(seed, verbose=False)
    make_data, optimizer = TASKS[task]
    module = ClassificationTask(ConvNet(widths=(16, 32)), optimizer=partial(optimizer, lr=lr))
    options = {"every": max(1, steps // 20), "max_lr": 100.0, **options}
    callback = FactorSearchCallback(count_search=True, figures=False, seed=seed, **options)
    trainer = quiet_trainer(folder, steps, callbacks=[callback], val_check_interval=steps)
    data = make_data()
    trainer.fit(module, data)
    (validated,) = trainer.validate(module, data, verbose=False)
    (tested,) = trainer.test(module, data, verbose=False)
    return {
        "steps": steps,
        "real_steps": trainer.global_step,
        "lrs": [segment.lr for segment in callback.schedule],
        "val_loss": _finite(validated["val_loss"]),
        "test_loss": _finite(tested["test_loss"]),
        "test_acc": tested["test_acc"],
    }


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else 1e4


def score_table() -> str:
    """The factor for four good candidates of which the second is best, and one that explodes."""
    factors = (4.0, 2.0, 1.0, 0.5, 0.25)
    lines = ["| rule | loss at x 4: 2.1 | 30 | 3,000 | not finite |", "|---|--:|--:|--:|--:|"]
    rules: dict[str, dict[str, Any]] = {
        "published: z-score, T = 1, no clip": {"outlier_clip": None},
        "clip 3 (default)": {},
        "clip 1": {"outlier_clip": 1.0},
        "clip 3, T = 0.5": {"temperature": 0.5},
        "clip 3, T = 0.25": {"temperature": 0.25},
        "improvement, clip 3, T = 0.5": {"normalization": "improvement", "temperature": 0.5},
        "rank, T = 0.5": {"normalization": "rank", "temperature": 0.5},
    }
    for name, rule in rules.items():
        cells = [scored_factor(factors, (bad, 1.8, 1.9, 1.95, 1.97), 2.0, **rule) for bad in (2.1, 30, 3000, math.nan)]
        lines.append(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]], part: str, against: str) -> str:
    """Test losses, and the 95 % t interval of the difference to one arm, paired by seed."""
    mine = [r for r in rows if r["part"] == part]
    lines = [
        f"| task | from LR | arm | seeds | test loss | against '{against}' (95 %) | accuracy, % | highest LR | last LR |"
    ]
    lines += ["|---|--:|---|--:|--:|--:|--:|---|---|"]
    for task, lr, arm in dict.fromkeys((r["task"], r["lr"], r["arm"]) for r in mine):
        of, other = (
            {r["seed"]: r for r in mine if (r["task"], r["lr"], r["arm"]) == (task, lr, name)}
            for name in (arm, against)
        )
        runs = list(of.values())
        rates = [", ".join(f"{rate(r['lrs']):.1g}" for r in runs) for rate in (max, lambda lrs: lrs[-1])]
        lines.append(
            f"| {task} | {lr:g} | {arm} | {len(runs)} | {np.mean([r['test_loss'] for r in runs]):.4f} "
            f"| {_difference(of, other)} | {100 * np.mean([r['test_acc'] for r in runs]):.2f} | {' | '.join(rates)} |"
        )
    return "\n".join(lines)


def _difference(arm: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> str:
    seeds = sorted(set(arm) & set(other))
    if arm == other or not seeds:
        return "-"
    differences = np.array([arm[s]["test_loss"] - other[s]["test_loss"] for s in seeds])
    if len(seeds) < 2 or np.ptp(differences) == 0:
        return f"{differences.mean():+.4f}"
    low, high = stats.t.interval(0.95, len(seeds) - 1, differences.mean(), stats.sem(differences))
    return f"{differences.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


def fashion_table(path: Path) -> str:
    """Test accuracy and loss of the arms in FASHION, fixed schedules at their best learning rate of five."""
    rows = [r for line in path.read_text().splitlines() if (r := json.loads(line))["task"] == "fashion"]
    lines = [
        "| method | learning rate | test accuracy, % | test loss | validation loss | steps in search | time in search | seeds |"
    ]
    lines += ["|---|---|--:|--:|--:|--:|--:|--:|"]
    for method in FASHION:
        of = [r for r in rows if r["method"] == method]
        tried = [r for r in of if r["lr"] is not None and r["seed"] == 0]
        best = min(tried, key=lambda r: r["val_loss"])["lr"] if tried else None
        for lr in dict.fromkeys((None, best)):
            arm = [r for r in of if r["lr"] == lr]
            if arm:
                name = "found, from 0.001" if not tried else "0.001, default" if lr is None else f"{lr:g}, tuned"
                keys = (("test_acc", 100, 2), ("test_loss", 1, 4), ("val_loss", 1, 4))
                columns = [(np.array([unit * r[key] for r in arm]), digits) for key, unit, digits in keys]
                cells = [f"{x.mean():.{digits}f} ± {stats.sem(x):.{digits}f}" for x, digits in columns]
                steps = np.mean([r["search_steps"] / r["total_steps"] for r in arm])
                seconds = np.mean([r["search_seconds"] / r["seconds"] if r["search_seconds"] else 0.0 for r in arm])
                lines.append(f"| {method} | {name} | {' | '.join(cells)} | {steps:.0%} | {seconds:.0%} | {len(arm)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/beam_and_factors.jsonl"))
    parser.add_argument("--quality", type=Path, default=Path("benchmarks/results/quality.jsonl"), help="for --fashion")
    parser.add_argument("--fashion", action="store_true", help="print that table, and run nothing")
    parser.add_argument("--short", action="store_true", help="a few steps of two arms")
    parser.add_argument("--table", action="store_true", help="print the tables of what was run, and run nothing")
    arguments = parser.parse_args()
    if arguments.fashion:
        print(fashion_table(arguments.quality))
        return
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    jobs = [("informed", "digits, SGD", arm, 1e-3, seed) for seed in range(arguments.seeds) for arm in INFORMED]
    jobs += [
        ("start", "digits, SGD", arm, lr, seed)
        for seed in range(arguments.seeds)
        for lr in BAD_STARTS
        for arm in STARTS
    ]
    for seed in range(arguments.seeds + 2):
        jobs += [
            ("informed", task, arm, 1e-3, seed)
            for task in list(TASKS)[: 2 if seed < arguments.seeds else 1]
            for arm in (*MAIN, "start_rounds=10")
        ]
    if arguments.short:
        arguments.steps, arguments.out, jobs = 60, Path("runs/beam-and-factors-short.jsonl"), jobs[:2]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    keys = ("part", "task", "arm", "lr", "seed")
    done = {tuple(r[key] for key in keys) for r in rows}
    for job in () if arguments.table else dict.fromkeys(jobs):
        if job in done:
            continue
        part, task, arm, lr, seed = job
        options = (INFORMED if part == "informed" else STARTS)[arm]
        row = {**dict(zip(keys, job, strict=True)), **run(task, options, lr, seed, arguments.steps, FOLDER)}
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(f"{job}: test loss {row['test_loss']:.4f}, LR {row['lrs'][-1]:.2g}", flush=True)
    print("\n### The factor for losses 1.8, 1.9, 1.95, 1.97 at x 2, 1, 0.5, 0.25, from 2.0\n\n" + score_table())
    print("\n### Does the information matter?\n\n" + table(rows, "informed", "scores shuffled (control)"))
    print("\n### Bad starts\n\n" + table(rows, "start", "as published: no clip, no guard"))


if __name__ == "__main__":
    main()
