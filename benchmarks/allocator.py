"""Have the C library keep freed memory, for every mode alike, as long as nobody has said otherwise.

By default glibc hands large blocks back to the system as soon as they are freed, and each step asks for them anew,
page by page. On two cores of a virtual machine that was a quarter of an ordinary step of cnn-medium, and how much of it
a mode pays depends on which mode ran before. PyTorch's guide to performance on CPUs advises other allocators.
"""

from __future__ import annotations

import ctypes
import os
import sys

_LIMIT = 2**30
_NAMES = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1}
"""The environment variables of glibc, and the numbers that ``mallopt`` has for them."""
_MAPPED = 2**16
"""Blocks of this many bytes are mappings of their own where peak memory is measured."""
_ours: set[str] = set()


def keep_freed_memory() -> None:
    """For this process, and for the processes that it starts."""
    chosen = os.environ.get("LD_PRELOAD") or os.environ.get("GLIBC_TUNABLES")
    if chosen or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for name, number in _NAMES.items():
        os.environ[name] = str(_LIMIT)
        _ours.add(name)
        mallopt(number, _LIMIT)


def environment_of_mappings() -> dict[str, str]:
    """The environment of a process in which every larger block is a mapping of its own, gone when it is freed.

    Peak memory is measured so: it is then what the mode holds, the same from run to run. Kept memory has gaps, and so
    has what glibc does by default: it raises the threshold with every mapping that is freed, up to 32 MiB.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _ours}
    if not any(name.startswith("MALLOC_") for name in environment):
        environment["MALLOC_MMAP_THRESHOLD_"] = str(_MAPPED)
    return environment
