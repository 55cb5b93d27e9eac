"""The learning-rate range test: climb, watch the loss, and say which learning rate it speaks for."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from lightning_autolr.core.range_rules import (
    MODES,
    RULES,
    Mode,
    RangeCurve,
    RangeSuggestion,
    Rule,
    divergence,
    ladder,
    suggest,
)
from lightning_autolr.core.requests import Probe, ProbeResult, Request, Status
from lightning_autolr.schedules import Exponential, Points

__all__ = ["RangeTest"]


@dataclass(frozen=True)
class RangeTest:
    """Train privately while the learning rate climbs, several times, and suggest a learning rate with its interval.

    The climb is made in chunks, each going on from the end of the one before, so that it stops soon after the loss ran
    away. At most ``repeats * num_steps`` private steps, and two kept states at a time. Searches make it at any moment of
    a run::

        suggestion = yield from RangeTest(repeats=1).measure()
        lower, upper = suggestion.bounds

    Differs from Lightning's finder (2.6): slopes are taken over the logarithm of the learning rate; the loss is the one
    after the step and not before it; a local fit in place of a running mean with decay 0.98, which lags behind by tens
    of steps (it turns losses 4, 3, 2, 1 into 4, 3.49, 2.99, 2.47); divergence is a difference and not a ratio; no
    points are skipped; repeats give an interval; and a curve that supports no suggestion gives none, with the reason.

    Args:
        min_lr: bottom of the ladder, > 0.
        max_lr: top of the ladder.
        num_steps: rungs, >= 10. The loss of the top rung is not seen.
        mode: "exponential", or "linear" as in Smith's paper, which spends most rungs on the top decade.
        repeats: climbs, each with other batches, >= 1.
        rule: "minimum", a tenth of the rate with the lowest loss: the steadiest, and right for a constant rate. "edge",
            a quarter of the rate from which on the loss rises: higher, for schedules that decay. "valley", the middle
            of the main fall, and "steepest", its steepest point, are mostly near "minimum" and vary more.
        width: half the window of the smoothing, in decades, > 0.
        chunk: steps between two looks at the loss, >= 1.
        seed: number of the first climb's draw of batches.

    Raises:
        ValueError: options out of range.

    >>> requests = RangeTest(min_lr=1e-4, max_lr=1.0, num_steps=20, repeats=1).measure()
    >>> first = next(requests)
    >>> first.lr, first.num_steps, first.evaluate
    (0.0001, 10, 'none')
    >>> second = requests.send(ProbeResult(losses=(1.0,) * 10, end="a"))
    >>> round(second.lr, 6), second.start, second.offset
    (0.012743, 'a', 10)
    """

    min_lr: float = 1e-7
    max_lr: float = 10.0
    num_steps: int = 100
    mode: Mode = "exponential"
    repeats: int = 3
    rule: Rule = "minimum"
    width: float = 0.4
    chunk: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.min_lr < self.max_lr < math.inf:
            raise ValueError(f"Expected 0 < min_lr < max_lr, got min_lr={self.min_lr!r} and max_lr={self.max_lr!r}.")
        for name in ("num_steps", "repeats", "chunk", "seed"):
            if not isinstance(value := getattr(self, name), Integral):
                raise ValueError(f"Expected a whole number for {name}, got {name}={value!r}.")
        if self.num_steps < 10 or self.repeats < 1 or self.chunk < 1 or self.seed < 0:
            raise ValueError(
                f"Expected num_steps >= 10, repeats >= 1, chunk >= 1 and seed >= 0, got num_steps={self.num_steps!r}, "
                f"repeats={self.repeats!r}, chunk={self.chunk!r} and seed={self.seed!r}."
            )
        if self.mode not in MODES or self.rule not in RULES:
            raise ValueError(f"Expected a mode out of {MODES} and a rule out of {[*RULES]}, got {self}.")
        if not self.width > 0:
            raise ValueError(f"Expected width > 0, got width={self.width!r}.")

    def measure(self) -> Generator[Request, Any, RangeSuggestion]:
        """Yield the climbs, return what they say; nothing is kept when they are over."""
        curves: list[RangeCurve] = []
        left_over: str | None = None
        lrs = ladder(self.min_lr, self.max_lr, self.num_steps, self.mode).tolist()
        for repeat in range(self.repeats):
            losses: list[float] = []
            tried: list[float] = []  # the learning rate of each of them: a skipped batch gives none
            start: str | None = None
            for position in range(0, self.num_steps, self.chunk):
                steps = min(self.chunk, self.num_steps - position)
                answer: ProbeResult = yield Probe(
                    lr=lrs[position],
                    num_steps=steps,
                    draw=self.seed + repeat,
                    offset=position,
                    shape=self._shape(lrs, position),
                    start=start,
                    keep_end=position + steps < self.num_steps,
                    evaluate="none",
                    label=f"range test {repeat + 1} of {self.repeats}, lr {lrs[position]:.2g}",
                    kind="range test",
                    rule=self.rule,
                    release=tuple(name for name in (start, left_over) if name is not None),
                )
                start, left_over = answer.end, None
                losses += answer.losses
                tried += [lrs[position + step] for step in answer.loss_steps]
                if answer.status is Status.DIVERGED:
                    losses.append(math.inf)
                if losses and divergence(losses)[0] is not None:
                    break
            left_over = start
            curves.append(RangeCurve.measured(tried, losses, self.width))
        if left_over is not None:
            yield Probe(self.min_lr, 0, evaluate="none", label="range test", kind="range test", release=(left_over,))
        return suggest(curves, self.rule)

    def _shape(self, lrs: list[float], position: int) -> Exponential | Points:
        """The rest of the ladder, as a factor on the learning rate at ``position``."""
        rungs = self.num_steps - 1
        if self.mode == "exponential":
            return Exponential(num_steps=rungs, gamma=math.log(self.max_lr / self.min_lr))
        climb = (self.max_lr - self.min_lr) / lrs[position]
        return Points((1.0, 1.0 + climb), num_steps=rungs)
