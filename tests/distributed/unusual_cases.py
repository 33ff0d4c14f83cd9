"""Define sharded models with unusual features: mixed precision, checkpoints, recurrence, writes in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.distributed.cases import (
    CASES,
    Case,
    llama,
    mlp,
    own_rows,
    private,
    sgd,
    shard_layers,
    train_sharded,
)


def shard_half_precision(model: nn.Module) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    shard_layers(model, mp_policy=policy)


class HalfPrecision(nn.Module):
    """This model casts as the mixed precision policy does, for parameters in half precision."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = x.bfloat16()
        for layer in self.inner:  # type: ignore[union-attr]
            if not any(True for _ in layer.parameters()):
                x = layer(x)
                continue
            x = layer(x.bfloat16()).float()
        return x.float()


def half_precision(rank: int, size: int, *, compile: bool = False) -> dict[str, Tensor]:
    """Return clipped sums of one batch under the policy; one process uses the model that casts itself."""
    case = CASES["mlp"]
    model = case.model().float()
    wrapped: nn.Module = model
    if size == 1:
        wrapped = HalfPrecision(model.bfloat16())
    else:
        shard_half_precision(model)
    optimizer = private(wrapped, case, sgd(model), compile=compile)
    batch = case.batches(1)[0].float()
    optimizer.backward(own_rows(batch, 0, rank, size))
    sums = {name.removeprefix("inner."): value for name, value in optimizer.clipped_sums.items()}
    if size == 1:
        return sums
    return {name: value.full_tensor() for name, value in sums.items()}  # type: ignore[operator]


def watched_memory(
    rank: int, size: int, shard: Callable[[nn.Module], None], *, compile: bool = False
) -> tuple[list[int], int, list[int]]:
    """Count the elements of whole parameters whenever a layer is gathered.

    Returns:
        Elements of whole parameters each time, the largest number of elements of one
        layer, and the elements of whole parameters before and after ``backward``.
    """
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(6))).double()
    shard(model)
    optimizer = private(model, CASES["mlp"], sgd(model), compile=compile)
    optimizer.backward(torch.randn(2, 10, dtype=torch.float64))
    streaming = optimizer._clipper.ranks._streaming  # type: ignore[attr-defined]
    wholes = streaming.whole_parameters([name for name, _ in model.named_parameters()])

    def here() -> int:
        return sum(p.untyped_storage().nbytes() // 8 for p in wholes)

    seen: list[int] = []
    before = here()
    gathers = streaming._gather

    def counted(group: int) -> None:
        gathers(group)
        seen.append(here())

    streaming._gather = counted
    optimizer.step()
    optimizer.backward(torch.randn(2, 10, dtype=torch.float64))
    return seen, 110, [before, here()]


class Packed(nn.Module):
    """This model slices and normalises weights, uses them twice, and writes in place after a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Linear(4, 8)
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.packed(x).chunk(2, -1)
        y = self.scaled(first.clone().relu_() + second)
        y = y.add_(1.0).sigmoid()
        return self.last(self.last(y))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[..., None])[0])


def recorded(rank: int, size: int, name: str) -> tuple[dict[str, Tensor], int, int]:
    """Return parameters after steps on recordings of a stand-in, and how many were made and replayed."""
    import pytest

    from clipgrad.compiled import backend
    from tests.compiled.conftest import record_by_stand_in

    with pytest.MonkeyPatch.context() as patch:
        recorders = record_by_stand_in(patch)
        patch.setattr(backend, "compile_graph", lambda module, mode, arguments: module)
        found = train_sharded(rank, size, name, shard_layers, options={"compile": True})
    return found, len(recorders), sum(recorder.replays for recorder in recorders)


def with_metrics(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model(x)
    return y.square().sum(), y.detach().mean()


def metrics_of_few(
    rank: int, size: int, *, compile: bool
) -> tuple[list[tuple[int, ...]], dict[str, Tensor]]:
    """Return shapes of the metrics of two batches, in the first of which the second rank has no row, and the sums."""
    case = Case(mlp, with_metrics)
    model = case.model()
    shard_layers(model)
    optimizer = private(model, case, sgd(model), compile=compile)
    first, second = case.batches(4)[3], case.batches(1)[0]
    found = [optimizer.backward(first if rank == 0 else first[:0])]
    found.append(optimizer.backward(second[rank:]))
    shapes = [tuple(returned.metrics.shape) for returned in found]
    sums: dict[str, Any] = optimizer.clipped_sums
    return shapes, {key: value.full_tensor() for key, value in sums.items()}


def shard_without_freeing(model: nn.Module) -> None:
    shard_layers(model, reshard_after_forward=False)


def evaluated(
    rank: int, size: int, shard: Callable[[nn.Module], None], *, compile: bool = False
) -> list[Tensor]:
    """Return outputs of the model before and after each ``backward`` and ``step``, some of them with a graph."""
    case = CASES["mlp"]
    model = case.model()
    if size > 1:
        shard(model)
    inner, found = sgd(model), []

    def evaluate(*, grad: bool = False) -> None:
        with torch.set_grad_enabled(grad):
            found.append(model(torch.ones(1, 4, dtype=torch.float64)).detach())

    evaluate()
    optimizer = private(model, case, inner, compile=compile)
    for step, batch in enumerate(case.batches(4)):
        evaluate()
        optimizer.backward(own_rows(batch, step, rank, size))
        evaluate(grad=bool(step % 2))
        optimizer.step()
        evaluate(grad=not step % 2)
        optimizer.zero_grad()
    return found


def masked(model: nn.Module, x: Tensor) -> Tensor:
    mask = (x > 2).long()
    return model(input_ids=x, attention_mask=mask, labels=x).loss


class Checkpointed(nn.Module):
    """This model computes a layer's activations again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return self.last(checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=False))


UNUSUAL = {
    "checkpointed": Case(Checkpointed),
    "padding mask": Case(llama, masked, 17),
    "recurrent": Case(Recurrent),
    "nonfinite": Case(mlp),
    "in place": Case(Packed),
}


def unusual(rank: int, size: int, name: str, *, compile: bool = False) -> dict[str, Tensor]:
    """Return clipped sums of a batch; one rank has all rows but one, and the other rank has an infinite row."""
    case = UNUSUAL[name]
    model = case.model()
    if size > 1:
        shard_layers(model)
    optimizer = private(model, case, sgd(model), microbatch_size=3, compile=compile)
    batch = case.batches(4)[3]
    if name == "nonfinite":
        batch[6, 0] = float("inf")
    own = batch if size == 1 else (batch[:6], batch[6:])[rank]
    optimizer.backward(own)
    sums: dict[str, Any] = optimizer.clipped_sums
    return {key: value if size == 1 else value.full_tensor() for key, value in sums.items()}
