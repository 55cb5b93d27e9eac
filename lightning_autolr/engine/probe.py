"""Answers what a search asks for, inside a Trainer, and leaves no trace."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_autolr.core.record import Cost
from lightning_autolr.core.requests import Evaluation, LineProbe, LineResult, Probe, ProbeResult, Status, diverged
from lightning_autolr.engine.batch_norm import updated_statistics
from lightning_autolr.engine.batches import Draws, in_parts, mix, validation_batches
from lightning_autolr.engine.compat import ValLoaders, average_models
from lightning_autolr.engine.evaluate import evaluate_first, evaluate_training_batches, validating
from lightning_autolr.engine.files import Place, make_store
from lightning_autolr.engine.line import answer_line_probe
from lightning_autolr.engine.lr import LearningRate
from lightning_autolr.engine.permute import permute_weights
from lightning_autolr.engine.quiet import LogSink, deferred_signals, quiet
from lightning_autolr.engine.randomness import Generator, RandomState, generators_of, restore_of
from lightning_autolr.engine.ranks import gather, mean_over_ranks
from lightning_autolr.engine.state import Fork, take_gradients
from lightning_autolr.engine.steps import batches_per_step, index_in_epoch, private_step, to_device
from lightning_autolr.engine.tallies import tallies_stay

__all__ = ["ProbeOptions", "Prober"]

T = TypeVar("T")

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
        search_callbacks: callbacks that take part in private steps, since they change gradients; their attributes are put back.
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

    @property
    def score_name(self) -> str:
        """What validation scores are, for those who read the trace; see :class:`~lightning_autolr.core.requests.Evaluation`."""
        if self.monitor == "val_loss":
            return ""
        return f"-{self.monitor}" if self.mode == "max" else self.monitor


class _DivergedError(Exception):
    """The weights of a probe are broken: an answer, not an error."""


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
        self.trainer, self.lr, self._options, self.progress = trainer, lr, options, progress
        self._module, self._strategy = trainer.lightning_module, trainer.strategy
        self._here = self._new_fork()
        self._kept: dict[str, Fork] = {}
        self._held: list[Generator] = []  # random number generators of the user's
        self._at: str | None = None  # the state we are in: "here", a kept id, or None when it was trained on
        self._sink: LogSink | None = None
        self._signals: list[int] = []
        self._validation: list[list[tuple[Any, int, int]]] = []
        self.is_linear: bool | None = None  # whether updates are proportional to the learning rate; checked once
        self.draws = Draws(
            trainer, options.seed, options.holdout_batches, options.probe_dataloader, options.cache_bytes
        )
        self.cost = Cost()

    @contextmanager
    def session(self) -> Iterator[str]:
        """A row of probes from one moment of the run. Yields the fingerprint of the weights."""
        self._held = generators_of([self.trainer.datamodule, *self._module.modules()])
        random_state = self._random_state()
        grads: list[tuple[torch.nn.Parameter, Tensor]] = []
        with quiet(self.trainer, self._module, list(self._options.search_callbacks)) as (sink, signals):
            lr, momentum, self.lr.is_private = self.lr.value, self.lr.momentum, True
            self._at, self._sink, self._signals = "here", sink, signals
            try:
                grads += take_gradients(self._module.parameters())
                # Callbacks that take part have a state, too; schedulers may have come since.
                self._here.roots = [*self._roots(), *map(vars, self._options.search_callbacks)]
                self._here.capture()
                yield self._here.fingerprint()
            finally:
                with deferred_signals(frozenset({signal.SIGINT})):
                    self.go_to("here")
                    self._at = self._sink = None
                    self.lr.value, self.lr.momentum, self.lr.is_private = lr, momentum, False
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

    def close(self) -> None:
        """Drop all copies."""
        for fork in (self._here, *self._kept.values()):
            fork.release()
        self._kept.clear()

    def note(self, request: Probe | LineProbe) -> None:
        """Remember which batches an answered request used up; for those that are not answered here, too."""
        steps = request.offset + request.num_steps if isinstance(request, Probe) else request.horizon + 1
        self.draws.note(request.draw, steps * batches_per_step(self.trainer))

    def answer(self, request: Probe | LineProbe, new_id: str) -> ProbeResult | LineResult:
        """Answer one request; inside a session only."""
        self.note(request)
        try:
            return self._probe(request, new_id) if isinstance(request, Probe) else answer_line_probe(self, request)
        except StopIteration as error:  # out of a hook it would look to the Trainer like the end of an epoch, for ever
            raise RuntimeError(
                "Expected private steps to end without an exception, got a StopIteration from the module: a `next(...)` "
                "without a default found nothing. Give it one, or look at where the error above comes from."
            ) from error

    def keep(self, new_id: str) -> None:
        """Keep the present state of the real run."""
        self._kept[new_id] = self._fork_of_all()
        self._kept[new_id].capture()

    def resume_from(self, state: str) -> None:
        """Make a kept state the state of the real run, averages of its weights included; what the module has counted of the
        epoch stays, and so do generators.

        Entries of parameter groups that came since stay: whoever added them, such as the scheduler of a weight averaging,
        is not taken back, and reads them on.
        """
        before = [[dict(group) for group in optimizer.param_groups] for optimizer in self.trainer.optimizers]
        # The data go on, and what is drawn for them: noise that was seen must not come again.
        put_back = [restore_of(generator) for generator in generators_of([*self._module.modules(), *self._roots()])]
        with tallies_stay(self._module):
            self._known(state).restore()
        for put_generator_back in put_back:
            put_generator_back()
        for optimizer, groups in zip(self.trainer.optimizers, before, strict=True):
            for group, old in zip(optimizer.param_groups, groups, strict=False):  # there may be fewer now
                group.update({key: value for key, value in old.items() if key not in group})

    def release(self, state: str) -> None:
        """Drop a kept state."""
        self._known(state).release()
        del self._kept[state]

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Put the present state back at the end of the block."""
        here = self._fork_of_all()
        here.capture()
        try:
            yield
        finally:
            here.restore()
            here.release()

    @property
    def kept(self) -> dict[str, Fork]:
        return self._kept

    def go_to(self, state: str) -> None:
        """Be in a state: "here", where the session began, or a kept one. This and what follows: inside a session only."""
        if self._at != state:
            (self._here if state == "here" else self._known(state)).restore()
            for parameter in self._module.parameters():
                parameter.grad = None
            self._at = state

    def leave(self) -> None:
        """The weights are about to change: from here on we are in no state that was kept."""
        self._at = None

    def seed(self, draw: int, offset: int) -> None:
        """The same random numbers for every candidate of a draw; other ones on each rank, as in training."""
        seed = mix(self._options.seed, draw, offset, 1 + self.trainer.global_rank)
        RandomState.seed(seed, self._strategy.root_device, self._held)

    def step(self, draw: int, step: int) -> Tensor | None:
        """One private step on the draw's batches for ``step``."""
        self.leave()
        count = batches_per_step(self.trainer)
        batches = [to_device(self.trainer, b) for b in self.draws.training(draw, step * count, count)]
        self.cost.steps += 1
        assert self._sink is not None
        return private_step(self.trainer, batches, index_in_epoch(self.trainer, step), self._sink)

    def evaluate(self, request: Probe) -> list[float]:
        """Losses of the evaluation batches. Random numbers and train/eval flags are as before afterwards."""
        assert self._sink is not None
        self.leave()
        modes = [(m, m.training) for m in self._module.modules()]
        random_state = self._random_state()
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
            raise ValueError(
                f"Expected evaluation batches with a loss for {request.evaluate!r}, got none: `training_step` returned none "
                "and logged none for any of them."
            )
        sign = -1.0 if self._options.mode == "max" and request.evaluate == "validation" else 1.0
        return [sign * value for value in mean_over_ranks(self._strategy, values)]

    def training_losses(self, batches: list[Any], training: bool = False) -> list[Tensor]:
        """Training losses of batches without a step, but for those that are skipped; in evaluation mode unless ``training``."""
        assert self._sink is not None
        self.leave()  # in training mode they move batch statistics
        self.cost.eval_batches += len(batches)
        return evaluate_training_batches(self.trainer, batches, self._sink, training)

    def _random_state(self) -> RandomState:
        return RandomState(self._strategy.root_device, self._held)

    def _new_fork(self) -> Fork:
        return Fork(self._roots(), make_store(self._options.fork, self._strategy.checkpoint_io))

    def _fork_of_all(self) -> Fork:
        """With the averages of the weights, which no private step touches."""
        fork = self._new_fork()
        fork.roots += average_models(self.trainer)
        return fork

    def _roots(self) -> list[object]:
        trainer = self.trainer
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        roots = [self._module, *trainer.optimizers, *schedulers, scaler, self.lr.memory]
        return [root for root in roots if root is not None]

    def _known(self, state: str) -> Fork:
        if state not in self._kept:
            raise KeyError(f"Expected the id of a kept state out of {sorted(self._kept)}, got {state!r}.")
        return self._kept[state]

    def _probe(self, request: Probe, new_id: str) -> ProbeResult:
        self.go_to(request.start or "here")
        if request.permuted:
            self.leave()
            permute_weights(self._module.parameters(), self._options.seed)
        self.seed(request.draw, request.offset)
        losses: list[float] = []
        evaluations: list[Evaluation] = []
        skipped: list[int] = []
        status, steps_before = Status.OK, self.cost.steps
        try:
            self._train(request, losses, evaluations, skipped)
        except _DivergedError:
            status = Status.DIVERGED
        for state in request.release:
            self.release(state)
        if request.keep_end:
            self.keep(new_id)
        if status is Status.OK:
            try:
                evaluations += self._evaluations_at_end(request, losses)
            except _DivergedError:
                status = Status.DIVERGED
        made = self.cost.steps - steps_before
        return ProbeResult(
            tuple(losses),
            tuple(evaluations),
            status,
            new_id if request.keep_end else None,
            None if made == len(losses) + len(skipped) else made,
            tuple(skipped),
        )

    def _train(self, request: Probe, losses: list[float], evaluations: list[Evaluation], skipped: list[int]) -> None:
        """Make the steps of a probe, and add what came of them to the lists, as far as it came."""
        unread: list[Tensor] = []
        for done in range(1, request.num_steps + 1):
            is_last = done == request.num_steps
            self.progress(request, done - 1)
            self.leave()
            self.lr.set(request.lr * request.shape(done - 1))
            loss = self._unless_weights_broke(partial(self.step, request.draw, request.offset + done - 1))
            if loss is None:
                skipped.append(done - 1)
            else:
                unread.append(loss)
            is_due = not is_last and request.evaluate_every is not None and done % request.evaluate_every == 0
            if is_due or is_last or done % _LOOK_EVERY == 0:
                new, unread = mean_over_ranks(self._strategy, unread), []
                bad = next((i for i, x in enumerate(new) if diverged(x, request.stop_above)), None)
                losses += new if bad is None else new[: bad + 1]
                if bad is not None:
                    raise _DivergedError
            if is_due:
                evaluations.append(self._evaluation(request, done))

    def _evaluations_at_end(self, request: Probe, losses: list[float]) -> list[Evaluation]:
        if request.evaluate == "none":
            return []
        if request.evaluate == "train":
            return [Evaluation.of_training(losses)]
        return [self._evaluation(request, request.num_steps)]

    def _evaluation(self, request: Probe, step: int) -> Evaluation:
        losses = self._unless_weights_broke(partial(self.evaluate, request))
        return Evaluation(step, tuple(losses), self._options.score_name if request.evaluate == "validation" else "")

    def _unless_weights_broke(self, work: Callable[[], T]) -> T:
        """What ``work`` gives. Its exception is a divergence when the weights are to blame: the real ones do not raise it.

        User code may refuse to work with NaN, and so does anomaly detection. What the real weights raise, too, is the user's
        own error and ends the run, with the real state in place.
        """
        try:
            return work()
        except (ArithmeticError, RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.go_to("here")
            try:
                work()
            except Exception:
                # Whatever the second try raises, the user gets the first error. The second may come from an iterator that
                # the first one broke; as a StopIteration it would even look to the Trainer like the end of an epoch.
                raise error from None
            raise _DivergedError from None

    def _losses(self, request: Probe) -> list[Tensor]:
        """One pass over the evaluation batches."""
        assert self._sink is not None
        if request.evaluate == "validation":
            with self._val_loaders.in_place(), validating(self.trainer):
                choices = self._validation_batches()
                values = evaluate_first(self.trainer, choices, self._sink, self._options.monitor)
            self.cost.eval_batches += len(choices[0])
            return values
        return self.training_losses(self.draws.held_out(request.draw))

    def _validation_batches(self) -> list[list[tuple[Any, int, int]]]:
        """In parts, where they are few; and whole, for a module that fails on parts."""
        if not self._validation:
            whole = validation_batches(
                self.trainer, self._options.eval_batches, self._val_loaders.combined, self._options.seed
            )
            parts = in_parts(whole)
            # Forward passes are collective on several ranks: all make the same number of them.
            counts = gather((len(parts), len(whole)))
            self._validation = [parts[: min(c[0] for c in counts)], whole[: min(c[1] for c in counts)]]
            if all(n == m for n, m in counts):
                del self._validation[0]
        return self._validation

    @cached_property
    def _val_loaders(self) -> ValLoaders:
        """Set up with random numbers of their own: a random split is the same on all ranks, and after a resume."""
        random_state = self._random_state()
        RandomState.seed(self._options.seed, self._strategy.root_device, self._held)
        loaders = ValLoaders(self.trainer)
        random_state.restore()
        return loaders
