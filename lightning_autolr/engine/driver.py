"""The callback that runs a search inside a Trainer.

Between two steps of the real training it asks the search what to do next, answers its probes, and sets the learning rate
of the steps that follow. Everything a search was told stands in the trace; a resumed run tells it again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_autolr.core.losses import first_not_finite, sudden
from lightning_autolr.core.requests import (
    Answer,
    LineProbe,
    Probe,
    ProbeResult,
    Request,
    Run,
    Status,
    Train,
    TrainResult,
    decode,
)
from lightning_autolr.engine import compat
from lightning_autolr.engine.checks import check_choice, check_trainer, facts_of, other_count, record_folder, steps_made
from lightning_autolr.engine.conversation import Conversation
from lightning_autolr.engine.figure_log import FigureLog, log_account, options_of
from lightning_autolr.engine.files import Place
from lightning_autolr.engine.kept import dump_kept, load_kept
from lightning_autolr.engine.lr import LearningRate, OnScheduler
from lightning_autolr.engine.probe import Cost, ProbeOptions, Prober
from lightning_autolr.engine.progress import Progress
from lightning_autolr.engine.ranks import decide, gather, strategy_is_distributed
from lightning_autolr.engine.segment import ActiveSegment
from lightning_autolr.engine.state import RandomState
from lightning_autolr.engine.steps import real_loss, steps_per_batch
from lightning_autolr.report.trace import Entry, Record, account_of, read_leftover, summary_of
from lightning_autolr.schedules import Segment, to_plain
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.ratchet import Guarded, Ratchet

__all__ = ["SearchCallback"]

_COUNTED_FOR = 20  # batches of manual optimization, after which optimizer steps are compared with what was planned


class SearchCallback(Callback):
    """Base of all callbacks of this package: runs a search, or a fixed schedule, inside a Trainer.

    Args:
        objective: what scores a candidate: the validation batches, training batches held out from the probe, or the
            training loss itself.
        monitor: name under which ``validation_step`` logs the score; the loss it returns is taken when it logs no such.
        mode: whether less ("min") or more ("max") of it is better.
        eval_batches: batches of each validation loader that score a candidate; None is all of them.
        fork: where the copy of the training state lies: on its own "device", in pinned "cpu" memory, or on "disk" through
            the Trainer's checkpoint I/O plugin.
        on_scheduler: what to do with learning-rate schedulers that the module configured: "override" them with one
            warning, "multiply" with what they do within a stage (relative to its start, or to their top where they have not
            reached it yet), or raise an "error".
        total_steps: optimizer steps from here to the end of the run; "auto" asks the Trainer.
        count_search: count search steps in ``total_steps``: the run then ends when search and training together have
            made that many. For comparisons at equal cost.
        search_callbacks: callbacks of the Trainer that take part in private steps, since they change gradients.
        probe_dataloader: batches for probes, when the training loader cannot be read twice.
        allow_untested: run on strategies that we have not tested.
        ratchet: take back training that did harm, see :class:`~lightning_autolr.search.ratchet.Ratchet`.
        figures: log figures of what was tried and of the whole run, see :mod:`lightning_autolr.report.figures`; as files in
            ``<log_dir>/autolr/figures`` when no logger takes them. Needs matplotlib, without which there are none.
        seed: seed of everything random in the search.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, a Trainer or module that cannot be served.
    """

    search: AbstractSearch

    def __init__(
        self,
        *,
        objective: Literal["validation", "holdout", "train"] = "validation",
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        eval_batches: int | None = None,
        fork: Place = "device",
        on_scheduler: OnScheduler = "override",
        total_steps: int | Literal["auto"] = "auto",
        count_search: bool = False,
        search_callbacks: Sequence[Callback] = (),
        probe_dataloader: Any = None,
        allow_untested: bool = False,
        ratchet: Ratchet | bool = False,
        figures: bool = True,
        seed: int = 0,
    ) -> None:
        check_choice("objective", objective, ("validation", "holdout", "train"))
        check_choice("mode", mode, ("min", "max"))
        check_choice("fork", fork, ("device", "cpu", "disk"))
        check_choice("on_scheduler", on_scheduler, ("override", "multiply", "error"))
        if eval_batches is not None and eval_batches < 1:
            raise ValueError(f"Expected eval_batches >= 1 or None, got {eval_batches=}.")
        if total_steps != "auto" and not (isinstance(total_steps, int) and total_steps >= 1):
            raise ValueError(f"Expected total_steps >= 1 or 'auto', got {total_steps=}.")
        if seed < 0:
            raise ValueError(f"Expected seed >= 0, got {seed=}.")
        self.objective = objective
        self.on_scheduler = on_scheduler
        self.total_steps = total_steps
        self.count_search = count_search
        self.allow_untested = allow_untested
        self.figures = figures
        looks_at: Literal["holdout", "validation"] = "holdout" if objective == "holdout" else "validation"
        self.ratchet = Ratchet() if ratchet is True else ratchet or None
        if self.ratchet is not None and self.ratchet.evaluate is None:
            self.ratchet = replace(self.ratchet, evaluate=looks_at)
        holds_out = objective == "holdout" or (self.ratchet is not None and self.ratchet.evaluate == "holdout")
        self.probe_options = ProbeOptions(
            monitor=monitor,
            mode=mode,
            eval_batches=eval_batches,
            holdout_batches=(eval_batches or 4) if holds_out else 0,
            fork=fork,
            seed=seed,
            search_callbacks=tuple(search_callbacks),
            probe_dataloader=probe_dataloader,
        )
        self._loaded: dict[str, Any] | None = None
        self._final: dict[str, Any] | None = None
        self._trainer: Any = None
        self._record, self._cost = Record(None), Cost()
        self._active: ActiveSegment | None = None

    def make_search(self, run: Run) -> AbstractSearch:
        """The search to run; called once at the start of training. To be overridden where it depends on the run."""
        return self.search

    @property
    def searches(self) -> bool:
        """Whether probes may be asked for. A fixed schedule without a ratchet needs no fork and works with every strategy."""
        return True

    # -- life cycle -------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if self.searches:
            looks_at = None if self.ratchet is None else self.ratchet.evaluate
            check_trainer(trainer, pl_module, {self.objective, looks_at}, self.allow_untested)
        if others := [type(c).__name__ for c in trainer.callbacks if isinstance(c, SearchCallback) and c is not self]:
            raise MisconfigurationException(
                f"Expected one callback that sets the learning rate, got {type(self).__name__} and {', '.join(others)}. Leave "
                "one of them out."
            )
        # First in line: LearningRateMonitor reads the optimizer when a batch starts, and whoever saves a checkpoint when it
        # ends must find that step counted.
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        configured = [type(c.scheduler).__name__ for c in trainer.lr_scheduler_configs]
        if not configured:
            return
        if self.on_scheduler == "error":
            raise MisconfigurationException(
                f"Expected a module without learning-rate schedulers, got {configured}. Remove them from "
                "`configure_optimizers`, or pass `on_scheduler='override'` or 'multiply'."
            )
        if self.on_scheduler == "override":
            rank_zero_warn(
                f"{type(self).__name__} overrides the learning rates of {', '.join(configured)}. Pass "
                "`on_scheduler='multiply'` to combine both."
            )

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        state, self._loaded, self._final = self._loaded, None, None
        if self.searches and any(is_lazy(p) for p in pl_module.parameters()):
            raise MisconfigurationException(
                "Expected parameters with shapes, got lazy ones, which a probe would initialize. Run one batch through the "
                "module in `configure_model`."
            )
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        multiply = self.on_scheduler == "multiply"
        self._lr = LearningRate(trainer.optimizers, multiply, state["lr"] if state else None, schedulers)
        self._progress = Progress(trainer)
        self._prober = Prober(trainer, self._lr, self.probe_options, self._show)
        self._cost = self._prober.cost
        folder = record_folder(trainer)
        self._record = Record(folder if trainer.is_global_zero else None)
        draws = self.figures and trainer.is_global_zero
        self._figures = FigureLog(trainer.loggers, folder) if draws and folder is not None else None
        self._active = None
        self._kept_at: dict[str, int] = {}
        self._best_at: dict[str, dict[str, float]] = {}
        self._ends_at: int | None = None
        self._has_warned = False
        self._batches, self._first_global_step = 0, trainer.global_step
        self._warm = not strategy_is_distributed()
        self._first_step = steps_made(trainer) if state is None else state.get("first_step", 0)
        leftover: list[Entry] = []
        self._conversation = Conversation(trainer.strategy, self._record, self._cost, leftover)
        self._planned: int | None = None if state is None else state.get("total_steps")
        self._total: int | None = self._planned
        self._trainer = trainer
        random_state = None
        if state is not None:
            random_state, found = self._resume(state)
            leftover += found
        # Saved ones are put back now, not at the first batch: loading it, or a validation before it, draws numbers again.
        random_state = random_state or RandomState(trainer.strategy.root_device)
        self._start_search()
        random_state.restore()
        self._record.restart(leftover)

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._step_before = trainer.global_step
        if batch_idx % steps_per_batch(trainer):
            return
        if not self._warm:
            self._warm_up()
        if self._active is None:
            self._next_segment()
        active = self._active
        assert active is not None
        self._lr.set(active.lr, active.momentum)
        self._lr.show()
        self._log(begins=active.steps_done == 0)

    @override
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self._lr.hide()

    @override
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._active is not None:
            self._active.measure_gradients(trainer, optimizer)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        active = self._active
        if active is None:
            return
        automatic = pl_module.automatic_optimization
        loss = real_loss(trainer, outputs)
        if loss is not None:
            # under automatic optimization the loop has divided by the accumulation
            active.add_loss(loss.detach().float().mean() * (trainer.accumulate_grad_batches if automatic else 1))
        if automatic and trainer.global_step == self._step_before:
            return
        if not automatic:
            self._compare_counts()
        active.end_step()
        if ends := self._is_at_end():
            trainer.should_stop = True
        if active.is_due or (active.is_guarded and compat.validates_after(trainer, batch_idx)):
            status = active.read(trainer.strategy, judge=active.is_guarded)
            if status is Status.DIVERGED and (bad := first_not_finite(active.losses)) is not None:
                self._warn_not_finite(f"in step {self._trained() - active.steps_done + bad + 1}")
            if active.is_finished or status is Status.DIVERGED:
                self._finish(status)
            if status is Status.DIVERGED and not ends:
                self._next_segment()  # at once: whoever validates or saves after this batch shall not meet broken weights

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._final = self.state_dict()  # what checkpoints get from now on: a longer run goes on from here
        if self._active is not None and self._active.steps_done:
            self._active.read(trainer.strategy)
            self._finish(Status.OK)
        self._active = None
        self._record.write_summary(self.summary)
        self._record.finish()
        if self.searches:
            self._say_account()
        self._log_end()
        self._lr.close()

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._trainer is None:
            return
        if self._active is not None and self._active.steps_done:
            self._record.write_schedule(self._active.to_segment())
        self._lr.close()
        # `teardown` is not called. With several ranks the state cannot be asked for: the others may not be here.
        if not strategy_is_distributed():
            try:
                self._final = self.state_dict()  # for a checkpoint that somebody saves from here on
            except Exception as error:  # such as no memory for it: it must not hide what the user's run died of
                rank_zero_warn(f"{type(self).__name__} has no state for a checkpoint saved from here on: {error!r}.")
            self._let_go()

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._trainer is not None:
            self._let_go()

    def _let_go(self) -> None:
        """Free the copies and the optimizers' hooks, and keep nothing of the Trainer's: only options, the account and
        the state for checkpoints, which may hold kept weights, on the CPU."""
        self._lr.close()
        self._prober.close()
        if self._final is not None:
            self._final = move_data_to_device(self._final, "cpu")
        self._trainer = self._active = None
        del self._lr, self._prober, self._progress, self._figures, self._conversation
        for name in compat.LENT:
            vars(self).pop(name, None)

    # -- what the user may ask --------------------------------------------------------------------------------------

    @property
    def trace(self) -> list[Entry]:
        """All answered requests so far; like the next two, empty before the first ``fit``."""
        return list(self._record.trace)

    @property
    def schedule(self) -> tuple[Segment, ...]:
        """What was trained so far, undone segments included."""
        return tuple(self._record.segments)

    @property
    def summary(self) -> dict[str, Any]:
        """Schedule steps, search steps, seconds in search, chosen learning rates."""
        return summary_of(self._record.segments, self._cost)

    def finish_in(self, num_steps: int) -> None:
        """End the run after ``num_steps`` more optimizer steps; a search that holds for want of an end anneals over them.

        To be called while training, on every rank, from another callback or an interactive session. What is under way is
        trained to its end first: at most a tenth of ``tau`` in :class:`~lightning_autolr.search.autolrs.AutoLRS`.

        Raises:
            ValueError: ``num_steps`` < 1.
            RuntimeError: nothing is being trained.
        """
        if num_steps < 1:
            raise ValueError(f"Expected num_steps >= 1, got {num_steps=}.")
        if self._trainer is None:
            raise RuntimeError("Expected a training under way, got none: call it between `fit`'s start and end.")
        if self._total is not None:
            rank_zero_warn(
                f"{type(self).__name__} has planned for {self._total} steps and does not anneal anew: the learning rate will "
                "not be at its end. `finish_in` is for runs of unknown length."
            )
        self._ends_at = self._trained() + num_steps

    # -- checkpoints ------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; called on every rank when a checkpoint is written."""
        if self._trainer is None or self._final is not None:
            return self._final or self._loaded or {}
        active = self._active
        device = self._trainer.strategy.root_device
        if active is not None:
            active.read(self._trainer.strategy)
        return {
            "trace": [entry.to_json() for entry in self._record.trace],
            "segments": [to_plain(s) for s in self._record.segments],
            "active": None if active is None else active.state_dict(),
            "kept_at": dict(self._kept_at),
            "best_at": {state: dict(best) for state, best in self._best_at.items()},
            "ends_at": self._ends_at,
            "first_step": self._first_step,
            "total_steps": self._total,
            "kept": dump_kept(self._trainer, self._prober),
            "lr": self._lr.state_dict(),
            "is_linear": self._prober.is_linear,
            "cost": vars(self._cost).copy(),
            "random_states": gather(RandomState(device).state_dict()),
            "folder": self._record.folder or "",
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None

    def _resume(self, state: dict[str, Any]) -> tuple[RandomState | None, list[Entry]]:
        """Take up a saved state; returns the random state of this rank and what was found out after it was saved."""
        trainer = self._trainer
        self._record.trace = [Entry.from_json(entry) for entry in state["trace"]]
        self._record.segments = [decode(s) for s in state["segments"]]
        if state["active"] is not None:
            self._active = ActiveSegment.from_state_dict(state["active"])
        self._kept_at, self._best_at, self._ends_at = dict(state["kept_at"]), state["best_at"], state["ends_at"]
        vars(self._cost).update(state["cost"])
        self._prober.is_linear = state["is_linear"]
        load_kept(trainer, self._prober, state["kept"])
        for entry in self._record.trace:
            if not isinstance(entry.request, Train):
                self._prober.note(entry.request)
        ranks, rank = state["random_states"], trainer.global_rank
        device = trainer.strategy.root_device
        random_state = RandomState.from_state_dict(ranks[rank], device) if rank < len(ranks) else None
        reads = trainer.is_global_zero and state["folder"]
        return random_state, read_leftover(state["folder"], len(self._record.trace)) if reads else []

    # -- the search -------------------------------------------------------------------------------------------------

    def _start_search(self) -> None:
        """Begin the search on rank 0, or bring it to where the trace ends."""
        run = facts_of(self._trainer, self._lr.reference, self.total_steps, self.count_search, self._first_step)
        self._total = run.total_steps  # asked for once: the Trainer counts its batches anew each time
        if self._total is not None and self.searches and self._time_left() is not None:
            rank_zero_warn(
                f"{type(self).__name__} plans for {self._total} steps. Should `max_time` end the run earlier, the learning "
                "rate is not annealed by then: leave `max_steps` and `max_epochs` at -1 to anneal with the time."
            )
        if self._trainer.is_global_zero:
            search = self.make_search(run)
            if self.ratchet is not None:
                search = Guarded(search, self.ratchet)
            if plan := search.describe(run):
                rank_zero_info(f"{type(self).__name__}: {plan}")
            active = None if self._active is None else self._active.train
            train = self._conversation.begin(search, run, active, not self.searches, self._planned)
            if self._active is not None and train is not None and train != active:
                rank_zero_info(f"{type(self).__name__}: the schedule is stretched over the new length of the run.")
                self._active.train = train
        if self._active is not None and not self.searches:
            self._active.train = decide(self._trainer.strategy, self._active.train)

    def _next_segment(self) -> None:
        """Answer probes until the search asks for real training, and begin it."""
        trainer = self._trainer
        request = self._conversation.next()
        if isinstance(request, (Probe, LineProbe)):
            begun = time.perf_counter()
            while isinstance(request, (Probe, LineProbe)):
                with self._prober.session() as fingerprint:
                    while isinstance(request, (Probe, LineProbe)):
                        self._conversation.tell(*self._answer(request, fingerprint))
                        request = self._conversation.next()
                        if self._prober.is_interrupted:
                            break  # a signal is delivered between two probes, with the real state in place
            self._progress.clear()
            self._cost.seconds += time.perf_counter() - begun
            if self._figures is not None:
                step = compat.logger_step(trainer)
                self._figures.after_search(self._record.trace, self._record.segments, request, step)
        if request is None:
            request = Train(lr=self._last_lr(), num_steps=None, label="hold", reason="The search has ended.")
        self._begin(request)

    def _answer(self, request: Probe | LineProbe, fingerprint: str) -> tuple[Request, Answer, int, float, str]:
        begun, step = time.perf_counter(), self._trainer.global_step
        known = self._conversation.known_answer(request, step, fingerprint)
        if known is not None:
            self._prober.note(request)
            return request, known, step, 0.0, fingerprint
        answer = self._prober.answer(request, f"state-{len(self._record.trace)}")
        if isinstance(answer, ProbeResult) and (bad := sudden(answer.losses)) is not None:
            self._warn_not_finite(f"in step {bad + 1} of a candidate at learning rate {request.lr:.3g}")
        return request, answer, step, time.perf_counter() - begun, fingerprint

    def _begin(self, train: Train) -> None:
        """Begin a segment of real training."""
        back_to = None if train.start is None else self._kept_at.get(train.start)
        if train.start is not None:
            self._go_back(train.start)
        for state in train.release:
            self._prober.release(state)
            self._kept_at.pop(state, None)
            self._best_at.pop(state, None)
        start = None
        if train.keep_start:
            start = f"state-{len(self._record.trace)}"
            self._prober.keep(start)
            self._kept_at[start] = len(self._record.segments)
            self._best_at[start] = _best_checkpoints(self._trainer)
        if not train.goes_on:
            self._lr.start_segment()
        leaps = train.start is not None and back_to is None  # to the end of a probe, whose steps are in no segment
        self._active = ActiveSegment(train, start, self._trainer.global_step, back_to, leaps)

    def _go_back(self, state: str) -> None:
        """Undo what was trained since ``state`` was kept."""
        best = _best_checkpoints(self._trainer)
        if new := sorted(path for path, _ in best.items() - self._best_at.get(state, best).items()):
            rank_zero_warn(
                f"{type(self).__name__} undoes a stage in which a checkpoint was saved as the best one: "
                f"{', '.join(new)}. The file stays, and holds weights that training does not go on from."
            )
        self._prober.resume_from(state)
        if state in self._kept_at:
            self._cost.steps_undone += self._record.undo_since(self._kept_at[state])

    def _trained(self) -> int:
        """Real steps so far, undone ones too."""
        active = 0 if self._active is None else self._active.steps_done
        return sum(s.num_steps for s in self._record.segments) + active

    def _steps_left(self, active: ActiveSegment) -> int | None:
        """How many steps a run of unknown length has left, if that is known: from the user, or from ``max_time``."""
        if self._ends_at is not None:
            return max(0, self._ends_at - self._trained())
        if self._total is not None:
            return None
        seconds = self._time_left()
        per_step = (time.perf_counter() - active.begun) / max(1, active.steps_done)
        return None if seconds is None else int(seconds / per_step)

    def _time_left(self) -> float | None:
        """Seconds until ``max_time``, if it was given."""
        seconds = (c.time_remaining() for c in self._trainer.callbacks if isinstance(c, Timer))
        return min((s for s in seconds if s is not None), default=None)

    def _compare_counts(self) -> None:
        """After some batches: does a manually optimized run make the steps that it was planned for?"""
        trainer = self._trainer
        self._batches += 1
        if self._batches == _COUNTED_FOR and self.total_steps == "auto" and trainer.max_steps != -1:
            said = other_count(trainer, self._batches, trainer.global_step - self._first_global_step)
            if said:
                rank_zero_warn(f"{type(self).__name__} {said}")

    def _is_at_end(self) -> bool:
        """Whether the run ends here although the Trainer does not know."""
        if self._ends_at is not None and self._trained() >= self._ends_at:
            return True
        if not self.count_search or self._total is None:
            return False
        return self._trained() + self._cost.steps >= self._total

    def _finish(self, status: Status) -> None:
        """Write the training under way down, and tell the search what came of it."""
        active, self._active = self._active, None
        assert active is not None
        self._record.add_segment(active.to_segment())
        left = self._steps_left(active)
        answer = TrainResult(tuple(active.losses), status, active.start, tuple(active.grad_norms), left)
        self._conversation.tell(active.train, answer, active.global_step, time.perf_counter() - active.begun)

    def _warm_up(self) -> None:
        """One private step that is thrown away.

        DistributedDataParallel rebuilds its gradient buckets after the first backward, which changes the order of sums over
        three and more ranks. Made in every run, with and without search, it makes both round alike.
        """
        with self._prober.session():
            self._prober.answer(Probe(lr=self._lr.reference, num_steps=1, evaluate="none", label="warm-up"), "warm-up")
        self._cost.steps -= 1
        self._warm = True

    def _last_lr(self) -> float:
        kept = [s for s in self._record.segments if not s.undone]
        if not kept:
            return self._lr.reference
        last = kept[-1].lr * kept[-1].shape(kept[-1].num_steps)
        return last if last > 0 else kept[-1].lr * max(kept[-1].shape(kept[-1].num_steps - 1), 1e-12)

    # -- what the user sees -----------------------------------------------------------------------------------------

    def _show(self, request: Probe | LineProbe, step: int) -> None:
        steps = request.num_steps if isinstance(request, Probe) else request.horizon
        name = type(self).__name__.removesuffix("Callback")
        self._progress.show(f"{name} {request.label or f'stage {request.stage}'}, step {step // 10 * 10}/{steps}")

    def _log(self, begins: bool) -> None:
        trainer = self._trainer
        step, every = compat.logger_step(trainer), trainer.log_every_n_steps
        if every and (begins or (step + 1) % every == 0):  # 0, as with `barebones`: never
            assert self._active is not None
            cost = self._cost
            scalars = {"autolr/lr": self._lr.value, "autolr/stage": float(self._active.train.stage)}
            if self.searches:
                scalars["autolr/search_steps"] = float(cost.steps + cost.steps_undone)
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=step)

    def _warn_not_finite(self, where: str) -> None:
        """Once per run: not every loss that is NaN is the learning rate's fault."""
        if not self._has_warned:
            rank_zero_warn(
                f"{type(self).__name__}: a training loss was not finite, {where}. That counts as a divergence: the learning "
                "rate is blamed for it. Where the module survives such losses by itself, let it return a finite one, or None "
                "to skip the batch; `ratchet=False` takes nothing back in the real training."
            )
        self._has_warned = True

    def _say_account(self) -> None:
        """Print what the run took, and what it found."""
        summary, folder = self.summary, self._record.folder
        lrs = [f"{lr:.2e}" for lr in summary["learning_rates"]]
        found = ", ".join(lrs[:12]) + (f" and {len(lrs) - 12} more" if len(lrs) > 12 else "")
        where = f" It lies in {folder}." if folder else ""
        account = "; ".join(account_of(summary))
        rank_zero_info(f"{type(self).__name__}: {account}. Learning rates: {found}.{where}")

    def _log_end(self) -> None:
        """Log the figures of the whole run, what the search cost, and with what options."""
        trainer, step = self._trainer, compat.logger_step(self._trainer)
        score = trainer.callback_metrics.get(
            self.probe_options.monitor
        )  # may reduce over ranks: asked for on all of them
        if self._figures is not None:
            self._figures.at_end(self._record.trace, self._record.segments, step)
        if self.searches and trainer.is_global_zero and not trainer.fast_dev_run:
            names = ("schedule_steps", "search_steps", "undone_steps", "search_seconds")
            metrics = {f"autolr/{name}": float(self.summary[name]) for name in names}
            log_account(trainer.loggers, options_of(self), metrics, None if score is None else float(score), step)


def _best_checkpoints(trainer: Any) -> dict[str, float]:
    """Their paths and scores: a better one may be written over the last."""
    monitored = [c for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None) is not None]
    found = {getattr(c, "best_model_path", ""): getattr(c, "best_model_score", None) for c in monitored}
    return {path: float(score) for path, score in found.items() if path and score is not None}
