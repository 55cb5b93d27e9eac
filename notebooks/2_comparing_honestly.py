# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Comparing schedules honestly
#
# Three rules: equal **total** steps, the search counted; the same seeds for all; read the result on a split that no method saw.
# `lightning-autolr compare` keeps them, from the shell and from Python.

# %% tags=["parameters"]
MAX_STEPS = 600
SEEDS = 3

# %%
from lightning_autolr.commands import compare

compare(
    ["../configs/digits/autolrs.yaml", "../configs/digits/cosine.yaml", "../configs/digits/constant.yaml"],
    seeds=SEEDS,
    equal_total_steps=True,
    out="runs/compare",
    overrides=["--trainer.max_steps", str(MAX_STEPS), "--trainer.val_check_interval", str(MAX_STEPS // 4)],
)

# %% [markdown]
# Differences are taken seed by seed to the first configuration, with a bootstrap interval. With three seeds it is wide, and that
# is the honest thing to show. The page has the curves.
#
# Costs stand beside results: `search` steps are part of the total here, so a method that searches trains less.
