"""Answers line probes: the loss at several multiples of one update."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_autolr.core.requests import LineProbe, LineResult, Probe
from lightning_autolr.engine.compat import float_of_sums, foreach_add_, foreach_neg_, local_tensor
from lightning_autolr.engine.ranks import gather, mean_over_ranks
from lightning_autolr.engine.steps import batches_per_step

if TYPE_CHECKING:
    from lightning_autolr.engine.probe import Prober

__all__ = ["answer_line_probe"]

_MOST_SKIPPED = 100  # steps in a row without a loss, after which none is looked for


def answer_line_probe(prober: Prober, request: LineProbe) -> LineResult:
    """Losses at multiples of the update; inside a session only."""
    if not request.exact:
        return _losses_along(prober, request)
    found = [_loss_at(prober, request, factor) for factor in request.factors]
    return LineResult(next((base for base, _ in found if base is not None), math.nan), tuple(x for _, x in found))


@torch.no_grad()
def _losses_along(prober: Prober, request: LineProbe) -> LineResult:
    """Losses at ``weights + factor * update``; one more copy of the weights in memory."""
    if prober.is_linear is None:
        prober.is_linear = _is_linear(prober, request)
    if not prober.is_linear:
        kinds = [type(o).__name__ for o in prober.trainer.optimizers]
        raise ValueError(
            f"Expected an optimizer whose update is proportional to its learning rate, got {kinds}. Pass `exact=True` to "
            "make one real step per factor instead."
        )
    update, base = _update(prober, request, request.lr, request.horizon)
    weights = _weights(prober)
    losses, at = [], 0.0
    for factor in request.factors:
        prober.leave()
        foreach_add_(weights, update, alpha=factor - at)
        at = factor
        losses.append(_evaluation(prober, request))
    return LineResult(base, tuple(losses))


def _is_linear(prober: Prober, request: LineProbe) -> bool:
    """Whether twice the learning rate makes twice the update.

    Where updates are too small to be told from the rounding of the weights, larger ones are looked at.
    """
    for scale in (1.0, 1e3, 1e6):
        once, twice = (_update(prober, request, s * request.lr, 1)[0] for s in (scale, 2 * scale))
        here = (
            _squares(2 * a - b for a, b in zip(once, twice, strict=True)),
            _squares(twice),
            _squares(torch.finfo(w.dtype).eps * w for w in _weights(prober)),
        )
        # of all ranks' pieces of the weights, so that all go on alike
        error, size, rounding = (math.fsum(values) for values in zip(*gather(here), strict=True))
        if size > 1e5 * rounding:
            break
    return error <= 1e-4 * size + 4 * rounding


@torch.no_grad()
def _update(prober: Prober, request: LineProbe, lr: float, num_steps: int) -> tuple[list[Tensor], float]:
    """What ``num_steps`` steps add to the weights, and the loss before them. Leaves the weights as they were."""
    prober.go_to(request.start or "here")
    weights = _weights(prober)
    before = [w.detach().clone() for w in weights]
    base = _make_steps(prober, request, lr, num_steps)
    foreach_neg_(before)
    foreach_add_(before, weights)
    prober.go_to(request.start or "here")
    return before, base


def _loss_at(prober: Prober, request: LineProbe, factor: float) -> tuple[float | None, float]:
    """The losses before (None: there was no step) and after real steps at ``lr * factor``."""
    prober.go_to(request.start or "here")
    base = _make_steps(prober, request, request.lr * factor, request.horizon) if factor > 0 else None
    return base, _evaluation(prober, request)


def _make_steps(prober: Prober, request: LineProbe, lr: float, num_steps: int) -> float:
    """Steps from where the weights are; the training loss before the first of them, NaN without one."""
    prober.seed(request.draw, 0)
    first: Tensor | None = None
    with torch.enable_grad():
        for step in range(num_steps):
            prober.progress(request, step)
            prober.lr.set(lr)
            loss = prober.step(request.draw, step)
            first = loss if step == 0 else first
    return math.nan if first is None else mean_over_ranks(prober.trainer.strategy, [first])[0]


@torch.no_grad()
def _evaluation(prober: Prober, request: LineProbe) -> float:
    """The loss where the weights are, with the same random numbers at each factor."""
    prober.seed(request.draw, 0)
    if request.evaluate_on == "validation":
        losses = prober.evaluate(Probe(lr=request.lr, num_steps=0))
        return math.fsum(losses) / len(losses)
    if not prober.trainer.lightning_module.automatic_optimization:
        raise ValueError("Expected `evaluate_on='validation'` under manual optimization, whose training step updates.")
    count = batches_per_step(prober.trainer)
    step = request.horizon - (request.evaluate_on == "same")
    for later in range(step, step + _MOST_SKIPPED):  # a batch that is skipped says nothing: the next one that is not
        batches = prober.draws.training(request.draw, later * count, count)
        # In training mode, as the real forward will be; batch statistics go into buffers that are put back.
        found = prober.training_losses(batches, training=True)
        if found:
            means = mean_over_ranks(prober.trainer.strategy, found)
            return math.fsum(means) / len(means)
    raise ValueError(
        f"Expected `training_step` to return a loss or to log one, got neither in {_MOST_SKIPPED} steps. Do either, or use "
        "`evaluate_on='validation'`."
    )


def _weights(prober: Prober) -> list[Tensor]:
    return [local_tensor(p) for p in prober.trainer.lightning_module.parameters()]


def _squares(tensors: Iterable[Tensor]) -> float:
    return sum(float(t.to(float_of_sums(t.device)).square().sum()) for t in tensors)
