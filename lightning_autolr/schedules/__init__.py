"""Schedules as values: optimizer step -> factor on the learning rate.

Profiles of a budget (:class:`Linear`, :class:`Cosine`, :class:`Rex`, ...), cycles without an end (:class:`Cyclic`,
:class:`WarmRestarts`), compositions (:class:`Warmup`, :class:`Joined`, :class:`Sampled`, :class:`Scaled`), and tables
(:class:`Tabulated`) that searches write. Imports no torch.
"""

from lightning_autolr.schedules.base import Constant, Profile, Schedule
from lightning_autolr.schedules.compose import Joined, Sampled, Scaled, Shifted, Warmup, WarmupStableDecay
from lightning_autolr.schedules.cycles import Cyclic, WarmRestarts
from lightning_autolr.schedules.plain import from_plain, to_plain
from lightning_autolr.schedules.profiles import (
    Cosine,
    DelayedLinear,
    Exponential,
    HalfCosine,
    Linear,
    OneCycle,
    Points,
    Polynomial,
    Rex,
    Step,
)
from lightning_autolr.schedules.scheduler import to_lr_scheduler
from lightning_autolr.schedules.tabulated import Segment, Tabulated

__all__ = [
    "Constant",
    "Cosine",
    "Cyclic",
    "DelayedLinear",
    "Exponential",
    "HalfCosine",
    "Joined",
    "Linear",
    "OneCycle",
    "Points",
    "Polynomial",
    "Profile",
    "Rex",
    "Sampled",
    "Scaled",
    "Schedule",
    "Segment",
    "Shifted",
    "Step",
    "Tabulated",
    "WarmRestarts",
    "Warmup",
    "WarmupStableDecay",
    "from_plain",
    "to_lr_scheduler",
    "to_plain",
]
