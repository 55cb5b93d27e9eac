"""The callback that runs a search inside a Trainer: its options, and what it does in each of Lightning's hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal

from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_autolr.core.losses import more_is_better
from lightning_autolr.core.record import Cost, Entry, Record, summary_of
from lightning_autolr.core.requests import Run
from lightning_autolr.engine.checks import callbacks_among, check_choice, check_trainer
from lightning_autolr.engine.compat import remove_log_methods
from lightning_autolr.engine.figure_log import options_of
from lightning_autolr.engine.files import PLACES, Place
from lightning_autolr.engine.live import LiveSearch
from lightning_autolr.engine.lr import LearningRate, OnScheduler
from lightning_autolr.engine.probe import ProbeOptions
from lightning_autolr.engine.ranks import strategy_is_distributed
from lightning_autolr.schedules import Segment
from lightning_autolr.search.base import AbstractSearch
from lightning_autolr.search.ratchet import Ratchet

__all__ = ["SearchCallback"]


class SearchCallback(Callback):
    """Base of all callbacks of this package: runs a search, or a fixed schedule, inside a Trainer.

    Args:
        objective: what scores a candidate: the validation batches, training batches held out from the probe, or the
            training loss itself.
        monitor: name under which ``validation_step`` logs the score; for "val_loss" the loss it returns is taken when it logs
            no such.
        mode: whether less ("min") or more ("max") of it is better.
        eval_batches: batches of each validation loader that score a candidate, >= 1; None is all of them. With "holdout":
            training batches that are reserved, and None is 4.
        fork: where the copy of the training state lies: on its own "device", in pinned "cpu" memory, or on "disk" through
            the Trainer's checkpoint I/O plugin.
        on_scheduler: what to do with learning-rate schedulers that the module configured: "override" them with one
            warning, "multiply" with what they do within a stage (relative to its start, or to their top where they have not
            reached it yet), or raise an "error".
        total_steps: optimizer steps (batches under manual optimization) from here to the end of the run, >= 1; "auto" asks the
            Trainer.
        count_search: count search steps in ``total_steps``: the run then ends when search and training together have
            made that many. For comparisons at equal cost.
        search_callbacks: callbacks of the Trainer that take part in private steps, since they change gradients; their
            attributes are put back. One that the Trainer has not stands for the Trainer's of its class, as from YAML.
        probe_dataloader: batches for probes, when the training loader cannot be read twice; from Python only.
        allow_untested: run on strategies that we have not tested.
        ratchet: take back training that did harm, see :class:`~lightning_autolr.search.ratchet.Ratchet`.
        figures: log figures of what was tried and of the whole run, see :mod:`lightning_autolr.report.figures`; as files in
            ``<log_dir>/autolr/figures`` when no logger takes them. Needs matplotlib, without which there are none.
        seed: of everything random in the search, >= 0.

    Raises:
        ValueError: an argument out of its range.
        TypeError: an argument of another kind.
        MisconfigurationException: in ``setup``, a Trainer or module that cannot be served.
    """

    search: AbstractSearch
    scores_candidates = True  # by ``objective``; one whose learning rates are known makes none

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
        check_choice("fork", fork, PLACES)
        check_choice("on_scheduler", on_scheduler, ("override", "multiply", "error"))
        if not isinstance(monitor, str):
            raise TypeError(f"Expected monitor to be the name of a value that `validation_step` logs, got {monitor=}.")
        if eval_batches is not None and not (isinstance(eval_batches, (int, Integral)) and eval_batches >= 1):
            raise ValueError(f"Expected a whole eval_batches >= 1 or None, got {eval_batches=}.")
        if total_steps != "auto" and not (isinstance(total_steps, (int, Integral)) and total_steps >= 1):
            raise ValueError(f"Expected total_steps >= 1 or 'auto', got {total_steps=}.")
        if not (isinstance(seed, (int, Integral)) and seed >= 0):
            raise ValueError(f"Expected a whole seed >= 0, got {seed=}.")
        if not isinstance(ratchet, (Ratchet, bool)):
            raise TypeError(f"Expected a Ratchet, True or False, got {ratchet=}.")
        # By what they can do: there are two Lightning packages with a class each.
        if not (
            isinstance(search_callbacks, Sequence) and all(hasattr(c, "on_after_backward") for c in search_callbacks)
        ):
            raise TypeError(f"Expected search_callbacks to be a list of callbacks, got {search_callbacks!r}.")
        if isinstance(probe_dataloader, Mapping):  # what YAML gives for a class_path
            raise TypeError(
                f"Expected probe_dataloader to be a loader that yields batches, got {probe_dataloader!r}. Make the callback in "
                "Python, or in a class of your own that makes the loader."
            )
        if mode == "min" and more_is_better(monitor):
            rank_zero_warn(
                f"{type(self).__name__} takes less of {monitor!r} for better, and by its name it is a score. Pass `mode='max'` "
                "if more of it is better: otherwise the run ends on its worst weights."
            )
        if mode == "max" and "loss" in monitor.lower():
            rank_zero_warn(
                f"{type(self).__name__} takes more of {monitor!r} for better, and by its name it is a loss. Leave `mode='max'` "
                "out, or pass the name of a score as `monitor`."
            )
        self.objective = objective
        self.on_scheduler = on_scheduler
        self.total_steps: int | Literal["auto"] = total_steps if total_steps == "auto" else int(total_steps)
        self.count_search = count_search
        self.allow_untested = allow_untested
        self.figures = figures
        looks_at: Literal["holdout", "validation"] = "holdout" if objective == "holdout" else "validation"
        self.ratchet = Ratchet() if ratchet is True else ratchet or None
        if self.ratchet is not None and self.ratchet.objective is None:
            self.ratchet = replace(self.ratchet, objective=looks_at)
        holds_out = objective == "holdout" or (self.ratchet is not None and self.ratchet.objective == "holdout")
        self.probe_options = ProbeOptions(
            monitor=monitor,
            mode=mode,
            eval_batches=None if eval_batches is None else int(eval_batches),
            holdout_batches=int(eval_batches or 4) if holds_out else 0,
            fork=fork,
            seed=int(seed),  # what is written down has plain values
            search_callbacks=tuple(search_callbacks),
            probe_dataloader=probe_dataloader,
        )
        self._loaded: dict[str, Any] | None = None
        self._final: dict[str, Any] | None = None
        self._live: LiveSearch | None = None  # while something is trained
        self._record, self._cost = Record(None), Cost()

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
        self._loaded = None  # of another fit, or of a test of a checkpoint; what this fit resumes is loaded after this
        if type(self) is SearchCallback and not hasattr(self, "search"):
            raise MisconfigurationException(
                "Expected a callback with a search of its own, got SearchCallback: use AutoLRSCallback or another subclass, or "
                "write one that sets `search`."
            )
        if self.searches:
            scored_by = self.objective if self.scores_candidates else None
            looks_at = None if self.ratchet is None else self.ratchet.objective
            check_trainer(trainer, pl_module, {scored_by, looks_at}, self.allow_untested)
        if others := [type(c).__name__ for c in trainer.callbacks if isinstance(c, SearchCallback) and c is not self]:
            raise MisconfigurationException(
                f"Expected one callback that sets the learning rate, got {type(self).__name__} and {', '.join(others)}. Leave "
                "one of them out."
            )
        named = callbacks_among(trainer.callbacks, self.probe_options.search_callbacks)
        self.probe_options = replace(self.probe_options, search_callbacks=named)
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
        if self.searches and any(is_lazy(p) for p in pl_module.parameters()):
            raise MisconfigurationException(
                "Expected parameters with shapes, got lazy ones, which a probe would initialize. Run one batch through the "
                "module in `configure_model`."
            )
        saved, self._loaded, self._final = self._loaded, None, None
        self._live = LiveSearch(self, trainer, saved)
        self._record, self._cost = self._live.record, self._live.cost
        self._live.start(saved)

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._live is not None and (changed := self._live.length.other_epoch()):
            rank_zero_warn(f"{type(self).__name__} {changed}")

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._live is not None:
            self._live.before_batch(batch, batch_idx)

    @override
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if self._live is not None:
            self._live.lr.hide()

    @override
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._live is not None:
            self._live.before_optimizer_step(optimizer)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._live is not None:
            self._live.after_batch(outputs, batch, batch_idx)

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        live = self._live
        if live is None:
            return
        self._final = live.state_dict()  # what checkpoints get from now on: a longer run goes on from here
        live.end()
        summary = self.summary
        self._record.write_summary(summary)
        # may reduce over ranks: asked for on all of them
        score = trainer.callback_metrics.get(self.probe_options.monitor)
        if self.searches:
            live.announcer.say_account(summary)
        live.announcer.log_figures()
        if self.searches:
            live.announcer.log_account(summary, options_of(self), None if score is None else float(score))
        live.lr.close()

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._live is None:
            return
        self._live.break_off()
        self._live.lr.close()
        # `teardown` is not called. With several ranks the state cannot be asked for: the others may not be here.
        if not strategy_is_distributed():
            try:
                self._final = self.state_dict()  # for a checkpoint that somebody saves from here on
            except Exception as error:  # such as no memory for it: it must not hide what the user's run died of
                rank_zero_warn(f"{type(self).__name__} has no state for a checkpoint saved from here on: {error!r}.")
            self._let_go()

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._live is not None:
            self._let_go()

    def _let_go(self) -> None:
        """Keep nothing of the Trainer's: only options, the account and the state for checkpoints, which may hold kept
        weights, on the CPU."""
        assert self._live is not None
        self._live.close()
        self._live = None
        if self._final is not None:
            self._final = move_data_to_device(self._final, "cpu")
        remove_log_methods(self)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; called on every rank when a checkpoint is written."""
        if self._live is None or self._final is not None:
            return self._final or self._loaded or {}
        return self._live.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None

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
        """What the run took: ``schedule_steps`` (real ones that were kept), ``undone_steps``, ``probe_steps`` (private ones),
        ``search_steps`` (private and undone), ``eval_batches``, ``search_seconds``, ``learning_rates`` (the peak of each kept
        segment)."""
        return summary_of(self._record.segments, self._cost)

    @property
    def learning_rate(self) -> LearningRate | None:
        """What writes the learning rates while something is trained."""
        return None if self._live is None else self._live.lr

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
        if self._live is None:
            raise RuntimeError("Expected a training under way, got none: call it between `fit`'s start and end.")
        length = self._live.length
        if length.total is not None:
            rank_zero_warn(
                f"{type(self).__name__} has planned for {length.total} steps and does not anneal anew: the learning rate will "
                "not be at its end. `finish_in` is for runs of unknown length."
            )
        length.finish_in(num_steps, self._live.trained)
