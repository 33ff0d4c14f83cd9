"""A loss that reads the whole batch, or the number of its rows, is refused: its samples would see one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from clipgrad import DPOptimizer, PrivacyPlan, clipped_grad, poisson_loader
from clipgrad.compiled import backend
from clipgrad.errors import NotPerSampleError
from tests.dp_tools import clipped, data, mlp, private, sgd
from tests.nightly import chosen

WHOLE = "belongs to the whole batch"
READS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "broadcast": lambda m, x, whole: (m(x) - whole[:, :2]).square().mean(),
    "target": lambda m, x, whole: F.mse_loss(m(x).expand(5, 2), whole.narrow(1, 0, 2)),
    "mean": lambda m, x, whole: (m(x) * whole.mean()).sum(),
    "input of a layer": lambda m, x, whole: m(whole).square().mean() * x.sum(),
    "weight of a layer": lambda m, x, whole: F.linear(x, whole).sum() + m(x).sum(),
    "number of samples": lambda m, x, whole: m(x).sum() / whole.shape[0],
    "length": lambda m, x, whole: m(x).sum() / len(whole),
    "values": lambda m, x, whole: m(x).sum() * whole.tolist()[0][0],
    "in a list": lambda m, x, whole: torch.cat([m(x), m(x), whole[:, :2]]).square().sum(),
    "inside vmap": lambda m, x, whole: torch.vmap(lambda row: row * whole)(m(x).mean(1)).sum(),
    "inside a checkpoint": lambda m, x, whole: checkpoint(
        lambda h: (m(h) * whole.mean()).sum(), x, use_reentrant=False
    ),
}  # fmt: skip


class Holds(nn.Module):
    """This model finds the batch in an attribute, where the loop has put it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.batch = mlp(), torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@pytest.mark.parametrize("microbatch_size", [None, 4])
@pytest.mark.parametrize("name", READS)
def test_the_batch_in_an_attribute_is_refused(name: str, microbatch_size: int | None) -> None:
    model, read = Holds(), READS[name]
    optimizer = private(
        model, lambda m, x: read(m.net, x, m.batch), microbatch_size=microbatch_size
    )
    model.batch = data()
    assert model.batch.shape == (5, 4)
    optimizer.backward(data())  # equal values, and yet a constant of the loss
    optimizer.zero_grad()
    with pytest.raises(NotPerSampleError, match=WHOLE):
        optimizer.backward(model.batch)


@pytest.mark.parametrize("name", chosen(["mean", "input of a layer"], ()))
def test_a_compiled_step_refuses_it_at_each_batch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "compile_graph", lambda module, mode, arguments: module)
    model, read = Holds(), READS[name]
    optimizer = private(model, lambda m, x: read(m.net, x, m.batch), compile=True)
    model.batch = data()
    for _ in range(3):
        optimizer.backward(data())
    with pytest.raises(NotPerSampleError, match=WHOLE):
        optimizer.backward(model.batch)


class Doubled(torch.autograd.Function):
    """PyTorch captures this function, and so the eager step runs a graph."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


def test_a_captured_loss_is_refused() -> None:
    model = Holds()

    def loss(m: Any, x: Tensor) -> Tensor:
        doubled: Tensor = Doubled.apply(m(x))
        return (doubled * m.batch.mean()).sum()

    optimizer = private(model, loss)
    model.batch = data()
    optimizer.backward(data())
    with pytest.raises(NotPerSampleError, match=WHOLE):
        optimizer.backward(model.batch)


def test_the_variable_of_a_loop_is_refused() -> None:
    """The labels are missing among the arguments, and the loss finds those of all samples by their name."""
    labels: list[Tensor] = []
    plan = PrivacyPlan(
        num_samples=5, expected_batch_size=5, steps=3, delta=1e-2, noise_multiplier=1.0, accountant="rdp"
    )  # fmt: skip
    model = mlp()
    optimizer = DPOptimizer(
        sgd(model), model, lambda m, x: (m(x).mean(1) - labels[-1]).square().mean(), plan=plan
    )
    for x, y in poisson_loader(TensorDataset(data(), torch.arange(5)), plan=plan):
        labels.append(y)
        with pytest.raises(NotPerSampleError, match=r"shape \(5,\).*Pass it to backward"):
            optimizer.backward(x)
        break


def test_clipped_grad_refuses_it() -> None:
    x, w = data(), torch.ones(4, dtype=torch.float64)
    with pytest.raises(NotPerSampleError, match=WHOLE):
        clipped_grad(lambda w, row: (row @ w - x.mean()).sum(), max_grad_norm=1.0)(w, x)


def test_dtype_and_device_tell_nothing() -> None:
    model = Holds()

    def loss(m: Any, x: Tensor) -> Tensor:
        ones = torch.ones(2, dtype=m.batch.dtype, device=m.batch.device)
        scale = 1.0 if m.batch.is_floating_point() and m.batch.dim() == m.batch.ndim else 2.0
        return (m(x) * ones).square().sum() * scale

    optimizer = private(model, loss)
    model.batch = data()
    optimizer.backward(model.batch)
    expected = clipped(model, data(), loss=lambda m, x: m(x).square().sum())[0]
    torch.testing.assert_close(optimizer.clipped_sums, expected, rtol=0, atol=1e-9)


def scaled(model: nn.Module, x: Tensor, number: float) -> Tensor:
    return model(x).sum() / (1 + number)


@pytest.mark.parametrize("kind", [int, float, np.int64])
def test_the_number_of_rows_is_refused(kind: Callable[[int], Any]) -> None:
    optimizer = private(mlp(), scaled)
    optimizer.backward(data(), kind(5))
    optimizer.backward(data(), kind(5))
    optimizer.zero_grad()
    with pytest.raises(
        NotPerSampleError, match=r"the number 3(\.0)?, which is the number of its rows"
    ):
        optimizer.backward(data(3), kind(3))


def test_the_number_of_rows_by_name_is_refused() -> None:
    optimizer = private(mlp(), lambda model, inputs: scaled(model, inputs["x"], inputs["n"]))
    optimizer.backward({"x": data(5), "n": 5})
    with pytest.raises(NotPerSampleError, match="as it was in a batch of 5"):
        optimizer.backward({"x": data(0), "n": 0})


def test_other_numbers_are_constants() -> None:
    optimizer = private(mlp(), scaled)
    for size, number in ((5, 5), (3, 5), (5, 5), (3, 3), (4, 4)):  # a schedule that meets the sizes
        optimizer.backward(data(size), number)
    optimizer = private(mlp(), lambda model, x, flag: model(x).sum())
    for size in (1, 0, 1):
        optimizer.backward(data(size), bool(size))
