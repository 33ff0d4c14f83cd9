"""Implement what replicated and sharded ranks have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipgrad.distributed import agreement
from clipgrad.distributed.collectives import host_group, nobody_lost
from clipgrad.ranks import Facts, NoiseState

_log = logging.getLogger("clipgrad")

# Number of steps between two comparisons of all parameters, which read every parameter.
_COMPARED_EVERY = 100


class Group:
    """This class holds the processes of one group: it starts them, compares them, and draws common noise.

    Args:
        group: The process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._host = host_group(group)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._during = "the start"
        self._compared = False
        self._noise: NoiseState = dict

    def __copy__(self) -> Group:
        return self

    def __deepcopy__(self, memo: object) -> Group:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "An optimizer of several processes cannot be pickled, since a process group cannot. Save its state_dict()."
        )

    def prepare(self, model: nn.Module, facts: Facts, noise: NoiseState) -> None:
        """Compare settings and noise, and copy parameters and buffers from the first rank, as DDP does."""
        with self._reached():
            agreement.refuse_differences(self._during, facts(), self._host)
            agreement.refuse_shared_noise(noise(), self._host)
        self._noise = noise
        with self._reached(), torch.no_grad():
            for tensor in self._replicated([*model.parameters(), *model.buffers()]):
                self._broadcast(tensor.detach())

    def value_of_first(self, value: str) -> str:
        """Return the value of the first rank."""
        found: list[Any] = [value]
        with self._reached():
            dist.broadcast_object_list(found, src=self._first(self._host), group=self._host)
        return str(found[0])

    def meet(self, call: str, step: int, facts: Facts, parameters: Sequence[Tensor]) -> None:
        """Wait for every rank and compare facts; every 100 steps compare parameters and noise too."""
        self._begin(call, step)
        told = dict(facts())
        told["parameters"] = None
        if not self._compared or step % _COMPARED_EVERY == 0:
            told["parameters"] = self._checksum(parameters)
        agreement.meet(call, step, told, self._host)
        if told["parameters"] is not None:  # The ranks agree, so all of them take this branch.
            self._compared = True
            with self._reached():
                agreement.refuse_shared_noise(self._noise(), self._host)

    def compare_soon(self) -> None:
        """Compare all parameters and the noise at the next step."""
        self._compared = False

    def one_draw(self, counts: list[Tensor], add_noise: Callable[[list[Tensor]], None]) -> None:
        """Add up counts and their noise on the first rank, and send the result to all ranks."""
        total = torch.stack(counts)
        with self._reached():
            dist.reduce(total, dst=self._first(self._group), group=self._group)
        noised = list(total.unbind())
        if self.rank == 0:
            add_noise(noised)
        result = torch.stack(noised)
        with self._reached():
            self._broadcast(result)
        torch._foreach_copy_(counts, list(result.unbind()))

    def _begin(self, call: str, step: int) -> None:
        """Name what this rank does from here on, in errors and in the log."""
        self._during = f"{call} {step}"
        # NCCL ends a process whose collective stalls, without an exception. The last line of the log then has the step.
        _log.info("%s on rank %d of %d", self._during, self.rank, self.size)

    def _reached(self) -> AbstractContextManager[None]:
        """Say at which step a collective failed."""
        return nobody_lost(self._during, self._host)

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, src=self._first(self._group), group=self._group)

    @staticmethod
    def _first(group: dist.ProcessGroup) -> int:
        return dist.get_global_rank(group, 0)

    def _replicated(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the tensors that every rank holds as a whole."""
        return tensors

    def _checksum(self, parameters: Sequence[Tensor]) -> int:
        return agreement.checksum(self._replicated(parameters))
