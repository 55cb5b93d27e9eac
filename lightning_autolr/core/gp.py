"""Surroundings in which a Gaussian process may be fitted, whatever surrounds the call."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["undisturbed"]


@contextmanager
def undisturbed() -> Iterator[ExitStack]:
    """With gradients, on the CPU, without warnings. Yields a stack for further contexts, which end with this one.

    Import BoTorch and GPyTorch inside: that takes seconds, which searches without a surrogate need not spend, and warns.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))  # not always: it slows down every call
        yield stack
