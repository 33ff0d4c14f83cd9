"""DPOptimizer without noise is the wrapped optimizer on the oracle's clipped sums."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.dp_tools import assert_same, clipped, data, mlp, private, sgd, squared, trained, values

Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True),
    "sgd_decay_foreach": lambda p: torch.optim.SGD(p, lr=0.3, weight_decay=0.1, foreach=True),
    "sgd_maximize": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12, msg=name)


def reference_run(
    model: nn.Module, make: Make, batches: list[Tensor], expected_batch_size: float
) -> None:
    """The oracle's sums, divided, as gradients of the plain optimizer."""
    optimizer = make(model.parameters())
    for batch in batches:
        sums, _ = clipped(model, batch)
        for name, parameter in trained(model).items():
            parameter.grad = torch.empty_like(parameter).copy_(sums[name] / expected_batch_size)
        optimizer.step()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_several_steps_equal_the_oracle(name: str, microbatch_size: int | None) -> None:
    model, twin = mlp(), mlp()
    batches = [data(size, seed=size) for size in (5, 3, 4)]
    optimizer = private(
        model,
        inner=OPTIMIZERS[name](model.parameters()),
        expected_batch_size=4.5,
        microbatch_size=microbatch_size,
    )
    for batch in batches:
        optimizer.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
    reference_run(twin, OPTIMIZERS[name], batches, 4.5)
    assert_close(values(model), values(twin))


@pytest.mark.parametrize("name", ["sgd_momentum", "adamw", "adamw_fused"])
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_gradients_have_the_layout_of_their_parameters(name: str, layout: str) -> None:
    # A fused optimizer walks parameter, gradient and state as flat memory.
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)).double()
    if layout == "channels_last":
        model.to(memory_format=torch.channels_last)
    else:
        model[2].weight = nn.Parameter(model[2].weight.detach().t().contiguous().t())
    twin = copy.deepcopy(model)
    images = [data(24, seed=seed).view(3, 2, 4, 4) for seed in range(3)]
    optimizer = private(model, inner=OPTIMIZERS[name](model.parameters()), microbatch_size=2)
    for image in images:
        optimizer.backward(image)
        optimizer.step()
        assert all(p.grad is not None and p.grad.stride() == p.stride() for p in model.parameters())
    reference_run(twin, OPTIMIZERS[name], images, 1)
    assert_close(values(model), values(twin))


@pytest.mark.parametrize("sizes", [(2, 3), (1, 1, 1, 1, 1), (5, 0), (0, 4, 1)])
def test_several_backward_calls_are_one_logical_batch(sizes: tuple[int, ...]) -> None:
    model, batch = mlp(), data()
    sums, _ = clipped(model, batch)
    optimizer, before = private(model, expected_batch_size=2), values(model)
    for part in batch.split(sizes):
        optimizer.backward(part)
    torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert_close(values(model), {name: before[name] - sums[name] / 2 for name in sums})


def test_padding_contributes_nothing() -> None:
    model, batch = mlp(), data()
    padded = torch.cat([batch[:2], torch.full((2, 4), float("nan")), batch[2:]])
    mask = torch.tensor([False, False, True, True, False, False, False])
    sums, norms = clipped(model, batch)
    optimizer = private(model)
    loss = optimizer.backward(padded, is_padding=mask)
    torch.testing.assert_close(loss, squared(model, batch).detach())
    assert_close(optimizer.clipped_sums, sums)
    seen = optimizer.diagnostics
    assert (seen.batch_size, seen.num_nonfinite) == (5, 0)
    assert seen.clipped_fraction == float((norms > 1).double().mean())
    optimizer.zero_grad()
    optimizer.backward(padded, is_padding=torch.ones(7, dtype=torch.bool))
    assert not any(total.any() for total in optimizer.clipped_sums.values())


def test_an_empty_batch_is_a_step_of_nothing() -> None:
    model = mlp()
    optimizer, before = private(model), values(model)
    assert torch.isnan(optimizer.backward(data()[:0]))
    assert not any(total.any() for total in optimizer.clipped_sums.values())
    assert optimizer.diagnostics.batch_size == 0
    optimizer.step()
    assert_same(values(model), before)


def test_returns_the_mean_loss_detached() -> None:
    model, batch = mlp(), data()
    loss = private(model, microbatch_size=2).backward(batch)
    torch.testing.assert_close(loss, squared(model, batch).detach())
    assert not loss.requires_grad


