"""The same promises on a GPU. Skipped where there is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgrad import (
    DPOptimizer,
    Performance,
    SystemNoise,
    profile_step,
)
from clipgrad.engine import reference
from clipgrad.errors import NotPerSampleError
from clipgrad.testing import RuleCase, assert_rule_matches_reference
from tests.architectures import ARCHITECTURES, Architecture
from tests.oracle import clipped_sum, per_sample_gradients
from tests.test_rules import CASES

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # what CUDA libraries warn of is not ours to fix
]

EXACT = [a for a in ARCHITECTURES.values() if not (a.random or a.refused or a.may_refuse)]
REFUSED = [a for a in ARCHITECTURES.values() if a.refused and a.name != "refused_view_made_early"]


def clipping_optimizer(
    model: nn.Module, loss: Callable[..., Tensor], max_grad_norm: float, **options: Any
) -> DPOptimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return DPOptimizer(
        torch.optim.SGD(trained, lr=1.0),
        model,
        loss,
        max_grad_norm=max_grad_norm,
        noise_multiplier=0.0,
        expected_batch_size=1,
        **options,
    )


@pytest.mark.parametrize("strategy", ["auto", "ghost"])
@pytest.mark.parametrize("architecture", EXACT, ids=lambda a: a.name)
def test_architecture_equals_loop(architecture: Architecture, strategy: str) -> None:
    model, batch = architecture.build(3, device="cuda")
    try:
        gradients = per_sample_gradients(model, architecture.loss, batch)
    except RuntimeError as error:
        pytest.skip(f"PyTorch itself cannot run it on CUDA: {error}")
    _, norms = clipped_sum(gradients, 1.0)
    bound = float(norms.median())
    expected, norms = clipped_sum(gradients, bound)
    optimizer = clipping_optimizer(
        model, architecture.loss, bound, performance=Performance(strategy=strategy)
    )
    optimizer.backward(*batch)
    found = optimizer.diagnostics.grad_norms
    assert isinstance(found, Tensor)
    tolerance = max(architecture.tolerance, 1e-9)
    torch.testing.assert_close(found, norms, rtol=tolerance, atol=tolerance)
    for name, total in optimizer.clipped_sums.items():
        error = (total - expected[name]).abs().max()
        assert error <= tolerance * max(1.0, float(expected[name].abs().max())), name


@pytest.mark.parametrize("architecture", REFUSED, ids=lambda a: a.name)
def test_refused(architecture: Architecture) -> None:
    model, batch = architecture.build(3, device="cuda")
    with pytest.raises((NotPerSampleError, ValueError)) as error:  # noqa: PT012 - either call may refuse
        optimizer = clipping_optimizer(model, architecture.loss, 1.0)
        optimizer.backward(*batch)
    assert re.search(architecture.refused or "", str(error.value))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 49, 10),
    )


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def classify_in_bfloat16(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return F.cross_entropy(model(x).float(), y)


@pytest.mark.parametrize("strategy", ["kept", "ghost"])
@pytest.mark.parametrize("loss", [classify, classify_in_bfloat16])
def test_float32_and_autocast(strategy: str, loss: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = cnn().cuda()
    x, y = torch.randn(8, 3, 16, 16, device="cuda"), torch.randint(0, 10, (8,), device="cuda")
    gradients = per_sample_gradients(model, loss, (x, y))
    expected, norms = clipped_sum(gradients, 1.0)
    optimizer = clipping_optimizer(
        model, loss, 1.0, performance=Performance(strategy=strategy), microbatch_size=3
    )
    optimizer.backward(x, y)
    slack = 1e-3 if loss is classify else 3e-2  # TF32 is off; bfloat16 has eight bits
    found = optimizer.diagnostics.grad_norms
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, norms, rtol=slack, atol=slack)
    for name, total in optimizer.clipped_sums.items():
        assert (total - expected[name]).norm() <= 2 * slack * expected[name].norm(), name


def test_bfloat16_parameters_sum_in_float32() -> None:
    torch.manual_seed(0)
    model = cnn().cuda().bfloat16()
    x = torch.randn(8, 3, 16, 16, device="cuda", dtype=torch.bfloat16)
    y = torch.randint(0, 10, (8,), device="cuda")
    optimizer = DPOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3), model, classify,
        max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=8,
    )  # fmt: skip
    optimizer.backward(x, y)
    optimizer.step()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_noise_has_the_right_scale() -> None:
    tensors = [torch.zeros(1_000_000, device="cuda"), torch.zeros(1000, 1000, device="cuda")]
    SystemNoise().add_gaussian_(tensors, sigma=2.0)
    for tensor in tensors:
        assert abs(float(tensor.std()) - 2.0) < 0.02  # 14 standard errors
        assert abs(float(tensor.mean())) < 0.02
    product = (tensors[0] * tensors[1].flatten()).mean()
    assert abs(float(product)) < 0.04


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}-{case.name}")
def test_rule(case: RuleCase) -> None:
    with torch.device("cuda"):  # for the constants that a case's loss makes
        params, batch = case.params(), case.batch(2)
        try:
            reference.per_sample_gradients_by_loop(case.loss, params, *batch)
        except RuntimeError as error:  # a kernel that does not exist, a constant made on the CPU
            pytest.skip(f"plain PyTorch cannot run it on CUDA: {error}")
        assert_rule_matches_reference(case, device="cuda")


def test_a_profile_waits_for_the_device_and_draws_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).cuda()
    optimizer = clipping_optimizer(model, lambda m, x: m(x).square().mean(), 1.0)
    x, drawn = torch.randn(4, 8, device="cuda"), torch.cuda.get_rng_state()
    profile = profile_step(optimizer, x, rounds=2)
    assert profile.device == "cuda:0"
    assert all(seconds > 0 for seconds in profile.phases.values())
    assert torch.equal(torch.cuda.get_rng_state(), drawn)
