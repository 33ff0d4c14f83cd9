"""A number of each sample has no axis of its own: an operation along "axis 0" must not find the samples' axis there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clipgrad

PLACE, PLACES = torch.tensor(0), torch.tensor([0])
ONE = torch.ones((), dtype=torch.float64)
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda t: t.roll(1),
    "roll by keyword": lambda t: torch.roll(input=t, shifts=2),
    "roll of aten": lambda t: torch.ops.aten.roll(t, [1]),
    "flip": lambda t: torch.flip(t, (0,)),
    "flip of nothing": lambda t: t.flip(()),
    "sort": lambda t: t.sort(0).values,
    "argsort": lambda t: t + t.argsort(0),
    "topk": lambda t: t.topk(1).values,
    "kthvalue": lambda t: t.kthvalue(1).values,
    "mode": lambda t: t.mode(0).values,
    "median": lambda t: t.median(0).values,
    "median of all": lambda t: t.median(),
    "nanmedian": lambda t: t.nanmedian(0).values,
    "max": lambda t: t.max(0).values,
    "amax": lambda t: t.amax(0),
    "cummax": lambda t: t.cummax(0).values,
    "cumsum": lambda t: t.cumsum(0),
    "cumprod": lambda t: t.cumprod(0),
    "logcumsumexp": lambda t: t.logcumsumexp(0),
    "logsumexp": lambda t: t.logsumexp(0),
    "softmax": lambda t: t + t.softmax(0),
    "log_softmax": lambda t: t + F.log_softmax(t, 0),
    "sum": lambda t: t.sum(0),
    "mean": lambda t: t.mean(0),
    "prod": lambda t: t.prod(0),
    "norm": lambda t: torch.norm(t, 2, 0),
    "vector_norm": lambda t: torch.linalg.vector_norm(t),
    "quantile": lambda t: t.quantile(0.5),
    "squeeze": lambda t: t.squeeze(0),
    "expand": lambda t: t.expand(3),
    "repeat": lambda t: t.repeat(3),
    "tile": lambda t: t.tile((2,)),
    "movedim": lambda t: t.movedim(0, 0),
    "transpose": lambda t: t.transpose(0, 0),
    "permute": lambda t: t.permute(()),
    "flatten": lambda t: t.flatten(),
    "unfold": lambda t: t.unfold(0, 1, 1),
    "gather": lambda t: t.gather(0, PLACE),
    "index_select": lambda t: t.index_select(0, PLACE),
    "take": lambda t: t.take(PLACE),
    "take_along_dim": lambda t: torch.take_along_dim(t, PLACE),
    "index_fill": lambda t: t + t.index_fill(0, PLACE, 2.0),
    "index_copy": lambda t: t + t.index_copy(0, PLACES, ONE),
    "put": lambda t: t + t.put(PLACES, ONE[None]),
    "scatter": lambda t: t + t.scatter(0, PLACE, 2.0),
    "scatter_add": lambda t: t.scatter_add(0, PLACE, ONE),
    "masked_fill": lambda t: t.masked_fill(torch.tensor(False), 0),
    "stack": lambda t: torch.stack([t, t]),
    "atleast_2d": lambda t: torch.atleast_2d(t),
    "block_diag": lambda t: torch.block_diag(t, t),
    "meshgrid": lambda t: torch.meshgrid(t, t, indexing="ij")[0],
    "kron": lambda t: torch.kron(t, t),
}


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop"
)  # of operations that vmap loops over
@pytest.mark.parametrize("name", OPERATIONS)
def test_exact(name: str) -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        found = OPERATIONS[name](w * x[0])
        weights = torch.arange(1, found.numel() + 1, dtype=found.dtype).view(found.shape)
        return (found.sin() * weights).sum()

    w, x = 1.3 * ONE, torch.linspace(0.5, 1.5, 4, dtype=torch.float64)
    expected = torch.stack([torch.func.grad(loss)(w, x[i : i + 1]) for i in range(4)])
    result = clipgrad.clipped_grad(loss, max_grad_norm=1e9)(w, x)
    torch.testing.assert_close(result.grad_norms, expected.abs(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.grads, expected.sum(), rtol=1e-9, atol=1e-9)
