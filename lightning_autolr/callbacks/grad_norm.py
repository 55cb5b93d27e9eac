"""Gradient norms: record them for the next run, or refine the schedule of this one with them."""

from __future__ import annotations

import json
import os
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_autolr.engine.checks import check_choice, keep_earlier, record_folder
from lightning_autolr.engine.compat import remove_log_methods
from lightning_autolr.engine.driver import SearchCallback
from lightning_autolr.engine.grad_norms import GradNorms, Norm
from lightning_autolr.search.refined import OnlineRefined

__all__ = ["GradNormCallback", "RefinedScheduleCallback"]

_FILE = "grad_norms.json"
_READ_EVERY = 100  # steps; each reading waits for the device


class GradNormCallback(Callback):
    """Records the gradient norm of each optimizer step into ``<log_dir>/autolr/grad_norms.json``.

    ``lightning-autolr refine RUN_DIR``, or :func:`lightning_autolr.core.refine.refine_schedule`, makes a schedule of it.
    The norm is that of the accumulated gradient, unscaled under mixed precision and after all-reduce; NaN for a step whose
    batches were all skipped (``training_step`` returned None).

    Args:
        norm: "l2" for SGD, "l1" for the Adam family (Defazio et al. 2023, arXiv 2310.07831).
        clipped: record what is left after gradient clipping instead of before it.

    Raises:
        ValueError: an unknown norm.
    """

    def __init__(self, norm: Norm = "l2", clipped: bool = False) -> None:
        check_choice("norm", norm, ("l1", "l2"))
        self.norm, self.clipped = norm, clipped
        self.norms: list[float] = []
        self._loaded: list[float] = []

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._loaded = []  # what a fit resumes is loaded after this

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.norms, self._loaded = self._loaded, []
        self._meter = GradNorms(trainer, self.norm, self.clipped)
        self._folder = record_folder(trainer)
        self._step = trainer.global_step
        if not self.norms:
            keep_earlier(trainer, self._folder, _FILE)

    @override
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._meter.measure(optimizer)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            return  # gradients go on to accumulate
        self._step = trainer.global_step
        self._meter.end_step()
        if trainer.global_step % _READ_EVERY == 0:
            self.norms += self._meter.read()

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.norms += self._meter.read()
        if trainer.is_global_zero and self._folder is not None:
            os.makedirs(self._folder, exist_ok=True)
            path = os.path.join(self._folder, _FILE)
            with open(path, "w") as file:
                json.dump({"norm": self.norm, "clipped": self.clipped, "norms": [repr(x) for x in self.norms]}, file)
            rank_zero_info(f"GradNormCallback: {len(self.norms)} {self.norm} norms in {path}.")

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        vars(self).pop("_meter", None)  # holds the Trainer
        remove_log_methods(self)

    @override
    def state_dict(self) -> dict[str, Any]:
        if hasattr(self, "_meter"):
            self.norms += self._meter.read()
        return {"norm": self.norm, "clipped": self.clipped, "norms": self._loaded or list(self.norms)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["norm"] != self.norm or state_dict["clipped"] != self.clipped:
            raise ValueError(
                f"Expected the norm of the checkpoint, {state_dict['norm']!r} with clipped={state_dict['clipped']}, got "
                f"{self.norm!r} with clipped={self.clipped}: the record would mix two quantities."
            )
        self._loaded = list(state_dict["norms"])


class RefinedScheduleCallback(SearchCallback):
    """Refines a linear decay while training, from the gradient norms so far. Our own method: the paper needs two runs.

    Args:
        peak_lr: learning rate at factor 1; None is the one configured in the module.
        norm: "l2" for SGD, "l1" for the Adam family.
        smoothing: width of the median filter as a share of the run.
        every: share of the run between two refinements.
        options: see :class:`~lightning_autolr.engine.driver.SearchCallback`.
    """

    scores_candidates = False

    def __init__(
        self,
        peak_lr: float | None = None,
        norm: Norm = "l2",
        smoothing: float = 0.1,
        every: float = 0.01,
        **options: Any,
    ) -> None:
        check_choice("norm", norm, ("l1", "l2"))
        super().__init__(**options)
        self.search = OnlineRefined(peak_lr=peak_lr, norm=norm, smoothing=smoothing, every=every)

    @property
    @override
    def searches(self) -> bool:
        return self.ratchet is not None
