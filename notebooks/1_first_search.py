# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A first search, step by step
#
# We train a small network on scikit-learn's handwritten digits and let `AutoLRSCallback` find the learning rate.

# %% tags=["parameters"]
MAX_STEPS = 2000

# %%
# %matplotlib inline
import logging
import warnings

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_autolr import AutoLRSCallback
from lightning_autolr.report.figures import figures_of
from lightning_autolr.tasks import ClassificationTask, ConvNet, DigitsData

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

# %% [markdown]
# The module configures an optimizer and nothing else. Its learning rate, torch's default of 0.001 for SGD, is far too low:
# that is where the search starts.

# %%
seed_everything(0, verbose=False)
model = ClassificationTask(ConvNet(), optimizer=lambda p: torch.optim.SGD(p, momentum=0.9))
callback = AutoLRSCallback()
trainer = Trainer(
    max_steps=MAX_STEPS,
    callbacks=[callback],
    logger=CSVLogger("runs", name="notebook"),
    accelerator="cpu",
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DigitsData())

# %% [markdown]
# What did it try? Each candidate was trained privately, on the same batches, with its learning rate going to zero, and scored
# by the training losses of the second half of its steps. Then everything was put back, bit for bit.

# %%
for entry in callback.trace:
    if entry.request.kind == "candidate" and not entry.request.permuted:
        print(f"lr {entry.request.lr:8.4f}   {entry.request.num_steps} steps   loss {entry.answer.loss:.3f}")

# %%
figures = figures_of(callback.trace, callback.schedule)
print(list(figures))
figures[[name for name in figures if "candidates" in name][-1]]

# %% [markdown]
# And what came of it: a warm-up, then an anneal to zero. Segments that were undone, because the network overfitted (the
# validation loss rose while the training loss was far below it) or the training blew up, are marked.

# %%
figures["schedule"]

# %%
summary = callback.summary
print({k: summary[k] for k in ("schedule_steps", "probe_steps", "undone_steps", "eval_batches")})
trainer.test(model, DigitsData(), verbose=False)[0]

# %% [markdown]
# The schedule lies in `autolr/schedule.json` and can be replayed without any search. The replay ends with the same bits.

# %%
from lightning_autolr import ScheduleCallback
from lightning_autolr.schedules import Tabulated

seed_everything(0, verbose=False)
again = ClassificationTask(ConvNet(), optimizer=lambda p: torch.optim.SGD(p, momentum=0.9))
Trainer(
    max_steps=MAX_STEPS,
    callbacks=[ScheduleCallback(Tabulated.from_file(f"{trainer.log_dir}/autolr/schedule.json"))],
    logger=False,
    accelerator="cpu",
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
).fit(again, DigitsData())
all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
