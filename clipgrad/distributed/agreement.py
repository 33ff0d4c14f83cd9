"""Find out whether all ranks do the same thing at the same step, and which one does not."""

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

# Numbers in a message; one width for all calls, so that ranks in different calls can still read each other.
_WIDTH = 16
_AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def meet(call: str, step: int, facts: Mapping[str, object], group: dist.ProcessGroup) -> None:
    """Wait until every rank is here, and compare what they do in a message of a few bytes.

    Args:
        call: What this rank does.
        step: At which step.
        facts: What must be the same on every rank; in a fixed order, the same for every call of the name.
        group: A group for messages of the host.

    Raises:
        RanksError: With the ranks and their values, if two differ, or if a rank does not come.
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
    raise RanksError(f"{during}: the ranks differ, but by a value that looks the same on all.")


def refuse_differences(during: str, told: Mapping[str, object], group: dist.ProcessGroup) -> None:
    """Compare facts in words.

    Raises:
        RanksError: If two ranks differ; it names them, the fact and both values.
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
                    "backward calls (an empty batch is legal), and parameters that nobody else writes to. Nothing was "
                    "released."
                )


def refuse_shared_noise(state: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Refuse a noise source that draws the same numbers on two ranks.

    Each rank noises other coordinates, so two coordinates would get equal noise.

    Args:
        state: The source's state; if it holds no tensor, its key is the operating system's, and a new one in each
            process.
        group: A group for messages of the host.

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
                "equal noise. Seed each rank's generator differently, manual_seed(seed + rank), or leave noise out."
            )
        if mark is not None:
            seen[mark] = rank


def checksum(tensors: Sequence[Tensor]) -> int:
    """Return a number that differs if a bit of the tensors does, up to unlikely coincidences; it reads all of them."""
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
