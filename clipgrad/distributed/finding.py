"""Find out which processes train the model together."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from clipgrad.distributed.replicated import Replicated
from clipgrad.ranks import OneProcess, Ranks


def find_ranks(group: object, model: nn.Module) -> Ranks:
    """The processes of a group, or of all of ``torch.distributed``, as they hold the model.

    Args:
        group: A process group; None finds all processes.
        model: The model.

    Raises:
        ValueError: If there is no such group, or the model is spread in a way that is not supported.
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
    if dist.get_world_size(group) == 1:
        return OneProcess()
    return Replicated(group)
