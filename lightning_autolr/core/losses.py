"""What the losses of probes and of training say: when they are too high, and how far apart those of two candidates are."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import sem

from lightning_autolr.core.requests import ProbeResult

__all__ = ["divergence_limit", "first_not_finite", "more_is_better", "paired", "sudden"]

_SCORES = {"auc", "auroc", "bleu", "dice", "f1", "iou", "map", "precision", "recall"}
_FEW = 20  # first losses of a training, among which the highest is looked for


def more_is_better(name: str) -> bool:
    """Whether a logged value is a score and no loss, as far as its name says.

    >>> [more_is_better(name) for name in ("val_acc", "test_accuracy", "val/f1", "val_loss", "accuracy_loss")]
    [True, True, True, False, False]
    """
    name = name.lower()
    return name.endswith(("acc", "accuracy")) or re.split(r"[^a-z0-9]", name)[-1] in _SCORES


def divergence_limit(losses: Sequence[float]) -> float | None:
    """A training loss as far above the first as this is no noise; None where there are no losses.

    >>> divergence_limit([2.0, 2.5, 1.5])
    11.0
    """
    if not losses:
        return None
    first = losses[0]
    return first + 3 * abs(first) + 3 * (max(losses[:_FEW]) - min(losses))


def first_not_finite(losses: Sequence[float]) -> int | None:
    """Where the first loss stands that is NaN or infinite; None when all are finite.

    >>> first_not_finite([2.0, math.nan, math.inf])
    1
    """
    return next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)


def sudden(losses: Sequence[float]) -> int | None:
    """Where a loss is not finite that no growth has led to, so that the learning rate is hardly to blame; None elsewhere.

    The first loss comes before any update. One that is lost to the very first update says nothing.

    >>> [sudden(x) for x in ([math.nan], [2.0, math.nan], [2.0, 9.0, math.inf], [2.0, 1.9, math.nan])]
    [0, None, None, 2]
    """
    bad = first_not_finite(losses)
    if bad is None or bad == 1:
        return None
    return bad if bad == 0 or max(losses[1:bad]) <= losses[0] + abs(losses[0]) / 2 else None


def paired(before: ProbeResult, after: ProbeResult) -> tuple[float, float]:
    """By how much the loss is higher ``after``: mean and standard error of the differences on the same evaluation batches.

    Unlike numbers of losses, as of a training step that leaves some out, cannot be paired: their errors add up. Of a single
    loss the error is not known, and taken for zero.

    Args:
        before: with at least one evaluation.
        after: likewise, on the same batches.
    """
    a, b = (np.asarray(r.evaluations[-1].losses) for r in (before, after))
    if len(a) != len(b):
        return float(b.mean() - a.mean()), math.hypot(_standard_error(a), _standard_error(b))
    return float((b - a).mean()), _standard_error(b - a)


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(sem(values)) if len(values) > 1 else 0.0  # of one value scipy says NaN, with a warning
