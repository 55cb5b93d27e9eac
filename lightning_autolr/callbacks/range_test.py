"""The learning-rate range test, at any moment of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_autolr.core.range_rules import RangeCurve, RangeSuggestion, Rule
from lightning_autolr.core.requests import Probe
from lightning_autolr.engine import compat
from lightning_autolr.engine.batches import unchanged
from lightning_autolr.engine.checks import check_choice, check_trainer, keep_earlier, record_folder
from lightning_autolr.engine.driver import SearchCallback
from lightning_autolr.engine.figure_log import FigureLog
from lightning_autolr.engine.files import PLACES, Place
from lightning_autolr.engine.length import steps_made
from lightning_autolr.engine.lr import LearningRate, rescale_configured
from lightning_autolr.engine.probe import ProbeOptions, Prober
from lightning_autolr.engine.ranks import decide
from lightning_autolr.engine.steps import batches_per_step
from lightning_autolr.report.figures import range_test_figure
from lightning_autolr.schedules import from_plain, to_plain
from lightning_autolr.search.range_test import RangeTest

__all__ = ["RangeTestCallback"]

_FILE = "range_test.json"


class RangeTestCallback(Callback):
    """Finds a learning rate with its interval, at the start or at milestones, and leaves no trace in the run.

    What it found lies in ``suggestions``, by milestone, and in ``<log_dir>/autolr/range_test.json``. With ``apply`` the
    configured learning rates, and those that the module's schedulers have cached, are scaled so that the largest one is the
    suggestion: group ratios stay, and so does the shape of any stock scheduler. (Absolute floors such as ``eta_min`` stay
    what they are.)

    Args:
        milestones: epochs (or optimizer steps, see ``unit``) at whose first batch to test, each >= 0. A step within a batch, as
            of two optimizer steps under manual optimization, is tested at the next batch.
        unit: "epoch" or "step".
        min_lr: learning rate of the first step of a test, > 0.
        max_lr: learning rate of its last step, > ``min_lr``; a loss that runs away ends it before.
        num_steps: private steps of a test, >= 10.
        mode: "exponential": the learning rate grows by the same factor at each step; or "linear".
        repeats: tests, each on other batches, >= 1; the interval is from the lowest to the highest of their results.
        rule: "minimum" (a tenth of where the loss is lowest; for a constant learning rate), "edge" (a quarter of where it
            begins to rise; when a decay follows), "valley" (the middle of the main fall) or "steepest" (where it falls
            fastest).
        apply: use the suggestion, when there is one.
        stop: end the run after the test.
        fork: where the copy of the training state lies.
        figures: log a figure of each test, see :func:`lightning_autolr.report.figures.range_test_figure`; as a file in
            ``<log_dir>/autolr/figures`` when no logger takes it. Needs matplotlib, without which there is none.
        seed: of the batches, >= 0.
        allow_untested: run on strategies that we have not tested.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, a strategy that cannot be served, or ``apply=True`` beside a search.

    Example::

        Trainer(callbacks=[RangeTestCallback(apply=True)])
    """

    def __init__(
        self,
        milestones: Sequence[int] = (0,),
        unit: Literal["epoch", "step"] = "epoch",
        min_lr: float = 1e-7,
        max_lr: float = 10.0,
        num_steps: int = 100,
        mode: Literal["exponential", "linear"] = "exponential",
        repeats: int = 3,
        rule: Rule = "minimum",
        apply: bool = False,
        stop: bool = False,
        fork: Place = "device",
        figures: bool = True,
        seed: int = 0,
        allow_untested: bool = False,
    ) -> None:
        if not isinstance(milestones, Sequence) or not milestones:
            raise ValueError(f"Expected a list of at least one milestone, got {milestones=}.")
        if not all(isinstance(m, (int, Integral)) and m >= 0 for m in milestones):
            raise ValueError(f"Expected whole milestones >= 0, got {milestones=}.")
        if unit not in ("epoch", "step"):
            raise ValueError(f"Expected unit to be 'epoch' or 'step', got {unit!r}.")
        check_choice("fork", fork, PLACES)
        self.search = RangeTest(min_lr, max_lr, num_steps, mode, repeats, rule, seed=seed)
        self.milestones, self.unit, self.apply, self.stop = frozenset(map(int, milestones)), unit, apply, stop
        self.figures, self.allow_untested = figures, allow_untested
        self.options = ProbeOptions(fork=fork, seed=seed)
        self.suggestions: dict[int, RangeSuggestion] = {}
        self._done: list[int] = []
        self._passed = -1  # the last epoch or step at which a batch was begun
        self._loaded: dict[str, Any] = {}

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._loaded = {}  # what this fit resumes is loaded after this
            check_trainer(trainer, pl_module, (), self.allow_untested)
        searches = [type(c).__name__ for c in trainer.callbacks if isinstance(c, SearchCallback)]
        if self.apply and searches:
            raise MisconfigurationException(
                f"Expected no other callback that sets the learning rate beside `RangeTestCallback(apply=True)`, got "
                f"{searches}. Test in a run of its own (`stop=True`) and configure what it finds, or leave `apply` out."
            )

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        loaded, self._loaded = self._loaded, {}
        self._done = list(loaded.get("done", ()))
        found = from_plain(loaded.get("suggestions", ()), (RangeSuggestion, RangeCurve))  # older checkpoints have none
        self.suggestions = dict(found)
        self._passed = loaded.get("passed", self._now(trainer) - 1)  # a run that began elsewhere makes no earlier test
        self._folder = record_folder(trainer)
        if not self._done:
            keep_earlier(trainer, self._folder, _FILE)

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % batches_per_step(trainer):
            return
        now = self._now(trainer)
        due = [m for m in self.milestones if self._passed < m <= now and m not in self._done]
        if due:  # of several that one batch passed, the last
            with unchanged(batch):
                self._test(trainer, max(due))
        self._passed = now  # not before: a test that was interrupted is made again

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        compat.remove_log_methods(self)

    @override
    def state_dict(self) -> dict[str, Any]:
        found = [[at, to_plain(suggestion)] for at, suggestion in self.suggestions.items()]
        return self._loaded or {"done": list(self._done), "suggestions": found, "passed": self._passed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def _now(self, trainer: Any) -> int:
        return int(trainer.current_epoch) if self.unit == "epoch" else steps_made(trainer)

    def _test(self, trainer: Any, now: int) -> None:
        # Two that write would not know of each other's private steps.
        running = next((c.learning_rate for c in trainer.callbacks if isinstance(c, SearchCallback)), None)
        lr = running or LearningRate(trainer.optimizers)
        prober = Prober(trainer, lr, self.options)
        search = replace(self.search, num_steps=10, repeats=1) if trainer.fast_dev_run else self.search
        try:
            with prober.session():
                suggestion = decide(trainer.strategy, self._measure(prober, search))
        finally:
            prober.close()
            if lr is not running:
                lr.close()
        if self.apply and suggestion.lr is not None:
            rescale_configured(trainer.optimizers, [c.scheduler for c in trainer.lr_scheduler_configs], suggestion.lr)
        self.suggestions[now] = suggestion
        self._done.append(now)  # not before: one that was interrupted is made again
        found = "" if suggestion.lr is None else f"{suggestion.lr:.3g}. "
        rank_zero_info(f"RangeTestCallback at {self.unit} {now}: {found}{suggestion.reason}")
        self._write(trainer)
        if self.figures and trainer.is_global_zero and self._folder is not None:
            log = FigureLog(trainer.loggers, self._folder)
            log.log("range_test", partial(range_test_figure, suggestion), compat.logger_step(trainer))
        if self.stop:
            trainer.should_stop = True

    def _measure(self, prober: Prober, search: RangeTest) -> RangeSuggestion:
        climbs, answer, number = search.measure(), None, 0
        while True:
            try:
                request = climbs.send(answer)
            except StopIteration as end:
                suggestion: RangeSuggestion = end.value
                return suggestion
            assert isinstance(request, Probe)
            answer, number = prober.answer(request, f"state-{number}"), number + 1

    def _write(self, trainer: Any) -> None:
        if trainer.is_global_zero and self._folder is not None:
            os.makedirs(self._folder, exist_ok=True)
            tests = [{"at": at, "unit": self.unit, "suggestion": to_plain(s)} for at, s in self.suggestions.items()]
            with open(os.path.join(self._folder, _FILE), "w") as file:
                json.dump(tests, file, indent=1)
