"""This module finds the processes that train together, and refuses options that they do not support."""

from __future__ import annotations

from torch import nn

from clipgrad.options import Options
from clipgrad.ranks import OneProcess, Ranks, initialised


def ranks_of(options: Options, model: nn.Module) -> Ranks:
    """Return the processes of the user's group, or all processes of ``torch.distributed``.

    Raises:
        ValueError: If an option excludes several processes, or the model's sharding is not supported.
    """
    group = options.performance.process_group
    if group is None and not initialised():
        return OneProcess()
    from clipgrad.distributed import find_ranks

    ranks = find_ranks(group, model, whole=options.compile_mode is not None)
    if options.microbatch_size == "auto" and ranks.is_sharded:
        raise ValueError(
            "microbatch_size='auto' cannot be combined with a model of fully_shard, whose ranks run the same number of "
            "microbatches. Pass a number, the same on all ranks."
        )
    if options.grid is not None and (ranks.size > 1 or ranks.is_sharded):
        found = f"{ranks.size} train together" if ranks.size > 1 else "this model is sharded"
        raise ValueError(
            f"exact mode (grid={options.grid}) proves the sums of one process with a whole model, but {found}. Leave "
            "the grid out, or train in one process without fully_shard."
        )
    return ranks
