"""Half precision, mixed precision and mixed dtypes through DPOptimizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clipgrad import DPOptimizer, Performance
from tests.dp_tools import clipped, data, mlp, private, values


class Recorder:
    """A source of noise that keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def add_gaussian_(self, tensors: list[Tensor], sigma: float) -> None:
        self.seen += [tensor.clone() for tensor in tensors]

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_have_float32_sums(dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    noise = Recorder()
    optimizer = private(model, noise_multiplier=1.0, noise=noise, expected_batch_size=3)
    batch = data(64, dtype=dtype) / 64
    optimizer.backward(batch[:32])
    optimizer.backward(batch[32:])
    assert all(total.dtype == torch.float32 for total in optimizer.clipped_sums.values())
    optimizer.step()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
    assert all(total.dtype == torch.float32 for total in noise.seen)
    assert any(not torch.equal(total, total.to(dtype).float()) for total in noise.seen)
    for parameter, total in zip(model.parameters(), noise.seen, strict=True):
        assert torch.equal(parameter.grad, (total / 3).to(dtype))  # type: ignore[arg-type]


def test_accumulate_dtype() -> None:
    model, noise = mlp(dtype=torch.float32), Recorder()
    optimizer = private(
        model,
        noise_multiplier=1.0,
        noise=noise,
        performance=Performance(accumulate_dtype=torch.float64),
        microbatch_size=1,
    )
    optimizer.backward(data(dtype=torch.float32))
    optimizer.step()
    assert all(total.dtype == torch.float64 for total in noise.seen)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_parameters_of_different_dtypes(fused: bool) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.high(self.low(x.bfloat16()).double())

    model = Mixed()
    optimizer = private(
        model,
        inner=torch.optim.AdamW(model.parameters(), fused=fused),
        noise_multiplier=1.0,
        performance=Performance(accumulate_dtype=None),
    )
    before = values(model)
    optimizer.backward(data())
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, before[name])


def test_autocast_outside_and_inside_the_loss() -> None:
    def inside(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().square().mean()

    def outside(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).float().square().mean()

    found: list[dict[str, Tensor]] = []
    for loss in (inside, outside):
        model = mlp(dtype=torch.float32)
        optimizer = private(model, loss, max_grad_norm=0.5)
        batch = data(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=loss is outside):
            for _ in range(2):  # the second time with other weights: nothing may be cached
                optimizer.zero_grad()
                optimizer.backward(batch)
                optimizer.step()
        found.append(values(model))
        sums, norms = clipped(model, batch, loss=inside, max_grad_norm=0.5)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=loss is outside):
            optimizer.backward(batch)
        torch.testing.assert_close(optimizer.diagnostics.grad_norms, norms, rtol=0.02, atol=0.01)
        for name, total in optimizer.clipped_sums.items():
            assert total.dtype == torch.float32
            torch.testing.assert_close(total, sums[name], rtol=0.05, atol=0.02)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0.02, atol=0.01)


def test_an_overflow_in_half_precision_drops_the_sample() -> None:
    model = nn.Linear(4, 2).half()
    nn.init.ones_(model.weight)  # else it depends on chance whether anything overflows
    batch = data(dtype=torch.float16)
    optimizer = private(model)
    optimizer.backward(batch)
    expected = optimizer.clipped_sums
    optimizer.zero_grad()
    overflowing = torch.full((1, 4), 60000.0, dtype=torch.float16)
    optimizer.backward(torch.cat([batch[:2], overflowing, batch[2:]]))
    assert optimizer.diagnostics.num_nonfinite == 1
    torch.testing.assert_close(optimizer.clipped_sums, expected)


def test_a_model_that_changes_its_dtype_between_steps() -> None:
    model = mlp()
    optimizer: DPOptimizer = private(model, noise_multiplier=1.0)
    optimizer.backward(data())
    optimizer.step()
    optimizer.zero_grad()
    model.float()
    optimizer.backward(data(dtype=torch.float32))
    optimizer.step()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
