# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Looking inside a decision
#
# Why this learning rate? The scores are noisy; what counts is the difference between two candidates *on the same batches*, and
# what a Gaussian process makes of a handful of them.

# %% tags=["parameters"]
MAX_STEPS = 1000

# %%
import logging
import math
import warnings

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_autolr import AutoLRSCallback
from lightning_autolr.core.forecast import forecast
from lightning_autolr.core.surrogate import Observation, posterior
from lightning_autolr.tasks import ClassificationTask, ConvNet, DigitsData

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

seed_everything(0, verbose=False)
model = ClassificationTask(ConvNet(), optimizer=lambda p: torch.optim.SGD(p, momentum=0.9))
callback = AutoLRSCallback()
Trainer(
    max_steps=MAX_STEPS,
    callbacks=[callback],
    logger=False,
    accelerator="cpu",
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
).fit(model, DigitsData())
tried = [(e.request.lr, e.answer) for e in callback.trace if e.request.kind == "candidate"]

# %% [markdown]
# ## Paired noise
#
# Each score has one loss per batch. Taken alone their spread is large; the spread of the *differences* to the best
# candidate is what the decision rests on.

# %%
finite = [(lr, a) for lr, a in tried if math.isfinite(a.loss)]
best_lr, best = min(finite, key=lambda pair: pair[1].loss)
for lr, answer in sorted(finite):
    losses = np.array(answer.evaluations[-1].losses)
    differences = losses - np.array(best.evaluations[-1].losses)
    alone, paired = (x.std(ddof=1) / math.sqrt(len(x)) for x in (losses, differences))
    print(
        f"lr {lr:8.4f}  loss {losses.mean():.3f} +- {alone:.3f}   against the best {differences.mean():+.3f} +- {paired:.3f}"
    )

# %% [markdown]
# ## The posterior
#
# A Matern-5/2 process over the logarithm of the learning rate, fitted to the scores.

# %%
import matplotlib.pyplot as plt

bounds = (min(lr for lr, _ in finite), max(lr for lr, _ in finite))
grid = np.geomspace(*bounds, 80)
beliefs = posterior([Observation(lr, a.loss) for lr, a in finite], bounds, list(grid))
mean, std = np.array(beliefs.mean), np.array(beliefs.std)
fig, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
axes.fill_between(grid, mean - 2 * std, mean + 2 * std, alpha=0.2, label="two standard deviations")
axes.plot(grid, mean, label="posterior mean")
axes.plot(*zip(*[(lr, a.loss) for lr, a in finite]), "o", label="candidates")
axes.axvline(callback.schedule[0].lr, color="black", linestyle=":", label="chosen")
axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, second half of a probe")
axes.legend()
plt.show()

# %% [markdown]
# ## Why not a forecast?
#
# The published method extrapolates each candidate's training loss by an exponential to the end of the stage. From a short noisy
# series that is a wild guess, and the forecast says so: look at the standard errors.

# %%
for lr, answer in sorted(finite):
    guess = forecast(answer.losses, horizon=10 * len(answer.losses))
    print(
        f"lr {lr:8.4f}  last losses {np.mean(answer.losses[-5:]):.3f}   forecast {guess.value:.3f} +- {guess.stderr:.3f}"
    )
