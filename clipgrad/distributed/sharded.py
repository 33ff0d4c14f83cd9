"""Train on ranks that hold a shard of every parameter (FSDP2): gather parameters, and scatter sums to the shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.distributed.tensor import DTensor, Replicate, Shard

from clipgrad.distributed import agreement, costs
from clipgrad.distributed.fsdp import fsdp_modules, own_schedule, policy_of, shard_again, shard_of
from clipgrad.distributed.group import Group
from clipgrad.distributed.scattered import scattered_means
from clipgrad.distributed.shards import Keys, scattered
from clipgrad.distributed.streaming import Streaming
from clipgrad.ranks import Cost, Facts, Noised, NoiseState, OneProcess, Ranks

_HALF = (torch.float16, torch.bfloat16)


class Sharded(Group):
    """Each process of the group holds shards of a model of ``fully_shard`` and its own samples.

    Parameters, gradients and the optimizer's state are DTensors of FSDP. FSDP's schedule is not used, since it would
    reduce gradients of whole batches.

    Args:
        group: The processes.
        whole: Keep all parameters and sums whole from the start of a batch to its end, as a graph of the whole step
            needs them. Processes then need each other only at both ends of a batch.
    """

    is_sharded = True
    parameters_move = True
    sums_leave = True

    def __init__(self, group: dist.ProcessGroup, *, whole: bool = False) -> None:
        super().__init__(group)
        self._whole = whole
        self._calls = 0
        self._streaming: Streaming | None = None

    @property
    def within_batch(self) -> Ranks:
        """Return itself, or a process alone if parameters and sums stay whole."""
        return OneProcess(parameters_move=True) if self._whole else self

    def prepare(self, model: nn.Module, facts: Facts, noise: NoiseState) -> None:
        """Compare settings and noise, and copy each shard from its first replica."""
        super().prepare(model, facts, noise)
        with self._reached(), torch.no_grad():
            for parameter in model.parameters():
                if isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 2:
                    replicas = parameter.device_mesh.get_group(0)
                    shard = cast(DTensor, parameter.detach()).to_local()
                    dist.broadcast(shard, src=dist.get_global_rank(replicas, 0), group=replicas)

    def release(self, model: nn.Module) -> None:
        """Free whole parameters. FSDP leaves the root's after a forward pass, and a later step does not change them."""
        shard_again(model)

    @contextmanager
    def gathered(self, model: nn.Module, step: int) -> Iterator[Streaming]:
        """Gather parameters while the body runs; every rank must call this, also with an empty batch."""
        self._calls += 1
        self._begin("backward", step)
        agreement.meet("backward", step, {"the number of backward calls": self._calls}, self._host)
        if self._streaming is None or not self._streaming.fits(model):
            if self._streaming is not None:
                self._streaming.close()
            self._streaming = Streaming(model, self._reached)
        with (
            own_schedule(fsdp_modules(model)),
            self._streaming.running(whole=self._whole),
        ):
            yield self._streaming

    def passes(self, own: int) -> int:
        """Return the largest number of microbatches of a rank, since all ranks must gather and send as often."""
        if self._whole:
            return own
        most = torch.tensor(own)
        with self._reached():
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self._host)
        return int(most)

    def before_backward(self, roots: Sequence[Node | None]) -> None:
        """Gather weights again when the backward pass reads them."""
        assert self._streaming is not None
        self._streaming.before_backward(roots)

    def before_recipe(self, parameters: Sequence[Tensor]) -> None:
        """Gather weights again for a recipe that may read them."""
        assert self._streaming is not None
        self._streaming.before_recipe(parameters)

    def summed(self, totals: Iterator[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return sums over all ranks in the parameters' shards; whole sums are freed module by module."""
        assert self._streaming is not None
        self._streaming.free()
        keys = Keys(self._streaming.sharded, self._streaming.group)
        return scattered(totals, parameters, keys, self._reached)

    def after_batch(self, sums: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums, which are sent here if they stayed whole until now; then the list is emptied."""
        if not self._whole:
            return sums
        return self.summed((sums.pop(0) for _ in range(len(sums))), parameters)

    def squared_norms(self, own: Tensor) -> Tensor:
        """Return ``own``, since a rank holds whole gradients of its samples."""
        return own

    def means(
        self,
        sums: list[Tensor],
        parameters: Sequence[Tensor],
        names: Sequence[str],
        noised: Noised,
        *,
        aliases_graph: bool,
    ) -> list[Tensor]:
        """Return the noised means as DTensors with the placements of their parameters.

        Each rank draws the noise of its shards; the replicas of a shard divide that among them.
        """
        local = [cast(DTensor, total).to_local() for total in sums]
        sums.clear()
        sharded = [cast(DTensor, parameter) for parameter in parameters]
        mesh = sharded[0].device_mesh
        if noised.needs_all_sums:
            names = [
                f"{name} {tuple(p.shape)} {p.placements} at {mesh.get_coordinate()} of {mesh.shape}"
                for name, p in zip(names, sharded, strict=True)
            ]
        if mesh.ndim == 2:
            shards: list[Tensor] = [parameter.to_local() for parameter in sharded]
            means = scattered_means(local, shards, names, noised, mesh.get_group(0), self._reached)
        else:
            means = noised(local, names, in_place=not aliases_graph)
        return [shard_of(mean, p, p.placements) for mean, p in zip(means, sharded, strict=True)]

    def costs(
        self, parameters: Sequence[Tensor], dtypes: Sequence[torch.dtype]
    ) -> tuple[Cost, ...]:
        """Return what this rank holds and sends: shards, whole parameters, and sums."""
        streaming = self._streaming
        assert streaming is not None
        trained = {id(p): dtype for p, dtype in zip(parameters, dtypes, strict=True)}
        mesh = streaming.sharded(parameters[0]).device_mesh
        return costs.of_shards(
            [
                costs.Gathered(whole, streaming.group(whole), trained.get(id(whole)))
                for whole in streaming.everything()
            ],
            streaming.root,
            (mesh.size(0) if mesh.ndim == 2 else 1, mesh.size(mesh.ndim - 1)),
            self._group,
            streams=streaming.streams,
            whole_sums=self._whole,
        )

    def _replicated(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensor for tensor in tensors if not isinstance(tensor, DTensor)]


def refuse_what_is_no_fsdp(model: nn.Module, ranks: int) -> None:
    """Refuse a model whose DTensors ``fully_shard`` did not make, or made with unsupported options.

    Args:
        model: A model with at least one DTensor.
        ranks: Number of processes that train together.

    Raises:
        ValueError: If a parameter or an option is not supported; the message names the remedy.
    """
    modules = fsdp_modules(model)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            if parameter.requires_grad:
                raise ValueError(
                    f"parameter {name!r} is not sharded, but others are. Call fully_shard on the root module too, "
                    "without ignored_params, so that every trained parameter is sharded."
                )
            continue
        if not (modules and _is_data_parallel(parameter)):
            raise ValueError(_TENSOR_PARALLEL.format(name=name, placements=parameter.placements))
        if parameter.device_mesh.size() != ranks:
            raise ValueError(
                f"parameter {name!r} is sharded over {parameter.device_mesh.size()} ranks, but {ranks} train together. "
                "Pass the process group of the parameter's mesh: Performance(process_group=...)."
            )
        if parameter.to_local().device.type != parameter.device_mesh.device_type:
            raise ValueError(
                f"parameter {name!r} is offloaded to {parameter.to_local().device}, which is not supported. Leave "
                "offload_policy out of fully_shard."
            )
    for module in modules:
        if policy_of(module).reduce_dtype in _HALF:
            raise ValueError(
                f"fully_shard: reduce_dtype={policy_of(module).reduce_dtype} would round sums over samples, which can "
                "change them by more than their sensitivity. Leave reduce_dtype out: clipped sums are reduced in "
                "float32."
            )


def _is_data_parallel(parameter: DTensor) -> bool:
    first, *others = parameter.placements
    if not others:
        return isinstance(first, Shard)
    return len(others) == 1 and isinstance(first, Replicate) and isinstance(others[0], Shard)


_TENSOR_PARALLEL = (
    "parameter {name!r} is a DTensor with placements {placements}, as tensor parallelism makes it. The autograd "
    "functions of such a DTensor cannot run per sample, so it is not supported. Shard the model with fully_shard alone."
)
