"""Find the modules that launch Triton kernels, and test kernels before they are used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

_log = logging.getLogger("clipgrad")


@cache
def launcher(name: str) -> ModuleType | None:
    """Return a module of this package, or None without Triton; cached, since a failed search is slow."""
    return import_module(f"clipgrad.kernels.{name}") if find_spec("triton") else None


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launch on this CUDA device; Triton's interpreter runs on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def passes(self_test: Callable[[], bool], work: str) -> bool:
    """Return whether a kernel passes its self-test; if not, warn that clipgrad does the work without it."""
    reason = "its self-test found wrong values"
    try:
        if self_test():
            return True
    except Exception as error:  # compilers and drivers raise errors of many types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    _log.warning("clipgrad %s without the Triton kernel (%s).", work, reason)
    return False