def test_groups_of_parameters_have_their_own_learning_rates() -> None:
    model = mlp()
    sums, _ = clipped(model, data())
    inner = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}], lr=2.0
    )
    optimizer, before = private(model, inner=inner), values(model)
    optimizer.backward(data())
    optimizer.step()
    rates = {"0.weight": 0.5, "0.bias": 0.5, "2.weight": 2.0, "2.bias": 2.0}
    assert_close(
        values(model), {name: before[name] - rate * sums[name] for name, rate in rates.items()}
    )


def test_clipping_groups() -> None:
    model = mlp()
    norms = {"0": 0.5, "": 2.0}
    optimizer = private(model, max_grad_norm=norms)
    assert optimizer.sensitivity == pytest.approx((0.5**2 + 2.0**2) ** 0.5)
    optimizer.backward(data())
    for group, prefix in (("0", "0."), ("", "2.")):
        other = mlp()
        for name, parameter in other.named_parameters():
            parameter.requires_grad_(name.startswith(prefix))
        sums, expected = clipped(other, data(), max_grad_norm=norms[group])
        torch.testing.assert_close(optimizer.diagnostics.grad_norms[group], expected)  # type: ignore[index]
        for name, total in sums.items():
            torch.testing.assert_close(optimizer.clipped_sums[name], total)


def test_frozen_unfrozen_and_frozen_again() -> None:
    model, twin = mlp(), mlp()
    optimizer = private(model)
    plain = sgd(twin)
    for frozen in ("0.weight", "2.bias", "", "0.weight"):
        for one in (model, twin):
            for name, parameter in one.named_parameters():
                parameter.requires_grad_(name != frozen)
        optimizer.zero_grad()
        optimizer.backward(data())
        assert frozen == "" or model.get_parameter(frozen).grad is None
        optimizer.step()
        plain.zero_grad()
        for name, total in clipped(twin, data())[0].items():
            twin.get_parameter(name).grad = total
        plain.step()
        assert_close(values(model), values(twin))


def test_parameters_that_the_optimizer_does_not_own_are_constants() -> None:
    model = mlp()
    optimizer = private(model, inner=torch.optim.SGD(model[2].parameters(), lr=1.0))
    optimizer.backward(data())
    assert model[0].weight.requires_grad
    assert model[0].weight.grad is None
    model[0].requires_grad_(False)
    sums, norms = clipped(model, data())
    torch.testing.assert_close(optimizer.diagnostics.grad_norms, norms)
    torch.testing.assert_close(optimizer.clipped_sums["2.weight"], sums["2.weight"])
    assert "0.weight" not in optimizer.clipped_sums


def test_two_optimizers_share_a_model_as_in_a_gan() -> None:
    model, batch = mlp(), data()
    halves = [
        private(model, inner=torch.optim.SGD(model[index].parameters(), lr=1.0)) for index in (0, 2)
    ]
    for half in halves:
        half.backward(batch)
    for half in halves:
        half.step()
        half.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_tied_weight_is_clipped_and_stepped_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Any:
            return self.head(self.table(ids))

    model = Tied().double()
    ids = torch.tensor([[0, 1, 1], [2, 3, 5], [4, 4, 4]])
    sums, norms = clipped(model, ids)
    optimizer, before = private(model), values(model)
    optimizer.backward(ids)
    torch.testing.assert_close(optimizer.diagnostics.grad_norms, norms)
    optimizer.step()
    assert_close(values(model), {"table.weight": before["table.weight"] - sums["table.weight"]})
    assert model.head.weight is model.table.weight


def test_eval_mode_and_an_outer_no_grad_change_nothing() -> None:
    model, batch = mlp().eval(), data()
    sums, _ = clipped(model, batch)
    optimizer = private(model)
    with torch.no_grad():
        optimizer.backward(batch)
        optimizer.step()
    assert not model.training
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, sums[name])
        assert parameter.requires_grad


def test_modules_and_names_may_change_between_steps() -> None:
    model = mlp()
    optimizer = private(model)
    optimizer.backward(data())
    optimizer.zero_grad()
    model[0] = nn.Sequential(model[0], nn.Identity())  # same parameters, another place
    sums, _ = clipped(model, data())
    optimizer.backward(data())
    torch.testing.assert_close(optimizer.clipped_sums, sums)


def test_batches_may_be_nested() -> None:
    model = mlp()

    def loss(model: nn.Module, batch: dict[str, Any], scale: float, nothing: None) -> Tensor:
        return scale * F.mse_loss(model(batch["x"]), batch["labels"][0])

    batch = {"x": data(), "labels": (data()[:, :2], 3, "constant")}
    sums, _ = clipped(model, batch, 2.0, None, loss=loss)
    optimizer = private(model, loss)
    optimizer.backward(batch, 2.0, None)
    torch.testing.assert_close(optimizer.clipped_sums, sums)
