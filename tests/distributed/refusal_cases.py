"""Define models that are spread over processes in unsupported ways."""

from __future__ import annotations

import torch
from torch import nn

from tests.distributed.difference_cases import make, take


def build(rank: int, size: int, kind: str) -> None:
    """Make an optimizer of a model that is spread as ``kind`` says, and call backward."""
    import torch.distributed.fsdp as fsdp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel

    model: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    mesh = init_device_mesh("cpu", (size,))
    if kind == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
    if kind == "FSDP1":
        model = fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    if kind == "DataParallel":
        model = nn.DataParallel(model)
    if kind == "tensor parallel":
        plan = {"0": parallel.ColwiseParallel(), "1": parallel.RowwiseParallel()}
        model = parallel.parallelize_module(model, mesh, plan)
    if kind == "tensor parallel and FSDP":
        both = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "model"))
        plan = {"0": parallel.ColwiseParallel(), "1": parallel.RowwiseParallel()}
        model = parallel.parallelize_module(model, both["model"], plan)
        fsdp.fully_shard(model, mesh=both["data"])
    if kind == "root not sharded":
        fsdp.fully_shard(model[0])
    if kind == "reduce in half precision":
        policy = fsdp.MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
        fsdp.fully_shard(model, mp_policy=policy)
    make(model).backward(torch.ones(2, 3))


def missing_backward(rank: int, size: int) -> None:
    """Call step on one rank while the other rank calls backward once more."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(3, 2)
    fully_shard(model)
    optimizer = make(model)
    if rank == 0:
        optimizer.backward(torch.ones(2, 3))
    take(optimizer)
