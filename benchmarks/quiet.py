"""A Trainer that trains and says nothing, for benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

__all__ = ["quiet_trainer"]


def quiet_trainer(folder: Path, max_steps: int, **options: Any) -> Trainer:
    """On the CPU, without logger, checkpoints, progress bar or sanity check; validation counts in steps, not epochs."""
    return Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        **options,
    )
