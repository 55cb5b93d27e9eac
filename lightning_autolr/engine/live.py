"""A search inside one ``fit``: between two real steps it is asked what to do next.

Probes are answered at once; real training becomes a segment that the Trainer's own loop makes step by step. Everything a
search was told stands in the trace; a resumed run tells it again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_autolr.core.losses import first_not_finite, sudden
from lightning_autolr.core.record import Entry, Record, read_leftover
from lightning_autolr.core.requests import (
    Answer,
    LineProbe,
    Probe,
    ProbeResult,
    Request,
    Status,
    Train,
    TrainResult,
    decode,
)
from lightning_autolr.engine import compat
from lightning_autolr.engine.announce import Announcer
from lightning_autolr.engine.batches import unchanged
from lightning_autolr.engine.checks import record_folder
from lightning_autolr.engine.conversation import Conversation
from lightning_autolr.engine.kept import KeptStates
from lightning_autolr.engine.length import RunLength
from lightning_autolr.engine.lr import LearningRate
from lightning_autolr.engine.probe import Prober
from lightning_autolr.engine.randomness import RandomState
from lightning_autolr.engine.ranks import decide, gather, strategy_is_distributed
from lightning_autolr.engine.segment import ActiveSegment
from lightning_autolr.engine.steps import batches_per_step, real_loss
from lightning_autolr.schedules import to_plain
from lightning_autolr.search.ratchet import Guarded

if TYPE_CHECKING:
    from lightning_autolr.engine.driver import SearchCallback

__all__ = ["LiveSearch"]


class LiveSearch:
    """The search of a callback, from the start of a training to its end.

    Args:
        owner: the callback, whose options it reads.
        trainer: the Trainer, at the start of its training.
        saved: what :meth:`state_dict` gave, when the run is resumed.
    """

    def __init__(self, owner: SearchCallback, trainer: Any, saved: dict[str, Any] | None) -> None:
        self._owner, self.trainer = owner, trainer
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        memory = None if saved is None else saved["lr"]
        self.lr = LearningRate(trainer.optimizers, owner.on_scheduler == "multiply", memory, schedulers)
        folder = record_folder(trainer)
        self.record = Record(folder if trainer.is_global_zero else None)
        self.announcer = Announcer(type(owner).__name__, trainer, self.record, owner.figures)
        self._prober = Prober(trainer, self.lr, owner.probe_options, self.announcer.show)
        self.cost = self._prober.cost
        self._kept = KeptStates(trainer, self._prober, self.record)
        self.length = RunLength(trainer, owner.total_steps, owner.count_search, saved)
        self._leftover: list[Entry] = []
        self._conversation = Conversation(trainer.strategy, self.record, self.cost, self._leftover)
        self._active: ActiveSegment | None = None
        self._is_warm = not strategy_is_distributed()
        self._step_before = 0

    # -- start and end ----------------------------------------------------------------------------------------------

    def start(self, saved: dict[str, Any] | None) -> None:
        """Begin the search, or bring it to where the saved run was."""
        if saved is None and (old := self.record.set_aside()):
            self.announcer.info(f"the record of an earlier fit is now in {old}.")
        random_state = None if saved is None else self._resume(saved)
        # Saved ones are put back now, not at the first batch: loading it, or a validation before it, draws numbers again.
        random_state = random_state or RandomState(self.trainer.strategy.root_device)
        self._begin_search()
        random_state.restore()
        self.record.restart(self._leftover)

    def _resume(self, saved: dict[str, Any]) -> RandomState | None:
        """Take up a saved run; returns the random state of this rank."""
        trainer = self.trainer
        self.record.trace = [Entry.from_json(entry) for entry in saved["trace"]]
        self.record.segments = [decode(s) for s in saved["segments"]]
        if saved["active"] is not None:
            self._active = ActiveSegment.from_state_dict(saved["active"])
        vars(self.cost).update(saved["cost"])
        self._prober.is_linear = saved["is_linear"]
        self._kept.load_state_dict(saved)
        for entry in self.record.trace:
            if not isinstance(entry.request, Train):
                self._prober.note(entry.request)
        if trainer.is_global_zero and saved["folder"]:
            self._leftover += read_leftover(saved["folder"], len(self.record.trace))
        ranks, rank = saved["random_states"], trainer.global_rank
        return RandomState.from_state_dict(ranks[rank], trainer.strategy.root_device) if rank < len(ranks) else None

    def _begin_search(self) -> None:
        """On rank 0, which decides for all."""
        owner, total = self._owner, self.length.total
        run = self.length.facts(self.lr.reference)
        if total is not None and owner.searches and self.length.time_left() is not None:
            rank_zero_warn(
                f"{self.announcer.name} plans for {total} steps. Should `max_time` end the run earlier, the learning "
                "rate is not annealed by then: leave `max_steps` and `max_epochs` at -1 to anneal with the time."
            )
        if self.trainer.is_global_zero:
            search = owner.make_search(run)
            if owner.ratchet is not None:
                search = Guarded(search, owner.ratchet)
            if plan := search.describe(run):
                self.announcer.info(plan)
            active = None if self._active is None else self._active.train
            train = self._conversation.begin(search, run, active, not owner.searches, self.length.planned)
            if self._active is not None and train is not None and train != active:
                self.announcer.info("the schedule is stretched over the new length of the run.")
                self._active.train = train
        if self._active is not None and not owner.searches:
            self._active.train = decide(self.trainer.strategy, self._active.train)

    def end(self) -> None:
        """The training has ended as it should."""
        if self._owner.ratchet is not None and self.length.is_cut_short(self.trained, self.cost.steps):
            self.announcer.warn_ended_early(self.trained, self.length.total)
        if self._active is not None and self._active.steps_done:
            self._active.read(self.trainer.strategy)
            self._finish(Status.OK)
        self._active = None
        self.record.finish()

    def break_off(self) -> None:
        """The training has ended by an exception, on this rank at least."""
        if self._active is not None and self._active.steps_done:
            self.record.write_schedule(self._active.to_segment())

    def close(self) -> None:
        """Free the copies and the optimizers' hooks."""
        self.lr.close()
        self._prober.close()

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; collective."""
        if self._active is not None:
            self._active.read(self.trainer.strategy)
        return {
            "trace": [entry.to_json() for entry in self.record.trace],
            "segments": [to_plain(s) for s in self.record.segments],
            "active": None if self._active is None else self._active.state_dict(),
            **self.length.state_dict(),
            **self._kept.state_dict(),
            "lr": self.lr.state_dict(),
            "is_linear": self._prober.is_linear,
            "cost": vars(self.cost).copy(),
            "random_states": gather(RandomState(self.trainer.strategy.root_device).state_dict()),
            "folder": self.record.folder or "",
        }

    # -- one step of the real training ------------------------------------------------------------------------------

    def before_batch(self, batch: Any, batch_idx: int) -> None:
        """Search, if it is time to, and set the learning rate."""
        self._step_before = self.trainer.global_step
        if batch_idx % batches_per_step(self.trainer):
            return
        if not self._is_warm:
            self._warm_up(batch)
        active = self._active or self._next_segment(batch)
        self.lr.set(active.lr, active.momentum)
        self.lr.show()
        scalars = {"autolr/lr": self.lr.value, "autolr/stage": float(active.train.stage)}
        if self._owner.searches:
            scalars["autolr/search_steps"] = float(self.cost.steps + self.cost.steps_undone)
        self.announcer.log_step(scalars, always=active.steps_done == 0)

    def before_optimizer_step(self, optimizer: Any) -> None:
        if self._active is not None:
            self._active.measure_gradients(self.trainer, optimizer)

    def after_batch(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step, and look at its loss where somebody wants to know."""
        trainer, active = self.trainer, self._active
        if active is None:
            return
        automatic = trainer.lightning_module.automatic_optimization
        loss = real_loss(trainer, outputs)
        if loss is not None:
            # under automatic optimization the loop has divided by the accumulation
            active.add_loss(loss.detach().float().mean() * (trainer.accumulate_grad_batches if automatic else 1))
        if automatic and trainer.global_step == self._step_before:
            return
        if not automatic and (wrong := self.length.count_batch()):
            rank_zero_warn(f"{self.announcer.name} {wrong}")
        active.end_step()
        if ends := self.length.is_over(self.trained, self.cost.steps):
            trainer.should_stop = True
        if active.is_due or (active.is_guarded and compat.validates_after(trainer, batch_idx)):
            status = active.read(trainer.strategy, judge=True)
            if status is Status.DIVERGED and (bad := first_not_finite(active.losses)) is not None:
                self.announcer.warn_not_finite(f"in step {self.trained - active.steps_done + bad + 1}")
            if active.is_finished or status is Status.DIVERGED:
                self._finish(status)
            if status is Status.DIVERGED and not ends:
                # At once: whoever validates or saves after this batch shall not meet broken weights.
                self._next_segment(batch)

    @property
    def trained(self) -> int:
        """Real steps so far, undone ones too."""
        active = 0 if self._active is None else self._active.steps_done
        return sum(s.num_steps for s in self.record.segments) + active

    # -- what the search asks for -----------------------------------------------------------------------------------

    def _next_segment(self, batch: Any) -> ActiveSegment:
        """Answer probes until the search asks for real training, and begin it; ``batch`` is the one of the real step."""
        request = self._conversation.next()
        if isinstance(request, (Probe, LineProbe)):
            begun = time.perf_counter()
            while isinstance(request, (Probe, LineProbe)):
                num_known = len(self.record.trace)
                with unchanged(batch), self._prober.session() as fingerprint:
                    while isinstance(request, (Probe, LineProbe)):
                        self._conversation.tell(*self._answer(request, fingerprint))
                        request = self._conversation.next()
                        if self._prober.is_interrupted:
                            break  # a signal is delivered between two probes, with the real state in place
                for entry in self.record.trace[num_known:]:
                    self._kept.learn(entry.request, entry.answer)
            self.cost.seconds += time.perf_counter() - begun
            self.announcer.end_search(request)
        if request is None:
            request = Train(lr=self._last_lr(), num_steps=None, label="hold", reason="The search has ended.")
        self._active = self._begin(request)
        return self._active

    def _answer(self, request: Probe | LineProbe, fingerprint: str) -> tuple[Request, Answer, int, float, str]:
        begun, step = time.perf_counter(), self.trainer.global_step
        known = self._conversation.known_answer(request, step, fingerprint)
        if known is not None:
            self._prober.note(request)
            return request, known, step, 0.0, fingerprint
        answer = self._prober.answer(request, f"state-{len(self.record.trace)}")
        if isinstance(answer, ProbeResult) and (bad := sudden(answer.losses)) is not None:
            self.announcer.warn_not_finite(f"in step {bad + 1} of a candidate at learning rate {request.lr:.3g}")
        return request, answer, step, time.perf_counter() - begun, fingerprint

    def _begin(self, train: Train) -> ActiveSegment:
        """The segment that a request for real training becomes."""
        place = None if train.start is None else self._kept.go_back(train.start, self.announcer.name)
        self._kept.release(train.release)
        start = f"state-{len(self.record.trace)}" if train.keep_start else None
        if start is not None:
            self._kept.keep(start)
        if not train.goes_on:
            self.lr.start_segment()
        leaps = train.start is not None and place is None  # to the end of a probe, whose steps are in no segment
        back_to, as_left = place or (None, False)
        if back_to == len(self.record.segments):
            back_to = None  # nothing was trained since
        return ActiveSegment(train, start, self.trainer.global_step, back_to, leaps, as_left)

    def _finish(self, status: Status) -> None:
        """Write the training under way down, and tell the search what came of it."""
        active, trained = self._active, self.trained
        assert active is not None
        self._active = None
        self.record.add_segment(active.to_segment(status))
        left = self.length.steps_left(trained, active.steps_done, active.begun)
        answer = TrainResult(
            tuple(active.losses), status, active.start, tuple(active.grad_norms), left, tuple(active.skipped)
        )
        self._conversation.tell(active.train, answer, active.global_step, time.perf_counter() - active.begun)

    def _warm_up(self, batch: Any) -> None:
        """One private step that is thrown away.

        DistributedDataParallel rebuilds its gradient buckets after the first backward, which changes the order of sums over
        three and more ranks. Made in every run, with and without search, it makes both round alike.
        """
        with unchanged(batch), self._prober.session():
            self._prober.answer(Probe(lr=self.lr.reference, num_steps=1, evaluate="none", label="warm-up"), "warm-up")
        self.cost.steps -= 1
        self._is_warm = True

    def _last_lr(self) -> float:
        kept = [s for s in self.record.segments if not s.undone]
        if not kept:
            return self.lr.reference
        last = kept[-1].lr * kept[-1].shape(kept[-1].num_steps)
        return last if last > 0 else kept[-1].lr * max(kept[-1].shape(kept[-1].num_steps - 1), 1e-12)
