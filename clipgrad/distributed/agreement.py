"""Compare what all ranks do at a step, and name a rank that differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clipgrad.distributed.collectives import all_gather, nobody_lost
from clipgrad.errors import RanksError

# Numbers in a message. All calls have the same width, so that ranks in different calls can compare their messages.
_WIDTH = 16
_AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def meet(call: str, step: int, facts: Mapping[str, object], group: dist.ProcessGroup) -> None:
    """Wait for every rank, and compare their calls, steps and facts by hashes of a few bytes.

    Args:
        call: Name of the method that this rank runs.
        step: Number of the step.
        facts: Values that must be equal on every rank; the same names in the same order at every call of this name.
        group: A process group whose tensors are in host memory.

    Raises:
        RanksError: If two ranks differ, with their values, or if a rank does not arrive.
    """
    told = {"call": call, "step": step, **facts}
    assert len(told) <= _WIDTH
    numbers = [_number(value) for value in told.values()]
    own = torch.tensor(numbers + [0] * (_WIDTH - len(numbers)), dtype=torch.int64, device="cpu")
    everybody = own.new_empty(dist.get_world_size(group) * _WIDTH)
    during = f"{call} {step}"
    with nobody_lost(during, group):
        all_gather(everybody, own, group).wait()
    if bool((everybody.view(-1, _WIDTH) == own).all()):
        return
    with nobody_lost(during, group):
        refuse_differences(during, told, group)
    raise RanksError(
        f"{during}: the ranks differ in a value that had the same text on all ranks when it was compared again. End "
        "all processes and report this at the project's issue tracker."
    )


def refuse_differences(during: str, told: Mapping[str, object], group: dist.ProcessGroup) -> None:
    """Compare the texts of all facts.

    Args:
        during: The call and the step that an error names.
        told: Values of this rank by name.
        group: A process group whose tensors are in host memory.

    Raises:
        RanksError: If two ranks differ; the message names the ranks, the fact and both values.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, {name: repr(value) for name, value in told.items()}, group=group)
    first = found[0]
    for rank, other in enumerate(found):
        for name in [*first, *(name for name in other if name not in first)]:
            ours, theirs = first.get(name, "not there"), other.get(name, "not there")
            if ours != theirs:
                raise RanksError(
                    f"{during}: {name} is {_short(ours)} on rank 0, but {_short(theirs)} on rank {rank}. All ranks "
                    "must run the same program on the same plan: the same settings, the same number of steps and of "
                    "backward calls (an empty batch is legal), and parameters that no other code writes to. Nothing "
                    "was released."
                )


def refuse_shared_noise(state: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Refuse noise sources that draw the same numbers on two ranks.

    Each rank adds noise to other coordinates, so two coordinates would get equal noise.

    Args:
        state: State of this rank's source. A state without tensors is accepted, since the source then has a new key of
            the operating system in each process.
        group: A process group whose tensors are in host memory.

    Raises:
        RanksError: If two ranks have the same state.
    """
    tensors = [leaf for leaf in tree_leaves(dict(state)) if isinstance(leaf, Tensor)]
    own = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in tensors)).hexdigest()
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own if tensors else None, group=group)
    seen: dict[str, int] = {}
    for rank, mark in enumerate(found):
        if mark is not None and mark in seen:
            raise RanksError(
                f"noise: ranks {seen[mark]} and {rank} have the same generator state, so that coordinates would get "
                "equal noise. Seed each rank's generator differently, manual_seed(seed + rank), or leave noise= out."
            )
        if mark is not None:
            seen[mark] = rank


def checksum(tensors: Sequence[Tensor]) -> int:
    """Return a hash of sums of the tensors' bits, which almost always differs if a bit does; it reads all tensors."""
    sums = [
        tensor.detach()
        .contiguous()
        .view(_AS_INTEGERS[tensor.element_size()])
        .sum(dtype=torch.int64)
        for tensor in tensors
        if tensor.numel()
    ]
    return _number(torch.stack([total.cpu() for total in sums]).tolist() if sums else [])


def _number(value: object) -> int:
    digest = hashlib.sha256(repr(value).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
