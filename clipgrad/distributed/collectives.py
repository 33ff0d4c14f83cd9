"""Name collective operations the same way for all versions of PyTorch, and say at which step one failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipgrad.errors import RanksError

_DEFAULT_TIMEOUT = timedelta(minutes=10)
# Newer versions of PyTorch have other names for these functions, and warn of the old names.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def reduce_scatter(part: Tensor, whole: Tensor, group: dist.ProcessGroup) -> Any:
    """Start to sum ``whole`` over all ranks and to write this rank's part of the sum; the result has ``wait()``."""
    return _reduce_scatter(part, whole, group=group, async_op=True)


def all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> Any:
    """Start to write the ``part`` of every rank into ``whole``, in order of ranks; the result has ``wait()``."""
    return _all_gather(whole, part, group=group, async_op=True)


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a group of the same ranks whose tensors are in host memory, so that no device has to wait."""
    if "cpu:gloo" in dist.get_backend_config(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    made: dist.ProcessGroup = dist.new_group(
        ranks, timeout=_timeout(group), backend="gloo", use_local_synchronization=True
    )
    return made


def _timeout(group: dist.ProcessGroup) -> timedelta:
    """Return the timeout of a group, which PyTorch shows only in the options of the group's backend."""
    try:
        options: Any = group._get_backend(torch.device("cuda")).options
        found = options._timeout
    except (AttributeError, RuntimeError):
        return _DEFAULT_TIMEOUT
    return found if isinstance(found, timedelta) else _DEFAULT_TIMEOUT


@contextmanager
def nobody_lost(during: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Replace the error of a failed collective by one that names the step; a dead or stalled rank makes it fail.

    Args:
        during: The call and the step that the error names.
        group: A process group whose tensors are in host memory.

    Raises:
        RanksError: If PyTorch raises a ``RuntimeError``.
    """
    try:
        yield
    except RanksError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise RanksError(
            f"{during}: rank {dist.get_rank(group)} of {dist.get_world_size(group)} could not reach the other ranks. "
            "One of them has failed, and its own error says why, or it exceeded the timeout of the process group. "
            "Nothing of this step was applied here; end all processes and go on from the last checkpoint. "
            f"({type(error).__name__}: {reason})"
        ) from error
