"""Name collective operations the same way for all versions of PyTorch, and say at which step one failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
    if sends_by_gloo(whole.device, group):
        return _SumOfParts(part, whole, group)
    return _reduce_scatter(part, whole, group=group, async_op=True)


class _SumOfParts:
    """This class sums parts over ranks with half of the bytes of gloo's own reduce-scatter, which reduces a whole copy.

    Every rank sends each other rank's part to it. The receiver adds the parts up in the order of the ranks.
    """

    def __init__(self, part: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
        self._part = part
        self._terms = whole.new_empty(dist.get_world_size(group), *part.shape)
        self._work = dist.all_to_all_single(
            self._terms, whole.view_as(self._terms), group=group, async_op=True
        )

    def wait(self) -> None:
        """Wait for the others' parts, and add them up."""
        self._work.wait()
        torch.sum(self._terms, 0, out=self._part)
        del self._terms


class Started:
    """This class holds the collective that was started last, and its memory, while the next one is prepared.

    Args:
        reached: Names the step in the errors of a collective that its body waits for.
    """

    def __init__(self, reached: Callable[[], AbstractContextManager[None]]) -> None:
        self._reached = reached
        self._started: tuple[Any, Tensor] | None = None

    def start(self, work: Any, memory: Tensor) -> None:
        """Keep a collective that was just started, and memory that must live until it is done."""
        assert self._started is None
        self._started = work, memory

    def wait(self) -> None:
        """Wait for it, if there is one, and let go of its memory."""
        if self._started is not None:
            with self._reached():
                self._started[0].wait()
            self._started = None


def all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> Any:
    """Start to write the ``part`` of every rank into ``whole``, in order of ranks; the result has ``wait()``."""
    return _all_gather(whole, part, group=group, async_op=True)


def has_gloo(group: dist.ProcessGroup) -> bool:
    """Return whether a group sends what lies in the host's memory by gloo."""
    return sends_by_gloo(torch.device("cpu"), group)


def sends_by_gloo(device: torch.device, group: dist.ProcessGroup) -> bool:
    """Return whether a group sends tensors of a device by gloo."""
    return f"{device.type}:gloo" in dist.get_backend_config(group)


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a group of the same ranks whose tensors are in host memory, so that no device has to wait."""
    if has_gloo(group):
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
