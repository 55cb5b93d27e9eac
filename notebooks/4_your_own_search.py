# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Your own search in 40 lines
#
# A search is a generator. It asks for probes and for real training, and is told what came of them. It knows nothing of Trainers,
# and the engine promises that its probes leave no trace. Here is one that tries three learning rates every so often and keeps
# the best: up, stay, down.

# %% tags=["parameters"]
MAX_STEPS = 600

# %%
from dataclasses import dataclass

from lightning_autolr import SearchCallback
from lightning_autolr.core.requests import Probe, Requests, Run, Train
from lightning_autolr.schedules import Linear
from lightning_autolr.search.base import AbstractSearch


@dataclass(frozen=True)
class UpStayDown(AbstractSearch):
    """Try twice, once and half the learning rate, on the same batches; train on with the best."""

    probe_steps: int = 15
    stage_steps: int = 100

    def requests(self, run: Run) -> Requests:
        lr, stage = run.lr, 0
        while True:
            scores = {}
            for candidate in (2 * lr, lr, lr / 2):
                answer = yield Probe(candidate, self.probe_steps, draw=stage, shape=Linear(), stage=stage)
                scores[candidate] = answer.loss  # inf if it diverged
            lr = min(scores, key=scores.get)
            yield Train(lr, self.stage_steps, stage=stage, reason="the best of three")
            stage += 1


class UpStayDownCallback(SearchCallback):
    def make_search(self, run: Run) -> UpStayDown:
        return UpStayDown()


# %% [markdown]
# That is all: checkpoints, resume, several ranks, mixed precision, TensorBoard figures and `schedule.json` come from the engine.

# %%
# %matplotlib inline
import logging
import warnings

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_autolr.report.figures import figures_of
from lightning_autolr.tasks import ClassificationTask, ConvNet, DigitsData

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

seed_everything(0, verbose=False)
model = ClassificationTask(ConvNet(), optimizer=lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9))
callback = UpStayDownCallback()
trainer = Trainer(
    max_steps=MAX_STEPS,
    callbacks=[callback],
    logger=False,
    accelerator="cpu",
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(model, DigitsData())
print([round(segment.lr, 4) for segment in callback.schedule])
figures_of(callback.trace, callback.schedule)["schedule"]

# %% [markdown]
# Each decision looks fifteen steps ahead and no further. Once the loss is small that says "lower", and "lower" again at the next
# stage: short-horizon bias. It is why our own AutoLRS searches once, early, and anneals slowly.

# %%
trainer.test(model, DigitsData(), verbose=False)[0]
