"""When does AutoWU end the warm-up? Synthetic losses with a known minimum, many seeds, no network.

A curve gives the training loss as a function of the learning rate, u = log(lr / 1e-5) / log(1e5) in [0, 1], plus noise.
``AutoWU`` is driven by hand through a warm-up of up to 500 steps. The table says for each curve how many seeds switched
within the stated window of u, when (10 %, median, 90 %), and the learning rate found over that of the true minimum.

    python benchmarks/autowu_switch.py [--seeds 20] [--compat]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lightning_autolr.core.minimum import PastMinimum
from lightning_autolr.core.requests import Answer, Request, Run, Status, Train, TrainResult
from lightning_autolr.search.autowu import AutoWU, WarmupRange


@dataclass(frozen=True)
class Curve:
    """A training loss over u, where 0 is the smallest and 1 the largest learning rate.

    Args:
        loss: without noise.
        minimum: where it is lowest; None: it has no minimum on the way, and no switch is right.
        noise: standard deviation.
        window: switches up to here are in time.
    """

    loss: Callable[[float], float]
    minimum: float | None
    noise: float = 0.0
    window: float = 1.0


def bowl(u: float) -> float:
    return 1 + 4 * (u - 0.6) ** 2


def plateau(u: float) -> float:
    """Flat, falls from 0.4 to 0.7, rises: what a network does before its learning rate means anything."""
    return 2.3 if u < 0.4 else 2.3 - 6 * (u - 0.4) if u < 0.7 else 0.5 + 6 * (u - 0.7)


def cliff(u: float) -> float:
    """Falls until 0.6, then grows by a half every step (of 500)."""
    return 2.3 - 3 * u if u < 0.6 else 0.5 * 1.5 ** min(500 * (u - 0.6), 1800)


CURVES = {
    "clean": Curve(bowl, 0.6, 0.0, 0.85),
    "noisy": Curve(bowl, 0.6, 0.1, 0.95),
    "plateau first": Curve(plateau, 0.7, 0.1, 0.9),
    "plateau first, noisy": Curve(plateau, 0.7, 0.4, 0.95),
    "diverging": Curve(cliff, 0.6, 0.05, 0.65),
    "monotone": Curve(lambda u: 2.3 - 1.8 * u, None, 0.1),
    "flattening": Curve(lambda u: 0.5 + 1.8 * math.exp(-6 * u), None, 0.1),
    "noise alone": Curve(lambda u: 2.3, None, 0.1),
}


def drive(
    search: AutoWU, curve: Curve, seed: int, total_steps: int = 1000, scale: float = 1.0
) -> tuple[WarmupRange, list[tuple[Request, Answer]]]:
    """The warm-up on losses that depend on the learning rate alone, and the record of it."""
    noise = curve.noise * np.random.default_rng(seed).normal(size=total_steps)
    warmup = search.warmup(Run(total_steps=total_steps))
    record: list[tuple[Request, Answer]] = []
    step, request = 0, next(warmup)
    while True:
        assert isinstance(request, Train)
        assert request.num_steps is not None
        losses: list[float] = []
        status = Status.OK
        for i in range(request.num_steps):
            u = math.log(request.lr * request.shape(i) / 1e-5) / math.log(1e5)
            losses.append(scale * (curve.loss(u) + float(noise[step])))
            step += 1
            if request.stop_above is not None and not math.isfinite(losses[-1]):
                status = Status.DIVERGED
                break
        record.append((request, TrainResult(tuple(losses), status, f"step {step}" if request.keep_start else None)))
        try:
            request = warmup.send(record[-1][1])
        except StopIteration as stop:
            found: WarmupRange = stop.value
            return found, record


def position(lr: float) -> float:
    return math.log(lr / 1e-5) / math.log(1e5)


def milliseconds(num_steps: int, repeats: int = 5) -> float:
    """CPU time of one test that sees ``num_steps`` losses."""
    losses: NDArray[np.float64] = np.array([bowl(i / num_steps) for i in range(num_steps)])
    losses += 0.1 * np.random.default_rng(0).normal(size=num_steps)
    test = PastMinimum()
    test(losses)
    begun = time.process_time()
    for _ in range(repeats):
        test(losses)
    return (time.process_time() - begun) / repeats * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--total-steps", type=int, default=1000)
    parser.add_argument("--compat", action="store_true", help="the published rules")
    args = parser.parse_args()
    search = AutoWU(compat=args.compat, test_every=args.total_steps // 40)
    print("| curve | noise | minimum | window | in window | switch at u (10, 50, 90 %) | lr / lr at the minimum |")
    print("|---|---|---|---|---|---|---|")
    for name, curve in CURVES.items():
        found = [drive(replace(search, seed=s), curve, s, args.total_steps)[0] for s in range(args.seeds)]
        switched = [f for f in found if f.outcome != "none"]
        ends = [2 * (f.num_steps - (not args.compat)) / args.total_steps for f in switched]
        right = sum(curve.minimum <= u <= curve.window for u in ends) if curve.minimum else len(found) - len(ends)
        at = ", ".join(f"{q:.2f}" for q in np.quantile(ends, (0.1, 0.5, 0.9))) if ends else "never"
        true = 1e-5 * 1e5 ** (1.0 if curve.minimum is None else curve.minimum)
        ratio = ", ".join(f"{q:.2g}" for q in np.quantile([f.lr / true for f in found], (0.1, 0.5, 0.9)))
        window = "no switch" if curve.minimum is None else f"{curve.minimum} to {curve.window}"
        print(
            f"| {name} | {curve.noise} | {curve.minimum} | {window} | {right} of {len(found)} | {at} | {ratio} |",
            flush=True,
        )
    print("\nOne test, milliseconds of CPU time:", end=" ")
    print(", ".join(f"{n} steps: {milliseconds(n):.0f}" for n in (100, 500, 1000, 5000, 20000, 100000)))


if __name__ == "__main__":
    main()
