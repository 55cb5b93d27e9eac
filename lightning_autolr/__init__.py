"""Learning-rate schedules found while you train, for PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_autolr.callbacks import (
        AutoLRSCallback as AutoLRSCallback,
    )
    from lightning_autolr.callbacks import (
        AutoWUCallback as AutoWUCallback,
    )
    from lightning_autolr.callbacks import (
        BeamSearchCallback as BeamSearchCallback,
    )
    from lightning_autolr.callbacks import (
        FactorSearchCallback as FactorSearchCallback,
    )
    from lightning_autolr.callbacks import (
        GradNormCallback as GradNormCallback,
    )
    from lightning_autolr.callbacks import (
        RangeTestCallback as RangeTestCallback,
    )
    from lightning_autolr.callbacks import (
        Ratchet as Ratchet,
    )
    from lightning_autolr.callbacks import (
        RefinedScheduleCallback as RefinedScheduleCallback,
    )
    from lightning_autolr.callbacks import (
        ScheduleCallback as ScheduleCallback,
    )
    from lightning_autolr.callbacks import (
        SearchCallback as SearchCallback,
    )

__all__ = [
    "AutoLRSCallback",
    "AutoWUCallback",
    "BeamSearchCallback",
    "FactorSearchCallback",
    "GradNormCallback",
    "RangeTestCallback",
    "Ratchet",
    "RefinedScheduleCallback",
    "ScheduleCallback",
    "SearchCallback",
]


def __getattr__(name: str) -> Any:
    # Lazy (PEP 562): importing `lightning_autolr.core` must not cost the import of Lightning.
    if name in __all__:
        return getattr(importlib.import_module("lightning_autolr.callbacks"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
