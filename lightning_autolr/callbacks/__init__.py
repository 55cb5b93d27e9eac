"""One thin callback per search: it validates, builds the search, and leaves the rest to the engine."""

from lightning_autolr.callbacks.autolrs import AutoLRSCallback
from lightning_autolr.callbacks.autowu import AutoWUCallback
from lightning_autolr.callbacks.beam import BeamSearchCallback
from lightning_autolr.callbacks.factors import FactorSearchCallback
from lightning_autolr.callbacks.grad_norm import GradNormCallback, RefinedScheduleCallback
from lightning_autolr.callbacks.range_test import RangeTestCallback
from lightning_autolr.callbacks.schedule import ScheduleCallback
from lightning_autolr.engine.driver import SearchCallback
from lightning_autolr.search.ratchet import Ratchet

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
