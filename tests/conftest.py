"""Every test begins with the same random numbers; one that leaks environment variables, threads, signal handlers, process
groups or determinism flags fails."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# Set by Lightning's and torch's own machinery for the life of the process.
_FREE = {
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "PYTEST_CURRENT_TEST",
    "KMP_INIT_AT_FORK",
    "KMP_DUPLICATE_LIB_OK",
    "TORCHINDUCTOR_CACHE_DIR",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
}


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    environment = dict(os.environ)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    deterministic, dtype = torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
    threads = {t for t in threading.enumerate() if not t.daemon}
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    changed = {k for k in {**environment, **os.environ} if environment.get(k) != os.environ.get(k)} - _FREE
    assert not changed, f"leaked environment variables: {changed}"
    assert {s: signal.getsignal(s) for s in handlers} == handlers
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.get_default_dtype() == dtype
    assert torch.is_grad_enabled()
    assert not (torch.distributed.is_available() and torch.distributed.is_initialized())
    assert {t for t in threading.enumerate() if not t.daemon} <= threads
