"""Answers what a search asks for, inside a Trainer, and leaves no trace."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_autolr.core.requests import Evaluation, LineProbe, LineResult, Probe, ProbeResult, Status, diverged
from lightning_autolr.engine.batch_norm import updated_statistics
from lightning_autolr.engine.batches import Draws, mix, validation_batches
from lightning_autolr.engine.compat import local_tensor, val_loaders
from lightning_autolr.engine.evaluate import evaluate, evaluate_training_batches
from lightning_autolr.engine.files import Place, make_store
from lightning_autolr.engine.lr import LearningRate
from lightning_autolr.engine.permute import permute_weights
from lightning_autolr.engine.quiet import LogSink, deferred_signals, quiet
from lightning_autolr.engine.ranks import gather, mean_over_ranks, smallest
from lightning_autolr.engine.state import Fork, RandomState, take_gradients
from lightning_autolr.engine.steps import private_step, steps_per_batch, to_device

__all__ = ["ProbeOptions", "Prober"]

_LOOK_EVERY = 10  # steps between looks at the losses: each look waits for the device


@dataclass(frozen=True)
class ProbeOptions:
    """How probes are made.

    Args:
        monitor: name of the validation value that scores a candidate.
        mode: whether less or more of it is better.
        eval_batches: batches of each validation loader that score a candidate; None is all of them.
        holdout_batches: training batches held out of each draw (``objective="holdout"``).
        fork: where the copy of the training state lies.
        seed: seed of the draws and of the random numbers in probes.
        search_callbacks: callbacks that take part in private steps, since they change gradients.
        probe_dataloader: batches for probes, when the training loader cannot be read twice.
        cache_bytes: memory for a draw's batches.
    """

    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    eval_batches: int | None = None
    holdout_batches: int = 0
    fork: Place = "device"
    seed: int = 0
    search_callbacks: Sequence[Callback] = ()
    probe_dataloader: Any = None
    cache_bytes: int = 2 << 30


@dataclass
class Cost:
    """What the search used up."""

    steps: int = 0
    eval_batches: int = 0
    seconds: float = 0.0
    steps_undone: int = 0


class Prober:
    """Answers ``Probe`` and ``LineProbe`` between two steps of the real training.

    Args:
        trainer: the Trainer, in ``fit``, at an accumulation boundary whenever something is asked.
        lr: writes the learning rates.
        options: how probes are made.
        progress: called before each step with the request and the step's number.
    """

    def __init__(
        self,
        trainer: Any,
        lr: LearningRate,
        options: ProbeOptions,
        progress: Callable[[Probe | LineProbe, int], None] = lambda request, step: None,
    ) -> None:
        self._trainer, self._lr, self._options, self._progress = trainer, lr, options, progress
        self._module, self._strategy = trainer.lightning_module, trainer.strategy
        self._here = self._new_fork()
        self._kept: dict[str, Fork] = {}
        self._at: str | None = None  # the state we are in: "here", a kept id, or None when it was trained on
        self._sink: LogSink | None = None
        self._signals: list[int] = []
        self._validation: list[tuple[Any, int, int]] | None = None
        self.is_linear: bool | None = None  # whether updates are proportional to the learning rate; checked once
        self.draws = Draws(
            trainer, options.seed, options.holdout_batches, options.probe_dataloader, options.cache_bytes
        )
        self.cost = Cost()

    @contextmanager
    def session(self) -> Iterator[str]:
        """A row of probes from one moment of the run. Yields the fingerprint of the weights."""
        random_state = RandomState(self._strategy.root_device)
        grads: list[tuple[torch.nn.Parameter, Tensor]] = []
        with quiet(self._trainer, self._module, list(self._options.search_callbacks)) as (sink, signals):
            lr, momentum = self._lr.value, self._lr.momentum
            self._at, self._sink, self._signals = "here", sink, signals
            try:
                grads += take_gradients(self._module.parameters())
                if self._module.automatic_optimization:
                    grads.clear()  # at an accumulation boundary it has no use for old ones; a manual one may
                self._here.capture()
                yield self._here.fingerprint()
            finally:
                with deferred_signals(frozenset({signal.SIGINT})):
                    self._go_to("here")
                    self._at = self._sink = None
                    self._lr.value, self._lr.momentum = lr, momentum
                    for parameter in self._module.parameters():
                        parameter.grad = None
                    for parameter, grad in grads:
                        parameter.grad = grad
                    random_state.restore()
                    self.draws.close()

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal waits for the end of the session, on any rank."""
        return any(gather(bool(self._signals)))

    @property
    def lr_memory(self) -> dict[str, Any]:
        """What the learning rates remember of the module's schedulers; part of the training state."""
        return self._lr.memory

    def close(self) -> None:
        """Drop all copies."""
        for fork in (self._here, *self._kept.values()):
            fork.release()
        self._kept.clear()

    def note(self, request: Probe | LineProbe) -> None:
        """Remember which batches an answered request used up; for those that are not answered here, too."""
        steps = request.offset + request.num_steps if isinstance(request, Probe) else request.horizon + 1
        self.draws.note(request.draw, steps * steps_per_batch(self._trainer))

    def answer(self, request: Probe | LineProbe, new_id: str) -> ProbeResult | LineResult:
        """Answer one request; inside a session only."""
        self.note(request)
        return self._probe(request, new_id) if isinstance(request, Probe) else self._line_probe(request)

    def keep(self, new_id: str) -> None:
        """Keep the present state of the real run."""
        self._kept[new_id] = self._new_fork()
        self._kept[new_id].capture()

    def resume_from(self, state: str) -> None:
        """Make a kept state the state of the real run."""
        self._known(state).restore()

    def release(self, state: str) -> None:
        """Drop a kept state."""
        self._known(state).release()
        del self._kept[state]

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Put the present state back at the end of the block. Between sessions only: their copy is used."""
        self._here.capture()
        try:
            yield
        finally:
            self._here.restore()
            self._here.release()

    @property
    def kept(self) -> dict[str, Fork]:
        return self._kept

    def _new_fork(self) -> Fork:
        trainer = self._trainer
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        roots = [self._module, *trainer.optimizers, *schedulers, scaler, self._lr.memory]
        return Fork(roots, make_store(self._options.fork, self._strategy.checkpoint_io))

    def _known(self, state: str) -> Fork:
        if state not in self._kept:
            raise KeyError(f"Expected the id of a kept state out of {sorted(self._kept)}, got {state!r}.")
        return self._kept[state]

    def _go_to(self, state: str) -> None:
        if self._at != state:
            (self._here if state == "here" else self._known(state)).restore()
            for parameter in self._module.parameters():
                parameter.grad = None
            self._at = state

    def _probe(self, request: Probe, new_id: str) -> ProbeResult:
        self._go_to(request.start or "here")
        if request.permuted:
            self._at = None
            permute_weights(self._module.parameters(), self._options.seed)
        self._seed(request.draw, request.offset)
        losses: list[float] = []
        evaluations: list[Evaluation] = []
        status, steps_before = Status.OK, self.cost.steps
        unread: list[Tensor] = []

        def read() -> Status:
            new = mean_over_ranks(self._strategy, unread)
            unread.clear()
            bad = next((i for i, x in enumerate(new) if diverged(x, request.stop_above)), None)
            losses.extend(new if bad is None else new[: bad + 1])
            return Status.OK if bad is None else Status.DIVERGED

        def train(step: int) -> None:
            if (loss := self._step(request.draw, request.offset + step)) is not None:
                unread.append(loss)

        def score(step: int) -> None:
            evaluations.append(Evaluation(step, tuple(self._evaluate(request))))

        for step in range(request.num_steps):
            self._progress(request, step)
            self._at = None
            self._lr.set(request.lr * request.shape(step))
            status = self._survives(train, step, self._step, request.draw, request.offset + step)
            due = request.evaluate_every and (step + 1) % request.evaluate_every == 0 and step + 1 < request.num_steps
            if status is Status.OK and (due or (step + 1) % _LOOK_EVERY == 0 or step + 1 == request.num_steps):
                status = read()
            if status is Status.OK and due:
                status = self._survives(score, step + 1, self._evaluate, request)
            if status is Status.DIVERGED:
                break
        for state in request.release:
            self.release(state)
        if request.keep_end:
            self.keep(new_id)
        if status is Status.OK and request.evaluate == "train":
            evaluations.append(Evaluation.of_training(losses))
        elif status is Status.OK and request.evaluate != "none":
            status = self._survives(score, request.num_steps, self._evaluate, request)
        made = self.cost.steps - steps_before
        return ProbeResult(
            tuple(losses),
            tuple(evaluations),
            status,
            new_id if request.keep_end else None,
            None if made == len(losses) else made,
        )

    def _survives(self, work: Callable[[int], None], step: int, again: Callable[..., Any], *args: Any) -> Status:
        """Do a piece of work. Its exception is an answer when the weights are to blame: the real ones do not raise it.

        User code may refuse to work with NaN, and so does anomaly detection. What the real weights raise, too, is the user's
        own error and ends the run, with the real state in place.
        """
        try:
            work(step)
        except (ArithmeticError, RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._go_to("here")
            try:
                again(*args)
            except Exception:
                # Whatever the second try raises, the user gets the first error. The second may come from an iterator that
                # the first one broke; as a StopIteration it would even look to the Trainer like the end of an epoch.
                raise error from None
            return Status.DIVERGED
        return Status.OK

    def _step(self, draw: int, step: int) -> Tensor | None:
        """One private step on the draw's batches for ``step``."""
        self._at = None
        count = steps_per_batch(self._trainer)
        batches = [to_device(self._trainer, b) for b in self.draws.training(draw, step * count, count)]
        self.cost.steps += 1
        assert self._sink is not None
        return private_step(self._trainer, batches, step * count, self._sink)

    def _evaluate(self, request: Probe) -> list[float]:
        """Losses of the evaluation batches. Random numbers and train/eval flags are as before afterwards."""
        assert self._sink is not None
        self._at = None
        modes = [(m, m.training) for m in self._module.modules()]
        random_state = RandomState(self._strategy.root_device)
        try:
            norms = self._module.modules() if request.update_bn else ()
            with updated_statistics(norms, partial(self._losses, request)):
                values = self._losses(request)
        finally:
            for module, mode in modes:
                module.training = mode
            random_state.restore()
            self._sink.dataloader_idx = None
            self._sink.take()
        if not values:
            raise ValueError(f"Expected evaluation batches for {request.evaluate!r}, got none of them.")
        sign = -1.0 if self._options.mode == "max" and request.evaluate == "validation" else 1.0
        return [sign * value for value in mean_over_ranks(self._strategy, values)]

    def _losses(self, request: Probe) -> list[Tensor]:
        """One pass over the evaluation batches."""
        assert self._sink is not None
        if request.evaluate == "validation":
            batches = self._validation_batches()
            self.cost.eval_batches += len(batches)
            return evaluate(self._trainer, batches, self._sink, self._options.monitor)
        held_out = self.draws.held_out(request.draw)
        self.cost.eval_batches += len(held_out)
        return evaluate_training_batches(self._trainer, held_out, self._sink)

    def _validation_batches(self) -> list[tuple[Any, int, int]]:
        if self._validation is None:
            batches = validation_batches(
                self._trainer, self._options.eval_batches, val_loaders(self._trainer), self._options.seed
            )
            # Forward passes are collective on several ranks: all make the same number of them.
            self._validation = batches[: smallest(self._strategy, len(batches))]
        return self._validation

    def _line_probe(self, request: LineProbe) -> LineResult:
        if not request.exact:
            return self._losses_along(request)
        found = [self._line_loss(request, factor) for factor in request.factors]
        return LineResult(next((base for base, _ in found if base is not None), math.nan), tuple(x for _, x in found))

    @torch.no_grad()
    def _losses_along(self, request: LineProbe) -> LineResult:
        """Losses at ``weights + factor * update``; one more copy of the weights in memory."""
        if self.is_linear is None:
            self.is_linear = self._check_linear(request)
        if not self.is_linear:
            kinds = [type(o).__name__ for o in self._trainer.optimizers]
            raise ValueError(
                f"Expected an optimizer whose update is proportional to its learning rate, got {kinds}. Pass `exact=True` to "
                "make one real step per factor instead."
            )
        update, base = self._update(request, request.lr, request.horizon)
        weights = [local_tensor(p) for p in self._module.parameters()]
        losses, at = [], 0.0
        for factor in request.factors:
            torch._foreach_add_(weights, update, alpha=factor - at)
            at = factor
            losses.append(self._line_evaluation(request))
        return LineResult(base, tuple(losses))

    def _check_linear(self, request: LineProbe) -> bool:
        """Whether twice the learning rate makes twice the update.

        Where updates are too small to be told from the rounding of the weights, larger ones are looked at.
        """
        for scale in (1.0, 1e3, 1e6):
            once, twice = (self._update(request, s * request.lr, 1)[0] for s in (scale, 2 * scale))
            weights = [local_tensor(p) for p in self._module.parameters()]
            here = (
                _squares(2 * a - b for a, b in zip(once, twice, strict=True)),
                _squares(twice),
                _squares(torch.finfo(w.dtype).eps * w for w in weights),
            )
            # of all ranks' pieces of the weights, so that all go on alike
            error, size, rounding = (math.fsum(values) for values in zip(*gather(here), strict=True))
            if size > 1e5 * rounding:
                break
        return error <= 1e-4 * size + 4 * rounding

    @torch.no_grad()
    def _update(self, request: LineProbe, lr: float, num_steps: int) -> tuple[list[Tensor], float]:
        """What ``num_steps`` steps add to the weights, and the loss before them. Leaves the weights as they were."""
        self._go_to(request.start or "here")
        weights = [local_tensor(p) for p in self._module.parameters()]
        before = [w.detach().clone() for w in weights]
        base = self._make_steps(request, lr, num_steps)
        torch._foreach_neg_(before)
        torch._foreach_add_(before, weights)
        self._go_to(request.start or "here")
        return before, base

    def _line_loss(self, request: LineProbe, factor: float) -> tuple[float | None, float]:
        """The losses before (None: there was no step) and after real steps at ``lr * factor``."""
        self._go_to(request.start or "here")
        base = self._make_steps(request, request.lr * factor, request.horizon) if factor > 0 else None
        return base, self._line_evaluation(request)

    def _make_steps(self, request: LineProbe, lr: float, num_steps: int) -> float:
        """Steps from where the weights are; the training loss before the first of them, NaN without one."""
        self._seed(request.draw, 0)
        first: Tensor | None = None
        with torch.enable_grad():
            for step in range(num_steps):
                self._progress(request, step)
                self._lr.set(lr)
                loss = self._step(request.draw, step)
                first = loss if step == 0 else first
        return math.nan if first is None else mean_over_ranks(self._strategy, [first])[0]

    @torch.no_grad()
    def _line_evaluation(self, request: LineProbe) -> float:
        assert self._sink is not None
        self._at = None  # in training mode an evaluation moves batch statistics
        self._seed(request.draw, 0)
        if request.evaluate_on == "validation":
            losses = self._evaluate(Probe(lr=request.lr, num_steps=0))
            return math.fsum(losses) / len(losses)
        if not self._module.automatic_optimization:
            raise ValueError(
                "Expected `evaluate_on='validation'` under manual optimization, whose training step updates."
            )
        count = steps_per_batch(self._trainer)
        step = request.horizon - (request.evaluate_on == "same")
        batches = self.draws.training(request.draw, step * count, count)
        # In training mode, as the real forward will be; batch statistics go into buffers that are put back.
        values = evaluate_training_batches(self._trainer, batches, self._sink, training=True)
        self.cost.eval_batches += len(values)
        means = mean_over_ranks(self._strategy, values)
        return math.fsum(means) / len(means)

    def _seed(self, draw: int, offset: int) -> None:
        """The same random numbers for every candidate of a draw; other ones on each rank, as in training."""
        RandomState.seed(
            mix(self._options.seed, draw, offset, 1 + self._trainer.global_rank), self._strategy.root_device
        )


def _squares(tensors: Iterable[Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in tensors)
