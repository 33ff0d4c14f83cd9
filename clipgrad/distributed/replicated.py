"""Ranks that all hold the whole model: sums are scattered over them, noised in parts, and gathered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipgrad.distributed import agreement
from clipgrad.distributed.buckets import Bucket, buckets
from clipgrad.distributed.collectives import all_gather, host_group, nobody_lost, reduce_scatter
from clipgrad.ranks import Facts

# Buckets on their way at once: one is filled while the one before travels.
_IN_FLIGHT = 2
# Steps from one comparison of all parameters to the next; it reads all of them.
_COMPARED_EVERY = 100


class Replicated:
    """Processes of one group, each with the whole model and samples of its own.

    Args:
        group: The processes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._host = host_group(group)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._during = "the start"
        self._compared = False

    def __copy__(self) -> Replicated:
        return self

    def __deepcopy__(self, memo: object) -> Replicated:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "An optimizer of several processes cannot be pickled, since a process group cannot. Save its state_dict()."
        )

    def prepare(self, model: nn.Module, facts: Facts, noise: Mapping[str, Any]) -> None:
        """Compare settings and noise, and take parameters and buffers from the first rank, as DDP does."""
        with nobody_lost(self._during, self._host):
            agreement.refuse_differences(self._during, facts(), self._host)
            agreement.refuse_shared_noise(noise, self._host)
        with nobody_lost(self._during, self._host), torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                self._broadcast(tensor.detach())

    def same(self, value: str) -> str:
        """The value of the first rank."""
        found: list[Any] = [value]
        with nobody_lost(self._during, self._host):
            dist.broadcast_object_list(found, src=self._first(self._host), group=self._host)
        return str(found[0])

    def meet(self, call: str, step: int, facts: Facts, parameters: Sequence[Tensor]) -> None:
        """Wait for every rank, and compare; now and then also the parameters."""
        self._during = f"{call} {step}"
        told = dict(facts())
        told["parameters"] = None
        if not self._compared or step % _COMPARED_EVERY == 0:
            self._compared = True
            told["parameters"] = self._checksum(parameters)
        agreement.meet(call, step, told, self._host)

    def whole(self, model: nn.Module, step: int) -> AbstractContextManager[bool]:
        """The parameters are whole on every rank."""
        return nullcontext(False)

    def collected(self, sums: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Own sums, until the step."""
        return sums

    def squared_norms(self, own: Tensor) -> Tensor:
        """The norms as they are: a rank holds whole gradients of its samples."""
        return own

    def share(
        self, sums: list[Tensor], parameters: Sequence[Tensor], *, is_lent: bool
    ) -> ScatteredSums:
        """This rank's part of the totals, one flat tensor for each bucket."""
        with nobody_lost(self._during, self._host):
            return ScatteredSums(sums, parameters, self._group, self._during)

    def one_draw(self, counts: list[Tensor], add_noise: Callable[[list[Tensor]], None]) -> None:
        """Totals on the first rank, noise there, and from there to the others."""
        total = torch.stack(counts)
        with nobody_lost(self._during, self._host):
            dist.reduce(total, dst=self._first(self._group), group=self._group)
        noised = list(total.unbind())
        if self.rank == 0:
            add_noise(noised)
        result = torch.stack(noised)
        with nobody_lost(self._during, self._host):
            self._broadcast(result)
        torch._foreach_copy_(counts, list(result.unbind()))

    def _checksum(self, parameters: Sequence[Tensor]) -> int:
        return agreement.checksum(parameters)

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, src=self._first(self._group), group=self._group)

    @staticmethod
    def _first(group: dist.ProcessGroup) -> int:
        return dist.get_global_rank(group, 0)


class ScatteredSums:
    """This rank's part of the clipped sums over all ranks.

    Args:
        sums: Clipped sums of this rank; the list is emptied.
        parameters: Of the same shapes and strides.
        group: The ranks.
        during: What an error names.
    """

    private = True

    def __init__(
        self,
        sums: list[Tensor],
        parameters: Sequence[Tensor],
        group: dist.ProcessGroup,
        during: str,
    ) -> None:
        self._group, self._during, self._count = group, during, len(sums)
        ranks = dist.get_world_size(group)
        self._buckets: list[Bucket] = list(buckets(sums, parameters, ranks))
        self.parts: list[Tensor] = []
        works: deque[tuple[Any, Tensor]] = deque()
        for bucket in self._buckets:
            while len(works) >= _IN_FLIGHT:
                works.popleft()[0].wait()
            flat = sums[-1].new_zeros(bucket.length)
            for place in bucket.places:
                place.of(flat).copy_(sums.pop())
            part = flat.new_empty(bucket.length // ranks)
            works.append(
                (reduce_scatter(part, flat, group), flat)
            )  # it reads flat until it is done
            self.parts.append(part)
        for work, _ in works:
            work.wait()

    def gathered(self, means: list[Tensor]) -> list[Tensor]:
        """The means of all ranks, as views of one memory for each bucket; ``means`` is emptied."""
        with nobody_lost(self._during, self._group):
            return self._gathered(means)

    def _gathered(self, means: list[Tensor]) -> list[Tensor]:
        whole: dict[int, Tensor] = {}
        works: list[Any] = []
        means.reverse()
        for bucket in self._buckets:
            # Rounded to the parameter's dtype on the way, as it would be in .grad.
            part = means.pop().to(bucket.dtype)
            flat = part.new_empty(bucket.length)
            works.append((all_gather(flat, part, self._group), part))
            whole.update((place.index, place.of(flat)) for place in bucket.places)
        for work, _ in works:
            work.wait()
        return [whole[index] for index in range(self._count)]
