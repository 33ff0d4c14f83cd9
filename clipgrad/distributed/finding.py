"""Find the processes that train the model together."""

from __future__ import annotations

import sys

import torch.distributed as dist
from torch import Tensor, nn

from clipgrad.distributed.replicated import Replicated
from clipgrad.ranks import OneProcess, Ranks


def find_ranks(group: object, model: nn.Module, *, whole: bool) -> Ranks:
    """Return the processes of a group, or all processes, as replicated or sharded ranks.

    Args:
        group: A process group; None means all processes of ``torch.distributed``.
        model: The model, whose parameters tell whether it is sharded.
        whole: Whether shards are gathered for a whole batch, and not module by module.

    Raises:
        ValueError: If ``group`` is no process group, or the model's sharding is not supported.
    """
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return OneProcess()
        group = dist.group.WORLD
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ValueError(
            f"process_group must be a torch.distributed.ProcessGroup that this process belongs to, got {group!r}. Call "
            "torch.distributed.init_process_group first, and leave process_group out to train on all processes."
        )
    ranks = dist.get_world_size(group)
    # FSDP takes seconds to import. Only a program that has imported it has models of it.
    if "torch.distributed.fsdp" in sys.modules:
        from clipgrad.distributed.fsdp import shard_again

        # A forward pass may have left parameters whole, which then do not look sharded.
        shard_again(model)
    if any(_is_spread(parameter) for parameter in model.parameters()):
        from clipgrad.distributed.sharded import Sharded, refuse_what_is_no_fsdp

        refuse_what_is_no_fsdp(model, ranks)
        return Sharded(group, whole=whole)
    return OneProcess() if ranks == 1 else Replicated(group)


def _is_spread(parameter: Tensor) -> bool:
    return hasattr(parameter, "device_mesh")
